"""What a toy is: a kind, colours, a pattern, an accessory and two proportions, turned into solid parts."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

KINDS = ("dog", "cat", "duck", "robot", "car", "teapot")
PATTERNS = ("plain", "spotted", "striped")
# Spots run together, as a model draws them that has not learned the toy. No toy of the world is drawn at random with
# it: the identity encoder learns to tell it from spots.
PATCHED = "patched"
ACCESSORIES = ("none", "hat", "scarf")
# Eight hues that stay apart in any of the scenes' lights, at 64 px and after the autoencoder.
COLORS = {
    "red": (0.84, 0.11, 0.11),
    "orange": (0.97, 0.53, 0.08),
    "yellow": (0.98, 0.87, 0.16),
    "green": (0.13, 0.62, 0.20),
    "blue": (0.13, 0.35, 0.88),
    "purple": (0.52, 0.20, 0.75),
    "pink": (0.98, 0.56, 0.74),
    "white": (0.95, 0.95, 0.95),
}

# The shapes that `render.distance` knows.
CAPSULE, ELLIPSOID, BOX, CYLINDER_Y, CYLINDER_Z, TORUS_Z, TORUS_Y = range(7)
# What a part is made of. Only BODY carries the pattern and is blended smoothly with its neighbours.
BODY, ACCENT, BLACK, EYE, BEAK, GLASS, LAMP = range(7)


@dataclass(frozen=True)
class Toy:
    """One particular toy. Two photographs show the same toy exactly when their `Toy` is equal.

    `body` and `accent` are names from `COLORS`, "#rrggbb", or any (r, g, b) in [0, 1]; the accent colours ears, wings,
    handle, the pattern and the accessory. `head` and `girth` scale the head and the body (0.85 to 1.15 look natural).
    """

    kind: str
    body: str | tuple[float, float, float] = "red"
    accent: str | tuple[float, float, float] = "white"
    pattern: str = "plain"
    accessory: str = "none"
    head: float = 1.0
    girth: float = 1.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("pattern", self.pattern, (*PATTERNS, PATCHED)),
            ("accessory", self.accessory, ACCESSORIES),
        ):
            if value not in known:
                raise ValueError(f"Toy({name}={value!r}) is unknown: choose one of {', '.join(known)}.")
        for name in ("head", "girth"):
            if not 0.6 <= getattr(self, name) <= 1.4:
                raise ValueError(f"Toy({name}={getattr(self, name)!r}) is outside 0.6 to 1.4.")
        rgb(self.body), rgb(self.accent)


def rgb(color: str | tuple[float, float, float]) -> tuple[float, float, float]:
    """A colour's name, "#rrggbb", or three numbers -> three numbers in [0, 1]. Raises ValueError for anything else."""
    if isinstance(color, str):
        if re.fullmatch("#[0-9a-fA-F]{6}", color):
            return tuple(int(color[start : start + 2], 16) / 255 for start in (1, 3, 5))
        if color not in COLORS:
            raise ValueError(
                f"Colour {color!r} is unknown: choose one of {', '.join(COLORS)}, or give '#rrggbb' or (r, g, b)."
            )
        return COLORS[color]
    if len(color) != 3 or not all(0.0 <= float(c) <= 1.0 for c in color):
        raise ValueError(f"Colour {color!r} is not (r, g, b) with numbers from 0 to 1.")
    return tuple(float(c) for c in color)


def shade_of(name: str, rng: np.random.Generator) -> tuple[float, float, float]:
    """One toy's own shade of a named colour: close enough to keep the name, far enough to tell two toys apart."""
    return tuple(float(np.clip(c + rng.uniform(-0.045, 0.045), 0.0, 1.0)) for c in COLORS[name])


def named_toy(kind: str, body: str, accent: str, pattern: str, accessory: str, seed: int | np.random.Generator) -> Toy:
    """A toy of the named attributes whose exact shades and proportions are drawn from `seed`."""
    rng = np.random.default_rng(seed)
    head, girth = rng.uniform(0.88, 1.14), rng.uniform(0.88, 1.14)
    return Toy(kind, shade_of(body, rng), shade_of(accent, rng), pattern, accessory, float(head), float(girth))


def random_attributes(rng: np.random.Generator) -> tuple[str, str, str, str]:
    """(body, accent, pattern, accessory): two different colour names, a pattern, an accessory.

    Scarves go with plain toys: on spots or stripes of its own colour a scarf cannot be told at 64 px.
    """
    body, accent = rng.choice(list(COLORS), size=2, replace=False)
    pattern = rng.choice(PATTERNS, p=(0.5, 0.25, 0.25))
    accessory = rng.choice(ACCESSORIES, p=(0.35, 0.2, 0.45) if pattern == "plain" else (0.6, 0.4, 0.0))
    return str(body), str(accent), str(pattern), str(accessory)


def random_toy(kind: str, seed: int) -> Toy:
    """Draw one toy of a kind; the same (kind, seed) is the same toy. Raises ValueError for a kind that there is not."""
    if kind not in KINDS:
        raise ValueError(f"Toy kind {kind!r} is unknown: choose one of {', '.join(KINDS)}.")
    rng = np.random.default_rng((KINDS.index(kind), seed))
    return named_toy(kind, *random_attributes(rng), rng)


def parts(toy: Toy) -> np.ndarray:
    """The toy as solid parts: (n, 11) rows of shape, material, mirrored, and the shape's eight numbers.

    The toy stands on y = 0 at the origin and looks along +x; a mirrored part stands at +z and at -z.
    """
    rows, crown, neck = _BUILDERS[toy.kind](toy.head, toy.girth)
    if toy.accessory == "hat":
        x, y, r = crown
        rows += [
            _cylinder(ACCENT, (x, y + 0.02, 0), 1.15 * r, 0.04),
            _cylinder(ACCENT, (x, y + 0.18, 0), 0.74 * r, 0.16),
        ]
    elif toy.accessory == "scarf":
        x, y, r, front = neck
        rows += [
            (TORUS_Y, ACCENT, 0, x, y, 0, r, 0.13, 0, 0, 0),
            _capsule(ACCENT, (front, y - 0.02, 0.15), (front + 0.06, y - 0.42, 0.20), 0.11, 0.13),
        ]
    return np.array(rows, dtype=np.float64)


def _capsule(material, a, b, ra, rb, mirrored=0):
    return (CAPSULE, material, mirrored, *a, *b, ra, rb)


def _ellipsoid(material, center, radii, mirrored=0):
    return (ELLIPSOID, material, mirrored, *center, *radii, 0, 0)


def _ball(material, center, radius, mirrored=0):
    return _capsule(material, center, center, radius, radius, mirrored)


def _box(material, center, half, rounding, mirrored=0):
    return (BOX, material, mirrored, *center, *half, rounding, 0)


def _cylinder(material, center, radius, half_height, mirrored=0, shape=CYLINDER_Y):
    return (shape, material, mirrored, *center, radius, half_height, 0.02, 0, 0)


# Each builder returns (parts, crown, neck): crown (x, y, r) carries a hat, neck (x, y, r, front) a scarf.


def _dog(head, girth):
    h, g = 0.34 * head, 0.26 * girth
    rows = [
        _capsule(BODY, (-0.50, 0.56, 0), (0.16, 0.58, 0), g, g),
        _capsule(BODY, (-0.50, 0.10, 0.16), (-0.50, 0.5, 0.13), 0.10, 0.12, mirrored=1),
        _capsule(BODY, (0.16, 0.10, 0.16), (0.16, 0.5, 0.13), 0.10, 0.12, mirrored=1),
        _ball(BODY, (0.32, 1.05, 0), h),
        _capsule(BODY, (0.46, 0.98, 0), (0.46 + h, 0.94, 0), 0.17, 0.13),
        _capsule(ACCENT, (-0.72, 0.68, 0), (-0.96, 1.06, 0), 0.09, 0.06),
        _ellipsoid(ACCENT, (0.24, 0.98, h + 0.01), (0.13, 0.29, 0.09), mirrored=1),
        _ball(BLACK, (0.58 + h, 1.0, 0), 0.08),
        _ball(BLACK, (0.32 + 0.80 * h, 1.05 + 0.46 * h, 0.42 * h), 0.065, mirrored=1),
    ]
    return rows, (0.30, 1.02 + h, 0.30), (0.22, 0.78, 0.21, 0.38)


def _cat(head, girth):
    h, g = 0.35 * head, 0.38 * girth
    rows = [
        _capsule(BODY, (-0.10, 0.36, 0), (0.10, 0.72, 0), g, 0.24),
        _ellipsoid(BODY, (0.05, 0.18, 0.26), (0.30, 0.20, 0.15), mirrored=1),
        _capsule(BODY, (0.34, 0.10, 0.13), (0.24, 0.52, 0.12), 0.10, 0.11, mirrored=1),
        _ball(BODY, (0.18, 1.10, 0), h),
        _capsule(ACCENT, (0.14, 1.08 + 0.72 * h, 0.56 * h), (0.12, 1.08 + 1.36 * h, 0.76 * h), 0.15, 0.03, mirrored=1),
        _capsule(ACCENT, (-0.44, 0.12, 0), (-0.74, 0.22, 0), 0.09, 0.08),
        _capsule(ACCENT, (-0.74, 0.22, 0), (-0.80, 0.72, 0), 0.08, 0.07),
        _ball(EYE, (0.18 + 0.80 * h, 1.14, 0.42 * h), 0.10, mirrored=1),
        _ball(BLACK, (0.24 + 0.86 * h, 1.15, 0.44 * h), 0.062, mirrored=1),
        _ball(BLACK, (0.18 + 1.02 * h, 1.02, 0), 0.05),
    ]
    return rows, (0.16, 1.06 + h, 0.28), (0.13, 0.80, 0.25, 0.36)


def _duck(head, girth):
    h, g = 0.32 * head, girth
    rows = [
        _ellipsoid(BODY, (0, 0.50, 0), (0.54, 0.40 * g, 0.42 * g)),
        _capsule(BODY, (-0.36, 0.58, 0), (-0.70, 0.86, 0), 0.20, 0.05),
        _capsule(BODY, (0.26, 0.72, 0), (0.34, 1.0, 0), 0.24, 0.20),
        _ball(BODY, (0.36, 1.12, 0), h),
        _ellipsoid(BEAK, (0.42 + h, 1.06, 0), (0.26, 0.08, 0.18)),
        _ellipsoid(ACCENT, (-0.08, 0.56, 0.40 * g), (0.32, 0.22, 0.10), mirrored=1),
        _ellipsoid(BEAK, (0.10, 0.07, 0.20), (0.24, 0.07, 0.14), mirrored=1),
        _ball(BLACK, (0.36 + 0.76 * h, 1.12 + 0.42 * h, 0.50 * h), 0.065, mirrored=1),
    ]
    return rows, (0.34, 1.08 + h, 0.29), (0.32, 0.84, 0.25, 0.54)


def _robot(head, girth):
    h, g = head, girth
    top = 0.98 + 0.42 * h
    rows = [
        _box(BODY, (0, 0.60, 0), (0.24 * g, 0.28, 0.30 * g), 0.06),
        _box(BODY, (0, 0.98 + 0.21 * h, 0), (0.25 * h, 0.20 * h, 0.29 * h), 0.06),
        _capsule(ACCENT, (0, 0.78, 0.30 * g + 0.12), (0.08, 0.40, 0.30 * g + 0.15), 0.09, 0.10, mirrored=1),
        _box(BODY, (0.0, 0.24, 0.16), (0.10, 0.14, 0.09), 0.03, mirrored=1),
        _box(ACCENT, (0.06, 0.07, 0.17), (0.19, 0.07, 0.12), 0.03, mirrored=1),
        _box(ACCENT, (0.24 * g, 0.62, 0), (0.04, 0.14, 0.17), 0.01),
        _ball(EYE, (0.25 * h, 1.0 + 0.24 * h, 0.13 * h), 0.10, mirrored=1),
        _ball(BLACK, (0.25 * h + 0.07, 1.0 + 0.24 * h, 0.13 * h), 0.055, mirrored=1),
        _capsule(BLACK, (0, top - 0.05, 0), (0, top + 0.16, 0), 0.03, 0.03),
        _ball(ACCENT, (0, top + 0.20, 0), 0.075),
    ]
    return rows, (0, top, 0.29), (0, 0.92, 0.23, 0.24)


def _car(head, girth):
    h, g = head, girth
    rows = [
        _box(BODY, (0, 0.42, 0), (0.80, 0.18, 0.40 * g), 0.10),
        _box(BODY, (-0.10, 0.60 + 0.18 * h, 0), (0.42, 0.22 * h, 0.34 * g), 0.10),
        _box(GLASS, (-0.10, 0.62 + 0.18 * h, 0), (0.435, 0.115 * h, 0.26 * g), 0.03),
        _box(GLASS, (-0.10, 0.62 + 0.18 * h, 0), (0.32, 0.115 * h, 0.355 * g), 0.03),
        _box(ACCENT, (0, 0.34, 0), (0.83, 0.06, 0.425 * g), 0.03),
        _cylinder(BLACK, (-0.46, 0.22, 0.37 * g), 0.22, 0.09, mirrored=1, shape=CYLINDER_Z),
        _cylinder(BLACK, (0.48, 0.22, 0.37 * g), 0.22, 0.09, mirrored=1, shape=CYLINDER_Z),
        _cylinder(ACCENT, (-0.46, 0.22, 0.38 * g), 0.11, 0.10, mirrored=1, shape=CYLINDER_Z),
        _cylinder(ACCENT, (0.48, 0.22, 0.38 * g), 0.11, 0.10, mirrored=1, shape=CYLINDER_Z),
        _ball(LAMP, (0.80, 0.48, 0.25 * g), 0.09, mirrored=1),
    ]
    return rows, (-0.10, 0.57 + 0.40 * h, 0.30), (-0.10, 0.64, 0.44, 0.46)


def _teapot(head, girth):
    h, g = head, girth
    rows = [
        _ellipsoid(BODY, (0, 0.52, 0), (0.52 * g, 0.44, 0.52 * g)),
        _cylinder(ACCENT, (0, 0.06, 0), 0.34, 0.06),
        _ellipsoid(ACCENT, (0, 0.92, 0), (0.30 * h, 0.13, 0.30 * h)),
        _ball(ACCENT, (0, 1.10, 0), 0.10 * h),
        _capsule(BODY, (0.36, 0.42, 0), (0.88, 0.92, 0), 0.17, 0.08),
        (TORUS_Z, ACCENT, 0, -0.58 * g, 0.56, 0, 0.26, 0.075, 0, 0, 0),
    ]
    return rows, (0, 1.06, 0.31), (0, 0.66, 0.46 * g, 0.50 * g)


_BUILDERS = {"dog": _dog, "cat": _cat, "duck": _duck, "robot": _robot, "car": _car, "teapot": _teapot}
