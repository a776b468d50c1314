"""The loop that fits one part of the miniature: every step a function of (seed, step), resumable, averaged."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

_DECAY_SHARE = 0.3  # of the steps, at the end, over which the learning rate falls to 0
_WORKERS = 5  # processes that prepare batches for a GPU, which would wait for captions otherwise


@dataclass(frozen=True)
class Stage:
    """How a part is fitted: for how long, on how much at once, where to.

    `made_from` is what its checkpoint belongs to: it goes on only from one that was made from the same.
    """

    name: str
    steps: int
    batch_size: int
    folder: Path
    made_from: dict[str, object]
    seed: int = 0
    lr: float = 1e-3
    minutes: float = 1e9  # of this sitting
    mixed_precision: str = "no"
    device: str = "cpu"
    minutes_between_checkpoints: float = 3.0
    steps_between_drawings: int = 1000


def generator(seed: int, step: int, device: str = "cpu") -> torch.Generator:
    """The one source of a step's randomness on a device."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)


@dataclass
class _Batches(Dataset):
    """The batch of each step from `first` to before `last`."""

    batch_of_step: Callable[[int], Any]
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> Any:
        return self.batch_of_step(self.first + index)


def _batches(stage: Stage, batch_of_step: Callable[[int], Any], first: int) -> Iterator[Any]:
    """The batches from step `first` on; for a GPU they are prepared ahead, in other processes."""
    if stage.device == "cpu":
        return map(batch_of_step, itertools.count(first))
    steps = _Batches(batch_of_step, first, max(first, stage.steps))
    return iter(DataLoader(steps, batch_size=None, num_workers=_WORKERS, multiprocessing_context="fork"))


def fit(
    stage: Stage,
    models: nn.Module,
    loss_of_batch: Callable[[Any], dict[str, torch.Tensor]],
    *,
    batch_of_step: Callable[[int], Any] = int,
    groups: list[dict] | None = None,
    weight_decay: float = 1e-2,
    ema_decay: float = 0.999,
    draw: Callable[[], Image.Image] | None = None,
) -> bool:
    """Run one stage until its steps or its minutes are over; True when it is complete.

    `batch_of_step` prepares on the CPU what `loss_of_batch` is computed from; without it, that is the step's number.
    AdamW, warm-up over 200 steps, a constant learning rate, linear decay over the last 30 %. Afterwards `models` holds
    the moving average of the weights, with which `draw` paints the pictures in samples/. Raises ValueError where the
    checkpoint in the stage's folder was made from something else (seed, photographs, batch size).
    """
    folder = stage.folder
    models.to(stage.device)
    if stage.device != "cpu":
        torch.set_float32_matmul_precision("high")  # TF32
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        groups or models.parameters(), lr=stage.lr, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True
    )
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    parameters = list(models.parameters())
    ema = EMAModel(parameters, decay=ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    path, log = folder / f"{stage.name}.pt", folder / f"{stage.name}.jsonl"
    step = warm_up_from = 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=stage.device)
        if state["made_from"] != stage.made_from:
            raise ValueError(
                f"{path} was made from {state['made_from']}, not {stage.made_from}: take those, or another "
                "--output_dir."
            )
        models.load_state_dict(state["models"])
        step, warm_up_from = state["step"], state["warm_up_from"]
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
            ema.load_state_dict(state["ema"])
        else:  # a shipped part: the average is of the steps that follow
            ema = EMAModel(parameters, decay=ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    started = saved = time.monotonic()

    def save() -> None:
        temporary = path.with_suffix(".tmp")
        state = dict(models=models.state_dict(), optimizer=optimizer.state_dict(), ema=ema.state_dict(), step=step)
        torch.save(state | dict(warm_up_from=warm_up_from, made_from=stage.made_from), temporary)
        os.replace(temporary, path)

    def show() -> None:
        ema.store(parameters)
        ema.copy_to(parameters)
        models.eval()
        (folder / "samples").mkdir(exist_ok=True)
        draw().save(folder / "samples" / f"{stage.name}-{step:06d}.png")
        ema.restore(parameters)
        models.train()

    models.train()
    sums: dict[str, torch.Tensor] = {}
    summed = 0
    batches = _batches(stage, batch_of_step, step)
    while step < stage.steps and time.monotonic() - started < 60 * stage.minutes:
        rate = min(1.0, (step + 1 - warm_up_from) / 200, (stage.steps - step) / (_DECAY_SHARE * stage.steps))
        for group, base in zip(optimizer.param_groups, base_lrs, strict=True):
            group["lr"] = base * rate
        losses = loss_of_batch(next(batches))
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        step += 1
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + value.detach()
        summed += 1
        if step % 50 == 0 or step == stage.steps:
            line = dict(step=step, minutes=round((time.monotonic() - started) / 60, 2))
            line |= {key: float(total) / summed for key, total in sums.items()}
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(stage.name, json.dumps(line), flush=True)
            sums, summed = {}, 0
        if draw is not None and step % stage.steps_between_drawings == 0:
            show()
        if time.monotonic() - saved > 60 * stage.minutes_between_checkpoints:
            save()
            saved = time.monotonic()
    save()
    ema.copy_to(parameters)
    models.to("cpu").eval()
    return step >= stage.steps
