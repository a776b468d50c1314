"""Captions that photographs come with, as other trainers read them.

A text file beside a photograph (`dog.txt`, or kohya's `dog.caption`) comes first, then the folder's `metadata.jsonl`
(`file_name` and `text`, Hugging Face's imagefolder), then a folder's name as kohya's trainer has it: `10_sks dog` asks
for ten repeats of each photograph, under the prompt "sks dog".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dbnb.tables import printable

_SUFFIXES = (".txt", ".caption")
_KOHYA = re.compile(r"(\d+)_(.+)")
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Captions:
    """What was found: a caption by file name, where from (how many of each), and how often each picture is to count."""

    texts: dict[str, str] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    repeats: int = 1

    def __str__(self) -> str:
        return ", ".join(f"{number} from {source}" for source, number in self.sources.items())


def _first_line(path: Path) -> str:
    """A caption file's first line that says something, as kohya's trainer reads it."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Caption {printable(path.name)} cannot be read ({error}): save it as a text in UTF-8."
        ) from error
    return next((" ".join(line.split()) for line in lines if line.strip()), "")


def _metadata(path: Path) -> dict[str, str]:
    """File name -> text, of a `metadata.jsonl`; {} where there is none. Raises ValueError that names the line."""
    if not path.is_file():
        return {}
    found = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{METADATA} cannot be read ({error}): save it as a text in UTF-8.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (ValueError, KeyError, TypeError):
            name = text = None
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(
                f'{METADATA}, line {number}, is no caption: write {{"file_name": "dog.png", "text": "a photo of …"}}.'
            )
        found[name] = " ".join(text.split())
    return found


def read_captions(folder: Path, paths: Sequence[Path]) -> Captions:
    """The captions of the pictures in a folder; those that have none are left out, as are empty ones.

    Raises ValueError where a caption file cannot be read, or a line of the metadata is none.
    """
    metadata, kohya = _metadata(folder / METADATA), _KOHYA.fullmatch(folder.resolve().name)
    texts, sources = {}, {}
    for path in paths:
        beside = [file for suffix in _SUFFIXES if (file := path.with_suffix(suffix)).is_file()]
        choices = {"text files": _first_line(beside[0]) if beside else "", METADATA: metadata.get(path.name, "")}
        if kohya:
            choices[f"the folder's name ({kohya[1]} repeats)"] = " ".join(kohya[2].split())
        for source, text in choices.items():
            if text:
                texts[path.name] = text
                sources[source] = sources.get(source, 0) + 1
                break
    return Captions(texts, sources, max(1, int(kohya[1])) if kohya else 1)
