"""A hundred class images as this project draws them, beside the plain pipeline call: `python class_images.py`.

Plain is the base's own scheduler at the pipeline's default number of steps, in batches of four. The miniature's judge
reads both, so that speed does not cost what the pictures show.
"""

from __future__ import annotations

import os
import time

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from dbnb import miniature, toybox
from dbnb.config import DreamBoothConfig
from dbnb.drawing import build_pipeline, draw_images, image_seed
from dbnb.miniature.data import ATTRIBUTES
from dbnb.miniature.evaluate import Judge
from dbnb.models import load_components
from dbnb.tables import Table


def main(count: int = 100) -> None:
    """Print the table."""
    judge, rows = Judge(miniature.path()), Table()
    pairs = [(kind, scene) for kind in toybox.KINDS for scene in toybox.SCENES]
    asked = [pairs[index % len(pairs)] for index in range(count)]
    prompts = [f"a photo of a {kind} {toybox.SCENES[scene]}" for kind, scene in asked]
    seeds = [image_seed(0, index) for index in range(count)]
    plain = StableDiffusionPipeline.from_pretrained(miniature.path(), torch_dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)

    def ours():
        pipeline = build_pipeline(load_components("miniature"))
        return draw_images(pipeline, prompts, seeds, DreamBoothConfig().sampling)

    def naive():
        images = []
        for start in range(0, count, 4):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + 4]]
            images += plain(prompts[start : start + 4], generator=generators).images
        return images

    for name, draw in (("plain pipeline call", naive), ("ours", ours)):
        started = time.perf_counter()
        images = draw()
        seconds = time.perf_counter() - started
        found = judge(np.stack([np.asarray(image) for image in images]))
        right = {
            attribute: np.mean([ATTRIBUTES[attribute][found[i, column]] == asked[i][part] for i in range(count)])
            for part, (column, attribute) in enumerate(((0, "kind"), (5, "scene")))
        }
        rows.append({"": name, "seconds": f"{seconds:.1f}", **{k: f"{100 * v:.0f} %" for k, v in right.items()}})
        print(rows[-1], flush=True)
    print(f"\n{count} images, {os.cpu_count()} cores\n\n{rows.markdown()}")


if __name__ == "__main__":
    main()
