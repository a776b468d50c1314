"""Checks for the notebooks' coding exercises: each runs what a learner wrote and says in words what is wrong with it.

    from dbnb.exercises import check_02a

    check_02a(cache_key)

The name of a check is the number of its notebook and a letter, in the notebook's order: `check_02a` and `check_02b`
belong to notebook 02. A check takes the function (or class) that the exercise asks for, runs it on small inputs, and
prints one line: `Right: …`, `Not yet: …` with what is wrong, or `Not written yet: …` for an unfilled stub. It never
raises. The solutions are not here: they are folded in the notebooks, and the project's tests take them from there.
"""

from __future__ import annotations

from dbnb.exercises.adapters import check_04a, check_04b
from dbnb.exercises.concept import check_01a, check_01b
from dbnb.exercises.dataset import check_05a, check_05b
from dbnb.exercises.export import check_07a, check_07b
from dbnb.exercises.failures import ALL_IS_WELL, FAULTS, Run, broken_run, broken_runs, check_09a, check_09b
from dbnb.exercises.flow import check_11a, check_11b
from dbnb.exercises.metrics import check_08a, check_08b
from dbnb.exercises.models import check_03a, check_03b
from dbnb.exercises.planner import check_10a, check_10b
from dbnb.exercises.prior import check_02a, check_02b
from dbnb.exercises.training import check_06a, check_06b, check_06c
from dbnb.exercises.workflow import check_00a, check_00b

__all__ = [
    "ALL_IS_WELL",
    "FAULTS",
    "Run",
    "broken_run",
    "broken_runs",
    "check_00a",
    "check_00b",
    "check_01a",
    "check_01b",
    "check_02a",
    "check_02b",
    "check_03a",
    "check_03b",
    "check_04a",
    "check_04b",
    "check_05a",
    "check_05b",
    "check_06a",
    "check_06b",
    "check_06c",
    "check_07a",
    "check_07b",
    "check_08a",
    "check_08b",
    "check_09a",
    "check_09b",
    "check_10a",
    "check_10b",
    "check_11a",
    "check_11b",
]
