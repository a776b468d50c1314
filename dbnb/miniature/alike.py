"""Toys that differ from a given one by a single thing: what the identity encoder must tell apart, and is tested on.

`likeness` is the scale that the encoder's similarities are trained to: how alike two toys look, from 0 to 1.
"""

from __future__ import annotations

import colorsys
import dataclasses

import numpy as np

from dbnb import toybox
from dbnb.toybox import Toy

# What a look-alike may differ in. "patches" are the toy's own spots or stripes, run together.
DIFFERENCES = ("hue", "pattern", "patches", "accent", "accessory", "proportions")
_HUE = (20.0, 40.0)  # degrees; the nearest two named colours are 23 apart
_PROPORTION = (0.16, 0.24)  # of the head's and the body's size; toys differ by 0.26 at most


def turned(color: str | tuple[float, float, float], degrees: float) -> tuple[float, float, float]:
    """A colour with its hue turned by so many degrees."""
    hue, saturation, value = colorsys.rgb_to_hsv(*toybox.rgb(color))
    return colorsys.hsv_to_rgb((hue + degrees / 360.0) % 1.0, saturation, value)


def _has_hue(color: str | tuple[float, float, float]) -> bool:
    red, green, blue = toybox.rgb(color)
    return max(red, green, blue) - min(red, green, blue) > 0.25


def _between(bounds: tuple[float, float], rng: np.random.Generator) -> float:
    return float(rng.uniform(*bounds) * rng.choice((-1, 1)))


def differences_of(toy: Toy) -> tuple[str, ...]:
    """The `DIFFERENCES` that this toy can have: grey has no hue to turn, a plain body no pattern to run together."""
    possible = dict.fromkeys(DIFFERENCES, True)
    possible["hue"] = _has_hue(toy.body)
    possible["patches"] = toy.pattern != "plain"
    return tuple(name for name, is_possible in possible.items() if is_possible)


def look_alike(toy: Toy, difference: str, rng: np.random.Generator) -> Toy:
    """A toy that differs in one of the `DIFFERENCES`; by how much, or to what, `rng` draws."""
    if difference == "hue":
        return dataclasses.replace(toy, body=turned(toy.body, _between(_HUE, rng)))
    if difference == "pattern":
        return dataclasses.replace(toy, pattern=str(rng.choice([p for p in toybox.PATTERNS if p != toy.pattern])))
    if difference == "patches":
        return dataclasses.replace(toy, pattern=toybox.PATCHED)
    if difference == "accent":
        if _has_hue(toy.accent):
            return dataclasses.replace(toy, accent=turned(toy.accent, float(rng.uniform(40.0, 320.0))))
        return dataclasses.replace(toy, accent=colorsys.hsv_to_rgb(rng.random(), 0.8, 0.9))
    if difference == "accessory":
        others = [name for name in toybox.ACCESSORIES if name != toy.accessory]
        return dataclasses.replace(toy, accessory=str(rng.choice(others)))
    head, girth = (size - np.sign(size - 1.01) * rng.uniform(*_PROPORTION) for size in (toy.head, toy.girth))
    return dataclasses.replace(toy, head=float(head), girth=float(girth))


def _hue_between(a: str | tuple[float, float, float], b: str | tuple[float, float, float]) -> float:
    """Degrees, 0 to 180."""
    hues = [colorsys.rgb_to_hsv(*toybox.rgb(color))[0] * 360.0 for color in (a, b)]
    return abs((hues[0] - hues[1] + 180.0) % 360.0 - 180.0)


def likeness(a: Toy, b: Toy) -> float:
    """How alike two toys of a kind should be found, from 1 (the same toy) to 0; each difference takes its share.

    A body's hue 15 degrees off leaves 0.75, 30 degrees off 0.5; another pattern leaves 0.3, one that has run together
    0.35; another accent or accessory 0.4; proportions 0.2 off leave 0.6.
    """
    found = max(0.0, 1.0 - _hue_between(a.body, b.body) / 60.0) if a.body != b.body else 1.0
    if a.pattern != b.pattern:
        found *= 0.35 if toybox.PATCHED in (a.pattern, b.pattern) else 0.3
    if a.accent != b.accent:
        found *= 0.4
    if a.accessory != b.accessory:
        found *= 0.4
    return found * max(0.0, 1.0 - 2.0 * max(abs(a.head - b.head), abs(a.girth - b.girth)))
