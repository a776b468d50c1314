"""Every cell that nbval runs is marked: `pytest -m "not notebook and not slow"` leaves the notebooks out."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.notebook)
