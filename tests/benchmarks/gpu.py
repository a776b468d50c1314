"""Training adapters on a GPU, setting by setting: `python tests/benchmarks/gpu.py --minutes 9`.

Random weights of the published sizes are made on the spot. Each setting trains through the whole workflow: a base that
is loaded, adapters, cached latents, `train`. Measured are steps a second, the peak of the card's memory against the
plan's, whether losses stay finite and adapters float32, and how far pictures of the reloaded adapter differ. Settings
that the time does not suffice for are in the table, without numbers. `--peer` takes diffusers' own scripts, one for
each base, which train on the same weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from results import record

from dbnb import toybox
from dbnb.adapters import adapted_modules, trainable_parameters
from dbnb.config import DreamBoothConfig
from dbnb.export import save_adapters, verify_reload
from dbnb.planner import BASES, Base, training_memory
from dbnb.processes import processes
from dbnb.tables import Table
from dbnb.toybox.sample import SAMPLE_DIR
from dbnb.training import train
from dbnb.workflow import prepare

_TIMED = Path(__file__).with_name("timed.py")
_GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """What one training changes; the rest is the family's preset."""

    precision: str = "bf16"
    pairs: int = 1
    changed: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        words = [self.precision, f"{self.pairs} pair{'s' * (self.pairs > 1)}"]
        words += [name if value is True else f"{name}={value}" for name, value in self.changed]
        return ", ".join(words)


def _with(**changed: object) -> tuple[tuple[str, object], ...]:
    return tuple(changed.items())


# What is most asked for comes first: the time may not suffice for all.
SETTINGS = (
    Setting(),
    Setting("fp16"),
    Setting(changed=_with(gradient_checkpointing=True)),
    Setting(changed=_with(lora_layers="all")),
    Setting(changed=_with(allow_tf32=True)),
    Setting(pairs=4),
    Setting(changed=_with(pre_compute_text_embeddings=False)),
    Setting(changed=_with(use_8bit_adam=True)),
    Setting(pairs=8, changed=_with(gradient_checkpointing=True)),
    Setting("no"),
)


def class_folder(folder: Path, count: int) -> Path:
    """Rendered dogs in place of class images, which random weights could not draw."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        toybox.photograph(toybox.random_toy("dog", number), scene="grass", seed=number, size=256).save(
            folder / f"{number}.png"
        )
    return folder


def _memory() -> float | None:
    """The most that the card has held since it was asked to forget, in bytes; None without a card."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def measure(
    base: Path, setting: Setting, folder: Path, *, classes: Path, plan: Base | None, steps: int = 12, **further: object
) -> dict[str, str]:
    """Train with one setting, and return its row."""
    config = DreamBoothConfig(
        base=str(base),
        output_dir=str(folder),
        instance_data_dir=str(SAMPLE_DIR / "photos"),
        class_data_dir=str(classes),
        num_class_images=len(list(classes.iterdir())),
        mixed_precision=setting.precision,
        train_batch_size=setting.pairs,
        max_train_steps=steps,
        checkpointing_steps=0,
        num_validation_images=0,
        lr_scheduler="constant",
        **{"gradient_checkpointing": False} | dict(setting.changed) | further,
    )
    row, nothing = {"setting": str(setting)}, {"peak": "", "plan": "", "reloaded": ""}
    try:
        session = prepare(config, tell=lambda line: None)
        components, ends = session.components, []
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

        def on_step(step: int, seen) -> None:
            seen.loss.item()  # waits for the card
            ends.append(time.perf_counter())

        train(config, components, session.dataset, on_step=on_step)
    except torch.OutOfMemoryError:
        return row | {"steps a second": "out of memory"} | nothing
    except FloatingPointError:
        return row | {"steps a second": "not finite"} | nothing
    except ValueError as error:  # a package that is not installed, a precision that the card has not
        return row | {"steps a second": f"refused: {error}"} | nothing
    for part, module in adapted_modules(components).items():
        if any(parameter.dtype != torch.float32 for _, parameter in trainable_parameters(module)):
            raise TypeError(f"{base.name}, {setting}: an adapter of the {part} is not float32.")
    seconds = statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))
    peak, forecast = _memory(), ""
    if plan is not None:
        parts = training_memory(
            plan,
            rank=config.rank,
            batch=2 * setting.pairs,
            bytes_per_weight=4 if setting.precision == "no" else 2,
            gradient_checkpointing=config.gradient_checkpointing,
            lora_layers=config.lora_layers,
            cached=config.pre_compute_text_embeddings,
        )
        forecast = f"{sum(parts.values()) / _GIB:.1f} GiB"
    adapter = save_adapters(components, folder)
    quick = dataclasses.replace(config.sampling, num_inference_steps=2)
    difference = verify_reload(components, adapter, session.concept, quick)
    return row | {
        "steps a second": f"{1 / seconds:.2f}",
        "peak": "" if peak is None else f"{peak / _GIB:.1f} GiB",
        "plan": forecast,
        "reloaded": f"{difference}/255",
    }


def peer_row(peer: Path, base: Path, setting: Setting, folder: Path, classes: Path, steps: int) -> dict[str, str]:
    """The same training by diffusers' own script, in a process of its own."""
    notes = folder / "notes.json"
    resolution = DreamBoothConfig(base=str(base)).resolution
    options = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": SAMPLE_DIR / "photos",
        "class_data_dir": classes,
        "num_class_images": len(list(classes.iterdir())),
        "instance_prompt": "a photo of sks dog",
        "class_prompt": "a photo of a dog",
        "resolution": resolution,
        "rank": 16,
        "train_batch_size": setting.pairs,
        "mixed_precision": setting.precision,
        "max_train_steps": steps,
        "output_dir": folder,
        "seed": 0,
    }
    command = [sys.executable, str(_TIMED), str(notes), str(peer), "--with_prior_preservation"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run(command, check=True, capture_output=True)
    ends = json.loads(notes.read_text())["steps"]
    seconds = statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))
    return {"setting": f"{setting}; diffusers' script", "steps a second": f"{1 / seconds:.2f}"} | dict.fromkeys(
        ("peak", "plan", "reloaded"), ""
    )


def drill(
    bases: Sequence[tuple[str, Path, Base | None]], settings: Sequence[Setting], minutes: float, **further: object
) -> Table:
    """All settings on all bases, (name, folder, plan), as long as the time suffices; `further` goes to `measure`."""
    rows, end = Table(), time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as work:
        classes = class_folder(Path(work) / "class", 4)
        for setting, (name, base, plan) in itertools.product(settings, bases):
            if time.monotonic() > end:
                row = {"setting": str(setting), "steps a second": "not run", "peak": "", "plan": "", "reloaded": ""}
            else:
                folder = Path(work) / f"run-{len(rows)}"
                row = measure(base, setting, folder, classes=classes, plan=plan, **further)
            rows.append({"base": name, **row})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Make the weights, run the drill, and record its table."""
    from published import PUBLISHED, write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="no setting is begun after so many")
    parser.add_argument("--steps", type=int, default=12, help="of each setting")
    parser.add_argument("--bases", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    parser.add_argument("--peer", type=Path, nargs="*", default=[], help="diffusers' script for each of the bases")
    args = parser.parse_args()
    device = processes().device.type
    with tempfile.TemporaryDirectory() as work:
        bases = []
        for name in args.bases:
            folder = Path(work) / name.replace(" ", "-")
            write(name, folder, device=device)
            bases.append((name, folder, BASES[name]))
        rows = drill(bases, SETTINGS, args.minutes, steps=args.steps)
        classes = class_folder(Path(work) / "class", 4)
        for peer, (name, folder, _) in zip(args.peer, bases, strict=False):
            row = peer_row(peer, folder, SETTINGS[0], Path(work) / f"peer {name}", classes, args.steps)
            rows.append({"base": name, **row})
    card = torch.cuda.get_device_name() if device == "cuda" else device
    record("gpu", rows, f"On one {card}; weights of the published sizes, but random.")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, where the checkpoints are made
    main()
