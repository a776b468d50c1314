"""Step 2: class images, drawn once from the class prompt, cached by what made them, reused. Built in notebook 02."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from accelerate.utils import gather_object
from filelock import FileLock

from dbnb.adapters import adapted_modules
from dbnb.config import Sampling, sampling_of
from dbnb.drawing import build_pipeline, draw_images, image_seed, solver_name
from dbnb.files import cache_dir, whole
from dbnb.models import Components, fingerprint
from dbnb.pictures import inspect_images
from dbnb.processes import from_first, processes

_ATTEMPTS = 5  # drawings of one class image, where the base's safety checker objects


@dataclass(frozen=True)
class ClassImageRecipe:
    """All that decides what a class image looks like; two equal recipes share a cache."""

    base: str
    prompt: str
    resolution: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    dtype: str
    seed: int
    diffusers: str
    max_sequence_length: int | None = None  # where the pipeline can be told
    quantization: str | None = None

    @property
    def folder(self) -> Path:
        """Where the pictures of this recipe are cached."""
        decides = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
        return cache_dir() / "class_images" / key


def _valid_images(folder: Path) -> dict[str, dict[str, int | str]]:
    """File name -> seed and hash of the cached images whose content is what the manifest says."""
    try:
        known = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["images"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # torn, or not ours
        return {}

    def is_whole(name: str, entry: Any) -> bool:
        if not isinstance(entry, dict) or not (folder / name).is_file():
            return False
        return entry.get("sha256") == hashlib.sha256((folder / name).read_bytes()).hexdigest()

    return {name: entry for name, entry in known if is_whole(name, entry)}


def _why_not_another(recipe: ClassImageRecipe) -> str:
    """What the closest other cached set differs in."""
    mine, closest = dataclasses.asdict(recipe), None
    for path in recipe.folder.parent.glob("*/manifest.json"):
        try:
            other = json.loads(path.read_text(encoding="utf-8"))["recipe"]
            different = [key for key in mine if mine[key] != other.get(key)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if different and (closest is None or len(different) < len(closest[0])):
            closest = (different, other)
    if closest is None:
        return "nothing is cached yet"
    return "the closest cached set differs in " + ", ".join(
        f"{key} ({closest[1].get(key)!r}, now {mine[key]!r})" for key in closest[0]
    )


@dataclass(frozen=True)
class ClassImages:
    """The class images of a run: where they are, and what was decided about the cache."""

    paths: tuple[Path, ...]
    decision: str
    reason: str


def _why_nothing(folder: Path) -> str:
    """Why a folder has not one file to look at, whose name is not hidden; "" where it has, or is no folder at all."""
    if not os.path.lexists(folder):
        return "does not exist"
    visible = not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())
    return "" if visible else "is empty"


def class_images(
    components: Components,
    prompt: str,
    num_class_images: int,
    sampling: Sampling | None = None,
    *,
    class_data_dir: str | Path | None = None,
    **changed: Any,
) -> ClassImages:
    """`num_class_images` pictures of the class: your own first, the rest from the cache, drawn where missing.

    A `class_data_dir` that is empty or does not exist yet holds no picture of your own, which `reason` then says.
    Decisions: "own", "reuse", "top up", "generate". Images are PNG, named by index, each from (seed, index). Raises
    ValueError where adapters are in place, or the base can only enlarge pictures, and OSError where the cache cannot be
    written. The fields of `sampling` can be given by name instead.
    """
    sampling = sampling_of(sampling, **changed)
    if adapted_modules(components):
        raise ValueError(
            "Class images show what the base knows: draw them before add_adapters, or load the base again."
        )
    own: list[Path] = []
    about_own = ""
    if class_data_dir is not None:
        if nothing := _why_nothing(Path(class_data_dir)):
            about_own = f"{class_data_dir} {nothing}: none of them is your own; "
        else:
            own = inspect_images(class_data_dir, sampling.resolution, option="class_data_dir")[0][:num_class_images]
            about_own = f"{len(own)} images of {class_data_dir}"
            if len(own) == num_class_images:
                return ClassImages(tuple(own), "own", about_own)
            about_own += "; "
    if components.upscales:
        raise ValueError(
            f"This base enlarges pictures and cannot draw class images: give {num_class_images} in --class_data_dir, "
            "or use --no_prior_preservation."
        )
    count = num_class_images - len(own)
    recipe = ClassImageRecipe(
        base=fingerprint(components.base),
        prompt=prompt,
        resolution=sampling.resolution,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        scheduler=solver_name(components.noise_scheduler),
        dtype=str(components.dtype).removeprefix("torch."),
        seed=sampling.seed,
        diffusers=diffusers.__version__,
        max_sequence_length=sampling.max_sequence_length if components.network.part == "transformer" else None,
        quantization=components.quantization,
    )
    folder = recipe.folder
    wanted = [f"{index:04d}.png" for index in range(count)]
    valid = from_first(lambda: _valid_images(folder))
    missing = [index for index, name in enumerate(wanted) if name not in valid]
    paths = tuple(own) + tuple(folder / name for name in wanted)
    if not missing:
        return ClassImages(paths, "reuse", f"{about_own}{count} images with this recipe are cached")
    decision = "top up" if valid else "generate"
    reason = about_own + (f"{len(valid)} of {count} are cached" if valid else _why_not_another(recipe))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A second run waits, and finds what the first has drawn; of several processes the first holds it for all.
        lock = FileLock(folder / ".lock") if processes().is_main_process else nullcontext()
        with lock:
            _draw_missing(components, recipe, wanted, sampling)
    except OSError as error:
        raise OSError(
            f"Class images cannot be kept in {folder} ({error}): set DBNB_CACHE to another folder."
        ) from error
    return ClassImages(paths, decision, reason)


def _draw_missing(components: Components, recipe: ClassImageRecipe, wanted: Sequence[str], sampling: Sampling) -> None:
    """Draw those of the `wanted` files that the recipe's folder lacks, and note each batch in its manifest.

    Several processes draw a batch each at a time, the same batches as one alone: the pictures are the same too.
    """
    folder, state = recipe.folder, processes()
    valid = from_first(lambda: _valid_images(folder))
    missing = [index for index, name in enumerate(wanted) if name not in valid]
    pipeline = build_pipeline(components)
    batch_size = sampling.batch_size
    for start in range(0, len(missing), batch_size * state.num_processes):
        first = start + batch_size * state.process_index
        chunk, drawn = missing[first : first + batch_size], {}
        wanting = [(index, image_seed(recipe.seed, index)) for index in chunk]
        for attempt in range(_ATTEMPTS):
            images = draw_images(
                pipeline,
                [recipe.prompt] * len(wanting),
                [seed for _, seed in wanting],
                sampling,
            )
            refused = []
            for (index, seed), image in zip(wanting, images, strict=True):
                if image.info["blackened"]:  # never trained on: drawn again, from another noise
                    refused.append((index, image_seed(seed, attempt)))
                    continue
                path = folder / wanted[index]
                with whole(path) as temporary:
                    image.save(temporary)
                drawn[path.name] = {"seed": seed, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            wanting = refused
            if not wanting:
                break
        else:
            raise ValueError(
                f"The base's safety checker refused {recipe.prompt!r} {_ATTEMPTS} times: choose another class word."
            )
        for part in gather_object([drawn]):
            valid |= part
        if not state.is_main_process:
            continue
        manifest = {"recipe": dataclasses.asdict(recipe), "images": dict(sorted(valid.items()))}
        with whole(folder / "manifest.json") as temporary:
            temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
