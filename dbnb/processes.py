"""Several processes, one run: `accelerate launch --multi_gpu --num_processes 2 -m dbnb`, or `torchrun`.

All compute, the first writes. A single process is the first of one, and nothing here changes what it does.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from dbnb.config import DreamBoothConfig

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


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM wait for the end of a step, so that nothing half-updated is saved; a second one stops at once.

    SIGTERM asks for the end of the whole process: it is delivered again when the block has ended well.
    """
    asked: set[int] = set()

    def ask(number: int, _) -> None:
        asked.add(number)
        tqdm.write("Stopping when this step is done and saved; once more stops at once.")
        signal.signal(number, before[number])

    if threading.current_thread() is not threading.main_thread():  # signals reach only the main thread
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGTERM in asked:
        signal.raise_signal(signal.SIGTERM)


@contextmanager
def own_precision() -> Iterator[None]:
    """accelerate knows one precision for the whole process: a run has its own, and then the one before holds again."""
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state()
        AcceleratorState._shared_state.update(before)


def overruled(config: DreamBoothConfig) -> str:
    """What accelerate's environment (`accelerate config`, `accelerate launch`) asks for and this run does otherwise.

    "" where there is nothing of the kind. Its own defaults ask for nothing.
    """
    settings = {
        "ACCELERATE_MIXED_PRECISION": ("no", f"mixed_precision={config.mixed_precision}"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            "1",
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}",
        ),
        "ACCELERATE_DYNAMO_BACKEND": ("no", "no compilation"),
    }
    asked, done = [], []
    for name, (default, setting) in settings.items():
        value = os.environ.get(name) or default
        if value.lower() not in (default, setting.rpartition("=")[2]):
            asked.append(f"{name}={value}")
            done.append(setting)
    return f"Not followed: {', '.join(asked)}; this run has {', '.join(done)}." if asked else ""
