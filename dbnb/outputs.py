"""A run's folder: its files, its lock, its log, and what becomes of an earlier run's results."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dbnb.config import DreamBoothConfig
from dbnb.files import whole
from dbnb.presets import PRESETS
from dbnb.processes import processes

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
KOHYA_NAME = "kohya_lora_weights.safetensors"
# All that an upload may contain; checkpoints, logs and settings of this machine stay here.
PUBLISHED = (WEIGHT_NAME, KOHYA_NAME, "README.md", "before_after.png", "loss.png", "trade_off.png", "metrics.json")
PREVIOUS = "previous"  # where a run puts what an earlier one left in its folder
_GROWING = ("samples", "logs")  # folders that grow as a run goes on; `log.jsonl` does too


@contextmanager
def alone(output_dir: Path) -> Iterator[None]:
    """Hold an output folder, for all processes of this run; raises ValueError where another run holds it."""
    if not processes().is_main_process:
        yield
        return
    name = hashlib.sha256(str(output_dir.resolve()).encode()).hexdigest()[:16]
    lock = Path(tempfile.gettempdir()) / f"dbnb-{name}.lock"  # not in the folder, which is the user's
    try:
        with FileLock(lock, timeout=0, is_singleton=True):  # what `run` holds, `train` may take
            for leftover in output_dir.glob(".checkpoint-*"):  # of a run that was killed while it wrote
                shutil.rmtree(leftover)
            yield
    except Timeout as error:
        raise ValueError(f"Another run writes to {output_dir}: wait for it, or choose another --output_dir.") from error


def read_log(path: Path, step: int) -> list[dict[str, Any]]:
    """What a log says of the first `step` steps."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # the line that a killed run was writing
            break
    return [line for line in lines if line["step"] <= step]


def write_log(path: Path, log: Sequence[Mapping[str, Any]]) -> None:
    """Put a log in its file, a line a step."""
    with whole(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")


def set_aside(output_dir: Path, step: int) -> Path | None:
    """Make room for a run that goes on from `step`; returns the folder that now holds the earlier results, if any.

    An output folder holds the results of one run: what it did not write must not pass for its own. So when training
    begins, and not before (a run that is refused changes nothing), the earlier adapter files, card, figures, measures
    and settings are moved to the folder `previous`, in place of what is there. A run that starts from the beginning
    moves the earlier log and samples too; one that is resumed goes on with its own, up to `step`. What an earlier run
    without an adapter left is removed. Checkpoints stay where they are: each says which run it belongs to.
    """
    fresh, previous = step == 0, output_dir / PREVIOUS
    names = [*PUBLISHED, "config.json", *(("log.jsonl", *_GROWING) if fresh else ())]
    found = [output_dir / name for name in names if (output_dir / name).exists()]
    kept = any((output_dir / name).exists() for name in (WEIGHT_NAME, KOHYA_NAME))
    if kept:
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
    for path in found:
        if kept:
            path.rename(previous / path.name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in (output_dir / "samples").glob("step-*.png"):
        if int(path.stem.removeprefix("step-")) > step:
            path.unlink()
    return previous if kept else None


def _holds(folder: Path, path: Path) -> bool:
    """Whether `path`, which need not exist yet, is `folder` or lies in it, whatever links or other spellings say."""
    folder, path = folder.resolve(), path.resolve()
    around = (path, *path.parents)
    return folder in around or (folder.exists() and any(place.exists() and place.samefile(folder) for place in around))


def keep_apart(config: DreamBoothConfig) -> None:
    """Raise ValueError where a run would write among what it reads: the next run would train on figures of this one."""
    inputs = {name: getattr(config, name) for name in ("instance_data_dir", "class_data_dir", "reference_data_dir")}
    if config.base not in PRESETS and Path(config.base).expanduser().is_dir():
        inputs["base"] = str(Path(config.base).expanduser())
    places = [Path(config.output_dir) / name for name in (".", *_GROWING, PREVIOUS)]
    for name, folder in inputs.items():
        for place in places:
            if folder is None:
                continue
            # The output folder itself may hold an input, such as photos/ beside the results; what a run fills may not.
            within = place != places[0] and _holds(place, Path(folder))
            if within or _holds(Path(folder), place):
                raise ValueError(
                    f"--output_dir {config.output_dir} would put results among the files of --{name} {folder}: choose "
                    "another --output_dir."
                )


def check_writable(folder: Path) -> None:
    """Raise OSError where nothing can be written to a folder, which is left as it was: missing, if it is missing."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"Nothing can be written to {folder} ({error}): choose another --output_dir.") from error
    finally:
        for path in missing:
            with suppress(OSError):  # not made, or used by now
                path.rmdir()
