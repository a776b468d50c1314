"""Exercises of notebook 11: the training pair of flow matching, and Euler's method along its path."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from dbnb.exercises.checking import Wrong, call, checked, close, compare, numbers


@checked
def check_11a(flow_pair: Callable) -> str:
    """`flow_pair(x, noise, s)`: what the network sees, and what it should answer."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 4, 3, 4, 4, generator=generator)  # as many pictures as columns: a wrong shape passes
    s = torch.tensor([0.1, 0.4, 0.7, 0.95])
    found = call(flow_pair, x, noise, s)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise Wrong("return two tensors: what the network sees, and what it should answer.")
    share = s.view(-1, 1, 1, 1)
    right, target = (1 - share) * x + share * noise, noise - x
    seen = numbers(found[0], tuple(x.shape), "The noisy batch")
    if close(seen, target) and close(numbers(found[1], tuple(x.shape), "The target"), right):
        raise Wrong("the two have changed places: what the network sees comes first, its target second.")
    compare(
        seen,
        right,
        {
            "picture and noise have changed places: at s = 0 all of it should be picture.": (
                share * x + (1 - share) * noise
            ),
            "these are diffusion's roots: on a straight line the shares themselves add up to 1.": (
                (1 - share).sqrt() * x + share.sqrt() * noise
            ),
            "the noise is added to a picture of full strength: the picture's share is `1 - s`.": x + share * noise,
            "the noise is not scaled: its share is `s`.": (1 - share) * x + noise,
            "the shares run along the width of the pictures instead of along the batch: give them the shape "
            "(B, 1, 1, 1).": (1 - s) * x + s * noise,
            "all pictures get the first one's share: each has its own.": (1 - s[0]) * x + s[0] * noise,
        },
        "x_s is `1 - s` times the picture plus `s` times the noise, picture by picture.",
    )
    compare(
        numbers(found[1], tuple(x.shape), "The target"),
        target,
        {
            "your target points from the noise to the picture: flow matching asks for the way from the picture to the "
            "noise.": -target,
            "your target is the noise, which a diffusion model is asked for: here it is the direction of the "
            "line.": noise,
            "your target is the picture: here it is the direction of the line.": x,
            "your target starts at the noisy picture: the line's direction is the same at all times.": noise - right,
            "your target is shortened by s: the direction does not depend on the time.": share * target,
            "your target is v of a diffusion model: on a straight line picture and noise count alike.": (1 - share)
            * noise
            - share * x,
        },
        "the target is the noise minus the picture, at every time.",
    )
    return "a point of the line, and the line's direction: that is all of flow matching's training."


@checked
def check_11b(euler: Callable) -> str:
    """`euler(velocity, noise, shares)`: from noise to a picture, one straight step after the other."""
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    shares, asked = [1.0, 0.7, 0.25, 0.0], []

    def direction(x: torch.Tensor, share: float) -> torch.Tensor:
        return torch.sin(2 * x) + share * x + 0.5

    def velocity(x: torch.Tensor, share: float) -> torch.Tensor:
        asked.append(float(share))
        return direction(x, share)

    def walked(step: Callable, times: list[float] = shares) -> torch.Tensor:
        """The end of a way of one `step(x, share, following)` after the other."""
        x = noise
        for share, following in pairwise(times):
            x = step(x, share, following)
        return x

    def right(x: torch.Tensor, share: float, following: float) -> torch.Tensor:
        return x + (following - share) * direction(x, share)

    found = numbers(call(euler, velocity, noise, shares, copies=False), tuple(noise.shape), "The picture")
    compare(
        found,
        walked(right),
        {
            "you walk the wrong way, to more noise: the share falls, so `following - share` is negative.": walked(
                lambda x, share, following: x - (following - share) * direction(x, share)
            ),
            "each step goes all the way to a picture, and noise is left out of the next one: go only from one share to "
            "the next.": walked(lambda x, share, following: x - share * direction(x, share)),
            "you ask for the direction at the share where a step ends: ask at the one where it begins.": walked(
                lambda x, share, following: x + (following - share) * direction(x, following)
            ),
            "you ask for the direction at the noise each time: ask at the point that you have come to.": walked(
                lambda x, share, following: x + (following - share) * direction(noise, share)
            ),
            "the last step is missing: the way ends at the share 0.": walked(right, shares[:-1]),
            "the first step is missing: the way begins at the share 1.": walked(right, shares[1:]),
            "your steps are all of one length: each is as long as its two shares are apart.": walked(
                lambda x, share, following: x - direction(x, share) / (len(shares) - 1)
            ),
            "all steps go in the first one's direction, as if the way were straight: ask the network again at each "
            "point.": noise - direction(noise, 1.0),
            "you return the noise that you began with: return the point that the last step has led to.": noise,
        },
        "each step adds (following share - share) times the direction that the network gives at the point before it.",
    )
    if len(asked) != len(shares) - 1:
        raise Wrong(f"the picture is right, but the network is asked {len(asked)} times for {len(shares) - 1} steps.")
    return "this loop draws with every network that answers with a direction."
