"""Run by tests in a process of its own: the resident memory that a phase of a run takes at its peak.

`python tests/resident.py training|checkpointing|drawing|decoding [BASE]` prints the measured and the planned bytes, of
a small network or of one of the planner's UNets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig

from dbnb.adapters import lora_targets
from dbnb.planner import BASES, Base, drawing_memory, training_memory

# Large pictures and few channels: hundreds of megabytes of activations in some seconds on a CPU.
BASE = Base(
    dict(
        sample_size=96,
        attention_head_dim=4,
        cross_attention_dim=32,
        block_out_channels=(32, 64, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    768,
    0,
    0,
    vae=dict(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
    ),
)
PICTURES = 4


def _status(name: str) -> int:
    """A line of Linux's account of this process, in bytes: VmRSS is what is resident now, VmHWM the most so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def _peak(work) -> int:
    """How far the resident memory rises while something is done."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts anew
    work()
    return _status("VmHWM") - before


def measured(phase: str, base: Base, pictures: int) -> int:
    """The rise of one phase, the models being there and everything that is loaded at first use having been loaded."""
    torch.manual_seed(0)
    width = base.denoiser["cross_attention_dim"]
    unet = UNet2DConditionModel(**base.denoiser).requires_grad_(False)
    vae = AutoencoderKL(**base.vae).requires_grad_(False).eval()

    def inputs(pictures: int, side: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(pictures, 4, side, side), torch.ones(pictures), torch.randn(pictures, 77, width)

    if phase in ("training", "checkpointing"):
        unet.add_adapter(LoraConfig(r=4, target_modules=lora_targets(unet)))
        if phase == "checkpointing":
            unet.enable_gradient_checkpointing()

        def work(pictures: int = pictures, side: int = base.denoiser["sample_size"]) -> None:
            unet.train()(*inputs(pictures, side)).sample.square().mean().backward()

    elif phase == "drawing":

        @torch.no_grad()
        def work(pictures: int = 2 * pictures, side: int = base.denoiser["sample_size"]) -> None:
            unet.eval()(*inputs(pictures, side))

    else:

        @torch.no_grad()
        def work(pictures: int = pictures, side: int = base.denoiser["sample_size"]) -> None:
            vae.decode(torch.randn(pictures, 4, side, side))

    work(1, 8)
    return _peak(work)


def planned(phase: str, base: Base, pictures: int) -> int:
    """What the plan says of it, in float32."""
    if phase in ("training", "checkpointing"):
        return training_memory(
            base, rank=4, batch=pictures, bytes_per_weight=4, gradient_checkpointing=phase == "checkpointing"
        )["activations"]
    return drawing_memory(base, pictures=pictures, bytes_per_weight=4)["denoiser" if phase == "drawing" else "vae"]


def measured_and_planned(phase: str, *base: str) -> dict[str, int]:
    """The bytes of a phase, "measured" in a process of its own and "planned"."""
    # Every large block apart, so that what glibc keeps of its heap is not taken for what tensors need.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, phase, *base]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    numbers = json.loads(said.splitlines()[-1])
    print(phase, *base, numbers)
    return numbers


if __name__ == "__main__":
    asked = (sys.argv[1], BASES[sys.argv[2]], 2) if len(sys.argv) > 2 else (sys.argv[1], BASE, PICTURES)
    print(json.dumps({"measured": measured(*asked), "planned": planned(*asked)}))
