"""Nothing is half-written: a file appears under its name when it is whole."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ENDS = 64 << 20


def cache_dir() -> Path:
    """Where caches are shared between runs: $DBNB_CACHE, else $XDG_CACHE_HOME/dbnb, else ~/.cache/dbnb.

    Raises OSError where none of them is set and there is no home.
    """
    if root := os.environ.get("DBNB_CACHE"):
        return Path(root)
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "dbnb"
    try:
        return Path.home() / ".cache" / "dbnb"
    except RuntimeError as error:
        raise OSError("There is no home folder to keep caches in: set DBNB_CACHE to a folder.") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: it takes the place of `path` when the block ends well, and goes otherwise.

    Anyone who may read what is written here may read this file too: safetensors would keep others out.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def ends(path: Path) -> bytes:
    """Up to 64 MiB from a file's start and as much from its end.

    A whole checkpoint can be gigabytes; training moves every weight, so its ends tell.
    """
    with path.open("rb") as file:
        start = file.read(_ENDS)
        file.seek(max(file.tell(), path.stat().st_size - _ENDS))
        return start + file.read()
