"""What the benchmarks measured, and the README's tables and figure of it: `python tests/benchmarks/results.py`.

Each benchmark adds its table to `results.json`; this command writes the tables of that file into the README, between
`<!-- measured: NAME -->` and `<!-- end -->`, and draws the curves that it holds.
"""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from dbnb import plots
from dbnb.files import whole
from dbnb.tables import Table

RESULTS = Path(__file__).with_name("results.json")
README = Path(__file__).parents[2] / "README.md"
FIGURE = README.with_name("docs") / "seconds_to_toy.png"
_PLACE = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def record(name: str, table: Table, note: str = "", **further: Any) -> None:
    """Print a table, and put it into `results.json` with the machine that it was measured on and what is `further`."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__.split('+')[0]}"
    results[name] = {"machine": machine, "note": note, "rows": [dict(row) for row in table]} | further
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


def seconds_to_toy() -> Figure:
    """Fidelity against seconds, the mean of all toys at each checkpoint, from the curves of `seconds_to_toy.py`."""
    curves = json.loads(RESULTS.read_text())["seconds_to_toy"]["curves"]
    names = {"peer": "diffusers' script: adapters on attention", "ours": "dbnb at its defaults"}
    series = {}
    for name, label in names.items():
        points = np.array([list(toy[name].items()) for toy in curves.values()], dtype=float).mean(0)
        series[label] = (points[:, 0], points[:, 1])
    return plots.curves(
        series,
        xlabel="seconds since the start of the command, class images included",
        ylabel="normalised subject fidelity",
        title=f"the mean of {len(curves)} toys: 0 is the base, 1 other photographs of the toy",
    )


if __name__ == "__main__":
    seconds_to_toy().savefig(FIGURE)
    with whole(README) as temporary:
        temporary.write_text(filled(README.read_text()))
