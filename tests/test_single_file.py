"""A base in one file is what it was as a folder, is converted once, and says why where it cannot be."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from families import one_file, write
from huggingface_hub import constants
from safetensors.torch import save_file

from dbnb.config import parse_args
from dbnb.models import load_components, resolve_base
from dbnb.presets import PRESETS, suggested


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DBNB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


@pytest.fixture
def pipeline(tmp_path):
    """A tiny Stable Diffusion, whose configs lie in the hub's cache under the name of the real one."""
    folder = write("sd1", tmp_path / "base")
    known = tmp_path / "hub" / f"models--{PRESETS['sd15']['base'].replace('/', '--')}"
    (known / "refs").mkdir(parents=True)
    (known / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, known / "snapshots" / ("0" * 40), ignore=shutil.ignore_patterns("*.safetensors"))
    return StableDiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_file_becomes_the_folder_it_was(tmp_path, cache, pipeline, dtype):
    path = tmp_path / "model.safetensors"
    save_file({name: value.to(dtype) for name, value in one_file(pipeline).items()}, path)
    assert suggested(str(path)) == PRESETS["sd15"]
    components = load_components(path)
    assert components.base.parent == cache / "bases"
    for name, module in components.modules().items():
        expected = getattr(pipeline, name).state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(value, expected[key].to(dtype).float()), (name, key)
    written = {entry: entry.stat().st_mtime_ns for entry in cache.rglob("*") if entry.is_file()}
    assert resolve_base(str(path)) == components.base
    assert {entry: entry.stat().st_mtime_ns for entry in cache.rglob("*") if entry.is_file()} == written
    assert not [entry for entry in components.base.parent.iterdir() if entry.is_dir() and entry.name.startswith(".")]


def _refused(path) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        suggested(str(path))
        resolve_base(str(path))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"--base {path} ")
    return str(caught.value)


def test_what_is_no_whole_checkpoint_says_what_it_is(tmp_path, cache, pipeline, capsys):
    tensors, path = one_file(pipeline), tmp_path / "model.safetensors"
    path.write_bytes(b"hello")
    assert "cannot be read as safetensors" in _refused(path)
    save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(2, 2)}, path)
    assert "is an adapter (LoRA) and no base" in _refused(path)
    with pytest.raises(SystemExit):
        parse_args(["--base", str(path)])
    assert "adapter (LoRA)" in capsys.readouterr().err
    for start, words in (("cond_stage", "no text encoder"), ("first_stage", "no VAE"), ("model.", "no UNet")):
        save_file({name: value for name, value in tensors.items() if not name.startswith(start)}, path)
        assert words in _refused(path)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    save_file(tensors | {first: torch.zeros(32, 9, 3, 3)}, path)
    assert "9 channels" in _refused(path)
    save_file({name: value for name, value in tensors.items() if "output_blocks" not in name}, path)
    assert "cannot be converted" in _refused(path)
    (tmp_path / "model.ckpt").write_bytes(b"")
    assert "could run code" in _refused(tmp_path / "model.ckpt")
    assert not [entry for entry in cache.rglob("*") if entry.suffix != ".lock" and entry.is_file()]


def test_without_configs_it_says_where_to_get_them(tmp_path, cache, pipeline):
    path = tmp_path / "model.safetensors"
    save_file(one_file(pipeline), path)
    shutil.rmtree(tmp_path / "hub")
    said = _refused(path)
    assert PRESETS["sd15"]["base"] in said and "hf download" in said and not cache.exists()


@pytest.mark.parametrize(
    "key, family",
    [
        ("cond_stage_model.transformer.text_model.x", "sd15"),
        ("cond_stage_model.model.token_embedding.weight", "sd21"),
        ("conditioner.embedders.1.model.positional_embedding", "sdxl"),
    ],
)
def test_the_names_of_the_tensors_tell_the_family(tmp_path, key, family):
    names = ("model.diffusion_model.input_blocks.0.0.bias", "first_stage_model.x", key)
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "a.safetensors")
    assert suggested(str(tmp_path / "a.safetensors")) == PRESETS[family]
