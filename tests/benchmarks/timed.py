"""Run a script or a module, and note when each optimizer step ended: `python timed.py NOTES.json TARGET ARGUMENTS …`.

The notes also hold when the process started, how many seconds it took, its peak memory, and what the first training
step worked on.
"""

from __future__ import annotations

import json
import resource
import runpy
import sys
import time
from pathlib import Path

started = time.perf_counter()

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from diffusers import DDPMScheduler, UNet2DConditionModel  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

notes, target, *arguments = sys.argv[1:]
steps: list[float] = []
first: dict[str, torch.Tensor] = {}


def _after(cls, name, note):
    """Have `note` see the arguments and the result of each call of a method."""
    method = getattr(cls, name)

    def noted(self, *positional, **named):
        result = method(self, *positional, **named)
        note(positional, named, result)
        return result

    setattr(cls, name, noted)


def _keep(**tensors):
    for name, tensor in tensors.items():
        first.setdefault(name, tensor.detach().float().clone().contiguous())


_after(torch.optim.AdamW, "step", lambda *_: steps.append(time.perf_counter()))
# Drawings call the UNet and add noise too, but not where gradients are kept.
_after(
    DDPMScheduler,
    "add_noise",
    lambda a, _, __: _keep(latents=a[0], noise=a[1], timesteps=a[2]) if torch.is_grad_enabled() else None,
)
_after(
    UNet2DConditionModel,
    "forward",
    lambda a, k, _: (
        _keep(hidden=k.get("encoder_hidden_states", a[2] if len(a) > 2 else None)) if torch.is_grad_enabled() else None
    ),
)
_after(Accelerator, "backward", lambda a, *_: _keep(loss=a[0].reshape(1)))

sys.argv = [target, *arguments]
try:
    if target.endswith(".py"):
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__")
except SystemExit as end:
    if end.code:
        raise
finally:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux
    record = {"started": started, "steps": steps, "seconds": time.perf_counter() - started, "peak_mib": peak}
    if torch.cuda.is_available():
        record["peak_on_card"] = torch.cuda.max_memory_allocated()  # bytes
    Path(notes).write_text(json.dumps(record))
    save_file(first, Path(notes).with_suffix(".safetensors"))
