"""The drill at full size: a random checkpoint with Stable Diffusion 1.5's published dimensions through the command.

Slow (minutes, 12 GiB, 4 GB of disk), so not part of a plain test run: `pytest -m slow tests/test_full_size.py -s`.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from published import write
from resident import measured_and_planned
from safetensors.torch import load_file


@pytest.mark.slow
def test_stable_diffusion_1_5_in_full_size_trains_on_a_cpu(tmp_path):
    sizes = write("Stable Diffusion 1.5", tmp_path / "base")
    assert sizes == {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863}
    command = [
        sys.executable,
        "-m",
        "dbnb",
        "--base",
        str(tmp_path / "base"),
        "--max_train_steps",
        "2",
        "--output_dir",
        str(tmp_path / "run"),
        "--num_class_images",
        "2",
        "--num_inference_steps",
        "2",
        "--num_validation_images",
        "0",
        "--gradient_checkpointing",
        "--mixed_precision",
        "bf16",
        "--train_batch_size",
        "1",
        "--sample_batch_size",
        "1",
        "--checkpointing_steps",
        "1",
    ]
    subprocess.run(command, check=True, env=os.environ | {"DBNB_CACHE": str(tmp_path / "cache")})
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    adapter = tmp_path / "run" / "pytorch_lora_weights.safetensors"
    tensors = load_file(adapter)
    print(
        f"peak {peak:.1f} GiB, {[line['seconds'] for line in log]} s a step, {adapter.stat().st_size / 2**20:.1f} MiB"
    )
    assert peak < 12 and len(log) == 2
    trainable = load_file(tmp_path / "run" / "checkpoint-2" / "state.safetensors")  # as trained, not as exported
    assert all(tensor.dtype == torch.float32 for tensor in trainable.values())
    assert all(re.fullmatch(r"unet\..*attn[12]\..*lora.*weight", key) for key in tensors)
    assert 2 * 2**20 < adapter.stat().st_size < 20 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's account of a process")
@pytest.mark.parametrize("phase", ["checkpointing", "decoding"])
def test_the_plan_of_stable_diffusion_1_5_holds_in_resident_memory_within_15_percent(phase):
    numbers = measured_and_planned(phase, "Stable Diffusion 1.5")
    assert numbers["planned"] == pytest.approx(numbers["measured"], rel=0.15)
