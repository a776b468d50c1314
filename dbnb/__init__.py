"""dbnb: DreamBooth personalisation, taught by running it.

The notebooks are the product; this package is the toolbox they lift their cells from, one module a step: concept,
prior, models, adapters, dataset, training, validation and export. What diffusers, peft, accelerate or transformers
already do, they do. `docs/architecture.md` shows how the modules build on each other.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

# transformers announces at import what it does without torchvision, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# PyTorch's threads wait for each other in a loop that never lets go of the core. Where another program wants that core,
# a training step takes several times as long (`tests/benchmarks/beside.py`); threads that sleep after a thousand turns
# cost it a little when they are alone. libgomp reads this once, when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
__all__ = [
    "adapters",  # step 4: LoRA on the denoiser and the text encoder
    "attention",  # which pixels a word paints
    "captions",  # captions that photographs come with
    "checkpoints",  # step 6: saving a run and going on with it
    "concept",  # step 1: photographs, identifier and class word
    "concepts",  # several subjects in one adapter
    "config",  # every option of a run, and the records made of them
    "dataset",  # step 5: instance and class images in batches
    "denoisers",  # the networks that denoise, a row each
    "doctor",  # what is the matter with a LoRA file
    "drawing",  # a base's pipeline, a fast solver, pictures from seeds
    "exercises",  # checks of what a learner writes, and quizzes
    "export",  # step 7: the adapter file, the model card, the Hub
    "files",  # files that are written whole or not at all; caches
    "fit",  # is a picture in the base's world
    "forecast",  # what a run will draw and train, and how long that takes
    "lora_checks",  # the faults that the doctor knows
    "lora_file",  # LoRA files in every naming
    "metrics",  # step 7: fidelity, prior preservation, diversity
    "miniature",  # the base that comes with the course, and its training
    "models",  # step 3: the parts of a base, frozen and cast
    "outputs",  # a run's folder
    "paths",  # diffusion and flow matching
    "pictures",  # pictures from disk, looked through
    "planner",  # memory and time on a GPU
    "plots",  # the figures of the course
    "presets",  # what each base suggests
    "prior",  # step 2: class images and their cache
    "processes",  # several processes, signals
    "progress",  # pictures and measures at validation steps
    "quantization",  # a frozen base in fewer bits
    "selection",  # which checkpoint is best
    "single_file",  # a base in one .safetensors file
    "tables",  # tables as text, Markdown and HTML
    "tokens",  # how a tokenizer reads an identifier
    "toybox",  # the toy world
    "training",  # step 6: one training step and the loop
    "validation",  # step 7: pictures from prompts and from references
    "widgets",  # sliders and buttons of the notebooks
    "workflow",  # the seven steps in a row
]


def __getattr__(name: str) -> ModuleType:
    """Load a module when it is first used: `import dbnb` itself stays instant."""
    if name in __all__:
        return importlib.import_module(f"dbnb.{name}")
    raise AttributeError(f"module 'dbnb' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
