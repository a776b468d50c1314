"""A shipped base's UNet trained further: the rest of the base stays, and batches prepared ahead are the same ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from dbnb import miniature
from dbnb.miniature import further
from dbnb.miniature.fit import Stage, _batches, generator


def _weights(base: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(next((base / part).glob("*.safetensors")))


@pytest.mark.long
@pytest.mark.commands
def test_the_command_trains_the_unet_alone_resumes_and_ships(tmp_path):
    options = ["--output_dir", str(tmp_path / "run"), "--photographs", "24", "--batch_size", "4"]
    further.main([*options, "--steps", "2", "--note", "A test.", "--ship", str(tmp_path / "base")])
    old, new = miniature.path(), tmp_path / "base"
    for part in ("text_encoder", "vae", "judge", "identity"):
        before, after = _weights(old, part), _weights(new, part)
        assert all(torch.equal(before[name], after[name]) for name in before), part
    before, after = _weights(old, "unet"), _weights(new, "unet")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    recipe = json.loads((new / "training.json").read_text())
    assert recipe["further"]["note"] == "A test." and recipe["further"]["stages"]["unet"]["step"] == 2
    assert recipe["stages"] == json.loads((old / "training.json").read_text())["stages"]
    pipeline = StableDiffusionPipeline.from_pretrained(new)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a photo of a red dog", num_inference_steps=2).images[0].size == (128, 128)
    further.main([*options, "--steps", "3"])
    assert torch.load(tmp_path / "run" / "unet.pt", weights_only=True)["step"] == 3
    with pytest.raises(ValueError, match="was made from"):
        further.main([*options, "--steps", "4", "--seed", "2"])


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # a GPU's machine has more cores
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_batches_that_other_processes_prepare_are_those_of_their_steps(tmp_path):
    def batch_of_step(step: int) -> dict:
        return {"step": step, "noise": torch.randn(3, generator=generator(0, step))}

    ahead, one_by_one = (
        _batches(Stage("toy", 9, 4, tmp_path, {}, device=device), batch_of_step, 5) for device in ("cuda", "cpu")
    )
    for batch, expected in zip(ahead, one_by_one, strict=False):
        assert batch["step"] == expected["step"] and torch.equal(batch["noise"], expected["noise"])
    assert expected["step"] == 8  # the last
