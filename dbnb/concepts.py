"""Several subjects in one adapter: a JSON file tells of each what the command's own options tell of one.

[
    {"instance_data_dir": "photos/rex", "identifier": "sks", "class_word": "dog"},
    {"instance_data_dir": "photos/tom", "identifier": "zwx", "class_word": "cat"}
]
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from dbnb.config import DreamBoothConfig
from dbnb.tables import printable
from dbnb.tokens import normalized

_NEEDED = ("instance_data_dir", "identifier", "class_word")
_OPTIONAL = ("instance_prompt", "class_prompt", "class_data_dir", "reference_data_dir")


def _entries(file: Path) -> list[dict[str, Any]]:
    """What a file of concepts holds. Raises OSError or ValueError, naming the entry, where it is none."""
    name = printable(str(file))
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OSError(f"--concepts {name} cannot be read ({error.strerror}): give a JSON file.") from error
    except ValueError as error:
        raise ValueError(f"--concepts {name} is no JSON ({error}): see `dbnb.concepts` for an example.") from error
    if not isinstance(entries, list) or len(entries) < 2 or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"--concepts {name} must be a list of two or more objects; see `dbnb.concepts`.")
    for number, entry in enumerate(entries, start=1):
        missing = [key for key in _NEEDED if key not in entry]
        strange = [key for key in entry if key not in (*_NEEDED, *_OPTIONAL)]
        if missing or strange:
            wrong = f"lacks {missing[0]!r}" if missing else f"has {strange[0]!r}, which is no setting of a concept"
            raise ValueError(
                f"--concepts {name}, entry {number}, {wrong}: it takes {', '.join(_NEEDED)} and perhaps "
                f"{', '.join(_OPTIONAL)}."
            )
    return entries


def each_concept(config: DreamBoothConfig) -> list[DreamBoothConfig]:
    """The settings of each subject: those of the run, with what its entry of `config.concepts` says instead.

    Without such a file the run's own settings are the one. Folders are as seen from where the file lies. Raises OSError
    or ValueError where the file cannot be used, two subjects have one identifier, or a step has no room for all.
    """
    if config.concepts is None:
        return [config]
    for name in ("instance_data_dir", *_OPTIONAL):
        if getattr(config, name) is not None:
            raise ValueError(f"{name} is told of each concept in --concepts {config.concepts}: leave it out beside it.")
    file, found = Path(config.concepts).expanduser(), []
    for number, entry in enumerate(_entries(file), start=1):
        settings = dict(entry)
        for key, value in entry.items():
            if key.endswith("_data_dir") and isinstance(value, str):
                settings[key] = str(file.parent / Path(value).expanduser())
        try:
            found.append(dataclasses.replace(config, concepts=None, **settings))
        except ValueError as error:
            raise ValueError(f"--concepts {printable(config.concepts)}, entry {number}: {error}") from error
    words = [normalized(one.identifier) for one in found]
    if twice := next((word for word in words if words.count(word) > 1), None):
        raise ValueError(f"Two concepts have the identifier {twice!r}: give each a word of its own.")
    room = config.train_batch_size * config.gradient_accumulation_steps
    if room < len(found):
        raise ValueError(
            f"A step of train_batch_size={config.train_batch_size} x gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps} has no room for all {len(found)} concepts: raise one of them."
        )
    return found
