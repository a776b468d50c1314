"""Step 3: loading, freezing, and the errors that name what is wrong."""

from __future__ import annotations

import json
import shutil
import uuid
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from families import write
from huggingface_hub import errors
from safetensors.torch import load_file

from dbnb import miniature
from dbnb.drawing import build_pipeline
from dbnb.models import cut_off, encode_prompts, fingerprint, load_components, text_architecture
from dbnb.presets import PRESETS, suggested


@pytest.fixture
def copy(tmp_path):
    """The miniature's configs and weights, to damage."""
    return shutil.copytree(miniature.path(), tmp_path / "base")


def test_everything_is_frozen_and_the_table_adds_up(components):
    for module in components.modules().values():
        assert not module.training and not any(p.requires_grad for p in module.parameters())
    rows = {row["part"]: row for row in components.table()}
    assert set(rows) == {"text_encoder", "vae", "unet"}
    assert rows["unet"]["parameters"] == f"{sum(p.numel() for p in components.unet.parameters()):,}"
    assert rows["unet"]["dtype"] == "float32" and "UNet2DConditionModel" in components._repr_html_()


def test_half_precision_casts_every_part():
    half = load_components("miniature", weight_dtype=torch.bfloat16)
    assert {p.dtype for module in half.modules().values() for p in module.parameters()} == {torch.bfloat16}
    mixed = load_components("miniature", weight_dtype={"unet": torch.float16})
    assert [mixed.unet.dtype, mixed.vae.dtype] == [torch.float16, torch.float32]


def test_vae_is_read_from_the_index(copy):
    index = json.loads((copy / "model_index.json").read_text())
    index["vae"] = [None, None]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="takes 12 channels"):  # those of pictures are 3
        load_components(copy)


def test_unknown_text_encoder_is_named(copy):
    config = json.loads((copy / "text_encoder" / "config.json").read_text())
    (copy / "text_encoder" / "config.json").write_text(json.dumps(config | {"architectures": ["Mystery"]}))
    with pytest.raises(ValueError, match="Mystery.*CLIPTextModel"):
        text_architecture(copy)


def test_a_base_of_another_kind_is_named(copy):
    path = copy / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"_class_name": "FluxPipeline", "unet": [None, None]}))
    with pytest.raises(ValueError, match="FluxPipeline"):
        load_components(copy)
    path.write_text(json.dumps(index))
    settings = json.loads((copy / "unet" / "config.json").read_text())
    UNet2DConditionModel.from_config(settings | {"in_channels": 9}).save_pretrained(copy / "unet")
    with pytest.raises(ValueError, match="9 channels"):
        load_components(copy)


def test_a_missing_t5_is_said_and_another_task_is_named(tmp_path):
    folder = write("sd3", tmp_path / "base")
    shutil.rmtree(folder / "text_encoder_3")  # as those who save 9 GB have it
    components = load_components(folder)
    assert components.absent() == ["text_encoder_3"] and "absent: its tokens are zeros" in str(components)
    hidden = encode_prompts(components, ["a dog"], max_length=5)
    assert hidden.shape == (1, 29, 64) and not hidden[:, 24:].any()
    assert build_pipeline(components).text_encoder_3 is None
    with pytest.raises(AttributeError, match="denoises with a transformer"):
        _ = components.unet
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "StableDiffusion3InpaintPipeline"}))
    with pytest.raises(ValueError, match="is a StableDiffusion3InpaintPipeline: give a text-to-image base"):
        load_components(folder)


def test_weights_that_could_run_code_are_not_read(copy):
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_components(copy)


def test_a_folder_without_preset_gets_its_familys(tmp_path):
    def suggestion(**configs):
        folder = tmp_path / uuid.uuid4().hex
        for part, settings in configs.items():
            (folder / part).mkdir(parents=True)
            (folder / part / "config.json").write_text(json.dumps(settings))
        return suggested(str(folder))

    vae = {"block_out_channels": [1, 2, 3, 4]}
    assert suggestion(unet={"sample_size": 64}, vae=vae) == PRESETS["sd15"]
    assert suggestion(unet={"sample_size": 96}, vae=vae) == PRESETS["sd15"] | {"resolution": 768}
    assert suggestion(unet={"sample_size": 128}, vae=vae, text_encoder_2={}) == PRESETS["sdxl"]
    assert suggestion(unet={"sample_size": 64}) == PRESETS["if"]
    assert suggestion(unet={}, vae=vae) == PRESETS["sd15"]
    assert suggested(str(miniature.path())) == PRESETS["miniature"]
    sd3 = {"_class_name": "SD3Transformer2DModel", "sample_size": 64}
    assert suggestion(transformer=sd3, vae=vae, text_encoder_2={}) == PRESETS["sd35"] | {"resolution": 512}
    small = suggestion(transformer=sd3 | {"sample_size": 16}, vae=vae, text_encoder_2={})
    assert small == PRESETS["miniature"] | {"weighting_scheme": "logit_normal", "lora_layers": "all"}
    flux = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
    assert suggestion(transformer=flux, vae=vae, text_encoder_2={}) == PRESETS["flux"]
    schnell = flux | {"guidance_embeds": False}
    assert suggestion(transformer=schnell, vae=vae) == PRESETS["flux"] | {"num_inference_steps": 4}


def test_a_mistyped_base_is_said_to_be_that(tmp_path):
    with pytest.raises(FileNotFoundError, match="check the spelling"):
        load_components("minature")
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        load_components(tmp_path)
    with pytest.raises(FileNotFoundError, match="check the network.*--base miniature"):
        load_components("nobody/nothing")


@pytest.mark.parametrize(
    "kind, words",
    [
        (errors.GatedRepoError, "accept its licence"),
        (errors.RepositoryNotFoundError, "check the spelling"),
        (errors.RevisionNotFoundError, "--revision"),
        (errors.RemoteEntryNotFoundError, "no diffusers pipeline"),
    ],
)
def test_what_the_hub_answers_is_said_with_what_to_do(monkeypatch, kind, words):
    def download(*args, **options):
        answer = SimpleNamespace(headers={}, request=None)
        raise OSError("cannot load") from kind("model_index.json is not there", response=answer)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    with pytest.raises(FileNotFoundError, match=words):
        load_components("someone/something")


def test_a_variant_is_read_and_a_missing_one_is_named(tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(miniature.path())
    pipeline.save_pretrained(tmp_path, variant="fp16")
    found = load_components(tmp_path, variant="fp16")
    assert build_pipeline(found).unet is found.unet
    with pytest.raises(FileNotFoundError, match="variant 'bf16'"):
        load_components(tmp_path, variant="bf16")
    with pytest.raises(FileNotFoundError, match="no weights as safetensors"):
        load_components(tmp_path)


def test_fingerprint_changes_with_the_weights(copy):
    before = fingerprint(copy)
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert fingerprint(miniature.path()) == before != fingerprint(copy)


def test_each_distinct_prompt_is_encoded_once(components, monkeypatch):
    sizes = []
    forward = components.text_encoder.forward
    monkeypatch.setattr(
        components.text_encoder, "forward", lambda ids, **k: sizes.append(len(ids)) or forward(ids, **k)
    )
    hidden = encode_prompts(components, ["a dog", "a cat", "a dog"])
    assert sizes == [2] and torch.equal(hidden[0], hidden[2]) and not torch.equal(hidden[0], hidden[1])


def test_what_is_cut_off_a_long_prompt_is_named(components):
    assert cut_off(components, "a photo of a sks dog") == ""
    words = ["dog"] * 20 + ["beach"] * 4
    assert cut_off(components, " ".join(words)).split() == ["beach"] * 2
    assert cut_off(components, "a photo of a dog", max_length=5).split() == ["a", "dog"]
