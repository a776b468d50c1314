"""How many solver steps a picture of the miniature needs, and where they lie: `python solver_steps.py`.

The same captions of toys that training never saw, from the same noise; the judge reads what was drawn.
"""

from __future__ import annotations

import os
import time

import numpy as np

from dbnb import miniature
from dbnb.drawing import build_pipeline
from dbnb.miniature.data import draw, held_out, labels_of
from dbnb.miniature.evaluate import Judge, accuracy, drawings, frechet, full_caption, renders_of, side_of
from dbnb.models import load_components
from dbnb.tables import Table


def main(count: int = 200) -> None:
    """Print the table."""
    judge, pipeline, rows = Judge(miniature.path()), build_pipeline(load_components("miniature")), Table()
    names = [draw("test", index)[1] for index in range(8 * count)]
    names = [n for n in names if not held_out(n["kind"], n["body"], n["scene"])][:count]
    true = np.stack([labels_of(n) for n in names])
    real = judge.features(renders_of(names, 1, side_of(pipeline)))
    config = pipeline.scheduler.config
    for steps, spacing in (
        (20, "leading"),
        (10, "leading"),
        (20, "trailing"),
        (10, "trailing"),
        (8, "trailing"),
        (6, "trailing"),
    ):
        pipeline.scheduler = type(pipeline.scheduler).from_config(config, timestep_spacing=spacing)
        started = time.perf_counter()
        pictures = drawings(pipeline, [full_caption(n) for n in names], num_inference_steps=steps)
        seconds = time.perf_counter() - started
        right = accuracy(judge(pictures), true)
        del right["accent"]  # asked for with an accessory only
        rows.append(
            {"steps": str(steps), "spacing": spacing, "seconds for 100": f"{100 * seconds / count:.1f}"}
            | {name: f"{100 * value:.1f} %" for name, value in right.items()}
            | {"Frechet": f"{frechet(judge.features(pictures), real):.1f}"}
        )
        print(rows[-1], flush=True)
    print(f"\n{count} images, {os.cpu_count()} cores\n\n{rows.markdown()}")


if __name__ == "__main__":
    main()
