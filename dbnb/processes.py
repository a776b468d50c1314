"""Several processes, one run: `accelerate launch --multi_gpu --num_processes 2 -m dbnb`, or `torchrun`.

All compute, the first writes. A single process is the first of one, and nothing here changes what it does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")
_SHARDED = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)


def processes() -> PartialState:
    """Who we are: `num_processes`, `process_index`, `is_main_process`, `device`, `print` (which the first alone does).

    Without an accelerator it says so to accelerate, which would otherwise take two processes on a CPU for two runs.
    Raises ValueError where accelerate's environment asks to split the model among them: here each has it whole.
    """
    if asked := [name for name in _SHARDED if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")]:
        raise ValueError(
            f"{asked[0]} is set, but the model is not split among processes here: launch with --multi_gpu alone, or "
            "leave it out of `accelerate config`."
        )
    return PartialState(cpu=not torch.accelerator.is_available())


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, given to all."""
    return broadcast_object_list([make() if processes().is_main_process else None])[0]
