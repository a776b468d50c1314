"""Exercises of notebook 06: the forward process, the loss, one step of the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dbnb.exercises.checking import Wrong, call, checked, close, compare, numbers


@checked
def check_06a(noisy: Callable) -> str:
    """`noisy(x0, noise, alphas, timesteps)`: each picture of a batch at its own noise level."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 3, 4, 4, generator=generator)  # as many pictures as columns: a wrong shape passes
    alphas, timesteps = torch.linspace(0.99, 0.05, 10), torch.tensor([1, 3, 6, 9])
    a = alphas[timesteps].view(-1, 1, 1, 1)
    compare(
        numbers(call(noisy, x0, noise, alphas, timesteps), tuple(x0.shape), "The noisy batch"),
        a.sqrt() * x0 + (1 - a).sqrt() * noise,
        {
            "the shares are not rooted: with the roots, the squares of the two shares add up to 1, and so do the "
            "variances.": a * x0 + (1 - a) * noise,
            "picture and noise have changed places: alpha is what is left of the picture.": (
                a.sqrt() * noise + (1 - a).sqrt() * x0
            ),
            "the noise is added to a picture of full strength: the picture is scaled by the root of alpha.": (
                x0 + (1 - a).sqrt() * noise
            ),
            "the noise's share is `1 - sqrt(alpha)`: it is `sqrt(1 - alpha)`.": a.sqrt() * x0 + (1 - a.sqrt()) * noise,
            "the levels run along the width of the pictures instead of along the batch: give them the shape "
            "(B, 1, 1, 1).": alphas[timesteps].sqrt() * x0 + (1 - alphas[timesteps]).sqrt() * noise,
            "all pictures get the first one's level: each has its own.": (
                alphas[timesteps[0]].sqrt() * x0 + (1 - alphas[timesteps[0]]).sqrt() * noise
            ),
            "the noise is not scaled: its share is the root of `1 - alpha`.": a.sqrt() * x0 + noise,
        },
        "x_t is the root of alpha times the picture plus the root of `1 - alpha` times the noise, picture by picture.",
    )
    return "any level in one go, and each picture at its own."


@checked
def check_06b(dreambooth_loss: Callable) -> str:
    """`dreambooth_loss(prediction, target, prior_loss_weight)`: instance loss plus weighted prior loss."""
    generator = torch.Generator().manual_seed(1)
    prediction, target = torch.randn(2, 4, 4, 3, 3, generator=generator)
    prediction[2:] *= 2.0
    weight = 0.3
    errors = (prediction - target) ** 2
    instance, prior = (half.mean() for half in errors.chunk(2))
    channels = [half.mean() for half in errors.chunk(2, dim=1)]
    absolute = [half.mean() for half in (prediction - target).abs().chunk(2)]
    summed = [half.sum() for half in errors.chunk(2)]
    alternating = errors[::2].mean(), errors[1::2].mean()
    compare(
        numbers(call(dreambooth_loss, prediction, target, weight), (), "The loss"),
        instance + weight * prior,
        {
            "your prior loss is averaged over both halves: chunk before the mean.": instance + weight * errors.mean(),
            "your instance loss is averaged over both halves: chunk before the mean.": errors.mean() + weight * prior,
            "the weight stands at the wrong half: the prior loss, of the second half, is the one that is "
            "weighted.": weight * instance + prior,
            "the weight is not used: multiply the prior loss by it.": instance + prior,
            "you take the mean of both halves together, so neither can be weighted: cut the batch in two "
            "first.": errors.mean(),
            "you divide by the sum of the weights, which makes the subject's share smaller as the weight grows: the "
            "loss is a plain sum.": (instance + weight * prior) / (1 + weight),
            "you cut along the channels: the halves of a batch lie along its first dimension.": (
                channels[0] + weight * channels[1]
            ),
            "you take every other picture for the class: the batch holds all instances first.": (
                alternating[0] + weight * alternating[1]
            ),
            "you add the errors up: with a mean the loss does not depend on the size of the pictures.": (
                summed[0] + weight * summed[1]
            ),
            "you take absolute differences: the loss is the mean of squares.": absolute[0] + weight * absolute[1],
        },
        "the loss is the first half's mean squared error plus the weight times the second half's.",
    )
    prediction = prediction.requires_grad_()
    if not getattr(call(dreambooth_loss, prediction, target, weight, copies=False), "requires_grad", False):
        raise Wrong("the value is right, but no gradient flows back from it: return the tensor, without `.item()`.")
    return "two means, one sum: that is DreamBooth's loss."


class _Watched(torch.optim.SGD):
    """An optimizer that notes what is done with it, and the gradients at the moment of a step."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.watched, self.gradients, self.forgotten = parameters, [], 0.0
        super().__init__(parameters, lr=0.1)

    def step(self, closure: Any = None) -> None:
        self.gradients.append([None if p.grad is None else p.grad.clone() for p in self.watched])
        super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.forgotten = sum(float(p.grad.square().sum()) for p in self.watched if p.grad is not None) ** 0.5
        super().zero_grad(set_to_none)


def _loss_of(parameters: list[torch.nn.Parameter], number: int) -> torch.Tensor:
    first, second = parameters
    return (first * torch.tensor([3.0, -4.0]) * (number + 1)).sum() + (second**2).sum() * 6.0


@checked
def check_06c(optimizer_step: Callable) -> str:
    """`optimizer_step(optimizer, parameters, loss, max_grad_norm)`: from a loss to changed weights."""
    parameters = [torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor([[0.5]]))]
    optimizer, previous = _Watched(parameters), [torch.zeros(2), torch.zeros(1, 1)]
    for number in range(2):
        loss = _loss_of(parameters, number)
        right = [grad.detach() for grad in torch.autograd.grad(loss, parameters, retain_graph=True)]
        start = [parameter.detach().clone() for parameter in parameters]
        found = call(optimizer_step, optimizer, parameters, loss, 1.0, copies=False)
        if len(optimizer.gradients) != number + 1:
            raise Wrong(f"call {number + 1} made {len(optimizer.gradients) - number} steps of the optimizer: make one.")
        if isinstance(found, torch.Tensor):
            raise Wrong("you return the loss as a tensor, which keeps the whole graph in memory: return `loss.item()`.")
        if not close(float(found), loss.detach()):
            raise Wrong(f"return the loss itself, {loss.item():g}, for the log; you return {found:g}.")
        gradients = optimizer.gradients[-1]
        left = [parameter.grad for parameter in parameters]
        if any(grad is None for grad in gradients) or not any(grad.any() for grad in gradients):
            raise Wrong(
                "the optimizer makes its step before there is a gradient: `loss.backward()` comes first."
                if any(grad is not None and grad.any() for grad in left)
                else "at the step all gradients are gone, or never were there: call `loss.backward()`, and "
                "`zero_grad` not between it and the step."
            )
        flat = torch.cat([grad.flatten() for grad in gradients])
        wanted = torch.cat([grad.flatten() for grad in right])
        summed = wanted + torch.cat([grad.flatten() for grad in previous])
        if close(flat, wanted):
            norm = sum(float(grad.square().sum()) for grad in left if grad is not None) ** 0.5 or optimizer.forgotten
            raise Wrong(
                "you clip after the step, when the weights have moved already: clip between `backward` and `step`."
                if 0 < norm <= 1.001
                else "the gradients are not clipped: their norm should be at most `max_grad_norm` when the step is "
                "made."
            )
        if close(flat, wanted.clamp(-1.0, 1.0)):
            raise Wrong(
                "you clip each number by itself, which turns the step's direction: `clip_grad_norm_` shortens it and "
                "keeps the direction."
            )
        previous = [
            torch.zeros_like(p) if grad is None else grad.clone() for p, grad in zip(parameters, left, strict=True)
        ]
        if number and not close(flat, wanted / wanted.norm()) and close(flat, summed / summed.norm()):
            raise Wrong(
                "the second step still holds the first one's gradients, since `backward` adds to what is there: call "
                "`zero_grad`."
            )
        if not close(flat, wanted / wanted.norm()):
            raise Wrong("at the step the gradients should be those of the loss, shortened to the norm `max_grad_norm`.")
        if not close(parameters[0].detach(), start[0] - 0.1 * gradients[0]):
            raise Wrong("the weights have moved by something else than the optimizer's step: leave them to it.")
    return "backward, clip, step, forget: four lines, in this order."
