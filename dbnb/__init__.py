"""dbnb: DreamBooth personalisation, taught by running it.

The notebooks are the product; this package is the toolbox they lift their cells from, one module a step: concept,
prior, models, adapters, dataset, training, validation and export. What diffusers, peft, accelerate or transformers
already do, they do.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

# transformers announces at import what it does without torchvision, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

__version__ = "0.1.0"
_MODULES = (
    "adapters", "concept", "config", "dataset", "exercises", "export", "files", "metrics", "miniature", "models",
    "planner", "plots", "prior", "processes", "single_file", "toybox", "training", "validation", "widgets", "workflow",
)  # fmt: skip


def __getattr__(name: str) -> ModuleType:
    """Load a module when it is first used: `import dbnb` itself stays instant."""
    if name in _MODULES:
        return importlib.import_module(f"dbnb.{name}")
    raise AttributeError(f"module 'dbnb' has no attribute {name!r}")
