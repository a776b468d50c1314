"""Exercises of notebook 09: six broken runs, and an adapter file that loads without effect.

The runs are real trainings, only very small: a linear layer with a low-rank adapter (Hu et al., 2021) learns to denoise
points instead of pictures, in hundredths of a second, and each fault is made and not played.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dbnb.exercises.checking import Wrong, call, checked

FAULTS = (
    "rate too low",
    "learned by heart",
    "alpha lost",
    "halves mixed up",
    "half precision",
    "not a number",
)
ALL_IS_WELL = "all is well"
_SIZE, _RANK, _PAIRS = 12, 4, 4


@dataclass(frozen=True)
class Run:
    """What one small training has left behind. A "picture" is a point of 12 numbers, and 4 + 4 of them make a batch."""

    losses: tuple[float, ...]  # of each step
    weight: torch.Tensor  # (12, 13), frozen: what the adapter sits on
    before: tuple[torch.Tensor, torch.Tensor]  # A (4, 13) and B (12, 4) before the first step
    after: tuple[torch.Tensor, torch.Tensor]  # and after the last, in the format in which they were trained
    alpha: float  # in training
    loaded_alpha: float  # where the saved file was loaded
    photographs: torch.Tensor  # (n, 12): the instance images
    batch: (
        torch.Tensor
    )  # (8, 12): the clean pictures of one batch, whose prompts are 4 of the subject, then 4 of the class
    held_out: dict[str, tuple[float, float]]  # the loss before and after, on "photographs" and on "further" ones

    def __repr__(self) -> str:
        return f"Run({len(self.losses)} steps on {len(self.photographs)} photographs)"


def _denoise(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """What the adapted layer believes the clean points to be; a constant input stands for the prompt."""
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1).to(a.dtype)
    return x @ weight.T.to(a.dtype) + scale * (x @ a.T) @ b.T


@functools.cache
def broken_run(fault: str, seed: int = 0) -> Run:
    """Train with one of `FAULTS`, or with none of them where it is `ALL_IS_WELL`."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    subject, further_count, noise_level = draw(_SIZE), 40, 0.7
    photographs = subject + draw(1 if fault == "learned by heart" else 5, _SIZE)
    further, classes = subject + draw(further_count, _SIZE), draw(40, _SIZE)
    weight = torch.cat([torch.eye(_SIZE) / (1 + noise_level**2), torch.zeros(_SIZE, 1)], dim=1)  # denoises any point
    dtype = torch.bfloat16 if fault == "half precision" else torch.float32
    alpha = 4.0 * _RANK if fault == "alpha lost" else float(_RANK)
    rate, steps = {"rate too low": (1e-6, 40), "half precision": (1e-5, 40)}.get(
        fault, (3e-2, 120 if fault == "learned by heart" else 40)
    )
    a, b = (draw(_RANK, _SIZE + 1) / _RANK).to(dtype), torch.zeros(_SIZE, _RANK, dtype=dtype)
    before = a.clone(), b.clone()
    optimizer = torch.optim.AdamW([a.requires_grad_(), b.requires_grad_()], lr=rate, weight_decay=0.0)

    def held_out(pictures: torch.Tensor) -> float:
        noisy = pictures.repeat(20, 1)
        noisy = noisy + noise_level * torch.randn(noisy.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            return float((_denoise(noisy, weight, a, b, alpha / _RANK) - pictures.repeat(20, 1)).square().mean())

    start = {"photographs": held_out(photographs), "further": held_out(further)}
    losses = []
    for step in range(steps):
        of_subject = photographs[torch.randint(len(photographs), (_PAIRS,), generator=generator)]
        clean = torch.cat([of_subject, classes[torch.randint(len(classes), (_PAIRS,), generator=generator)]])
        if fault == "halves mixed up":
            clean = clean[[0, 4, 1, 5, 2, 6, 3, 7]]
        halves = clean[:_PAIRS] if fault == "learned by heart" else clean
        noisy = halves + noise_level * draw(*halves.shape)
        used = weight.clone()
        if fault == "not a number" and step == 5:
            used[0, 0] = torch.nan  # as an overflow in float16 makes it; mended at once, and yet too late
        loss = (_denoise(noisy, used, a, b, alpha / _RANK) - halves).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    end = {"photographs": held_out(photographs), "further": held_out(further)}
    return Run(
        losses=tuple(losses),
        weight=weight,
        before=before,
        after=(a.detach(), b.detach()),
        alpha=alpha,
        loaded_alpha=float(_RANK),
        photographs=photographs,
        batch=clean,
        held_out={name: (start[name], end[name]) for name in start},
    )


def broken_runs(seed: int = 0) -> dict[str, Run]:
    """Six runs, A to F, each with another of `FAULTS`; the seed decides which is which."""
    faults = list(FAULTS)
    random.Random(seed).shuffle(faults)
    return {letter: broken_run(fault, seed) for letter, fault in zip("ABCDEF", faults, strict=True)}


_HINTS = {
    "rate too low": "its adapter has the right format and has hardly moved: compare B A with the weight in size.",
    "learned by heart": "on further photographs its held-out loss has risen, while it fell on those it was trained on.",
    "alpha lost": "it was trained with one alpha and loaded with another: compare the two.",
    "halves mixed up": "the first half of its batch holds points that are no photographs: compare them one by one.",
    "half precision": "look at the format of its adapter before you ask how far it has moved: bfloat16 rounds small "
    "updates away.",
    "not a number": "some of its losses are not finite; a comparison such as `loss > 10` is false for `nan`, so "
    "ask `math.isfinite`.",
    ALL_IS_WELL: "nothing is wrong with it: a look that always finds something finds nothing.",
}


@checked
def check_09a(diagnose: Callable) -> str:
    """`diagnose(run)`: one of `FAULTS`, or `ALL_IS_WELL`."""
    for seed in range(2):
        for fault in (*FAULTS, ALL_IS_WELL):
            said = call(diagnose, broken_run(fault, seed))
            if said not in _HINTS:
                raise Wrong(f"a diagnosis is one of {', '.join(_HINTS)}; {said!r} is none of them.")
            if said != fault:
                raise Wrong(f"a run is called {said!r}, and it is {fault!r}: {_HINTS[fault]}")
    return "six faults and a good run, twice over, told apart by what they left behind."


@checked
def check_09b(reached: Callable) -> str:
    """`reached(keys, layers)`: the layers of a UNet that the keys of an adapter file have both matrices for."""

    def asked(keys: list[str]) -> set[str]:
        found = call(reached, keys, list(layers))
        if isinstance(found, str) or not hasattr(found, "__iter__"):
            raise Wrong(f"return the names of the layers as a set, not {type(found).__name__}.")
        return set(found)

    def of(layer: str, *matrices: str) -> list[str]:
        return [f"{layer}.lora_{matrix}.weight" for matrix in matrices]

    layers = ("down.0.attn1.to_q", "down.0.attn1.to_k", "mid.attn2.to_q", "unet.head.to_q")
    everything = [key for layer in layers for key in of(f"unet.{layer}", "A", "B")]
    found = asked(everything)
    if not found:
        raise Wrong("a good file seems to reach nothing: its keys begin with 'unet.', the names of the layers do not.")
    if any(name.endswith(".weight") for name in found):
        raise Wrong(
            "you return keys of the file: cut off '.lora_A.weight' or '.lora_B.weight', which leaves the layer."
        )
    if found == set(layers) - {"unet.head.to_q"}:
        raise Wrong(
            "you take 'unet.' out wherever it occurs, and a layer may be called so: cut it off at the beginning."
        )
    if found != set(layers):
        raise Wrong(f"a good file reaches {sorted(layers)}, and you find {sorted(found)}.")
    if asked(of(f"unet.{layers[0]}", "A") + of(f"unet.{layers[1]}", "A", "B")) != {layers[1]}:
        raise Wrong(
            "a layer counts although only one of its matrices is there: the change is B times A, so it takes both."
        )
    if asked(of("unet.other.block.to_q", "A", "B")):
        raise Wrong(
            "keys of a layer that this UNet does not have count as reached: the whole name must be one of `layers`."
        )
    if asked(of("text_encoder.down.0.attn1.to_q", "A", "B")):
        raise Wrong("keys of the text encoder count for the UNet: only those that begin with 'unet.' do.")
    if asked(of(f"transformer.{layers[0]}", "A", "B") + of(layers[1], "A", "B")):
        raise Wrong("keys with a wrong prefix, or with none, count as reached: a loader would pass over them.")
    return "an empty set would have told you that a file loads without effect."
