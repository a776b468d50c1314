"""Drawing: a base's own pipeline, a fast solver, and pictures whose seeds alone decide them.

Class images (step 2), validation (step 7) and every measure draw with these functions.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from PIL import Image

from dbnb.config import Sampling, sampling_of
from dbnb.denoisers import network_in
from dbnb.models import Components

SOLVER = "sde-dpmsolver++"


def fast_solver(noise_scheduler: SchedulerMixin) -> DPMSolverMultistepScheduler | FlowMatchEulerDiscreteScheduler:
    """DPM-Solver++ (Lu et al., 2022) in its stochastic form, for a base's noise schedule; Euler's for a flow.

    Each step adds some fresh noise, which mends what earlier steps got wrong: drawn without, a toy of the miniature
    falls apart into patches of colour. The noise comes from the pipeline's generators: a seed still decides a picture.
    A flow's path is nearly straight, and its bases ship Euler's method.
    """
    if isinstance(noise_scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config)
    # A learned variance is split off by the pipeline only if the scheduler does not expect it.
    learned = str(noise_scheduler.config.get("variance_type", "")).startswith("learned")
    return DPMSolverMultistepScheduler.from_config(
        noise_scheduler.config, algorithm_type=SOLVER, **({"variance_type": "fixed_small"} if learned else {})
    )


def solver_name(noise_scheduler: SchedulerMixin) -> str:
    """The solver's class, and its form where there are several."""
    solver = fast_solver(noise_scheduler)
    return ", ".join(filter(None, (type(solver).__name__, solver.config.get("algorithm_type"))))


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


def call_options(pipeline: DiffusionPipeline, sampling: Sampling) -> dict[str, Any]:
    """How strongly, and what a family's call needs besides, where it can be told.

    IF would want two more packages to tidy captions scraped from the web; a family of long prompts is told how long.
    """
    unguided = network_in(pipeline).unguided
    options = {"clean_caption": False, "guidance_scale": sampling.guidance_scale - (1.0 - unguided)}
    if sampling.max_sequence_length is not None:
        options["max_sequence_length"] = sampling.max_sequence_length
    known = inspect.signature(pipeline.__call__).parameters
    return {name: value for name, value in options.items() if name in known}


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
    sampling: Sampling | None = None,
    *,
    small: Sequence[Image.Image] | None = None,
    **changed: Any,
) -> list[Image.Image]:
    """One image for each (prompt, seed), whatever the batch size.

    `small` are the pictures that an upscaling base is to enlarge, one for each prompt. Where the base's safety checker
    has blackened an image, its `info["blackened"]` is True. The fields of `sampling` can be given by name instead.
    """
    sampling = sampling_of(sampling, **changed)
    images: list[Image.Image] = []
    further = call_options(pipeline, sampling)
    for start in range(0, len(prompts), sampling.batch_size):
        began = time.perf_counter()
        stop = start + sampling.batch_size
        if small is not None:
            further["image"] = list(small[start:stop])
        output = pipeline(
            list(prompts[start:stop]),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[start:stop]],
            num_inference_steps=sampling.num_inference_steps,
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
