"""Several processes, one run: `accelerate launch --multi_gpu --num_processes 2 -m dbnb`, or `torchrun`.

All compute, the first writes. A single process is the first of one, and nothing here changes what it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def processes() -> PartialState:
    """Who we are: `num_processes`, `process_index`, `is_main_process`, `device`, `print` (which the first alone does).

    Without an accelerator it says so to accelerate, which would otherwise take two processes on a CPU for two runs.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, given to all."""
    return broadcast_object_list([make() if processes().is_main_process else None])[0]
