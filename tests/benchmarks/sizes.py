"""What a training step costs by rank, batch and resolution: `python tests/benchmarks/sizes.py`.

One of the three changes at a time; the rest is as the miniature's defaults have it. The growth is the exponent by
which the time grows from one row to the next: 1 is proportional.
"""

from __future__ import annotations

import math
import statistics
import time

from results import record

from dbnb.adapters import add_adapters, trainable_parameters
from dbnb.concept import Concept
from dbnb.config import DreamBoothConfig
from dbnb.dataset import DreamBoothDataset, cache_latents
from dbnb.models import load_components
from dbnb.tables import Table
from dbnb.training import batch_at, precompute_embeds, training_step

_USUAL = {"rank": 16, "batch": 4, "pixels": 128}
_SIZES = {"rank": (4, 16, 64), "batch": (1, 4, 16), "pixels": (64, 128, 256)}


def step_seconds(rank: int, batch: int, pixels: int, steps: int = 8) -> float:
    """The median of a few steps, forward and backward."""
    components, concept = load_components("miniature"), Concept.from_folder(None, "sks", "dog")
    add_adapters(components, DreamBoothConfig(rank=rank).adapters)
    # The photographs stand in for class images too: what they show costs nothing.
    dataset = DreamBoothDataset(
        concept.paths,
        concept.instance_prompt,
        class_paths=concept.paths,
        class_prompt=concept.class_prompt,
        size=pixels,
    )
    cache_latents(dataset, components.vae)
    embeds = precompute_embeds(components, dataset.distinct_prompts())
    seconds = []
    for number in range(steps):
        started = time.perf_counter()
        training_step(components, batch_at(dataset, number, batch), seed=0, prompt_embeds=embeds).loss.backward()
        seconds.append(time.perf_counter() - started)
        for _, parameter in trainable_parameters(components.denoiser):
            parameter.grad = None
    return statistics.median(seconds[2:])


def main() -> None:
    """Measure all sizes, and record the table."""
    rows = Table()
    for name, sizes in _SIZES.items():
        before = None
        for size in sizes:
            seconds = step_seconds(**_USUAL | {name: size})
            growth = "" if before is None else f"{math.log(seconds / before[1]) / math.log(size / before[0]):.2f}"
            rows.append({"size": f"{name} {size}", "steps a second": f"{1 / seconds:.2f}", "growth": growth})
            print(rows[-1], flush=True)
            before = size, seconds
    usual = ", ".join(f"{name} {size}" for name, size in _USUAL.items())
    record("sizes", rows, f"What does not change is {usual}; the growth is the exponent from one row to the next.")


if __name__ == "__main__":
    main()
