"""Step 7: what the model draws now, from prompts and from reference images, at seeds that never change.

Built in notebook 07.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

from dbnb.adapters import adapted_modules, strength, trainable_parameters
from dbnb.checkpoints import checkpoints, load_weights
from dbnb.concept import Concept
from dbnb.config import Sampling, sampling_of
from dbnb.drawing import build_pipeline, call_options, draw_images, image_seed
from dbnb.models import Components
from dbnb.toybox.scenes import SCENES

# Other ways to ask for the subject, which no training uses: `{}` is the identifier and the class word. None asks for
# another look: the toy's own colours would be measured against those of the prompt.
SENTENCES = (
    "a picture of a {}",
    "{}",
    "a {} on the beach",
    "a render of the {} in the snow",
    "picture of the {}",
    "my {} at night",
    "the {} in a room",
    "in the desert, a {}",
    "one {} in the city",
    "photo of my {} in the grass",
    "on the moon, the {}",
    "her {} on the beach",
)
SETS = ("subject", "scenes", "classes")  # the prompt sets that are drawn before and after training
# Validation images come from their own series, so that they never repeat a class image.
_SERIES = 1_000


@dataclass
class ValidationImages:
    """Images by prompt set: the subject, the subject in each scene (in turn), the bare class, redrawn references.

    `sentences` are the subject asked for in other words than training used, `SENTENCES` in turn.
    """

    subject: list[Image.Image]
    scenes: list[Image.Image]
    scene_names: list[str]
    scene_prompts: list[str]
    classes: list[Image.Image]
    redrawn: list[Image.Image] = field(default_factory=list)
    sentences: list[Image.Image] = field(default_factory=list)
    sentence_prompts: list[str] = field(default_factory=list)


def draw(
    components: Components,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    *,
    seeds: Sequence[int] | None = None,
    references: Sequence[Image.Image] = (),
    pipeline: DiffusionPipeline | None = None,
    **changed: Any,
) -> list[Image.Image]:
    """One image a prompt, as the components (or another `pipeline` of this base) are now.

    Without `seeds`, image i always starts from the same noise. A base that enlarges pictures gets `references` in turn,
    at a quarter of the resolution. The fields of `sampling` can be given by name instead.
    """
    sampling = sampling_of(sampling, **changed)
    seeds = seeds or [image_seed(sampling.seed + _SERIES, index) for index in range(len(prompts))]
    small = None
    if components.upscales:
        side = sampling.resolution // 4
        fitted = [ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS) for image in references]
        small = [fitted[index % len(fitted)] for index in range(len(prompts))]
    return draw_images(pipeline or build_pipeline(components), prompts, seeds, sampling, small=small)


def validation_images(
    components: Components,
    concept: Concept,
    sampling: Sampling | None = None,
    *,
    count: int,
    references: Sequence[Image.Image] = (),
    scenes: Mapping[str, str] = SCENES,
    sets: Sequence[str] = SETS,
    **changed: Any,
) -> ValidationImages:
    """`count` images of each of the prompt `sets`, and each of `references` redrawn under the instance prompt.

    Image i of every set starts from the same noise, before and after training. A base that enlarges pictures draws what
    it is given, whatever a prompt says of places: of the prompt sets it gets the subject's alone. The fields of
    `sampling` can be given by name instead.
    """
    sampling = sampling_of(sampling, **changed)
    names = [list(scenes)[index % len(scenes)] for index in range(count)]
    words = f"{concept.identifier} {concept.class_word}"
    sentence_prompts = [SENTENCES[index % len(SENTENCES)].format(words) for index in range(count)]
    scene_prompts = concept.prompts_in([scenes[name] for name in names])

    def drawn(name: str, prompts: Sequence[str]) -> list[Image.Image]:
        return draw(components, prompts, sampling, references=concept.images()) if name in sets else []

    if components.upscales:
        sets = ("subject",) if "subject" in sets else ()

    return ValidationImages(
        subject=drawn("subject", [concept.instance_prompt] * count),
        scenes=drawn("scenes", scene_prompts),
        scene_names=names,
        scene_prompts=scene_prompts,
        classes=drawn("classes", [concept.class_prompt] * count),
        sentences=drawn("sentences", sentence_prompts),
        sentence_prompts=sentence_prompts if "sentences" in sets else [],
        redrawn=from_references(components, references, concept.instance_prompt, sampling),
    )


def grid(
    components: Components,
    folder: str | Path,
    prompt: str,
    sampling: Sampling,
    *,
    strengths: Sequence[float] = (0.5, 0.75, 1.0, 1.25),
    seed: int = 0,
) -> dict[tuple[int, float], Image.Image]:
    """(step, strength) -> the picture of one prompt and one seed, for each checkpoint of a run's folder.

    The adapters are afterwards as they were before. Raises ValueError where there is no checkpoint, or one belongs to
    other adapters. `plots.grid` shows the pictures.
    """
    found = checkpoints(Path(folder))
    if not found:
        raise ValueError(
            f"{folder} holds no checkpoint: train with --checkpointing_steps and --checkpoints_total_limit."
        )
    kept = [
        (p, p.detach().clone())
        for module in adapted_modules(components).values()
        for _, p in trainable_parameters(module)
    ]
    pictures = {}
    try:
        for path in found:
            step = load_weights(path, components)
            for factor in strengths:
                with strength(components, factor):
                    [pictures[step, factor]] = draw(components, [prompt], sampling, seeds=[seed])
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
    return pictures


@torch.no_grad()
def from_references(
    components: Components,
    references: Sequence[Image.Image],
    prompt: str,
    sampling: Sampling | None = None,
    *,
    strength: float = 0.6,
    **changed: Any,
) -> list[Image.Image]:
    """Redraw reference images under a prompt (img2img): the higher the strength, the more is forgotten.

    The fields of `sampling` can be given by name instead. Raises ValueError where `strength` leaves no solver step to
    take.
    """
    sampling = sampling_of(sampling, **changed)
    if not 1 <= int(sampling.num_inference_steps * strength) <= sampling.num_inference_steps:
        raise ValueError(
            f"strength={strength} must be at most 1 and leave at least one of {sampling.num_inference_steps} solver "
            "steps to take."
        )
    if components.upscales:
        return draw(components, [prompt] * len(references), sampling, references=references)
    pipeline = build_pipeline(components)
    # A family's image-to-image pipeline is named after its text-to-image one; diffusers' own list lacks AltDiffusion.
    # Its from_pipe would cast every part to float32: a half-precision base would train on at twice the memory.
    image_to_image = getattr(diffusers, type(pipeline).__name__.replace("Pipeline", "Img2ImgPipeline"))
    known = inspect.signature(image_to_image.__init__).parameters
    settings = {name: value for name, value in pipeline.config.items() if name in known}
    pipeline = image_to_image(**(settings | {n: part for n, part in pipeline.components.items() if n in known}))
    pipeline.set_progress_bar_config(disable=True)
    options = call_options(pipeline, sampling)
    if "height" in inspect.signature(pipeline.__call__).parameters:  # others take the pictures' own size
        options |= {"height": sampling.resolution, "width": sampling.resolution}
    size = (sampling.resolution, sampling.resolution)
    images = [ImageOps.fit(image, size, Image.Resampling.LANCZOS) for image in references]
    seeds = [image_seed(sampling.seed + _SERIES, index) for index in range(len(images))]
    redrawn: list[Image.Image] = []
    for start in range(0, len(images), sampling.batch_size):
        part = slice(start, start + sampling.batch_size)
        redrawn += pipeline(
            [prompt] * len(images[part]),
            image=images[part],
            strength=strength,
            num_inference_steps=sampling.num_inference_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
            **options,
        ).images
    return redrawn
