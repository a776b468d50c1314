"""The miniature's training set: numbered photographs from the toy world, rendered once and kept in a file."""

from __future__ import annotations

import colorsys
import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dbnb import toybox
from dbnb.miniature.alike import differences_of, likeness, look_alike
from dbnb.toybox.captions import caption

# Number ranges of the splits: a test toy is never a training toy. "wild" toys have any colours, which no caption names:
# with them the model can paint, and the identity encoder tell apart, what the eight names do not cover.
_SPLITS = {"train": 0, "test": 1, "wild": 2}
_WORLD = 4  # raised whenever the same number shows another picture, so that old files are not read
SIZE = 64  # pixels to a side of a photograph
SHOTS = 2  # photographs of each toy, in different places: pairs for the identity encoder
CHUNK = 6000  # photographs a file
ALIKE = 6  # a toy and its look-alikes, for the identity encoder
ALIKE_SIZE = 128  # pixels to a side of their photographs: the encoder's first layers keep a quarter of them
SCENE_NAMES = tuple(toybox.SCENES)
COLOR_NAMES = tuple(toybox.COLORS)
UNNAMED = len(COLOR_NAMES)  # the label of a colour without a name
# The columns of a label row, each with the names that its numbers stand for.
ATTRIBUTES = {
    "kind": toybox.KINDS,
    "body": COLOR_NAMES,
    "accent": COLOR_NAMES,
    "pattern": toybox.PATTERNS,
    "accessory": toybox.ACCESSORIES,
    "scene": SCENE_NAMES,
}


def held_out(kind: str, body: str, scene: str) -> bool:
    """Whether a combination never occurs in training, so that composition can be tested: about one in ten."""
    k, b, s = toybox.KINDS.index(kind), COLOR_NAMES.index(body), SCENE_NAMES.index(scene)
    return (3 * k + 5 * b + 7 * s) % 10 == 0


def draw(split: str, index: int) -> tuple[toybox.Toy, dict[str, str], int]:
    """Photograph number `index` of a split: (toy, attribute names, view seed). A pure function of its arguments.

    A colour without a name is "".
    """
    of_toy = np.random.default_rng((_SPLITS[split], index // SHOTS))
    # Never 0 in the last place: numpy pads seeds with zeros, and (s, t, 0) would draw what (s, t) drew.
    of_shot = np.random.default_rng((_SPLITS[split], index // SHOTS, 1 + index % SHOTS))
    kind = str(of_toy.choice(toybox.KINDS))
    body, accent, pattern, accessory = toybox.random_attributes(of_toy)
    toy = toybox.named_toy(kind, body, accent, pattern, accessory, of_toy)
    if split == "wild":
        toy = dataclasses.replace(toy, body=_any_color(of_toy), accent=_any_color(of_toy))
        body = accent = ""
    scenes = [s for s in SCENE_NAMES if split != "train" or not held_out(kind, body, s)]
    names = dict(
        kind=kind, body=body, accent=accent, pattern=pattern, accessory=accessory, scene=str(of_shot.choice(scenes))
    )
    return toy, names, int(of_shot.integers(2**31))


def _any_color(rng: np.random.Generator) -> tuple[float, float, float]:
    """Any hue, seldom grey, never near black."""
    return colorsys.hsv_to_rgb(rng.random(), 1.0 - 0.7 * rng.random() ** 2, rng.uniform(0.4, 1.0))


def labels_of(names: dict[str, str]) -> np.ndarray:
    """Attribute names -> (6,) uint8 numbers, in the order of `ATTRIBUTES`."""
    numbers = [values.index(names[key]) if names[key] else UNNAMED for key, values in ATTRIBUTES.items()]
    return np.array(numbers, dtype=np.uint8)


def names_of(labels: np.ndarray) -> dict[str, str]:
    """A row of labels, (6,) -> attribute names, "" for a colour without one."""
    return {key: (*values, "")[min(labels[i], len(values))] for i, (key, values) in enumerate(ATTRIBUTES.items())}


def caption_of(labels: np.ndarray, rng: np.random.Generator) -> str:
    """A row of labels, (6,) -> one caption, another one each time: a picture has many captions."""
    return caption(**names_of(labels), rng=rng)


def _file(split: str, count: int, folder: Path, start: int, size: int) -> Path:
    name = f"{split}-{start}-{count}" if size == SIZE else f"{split}-{start}-{count}-{size}px"
    return folder / f"{name}-v{_WORLD}.npz"


def is_kept(split: str, count: int, folder: Path, *, start: int = 0, size: int = SIZE) -> bool:
    """Whether `photographs` would read these and not render them."""
    return _file(split, count, folder, start, size).exists()


def photographs(
    split: str, count: int, folder: Path, *, start: int = 0, size: int = SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """(count, size, size, 3) uint8 pictures and (count, 6) uint8 labels.

    Rendered on all cores, then read from `folder`.
    """
    path = _file(split, count, folder, start, size)
    if not path.exists():
        shots = [draw(split, start + i) for i in range(count)]
        images = rendered([(toy, names["scene"], seed) for toy, names, seed in shots], size)
        _keep(path, images=images, labels=np.stack([labels_of(names) for _, names, _ in shots]))
    with np.load(path) as file:
        return file["images"], file["labels"]


def group(split: str, number: int) -> tuple[list[toybox.Toy], np.random.Generator]:
    """Toy `number` of a split and the look-alikes that differ from it by one thing each, `ALIKE` in all.

    The generator draws what is left to draw: where and from where each is photographed.
    """
    toy, rng = draw(split, number * SHOTS)[0], np.random.default_rng((_SPLITS[split], number, 0, 1))
    possible = rng.permutation(differences_of(toy))
    differences = [str(possible[i % len(possible)]) for i in range(ALIKE - 1)]
    return [toy, *(look_alike(toy, difference, rng) for difference in differences)], rng


def look_alikes(split: str, count: int, folder: Path, *, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(count, `ALIKE`, `SHOTS`, 128, 128, 3) uint8 photographs, and (count, `ALIKE`, `ALIKE`) their likeness.

    Every shot has a scene and a view of its own. Rendered on all cores, one ray a pixel, then read from `folder`.
    """
    path = folder / f"alike-{split}-{start}-{count}-{ALIKE_SIZE}px-v{_WORLD}.npz"
    groups = [group(split, number) for number in range(start, start + count)]
    if not path.exists():
        shots = [
            (member, str(scene), int(rng.integers(2**31)))
            for members, rng in groups
            for member in members
            for scene in rng.choice(SCENE_NAMES, SHOTS, replace=False)
        ]
        pictures = rendered(shots, ALIKE_SIZE, supersample=1)
        _keep(path, images=pictures.reshape(count, ALIKE, SHOTS, *pictures.shape[1:]))
    alike = np.array([[[likeness(a, b) for b in members] for a in members] for members, _ in groups], np.float32)
    with np.load(path) as file:
        return file["images"], alike


def rendered(shots: Sequence[tuple[toybox.Toy, str, int]], size: int = SIZE, *, supersample: int = 2) -> np.ndarray:
    """(toy, scene, view seed) of each photograph -> (N, size, size, 3) uint8, on all cores."""

    def shoot(shot: tuple[toybox.Toy, str, int]) -> np.ndarray:
        toy, scene, seed = shot
        return toybox.pixels(toy, scene=scene, seed=seed, size=size, supersample=supersample)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiled renderer releases the interpreter's lock
        return np.stack(list(pool.map(shoot, shots, chunksize=64)))


def _keep(path: Path, **arrays: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)
