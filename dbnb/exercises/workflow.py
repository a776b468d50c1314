"""Exercises of notebook 00: a fair comparison, and a number with a scale."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dbnb.exercises.checking import Wrong, call, checked, compare, numbers


@checked
def check_00a(noise_of: Callable) -> str:
    """`noise_of(seed, number, shape)`: the noise that picture `number` of a set starts from, whenever it is drawn."""
    shape = (2, 40, 40)

    def noise(seed: int, number: int) -> torch.Tensor:
        return numbers(call(noise_of, seed, number, shape), shape, "The noise")

    first = noise(0, 0)
    if not torch.equal(first, noise(0, 0)):
        raise Wrong(
            "picture 0 gets other noise when it is drawn again, so before and after cannot be compared: draw from a "
            "generator that starts from the seed and the number, not from the global one."
        )
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    noise(0, 5)
    if not (torch.equal(states[0], torch.get_rng_state()) and np.array_equal(states[1], np.random.get_state()[1])):
        raise Wrong(
            "your function moves the global generator, so whatever the program draws next depends on it: make a "
            "generator of its own for each picture."
        )
    if torch.equal(first, noise(0, 1)):
        raise Wrong("pictures 0 and 1 start from the same noise: the number has to go into the generator as well.")
    if torch.equal(first, noise(1, 0)):
        raise Wrong("the seeds 0 and 1 give the same noise: the seed has to go into the generator as well.")
    drawn: dict[bytes, tuple[int, int]] = {}
    for pair in ((seed, number) for seed in range(4) for number in range(4)):
        other = drawn.setdefault(noise(*pair).numpy().tobytes(), pair)
        if other != pair:
            raise Wrong(
                f"picture {other[1]} of seed {other[0]} and picture {pair[1]} of seed {pair[0]} share their noise: a "
                "sum of seed and number does not tell them apart; give the generator both."
            )
    mean, deviation = float(first.mean()), float(first.std())
    if abs(mean) > 0.1 or abs(deviation - 1) > 0.1:
        raise Wrong(
            f"your noise has the mean {mean:.2f} and the deviation {deviation:.2f}: diffusion starts from a standard "
            "normal distribution, with mean 0 and deviation 1."
        )
    return "each picture has noise of its own, and it is the same before and after training."


@checked
def check_00b(normalized: Callable) -> str:
    """`normalized(after, floor, ceiling)`: 0 at the floor, 1 at the ceiling."""
    after, floor, top = 0.62, 0.35, 0.83
    compare(
        numbers(call(normalized, after, floor, top), (), "The result"),
        (after - floor) / (top - floor),
        {
            "you divide by the ceiling alone, and the base without training would not get 0: subtract the floor first, "
            "from both.": after / top,
            "the numerator is right, but you divide by the ceiling: divide by the whole way, ceiling minus floor.": (
                (after - floor) / top
            ),
            "that is the gain over the floor, without a scale: divide it by the whole way, ceiling minus floor.": after
            - floor,
            "you measure what is still missing: 0 should be the floor and 1 the ceiling.": (
                (top - after) / (top - floor)
            ),
            "you take 1 as the best possible, but even real photographs of the toy do not reach 1: take the ceiling.": (
                (after - floor) / (1 - floor)
            ),
        },
        "0 should be the floor and 1 the ceiling: how far is `after` on the way from one to the other?",
    )
    if close_to_one := [v for v in (0.9, 0.2) if abs(_beyond(normalized, v, floor, top)) > 1e-6]:
        raise Wrong(
            f"at after = {close_to_one[0]} your number is cut off: a result above the ceiling or below the floor is "
            "news, so let it show."
        )
    return "the floor is 0, the ceiling 1, and what lies beyond them shows."


def _beyond(normalized: Callable, after: float, floor: float, top: float) -> float:
    """How far the answer is from the right one, for a value outside of floor and ceiling."""
    return float(numbers(call(normalized, after, floor, top), (), "The result") - (after - floor) / (top - floor))
