"""Training adapters on a GPU, setting by setting: `python tests/benchmarks/gpu.py --minutes 9`.

Random weights of the published sizes are made on the spot. Each setting trains through the whole workflow: a base that
is loaded, adapters, cached latents, `train`. Measured are steps a second, the peak of the card's memory against the
plan's, whether losses stay finite and adapters float32, and how far pictures of the reloaded adapter differ. What the
time does not suffice for is named under the table; a later call with `--unseen` goes on with that. `--peer` takes
diffusers' own scripts, one for each base, which train on the same weights right after the first setting.
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
import traceback
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from results import RESULTS, record

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
    Setting(changed=_with(quantization="int8")),
    Setting(changed=_with(quantization="fp8")),
    Setting(changed=_with(quantization="nf4")),
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


def _forecast(plan: Base, config: DreamBoothConfig, setting: Setting) -> int:
    """Bytes that training takes by the plan."""
    parts = training_memory(
        plan,
        rank=config.rank,
        batch=2 * setting.pairs,
        bytes_per_weight=4 if setting.precision == "no" else 2,
        gradient_checkpointing=config.gradient_checkpointing,
        lora_layers=config.lora_layers,
        cached=config.pre_compute_text_embeddings,
        quantization=config.quantization,
    )
    return sum(parts.values())


def measure(
    base: Path,
    setting: Setting,
    folder: Path,
    *,
    classes: Path,
    plan: Base | None,
    beside: Executor,
    steps: int = 12,
    **further: object,
) -> dict[str, str]:
    """Train with one setting, and return its row; the forecast is made in another process meanwhile."""
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
    forecast = beside.submit(_forecast, plan, config, setting) if plan is not None else None
    row, nothing = {"setting": str(setting)}, {"peak": "", "plan": "", "reloaded": ""}
    try:
        session = prepare(config, tell=lambda line: None)
        components, ends = session.components, []
        gc.collect()

        def on_step(step: int, seen) -> None:
            seen.loss.item()  # waits for the card
            if torch.cuda.is_available() and not ends:
                torch.cuda.reset_peak_memory_stats()  # before the first step pictures were encoded
            ends.append(time.perf_counter())

        train(config, components, session.dataset, on_step=on_step)
        for part, module in adapted_modules(components).items():
            if any(parameter.dtype != torch.float32 for _, parameter in trainable_parameters(module)):
                raise TypeError(f"{base.name}, {setting}: an adapter of the {part} is not float32.")
        seconds = statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))
        peak = _memory()
        adapter = save_adapters(components, folder)
        quick = dataclasses.replace(config.sampling, num_inference_steps=2)
        difference = verify_reload(components, adapter, session.concept, quick)
        return row | {
            "steps a second": f"{1 / seconds:.2f}",
            "peak": "" if peak is None else f"{peak / _GIB:.1f} GiB",
            "plan": "" if forecast is None else f"{forecast.result() / _GIB:.1f} GiB",
            "reloaded": f"{difference}/255",
        }
    except torch.OutOfMemoryError:
        return row | {"steps a second": "out of memory"} | nothing
    except FloatingPointError:
        return row | {"steps a second": "not finite"} | nothing
    except ValueError as error:  # a package that is not installed, a precision that the card has not
        return row | {"steps a second": f"refused: {error}"} | nothing
    except Exception as error:  # a fault on a card that was never seen must not cost the other settings' numbers
        traceback.print_exc()
        return row | {"steps a second": f"failed: {type(error).__name__}"} | nothing


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
    row = {"setting": f"{setting}; diffusers' script", "steps a second": "", "peak": "", "plan": "", "reloaded": ""}
    ended = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    if ended.returncode:
        print(ended.stderr[-2000:], file=sys.stderr)
        return row | {"steps a second": "failed"}
    noted = json.loads(notes.read_text())
    seconds = statistics.median(b - a for a, b in itertools.pairwise(noted["steps"][1:]))
    peak = noted.get("peak_on_card")
    return row | {"steps a second": f"{1 / seconds:.2f}", "peak": "" if peak is None else f"{peak / _GIB:.1f} GiB"}


def drill(
    bases: Sequence[tuple[str, Path, Base | None]],
    settings: Sequence[Setting],
    minutes: float,
    seen: Sequence[dict[str, str]] = (),
    **further: object,
) -> Table:
    """All settings on all bases, (name, folder, plan), but those of the rows in `seen`, as long as the time suffices.

    `further` goes to `measure`.
    """
    known = {(row["base"], row["setting"]) for row in seen}
    rows, end = Table(), time.monotonic() + 60 * minutes
    beside = ProcessPoolExecutor(1, get_context("spawn"))
    with beside, tempfile.TemporaryDirectory() as work:
        classes = class_folder(Path(work) / "class", 4)
        for setting, (name, base, plan) in itertools.product(settings, bases):
            if (name, str(setting)) in known:
                continue
            if time.monotonic() > end:
                row = {"setting": str(setting), "steps a second": "not run", "peak": "", "plan": "", "reloaded": ""}
            else:
                folder = Path(work) / f"run-{len(rows)}"
                row = measure(base, setting, folder, classes=classes, plan=plan, beside=beside, **further)
            rows.append({"base": name, **row})
            print(rows[-1], flush=True)
    return rows


def shown(rows: Table, note: str) -> tuple[Table, str]:
    """The rows that were run, and the note with those that were not."""
    unseen: dict[str, list[str]] = {}
    for row in rows:
        if row["steps a second"] == "not run":
            unseen.setdefault(row["setting"], []).append(row["base"])
    bases = {row["base"] for row in rows}
    names = [setting if set(left) == bases else f"{setting} ({', '.join(left)})" for setting, left in unseen.items()]
    if names:
        note = f"{note.rstrip()} Never seen on a card: {'; '.join(names)}."
    return Table(row for row in rows if row["steps a second"] != "not run"), note.rstrip()


def main() -> None:
    """Make the weights, run the drill, and record its table."""
    from published import PUBLISHED, write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="no setting is begun after so many")
    parser.add_argument("--steps", type=int, default=12, help="of each setting")
    parser.add_argument("--bases", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    parser.add_argument("--note", default="", help="what else is to be known of the numbers")
    parser.add_argument("--unseen", action="store_true", help="add to the table of an earlier call what it lacks")
    parser.add_argument("--peer", type=Path, nargs="*", default=[], help="diffusers' script for each of the bases")
    args = parser.parse_args()
    device, started = processes().device.type, time.monotonic()
    seen = Table(json.loads(RESULTS.read_text())["gpu"]["rows"] if args.unseen else [])
    with tempfile.TemporaryDirectory() as work:
        bases = []
        for name in args.bases:
            folder = Path(work) / name.replace(" ", "-")
            write(name, folder, device=device)
            bases.append((name, folder, BASES[name]))
        rows = Table(seen) + drill(bases, SETTINGS[:1], args.minutes, seen, steps=args.steps)
        classes = class_folder(Path(work) / "class", 4)
        for peer, (name, folder, _) in zip(args.peer, bases, strict=False):
            output = Path(work) / f"peer {name}"
            output.mkdir()
            rows.append({"base": name, **peer_row(peer, folder, SETTINGS[0], output, classes, args.steps)})
            print(rows[-1], flush=True)
        left = args.minutes - (time.monotonic() - started) / 60
        rows += drill(bases, SETTINGS[1:], left, seen, steps=args.steps)
    card = torch.cuda.get_device_name() if device == "cuda" else device
    note = f"On one {card}; weights of the published sizes, but random. {args.note}"
    record("gpu", *shown(rows, note))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, where the checkpoints are made
    main()
