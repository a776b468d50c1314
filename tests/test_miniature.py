"""The embedded base: a plain Stable Diffusion folder, and a training command that resumes."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from dbnb import metrics, miniature
from dbnb.miniature import card, evaluate, pilots, train
from dbnb.miniature.fit import Stage, fit, generator
from dbnb.models import load_components
from dbnb.toybox import COLORS, KINDS
from dbnb.toybox.captions import IDENTIFIERS
from dbnb.validation import SENTENCES


@pytest.mark.long
def test_plain_diffusers_draws_with_it_without_our_package(tmp_path):
    code = (
        "import sys; from diffusers import StableDiffusionPipeline as P; "
        f"p = P.from_pretrained({str(miniature.path())!r}); "
        "i = p('a photo of a red dog on the beach', num_inference_steps=2).images[0]; "
        "print(i.size, 'dbnb' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert output.stdout.strip().endswith("(128, 128) False")


def test_all_parts_are_safetensors_and_small():
    files = [path for path in miniature.path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".jinja", ".md", ".png"}


def test_words_are_one_token_and_identifiers_the_rarest():
    words = StableDiffusionPipeline.from_pretrained(miniature.path()).tokenizer
    for word in ("dog", "teapot", "purple", "spotted", "scarf", "beach", "moon", "sks", "ohwx"):
        assert len(words.tokenize(word)) == 1
    assert words.convert_tokens_to_ids("sks</w>") > words.convert_tokens_to_ids("dog</w>")


def test_the_code_makes_the_tokenizer_that_is_shipped():
    from dbnb.miniature import design

    shipped = StableDiffusionPipeline.from_pretrained(miniature.path()).tokenizer
    assert design.tokenizer().get_vocab() == shipped.get_vocab()


def test_folding_the_latents_scale_into_the_vae_changes_no_picture():
    from dbnb.miniature import design

    torch.manual_seed(0)
    vae = design.vae().eval()
    pictures = torch.rand(8, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pictures).latent_dist
        decoded = vae.decode(before.mean).sample
        train.normalize_latents(vae, pictures)
        after = vae.encode(pictures).latent_dist
        assert torch.allclose(vae.decode(after.mean).sample, decoded, atol=1e-4)
        assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(6), atol=1e-4)
        assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(6), atol=1e-3)
        scale = before.mean.std((0, 2, 3)).view(1, 6, 1, 1)
        assert torch.allclose(after.std * scale, before.std, rtol=1e-4)


OPTIONS = ["--photographs", "48", "--look_alikes", "4", "--batch_sizes", *"2888244"]


@pytest.fixture(scope="module")
def small_training(tmp_path_factory):
    """A training of two steps a stage, each stage by a command of its own: its folder, and the base that it shipped."""
    folder, done = tmp_path_factory.mktemp("training"), []
    options = [*OPTIONS, "--steps", *"2222222", "--output_dir", str(folder / "run")]
    for stage in train.STAGES:
        train.main([*options, "--stages", stage])
        done.append(stage)
        assert sorted(p.stem for p in (folder / "run").glob("*.pt") if p.stem != "latents") == sorted(done)
    train.main([*options, "--ship", str(folder / "base")])
    return folder


@pytest.fixture
def run(small_training, tmp_path):
    """A copy of the folder of `small_training`."""
    return shutil.copytree(small_training / "run", tmp_path / "run")


@pytest.mark.long
@pytest.mark.commands
def test_the_training_command_runs_resumes_and_ships(small_training, run):
    assert StableDiffusionPipeline.from_pretrained(small_training / "base").unet.config.sample_size == 16
    first = torch.load(run / "unet.pt", weights_only=True)
    assert first["step"] == 2
    options = [*OPTIONS, "--output_dir", str(run), "--steps", *"2222242"]
    train.main(options)
    resumed = torch.load(run / "unet.pt", weights_only=True)
    assert resumed["step"] == 4
    assert any(not torch.equal(first["models"][key], resumed["models"][key]) for key in first["models"])
    with pytest.raises(ValueError, match="was made from.*'seed': 0.*not.*'seed': 1"):
        train.main([*options, "--seed", "1"])


@pytest.mark.long
def test_training_goes_on_from_a_shipped_base(small_training, tmp_path):
    base = small_training / "base"
    further = [*OPTIONS, "--output_dir", str(tmp_path / "b"), "--start_from", str(base)]
    train.main([*further, "--steps", *"2222232", "--ship", str(tmp_path / "longer")])
    shipped, longer = (json.loads((path / "training.json").read_text()) for path in (base, tmp_path / "longer"))
    assert [longer["stages"][name]["step"] for name in train.STAGES] == [2, 2, 2, 2, 2, 3, 2]
    assert longer["stages"]["vae"] == shipped["stages"]["vae"]
    pipelines = [StableDiffusionPipeline.from_pretrained(path) for path in (base, tmp_path / "longer")]
    pictures = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = [pipeline.vae.encode(pictures).latent_dist.mean for pipeline in pipelines]
    assert torch.allclose(*latents, atol=2e-2)
    before, after = (pipeline.unet.conv_in.weight for pipeline in pipelines)
    assert 0 < (before - after).abs().max() < 1e-2


@pytest.mark.long
def test_identity_encoder_and_words_of_a_shipped_base_are_mended_alone(tmp_path, small_base):
    options = [*OPTIONS, "--steps", *"2222222", "--output_dir", str(tmp_path / "run")]
    further = [*options, "--note", "Mended.", "--start_from", str(small_base)]
    train.main([*further, "--stages", "words", "--ship", str(tmp_path / "mended")])
    old, new = (StableDiffusionPipeline.from_pretrained(folder) for folder in (small_base, tmp_path / "mended"))
    assert not torch.equal(*(p.text_encoder.get_input_embeddings().weight for p in (old, new)))
    assert all(torch.equal(a, b) for a, b in zip(old.unet.parameters(), new.unet.parameters(), strict=True))
    recipe = json.loads((tmp_path / "mended" / "training.json").read_text())
    assert recipe["stages"]["words"]["step"] == 2 and recipe["note"].endswith("Mended.")
    with pytest.raises(SystemExit):  # a part that others depend on
        train.main([*further, "--stages", "vae", "--ship", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_of_a_grown_base_the_identity_encoder_alone_is_mended(tmp_path, capsys):
    options = ["--look_alikes", "4", "--batch_sizes", *"2888244", "--steps", *"2222222", "--output_dir"]
    options += [str(tmp_path / "run"), "--start_from", str(miniature.path()), "--ship", str(tmp_path / "mended")]
    with pytest.raises(SystemExit):
        train.main([*options, "--stages", "words"])
    assert "has been grown to twice the side" in capsys.readouterr().err
    train.main([*options, "--stages", "identity"])
    for part, same in (("identity", False), ("judge", True)):
        weights = [load_file(base / part / "model.safetensors") for base in (miniature.path(), tmp_path / "mended")]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]) is same


@pytest.mark.long
def test_the_shipped_identity_encoder_tells_a_toy_from_its_look_alikes():
    encoders, components = metrics.load_encoders(miniature.path()), load_components("miniature")
    ladder, among = evaluate.look_alike_tests(encoders, components, 6, evaluate.side_of(components))
    # Of six toys; the card has the order over sixty, in which a blur comes before the smaller turn of the hue.
    order = [name for name in ladder if name != "blurred"]
    assert all(ladder[more] > ladder[less] for more, less in itertools.pairwise(order)), ladder
    assert ladder["through the autoencoder"] > ladder["blurred"] > ladder["hue 30° off"], ladder
    assert among >= 0.8


def test_identifiers_have_vectors_of_their_own():
    pipeline = StableDiffusionPipeline.from_pretrained(miniature.path())
    table = pipeline.text_encoder.get_input_embeddings().weight.detach()
    words = {name: pipeline.tokenizer.convert_tokens_to_ids(f"{name}</w>") for name in (*KINDS, *COLORS)}
    length = table[list(words.values())].norm(dim=1).mean().item()
    for identifier in IDENTIFIERS:
        number = pipeline.tokenizer.convert_tokens_to_ids(f"{identifier}</w>")
        cosines = torch.cosine_similarity(table[number], table[torch.arange(len(table)) != number])
        assert cosines.abs().max() < 0.3
        assert table[number].norm().item() == pytest.approx(length, rel=1e-3)


def test_a_training_that_was_stopped_ends_where_an_uninterrupted_one_does(tmp_path):
    class Stopped(Exception):
        pass

    def run(folder, stop_at=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)

        def loss_of_step(step):
            if step == stop_at:
                raise Stopped
            x = torch.randn(4, 8, generator=generator(0, step))
            return {"loss": (model(x) - x).square().mean()}

        def draw():
            return Image.new("RGB", (2, 2))

        stage = Stage(
            name="toy",
            steps=9,
            batch_size=4,
            folder=folder,
            made_from={"seed": 0},
            lr=1e-2,
            minutes_between_checkpoints=0.0,
            steps_between_drawings=2,
        )
        fit(stage, model, loss_of_step, draw=draw)
        return model.weight

    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "parts", stop_at=5)
    assert torch.equal(run(tmp_path / "parts"), whole)
    assert sorted(p.name for p in (tmp_path / "whole" / "samples").iterdir())[0] == "toy-000002.png"


def test_measures_of_the_evaluation():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4000, 3)), rng.normal(size=(4000, 3)) + [2.0, 0.0, 0.0]
    assert evaluate.frechet(a, a) < 1e-6 and abs(evaluate.frechet(a, b) - 4.0) < 0.3
    (same, spread), (apart, _) = evaluate.kernel_distance(a[:2000], a[2000:]), evaluate.kernel_distance(a, b)
    assert abs(same) < spread < apart / 3
    assert evaluate.entropy(np.array([0, 1, 2, 3]), 4) == 1.0 and evaluate.entropy(np.array([1, 1]), 4) == 0.0
    red_green_blue_gray = np.array([[[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5]]])
    hues, chroma = evaluate.hue(red_green_blue_gray)
    assert np.allclose(hues[0, :3], [0, 120, 240]) and np.allclose(chroma, [[1, 1, 1, 0]])
    assert evaluate.turn(np.array(350.0), np.array(20.0)) == 30.0
    photos = rng.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    assert evaluate.nearest(photos[3:4], photos) < 1e-3 < 0.02 < evaluate.nearest(255 - photos[3:4], photos)
    reds = np.full((2, 64, 64, 3), (214, 28, 28), np.uint8)
    oranges = np.full((2, 64, 64, 3), (247, 135, 20), np.uint8)
    assert 20 < evaluate.hue_errors(reds, oranges, np.array([0, 0]))["red"] < 40
    assert evaluate.hue_errors(reds, reds, np.array([0, 0]))["red"] == 0.0
    assert 20 < evaluate.hue_errors_by_sector(reds, oranges)["0 to 30"] < 40


@pytest.mark.long
@pytest.mark.commands
def test_the_evaluation_runs_on_few_pictures_and_the_card_tells_it(tmp_path):
    evaluation = tmp_path / "e.json"
    evaluate.main(["--count", "6", "--unseen", "24", "--output", str(evaluation)])
    result = json.loads(evaluation.read_text())
    assert result["judge"]["kind"] > 0.9 and set(result) >= {"autoencoder", "drawn", "composition", "frechet"}
    assert result["drawn_by_plain_diffusers"]["kind"] > 0.5 and list(result["sentences"]) == list(SENTENCES)
    assert list(result["ladder"])[0] == "photograph" and 0.0 <= result["among_look_alikes"] <= 1.0
    base = tmp_path / "base"
    shutil.copytree(miniature.path(), base)
    command = ["--base", str(base), "--evaluation", str(evaluation)]
    with pytest.raises(ValueError, match="no subject experiment"):
        card.main(command)
    names = "normalized_subject_fidelity scene_recognised class_diversity_ratio class_subject_similarity".split()
    result["subjects"] = {"a toy of this test": {"after": dict.fromkeys(names, 0.25)}}
    evaluation.write_text(json.dumps(result))
    (base / "grid.png").unlink()
    card.main(command)
    text = (base / "README.md").read_text()
    assert "in plain diffusers at its defaults" in text and " 12 sentences" in text
    assert f"PSNR {result['autoencoder']['psnr']:.1f} dB" in text and "| a toy of this test | 0.25 |" in text
    with Image.open(base / "grid.png") as grid:
        assert grid.width > 500


@pytest.mark.long
def test_pilots_compare_designs_and_the_card_takes_their_table(run):
    pilots.main(["--output_dir", str(run), *OPTIONS[:2], "--minutes", "0.01", "--count", "2"])
    result = json.loads((run / "pilots.json").read_text())
    assert [design["predicts"] for design in result["designs"]] == list(pilots.DESIGNS)
    assert all(design["steps"] >= 1 for design in result["designs"])
    assert "| v, min(SNR + 1, 5) |" in card.pilots(run)


def test_a_stage_counts_all_sittings_and_no_halts(tmp_path):
    minutes = [1.0, 2.0, 3.0, 63.0, 64.0, 2.0, 4.0]  # two sittings; in the first the training stood still for an hour
    lines = [{"step": 50 * (number + 1), "minutes": value} for number, value in enumerate(minutes)]
    (tmp_path / "unet.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert train.stage_record("unet", 24, tmp_path) == {"step": 350, "batch_size": 24, "minutes": 9.0}
