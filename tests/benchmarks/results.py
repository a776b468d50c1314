"""What the benchmarks measured, and the README's tables of it: `python tests/benchmarks/results.py`.

Each benchmark adds its table to `results.json`; this command writes the tables of that file into the README, between
`<!-- measured: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path

import torch

from dbnb.files import whole
from dbnb.tables import Table

RESULTS = Path(__file__).with_name("results.json")
README = Path(__file__).parents[2] / "README.md"
_PLACE = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def record(name: str, table: Table, note: str = "") -> None:
    """Print a table, and put it into `results.json` with the machine that it was measured on."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__.split('+')[0]}"
    results[name] = {"machine": machine, "note": note, "rows": [dict(row) for row in table]}
    with whole(RESULTS) as temporary:
        temporary.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    print(f"\n{table.markdown()}\n\n{machine}. {note}".rstrip())


def filled(text: str) -> str:
    """`text` with all measured tables as they are in `results.json`."""
    results = json.loads(RESULTS.read_text())

    def place(match: re.Match[str]) -> str:
        result = results[match[2]]
        under = " ".join(filter(None, (f"Measured on {result['machine']}.", result["note"])))
        return f"{match[1]}{Table(result['rows']).markdown()}\n\n{under}\n{match[3]}"

    return _PLACE.sub(place, text)


if __name__ == "__main__":
    with whole(README) as temporary:
        temporary.write_text(filled(README.read_text()))
