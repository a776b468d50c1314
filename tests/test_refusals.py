"""What cannot work is refused in one sentence that names the option, before the costly part, and leaves no trace."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from families import write
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dbnb import miniature, workflow
from dbnb.__main__ import main
from dbnb.adapters import add_adapters
from dbnb.concept import Concept
from dbnb.config import DreamBoothConfig, check_libraries, parse_args
from dbnb.dataset import DreamBoothDataset
from dbnb.models import check_base, read_tokenizer, resolve_base, text_architecture
from dbnb.pictures import inspect_images, load_image
from dbnb.presets import suggested
from dbnb.training import train
from dbnb.validation import draw


@pytest.fixture
def refusal(monkeypatch, tmp_path, capsys):
    """Run the command until weights would be read, or until training; what it says when it refuses."""
    monkeypatch.setenv("DBNB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "kohya" / "10_sks dog").mkdir(parents=True)
    for folder in ("captioned", "torn", "masked"):
        (tmp_path / folder).mkdir()
    for name in ("file.png", "kohya/10_sks dog/1.png", "captioned/1.png", "torn/1.png", "masked/1.png"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)
    Image.new("L", (8, 8), "white").save(tmp_path / "masked" / "1.mask.png")
    (tmp_path / "captioned" / "1.txt").write_text("a dog\n")
    (tmp_path / "torn" / "metadata.jsonl").write_text('{"file_name": "1.png"}\n')
    one, other = (
        {"instance_data_dir": "captioned", "identifier": word, "class_word": "dog"} for word in ("sks", "zwx")
    )
    files = {"one": [one], "strange": [one | {"prompt": "a"}, other], "twice": [one, one], "two": [one, other]}
    for name, entries in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))

    def reached(*args, **options):
        raise AssertionError("it went on")

    def run(arguments: list[str], moment: str) -> str:
        monkeypatch.setattr(workflow, {"loading": "load_components", "training": "train"}[moment], reached)
        before = sorted(tmp_path.rglob("*"))
        try:
            code = main([*arguments, "--output_dir", "run"] if "--output_dir" not in arguments else arguments)
        except SystemExit as error:
            code = error.code
        assert code == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert said and said[-1].startswith(("dbnb: ", "python -m dbnb: error: "))
        assert not any("Traceback" in line for line in said)
        assert sorted(tmp_path.rglob("*")) == before
        return said[-1]

    return run


# Arguments, what the sentence says, and the moment before which it is said.
TABLE = [
    ("--learning_rate -1", "learning_rate=-1.0 must be above 0", "loading"),
    ("--learning_rate 0", "learning_rate=0.0 must be above 0", "loading"),
    ("--learning_rate nan", "learning_rate=nan must be", "loading"),
    ("--text_encoder_learning_rate 0", "text_encoder_learning_rate=0.0 must be above 0", "loading"),
    ("--lora_dropout 1.5", "lora_dropout=1.5 must be at least 0 and below 1", "loading"),
    ("--text_encoder_lora_dropout 1", "text_encoder_lora_dropout=1.0 must be", "loading"),
    ("--lora_alpha 0", "lora_alpha=0.0 must be above 0", "loading"),
    ("--prior_loss_weight -0.1", "prior_loss_weight=-0.1 must not be negative", "loading"),
    ("--prior_loss_weight inf", "prior_loss_weight=inf must", "loading"),
    ("--guidance_scale 0.5", "guidance_scale=0.5 must be at least 1", "loading"),
    ("--max_grad_norm -1", "max_grad_norm=-1.0 must not be negative", "loading"),
    ("--adam_beta1 1", "adam_beta1=1.0 must be at least 0 and below 1", "loading"),
    ("--adam_epsilon 0", "adam_epsilon=0.0 must be above 0", "loading"),
    ("--checkpoints_total_limit 0", "checkpoints_total_limit=0 must be at least 1, or -1", "loading"),
    ("--checkpoints_total_limit -2", "checkpoints_total_limit=-2 must be at least 1, or -1", "loading"),
    ("--seed -1", "seed=-1 must be at least 0", "loading"),
    (f"--seed {2**64}", f"seed={2**64} must be at least 0 and at most {2**64 - 1}", "loading"),
    ("--num_inference_steps 1", "num_inference_steps=1 must be at least 2", "loading"),
    ("--lr_warmup_steps 200", "lr_warmup_steps=200 must be below max_train_steps=200", "loading"),
    ("--rank x", "--rank", "loading"),
    ("--instance_data_dir=", "instance_data_dir='' is empty", "loading"),
    ("--output_dir bad\udce9name", "output_dir='bad\\udce9name' is not valid UTF-8", "loading"),
    ("--report_to foo", "report_to='foo' must be one of none, all", "loading"),
    ("--report_to wandb", "report_to='wandb' needs a package that is not installed", "loading"),
    ("--lr_scheduler piecewise_constant", "lr_scheduler='piecewise_constant' needs rules", "loading"),
    ("--instance_data_dir nowhere", "--instance_data_dir nowhere does not exist", "loading"),
    ("--instance_data_dir file.png", "--instance_data_dir file.png is a file", "loading"),
    ("--instance_data_dir empty", "No usable picture in --instance_data_dir empty (it is empty)", "loading"),
    ("--instance_data_dir kohya", "give 'kohya/10_sks dog'", "loading"),
    ("--reference_data_dir nowhere", "--reference_data_dir nowhere does not exist", "loading"),
    ("--identifier a\x1bb", "identifier='a\\x1bb' holds a line break or another control", "loading"),
    ("--class_word \u200b", "class_word='\\u200b' is blank", "loading"),
    ("--instance_prompt dog", "instance_prompt 'dog' does not contain the identifier 'sks'", "loading"),
    ("--resolution 60", "resolution=60 must be a multiple of 8 for this base: take 56 or 64", "loading"),
    ("--resolution 5", "resolution=5 must be a multiple of 8 for this base: take 8", "loading"),
    ("--tokenizer_max_length 78", "tokenizer_max_length=78 must be from 3 to", "loading"),
    ("--tokenizer_max_length 2", "tokenizer_max_length=2 must be from 3 to", "loading"),
    ("--quantization int4", "quantization='int4' must be one of nf4, int8, fp8", "loading"),
    ("--base minature", "Base 'minature' is no folder here", "loading"),
    ("--holdout -1", "holdout=-1 must not be negative", "loading"),
    ("--holdout 3", "holdout=3 of 5 photographs leaves fewer than 3 to train on: add 1", "loading"),
    ("--patience 0", "patience=0 must be at least 1", "loading"),
    ("--select first", "select='first' must be one of last, best", "loading"),
    ("--select best --validation_steps 0", "select='best' needs pictures that are measured", "loading"),
    ("--captions", "captions=True, but no picture in", "loading"),
    ("--captions --instance_data_dir captioned", "the caption of 1.png, 'a dog' does not contain the", "loading"),
    ("--captions --instance_data_dir torn", "metadata.jsonl, line 1, is no caption", "loading"),
    ("--masked_loss --instance_data_dir captioned", "masked_loss=True, but no picture has a mask", "loading"),
    ("--masked_loss --instance_data_dir masked", "1.mask.png has 8 x 8 pixels and its picture 64 x 64", "loading"),
    ("--concepts nowhere.json", "--concepts nowhere.json cannot be read", "loading"),
    ("--concepts file.png", "--concepts file.png is no JSON", "loading"),
    ("--concepts one.json", "--concepts one.json must be a list of two or more objects", "loading"),
    ("--concepts strange.json", "entry 1, has 'prompt', which is no setting of a concept", "loading"),
    ("--concepts twice.json", "Two concepts have the identifier 'sks'", "loading"),
    ("--concepts twice.json --train_batch_size 1", "Two concepts have the identifier 'sks'", "loading"),
    (
        "--concepts two.json --train_batch_size 1",
        "train_batch_size=1 x gradient_accumulation_steps=1 has no",
        "loading",
    ),
    ("--concepts two.json --instance_data_dir kohya", "instance_data_dir is told of each concept", "loading"),
    ("--hub_model_id a/b/c", "hub_model_id='a/b/c' is not a valid repository name", "loading"),
    ("--hub_model_id sks--dog", "hub_model_id='sks--dog' is not a valid repository name", "loading"),
    ("--weighting_scheme mode", "weighting_scheme=mode is for bases that are trained by flow matching", "loading"),
    ("--weighting_scheme cosine", "weighting_scheme='cosine' must be one of none, logit_normal, mode", "loading"),
    ("--logit_mean 0.5", "logit_mean=0.5 is for bases that are trained by flow matching", "loading"),
    ("--logit_std 2", "logit_std=2.0 is for bases that are trained by flow matching", "loading"),
    ("--logit_std 0", "logit_std=0.0 must be above 0", "loading"),
    ("--mode_scale 1", "mode_scale=1.0 is for bases that are trained by flow matching", "loading"),
    ("--precondition_outputs", "precondition_outputs=True is for bases that are trained by flow matching", "loading"),
    ("--base {flux} --snr_gamma 5", "snr_gamma=5.0 is for diffusion models", "loading"),
    ("--base {flux} --noise_offset 0.1", "noise_offset=0.1 is for diffusion models", "loading"),
    ("--base {flux} --logit_mean 1", "logit_mean=1.0 needs weighting_scheme='logit_normal', not 'none'", "loading"),
    ("--base {sd3} --mode_scale 1", "mode_scale=1.0 needs weighting_scheme='mode', not 'logit_normal'", "loading"),
    ("--base {z_image} --train_text_encoder", "train_text_encoder: this base's pipeline loads no adapters", "loading"),
    ("--base {flux} --export kohya", "export='kohya' is for bases with a UNet", "loading"),
    ("--base {flux} --tokenizer_max_length 513", "tokenizer_max_length=513 must be from 2 to 512", "loading"),
    ("--base {flux} --resolution 36", "resolution=36 must be a multiple of 8 for this base: take 32 or 40", "loading"),
    ("--base {sd3} --resolution 128", "resolution=128 must be at most 96 for this base", "loading"),
]


@pytest.fixture(scope="session")
def flows(tmp_path_factory):
    """Family -> the folder of a base that is trained by flow matching."""
    return {name: write(name, tmp_path_factory.mktemp(name)) for name in ("sd3", "flux", "z_image")}


@pytest.mark.parametrize("arguments, words, moment", TABLE, ids=lambda value: str(value)[:40])
def test_what_cannot_work_is_refused_by_name_in_time(refusal, request, arguments, words, moment):
    folders = request.getfixturevalue("flows") if "{" in arguments else {}
    assert words in refusal(arguments.format(**folders).split(), moment)


NUMBERS = {
    item.name: item for item in DreamBoothConfig.__dataclass_fields__.values() if item.metadata["range"] is not None
}


def test_every_number_has_a_range_that_help_shows():
    config = DreamBoothConfig(checkpoints_total_limit=3)
    for name in DreamBoothConfig.__dataclass_fields__:
        if isinstance(getattr(config, name), int | float) and not isinstance(getattr(config, name), bool):
            assert name in NUMBERS, name


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(NUMBERS)), st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**64])))
def test_any_number_is_taken_or_refused_by_its_name(name, value):
    within = NUMBERS[name].metadata["range"]
    try:
        config = DreamBoothConfig(**{"max_train_steps": 2**70, name: value})
    except ValueError as error:
        assert name in str(error) and "\n" not in str(error)
        return
    kept = getattr(config, name)
    assert kept is None if value == within.off else kept == value and math.isfinite(kept) and kept in within


def test_minus_one_keeps_all_checkpoints_and_zero_clips_nothing():
    assert parse_args(["--checkpoints_total_limit", "-1"]).checkpoints_total_limit is None
    assert parse_args(["--max_grad_norm", "0"]).max_grad_norm == 0


@pytest.mark.parametrize("value", ["1e-4", True, None.__class__, [1]], ids=str)
def test_a_number_of_another_type_is_refused(value):
    for name in ("learning_rate", "rank"):
        with pytest.raises(ValueError, match=f"{name}=.* must be a"):
            DreamBoothConfig(**{name: value})


def test_every_schedule_and_tracker_on_offer_is_taken():
    names = "linear cosine cosine_with_restarts polynomial constant constant_with_warmup warmup_stable_decay"
    for name in names.split():
        check_libraries(DreamBoothConfig(lr_scheduler=name))
    for name in ("none", "all", "tensorboard"):
        check_libraries(DreamBoothConfig(report_to=name))


_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def _command(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    arguments = [os.fsencode(argument) for argument in (sys.executable, "-m", "dbnb", *arguments)]
    return subprocess.run(arguments, capture_output=True, env=environment, timeout=300)


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "cp1252"}, _C], ids=["cp1252", "C"])
def test_help_and_refusals_are_said_on_any_console(environment):
    said = _command(["--help"], environment)
    assert said.returncode == 0 and b"--learning_rate" in said.stdout and not said.stderr
    said = _command(["--class_word", "狗", "--export", "小明"], environment)
    assert said.returncode == 2 and said.stderr.startswith(b"dbnb: export=") and said.stderr.count(b"\n") == 1


@pytest.mark.long
def test_a_run_in_other_letters_ends_well_on_any_console(tmp_path, concept):
    photographs = os.fsencode(tmp_path / "photos") + b"-\xe9"  # no UTF-8
    os.mkdir(photographs)
    for number, path in enumerate(concept.paths[:3]):
        shutil.copy(path, photographs + b"/\xe9-%d.png" % number)
    short = (
        "--max_train_steps 2 --num_class_images 2 --num_validation_images 0 --num_inference_steps 2 --rank 2".split()
    )
    words = ["--identifier", "小明", "--class_word", "狗", "--instance_prompt", "小明的狗"]
    folders = ["--instance_data_dir", os.fsdecode(photographs), "--output_dir", str(tmp_path / "run")]
    said = _command([*short, *words, *folders], _C)
    assert said.returncode == 0, said.stderr
    settings_ = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert settings_["class_word"] == "狗" and "小明的狗" in (tmp_path / "run" / "README.md").read_text(
        encoding="utf-8"
    )


def _tried(arguments: list[str]) -> tuple[DreamBoothConfig | None, str]:
    """The settings, or the one sentence instead of them."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            return parse_args(arguments), ""
        except SystemExit as error:
            assert error.code == 2
    lines = said.getvalue().splitlines()
    assert lines[-1].startswith(("dbnb: ", "python -m dbnb: error: ")) and (len(lines) == 1 or "usage" in lines[0])
    return None, lines[-1]


_ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=12)
_TEXT_OPTIONS = ("identifier", "class_word", "instance_prompt", "class_prompt")


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(NUMBERS)), st.one_of(st.integers().map(str), st.floats().map(str), _ANY_TEXT))
def test_any_text_for_a_number_is_a_number_or_one_sentence(name, text):
    config, said = _tried([f"--{name}={text}"])
    if config is None:
        assert name in said
        return
    value = getattr(config, name)
    assert value is None or value == type(value)(text)  # an int as an int: a float has fewer digits


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(_TEXT_OPTIONS), _ANY_TEXT)
def test_any_words_are_taken_or_refused_by_their_name(name, text):
    config, said = _tried([f"--{name}={text}", *(["--instance_prompt=sks"] if name == "class_prompt" else [])])
    if config is None:
        assert name in said
        return
    prompts = {} if config.instance_prompt is None else {"instance_prompt": config.instance_prompt}
    try:
        concept = Concept.from_folder(
            None, config.identifier, config.class_word, class_prompt=config.class_prompt, **prompts
        )
        concept.check_tokens(_TOKENIZER)
    except ValueError as error:
        assert name in str(error) and len(str(error).splitlines()) == 1
        return
    assert concept.report().encode("utf-8") and len(concept.report().splitlines()) == 6 + ("same" in concept.report())


_TOKENIZER = read_tokenizer(miniature.path())
_SOUND = io.BytesIO()
Image.radial_gradient("L").convert("RGB").save(_SOUND, "PNG")
_KINDS = ("picture", "cut", "empty", "text", "dangling", "folder", "folder with a picture")
_NAMES = (
    st.tuples(
        st.one_of(
            st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8),
            st.binary(min_size=1, max_size=8).filter(lambda name: not set(name) & set(b"/\0")).map(os.fsdecode),
        ),
        st.sampled_from([".png", ".jpg", ".avif", ".heic", ".txt", "", ".PNG"]),
    )
    .map("".join)
    .filter(lambda name: name not in (".", ".."))
)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(_NAMES, st.sampled_from(_KINDS), max_size=5))
def test_any_folder_gives_pictures_or_one_sentence_that_names_it(entries):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photos"
        folder.mkdir()
        for entry, kind in entries.items():
            path = folder / entry
            if kind == "dangling":
                path.symlink_to(folder / "gone" / "away")
            elif kind.startswith("folder"):
                path.mkdir()
                if kind != "folder":
                    (path / "1.png").write_bytes(_SOUND.getvalue())
            else:
                data = {"picture": _SOUND.getvalue(), "cut": _SOUND.getvalue()[:500], "empty": b"", "text": b"hello"}
                path.write_bytes(data[kind])
        try:
            paths, notes = inspect_images(folder, option="instance_data_dir")
        except ValueError as error:
            assert f"--instance_data_dir {folder}" in str(error) and len(str(error).splitlines()) == 1
            return
        assert {note.name for note in notes} == set(entries) and all(load_image(path).size for path in paths)
        report = Concept.from_folder(folder, "sks", "dog").report()
        assert report.encode("utf-8") and len(report.splitlines()) == 1 + len(notes) + (len(paths) < 3)


@settings(deadline=None, max_examples=50)
@given(_ANY_TEXT)
def test_any_text_for_a_base_is_one_sentence(text):
    config, said = _tried([f"--base={text}"])
    if config is None:
        assert "base" in said
        return
    with pytest.raises((FileNotFoundError, ValueError), match="(?i)base") as caught:
        resolve_base(config.base)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"null", b'{"a": ', b"\xff\xfe", None], ids=repr)
def test_a_damaged_config_of_a_base_is_one_sentence(tmp_path, damage):
    folder = write("sd1", tmp_path / "base")
    names = ["model_index.json", *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))]
    for path in [folder / name for name in (*names, "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")]:
        sound = path.read_bytes()
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        try:
            suggested(str(folder))
            resolve_base(str(folder))
            check_base(folder, resolution=32, tokenizer_max_length=20)
            text_architecture(folder)
            read_tokenizer(folder)
        except (ValueError, OSError) as error:
            assert len(str(error).splitlines()) == 1 and str(folder) in str(error)
        path.write_bytes(sound)


@pytest.mark.parametrize(
    "family, wrong, right",
    [("sd1", 36, (32, 40)), ("sdxl", 36, (32, 40)), ("alt", 4, (8,)), ("if", 31, (30, 32)), ("if2", 30, (28, 32))],
)
def test_a_resolution_that_a_base_cannot_draw_names_those_it_can(tmp_path, family, wrong, right):
    folder = write(family, tmp_path)
    with pytest.raises(
        ValueError, match=f"resolution={wrong} must be a multiple of .* take {' or '.join(map(str, right))}"
    ):
        check_base(folder, resolution=wrong)
    for resolution in right:
        check_base(folder, resolution=resolution)


@pytest.mark.parametrize("family, most", [("sd1", 24), ("sdxl", 24), ("alt", 38), ("if", None)])
def test_a_prompt_length_that_a_text_encoder_cannot_take_is_named(tmp_path, family, most):
    folder = write(family, tmp_path)
    check_base(folder, resolution=32, tokenizer_max_length=most or 1000)
    for length in (1, *([] if most is None else [most + 1])):
        with pytest.raises(ValueError, match=f"tokenizer_max_length={length} must be"):
            check_base(folder, resolution=32, tokenizer_max_length=length)


def test_a_seed_of_64_bits_trains(components, concept, config):
    config = dataclasses.replace(config, seed=2**64 - 1, max_train_steps=2, checkpointing_steps=0)
    add_adapters(components, rank=2, seed=config.seed)
    dataset = DreamBoothDataset(concept.paths, concept.instance_prompt, size=128, seed=config.seed)
    assert [line["step"] for line in train(config, components, dataset)] == [1, 2]
    assert len(draw(components, [concept.instance_prompt], config.sampling)) == 1
