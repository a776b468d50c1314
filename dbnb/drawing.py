"""Drawing: a base's own pipeline, a fast solver, and pictures whose seeds alone decide them.

Class images (step 2), validation (step 7) and every measure draw with these functions. Built in notebook 02.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, SchedulerMixin
from PIL import Image

from dbnb.config import Sampling
from dbnb.models import Components

SOLVER = "sde-dpmsolver++"


def fast_solver(noise_scheduler: SchedulerMixin) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (Lu et al., 2022) in its stochastic form, for a base's noise schedule.

    Each step adds some fresh noise, which mends what earlier steps got wrong: drawn without, a toy of the miniature
    falls apart into patches of colour. The noise comes from the pipeline's generators: a seed still decides a picture.
    """
    # A learned variance is split off by the pipeline only if the scheduler does not expect it.
    learned = str(noise_scheduler.config.get("variance_type", "")).startswith("learned")
    return DPMSolverMultistepScheduler.from_config(
        noise_scheduler.config, algorithm_type=SOLVER, **({"variance_type": "fixed_small"} if learned else {})
    )


def build_pipeline(components: Components) -> DiffusionPipeline:
    """The base's own diffusers pipeline around these parts, with a fast solver."""
    parts = components.parts() | components.further
    pipeline = DiffusionPipeline.from_pretrained(
        components.base, use_safetensors=True, variant=components.variant, **parts
    )
    others = {name: part for name, part in pipeline.components.items() if part is not None and name != "scheduler"}
    components.further = {name: part for name, part in others.items() if name not in components.parts()}
    pipeline.scheduler = fast_solver(components.noise_scheduler)
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker.to(dtype=components.dtype)
    return pipeline.to(components.device)


def image_seed(seed: int, index: int) -> int:
    """The seed of image number `index` of a series; adding images never changes earlier ones."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint32)[0])


def call_options(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """What a family's call needs besides: IF would want two more packages to tidy captions scraped from the web."""
    return {"clean_caption": False} if "clean_caption" in inspect.signature(pipeline.__call__).parameters else {}


_listeners: list[Callable[[int, float], None]] = []


@contextmanager
def timed(listener: Callable[[int, float], None]) -> Iterator[None]:
    """Within the block, tell `listener` of each batch that `draw_images` has drawn: how many pictures, and seconds."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@torch.no_grad()
def draw_images(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    small: Sequence[Image.Image] | None = None,
) -> list[Image.Image]:
    """One image for each (prompt, seed), whatever the batch size.

    `small` are the pictures that an upscaling base is to enlarge, one for each prompt. Where the base's safety checker
    has blackened an image, its `info["blackened"]` is True.
    """
    images: list[Image.Image] = []
    further = call_options(pipeline)
    for start in range(0, len(prompts), sampling.batch_size):
        began = time.perf_counter()
        stop = start + sampling.batch_size
        if small is not None:
            further["image"] = list(small[start:stop])
        output = pipeline(
            list(prompts[start:stop]),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[start:stop]],
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            height=sampling.resolution,
            width=sampling.resolution,
            **further,
        )
        flags = getattr(output, "nsfw_content_detected", None) or [False] * len(output.images)
        for image, flag in zip(output.images, flags, strict=True):
            image.info["blackened"] = bool(flag)
        images += output.images
        for listener in _listeners:
            listener(len(output.images), time.perf_counter() - began)
    return images
