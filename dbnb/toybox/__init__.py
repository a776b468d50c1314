"""The toy world: photographs of toys, rendered here, so that the truth about every picture is known.

    >>> toy = Toy(kind="dog", body="red", accent="blue", pattern="spotted", accessory="hat")
    >>> photograph(toy, scene="beach", seed=0, size=256)

Built in notebook 01.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from dbnb.toybox.scenes import SCENES
from dbnb.toybox.toys import (
    ACCESSORIES,
    COLORS,
    KINDS,
    PATCHED,
    PATTERNS,
    Toy,
    named_toy,
    parts,
    random_attributes,
    random_toy,
    rgb,
)

__all__ = [
    "ACCESSORIES",
    "COLORS",
    "KINDS",
    "PATCHED",
    "PATTERNS",
    "SCENES",
    "Toy",
    "mask",
    "named_toy",
    "photograph",
    "pixels",
    "random_attributes",
    "random_toy",
    "rgb",
]


def photograph(toy: Toy, *, scene: str = "beach", seed: int = 0, size: int = 128, supersample: int = 2) -> Image.Image:
    """Photograph a toy in a scene; `seed` draws camera, light and where the landmarks stand.

    The same arguments give the same picture at any size. Raises ValueError for an unknown scene or a size below 8.
    """
    return Image.fromarray(pixels(toy, scene=scene, seed=seed, size=size, supersample=supersample))


def mask(toy: Toy, *, seed: int = 0, size: int = 128, supersample: int = 2) -> Image.Image:
    """Where the toy is in `photograph(toy, seed=seed)`, whatever the scene: white on black, grey at its edges.

    Raises ValueError for a size below 8.
    """
    if size < 8 or supersample < 1:
        raise ValueError(f"size={size}, supersample={supersample}: size must be at least 8 and supersample at least 1.")
    from dbnb.toybox.render import silhouette  # as below

    return Image.fromarray(silhouette(parts(toy), _view(seed), size, supersample))


def pixels(toy: Toy, *, scene: str, seed: int, size: int = 128, supersample: int = 2) -> np.ndarray:
    """The photograph as an array: (size, size, 3) uint8. Raises ValueError for a scene or size that there is not."""
    if scene not in SCENES:
        raise ValueError(f"Scene {scene!r} is unknown: choose one of {', '.join(SCENES)}.")
    if size < 8 or supersample < 1:
        raise ValueError(f"size={size}, supersample={supersample}: size must be at least 8 and supersample at least 1.")
    from dbnb.toybox.render import render  # numba takes a second to import: only a caller that renders pays for it

    body, accent = np.array(rgb(toy.body)), np.array(rgb(toy.accent))
    scene_number, pattern = list(SCENES).index(scene), (*PATTERNS, PATCHED).index(toy.pattern)
    return render(parts(toy), body, accent, pattern, scene_number, _view(seed), size, supersample)


def _view(seed: int) -> tuple[float, ...]:
    """Where camera and light stand: a narrow range around a three-quarter view, so that a small model can learn it."""
    rng = np.random.default_rng(seed)
    degrees = np.pi / 180.0
    return (
        rng.uniform(18, 58) * degrees,  # azimuth: 0 is the toy's side, 90 its face
        rng.uniform(9, 17) * degrees,  # elevation
        rng.uniform(0.95, 1.08),  # zoom
        rng.uniform(-0.06, 0.06),  # shift
        rng.uniform(-0.05, 0.05),
        rng.uniform(-55, 55) * degrees,  # light azimuth, from the camera
        rng.uniform(40, 55) * degrees,  # light elevation
        rng.uniform(0.26, 0.40),  # horizon
        rng.uniform(0.0, 1.0),  # phase
    )
