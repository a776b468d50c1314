"""Exercises of notebook 04: LoRA as a module, and merged into the weight."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from dbnb.exercises.checking import NotWritten, Wrong, call, checked, close, compare, numbers

_RANK, _ALPHA = 2, 6.0


def _layers() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """A layer of each kind, and what to send through it."""
    generator = torch.Generator().manual_seed(0)
    layers = {
        "a linear layer": (nn.Linear(6, 5), torch.randn(4, 6, generator=generator)),
        "a convolution": (nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.randn(2, 3, 7, 7, generator=generator)),
    }
    for layer, _ in layers.values():
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return layers


def _answer(module: nn.Module, x: torch.Tensor, kind: str) -> torch.Tensor:
    """What the learner's module says, as `call` would tell it."""
    try:
        found = module(x.clone())
    except RuntimeError as error:
        if "convolution" in kind:
            raise Wrong(
                "on a convolution the adapter's output does not fit the layer's: A needs the layer's kernel size, "
                "stride and padding, and B a kernel of 1 x 1."
            ) from error
        raise Wrong(f"on {kind} `forward` stops with {type(error).__name__}: {error}") from error
    except Exception as error:
        raise Wrong(f"on {kind} `forward` stops with {type(error).__name__}: {error}") from error
    if found is None:
        raise NotWritten("`forward` returns nothing. Replace the `...` with your own lines.")
    return found


@checked
def check_04a(adapted_class: Callable) -> str:
    """`LoRA(layer, rank, alpha)`: a linear layer or a convolution with a low-rank adapter, equal to peft's."""
    for kind, (layer, x) in _layers().items():
        plain = layer(x).detach()
        mine = call(adapted_class, copy.deepcopy(layer), _RANK, _ALPHA, copies=False)
        found = _answer(mine, x, kind)
        if not (isinstance(getattr(mine, "A", None), nn.Module) and isinstance(getattr(mine, "B", None), nn.Module)):
            raise Wrong("keep the two thin layers as `self.A` and `self.B`, so that they can be found.")
        if mine.A.bias is not None or mine.B.bias is not None:
            raise Wrong("your A or B has a bias, which LoRA does not have: give both `bias=False`.")
        found = numbers(found, tuple(plain.shape), f"The answer on {kind}")
        if not found.any():
            raise Wrong("the layer's own answer is missing: LoRA adds to it.")
        if not close(found, plain):
            raise Wrong(f"on {kind} an untrained adapter changes the answer already: B has to start at zero.")
        if not mine.A.weight.any():
            raise Wrong("A starts at zero like B, and then neither would ever get a gradient: draw A at random.")
        own = {id(parameter) for part in (mine.A, mine.B) for parameter in part.parameters()}
        if any(parameter.requires_grad and id(parameter) not in own for parameter in mine.parameters()):
            raise Wrong("the layer itself would be trained too: freeze it with `requires_grad_(False)`.")
        for seed, part in enumerate((mine.A, mine.B)):
            part.weight.data = torch.randn(part.weight.shape, generator=torch.Generator().manual_seed(seed))
        config = LoraConfig(r=_RANK, lora_alpha=_ALPHA, target_modules=["layer"])
        theirs = inject_adapter_in_model(config, nn.ModuleDict({"layer": copy.deepcopy(layer)}))["layer"]
        if theirs.lora_A["default"].weight.shape != mine.A.weight.shape:
            raise Wrong(
                f"on {kind} A should have a weight of {tuple(theirs.lora_A['default'].weight.shape)}, and has one of "
                f"{tuple(mine.A.weight.shape)}."
            )
        theirs.lora_A["default"].weight.data = mine.A.weight.data
        theirs.lora_B["default"].weight.data = mine.B.weight.data
        right = theirs(x).detach()
        added = (right - plain) * _RANK / _ALPHA
        found = numbers(_answer(mine, x, kind), tuple(right.shape), f"The answer on {kind}")
        compare(
            found,
            right,
            {
                "the change is not scaled: multiply it by alpha / rank.": plain + added,
                "the change is multiplied by alpha alone: it is alpha / rank, so that the rank can be changed without "
                "changing the strength.": plain + _ALPHA * added,
                "the scale is turned round: it is alpha / rank.": plain + _RANK / _ALPHA * added,
            },
            f"on {kind} your answer is not peft's: it should be the layer's answer plus alpha / rank times B(A(x)).",
        )
    return "your module says what peft's says, on a linear layer and on a convolution."


@checked
def check_04b(merged: Callable) -> str:
    """`merged(weight, A, B, alpha)`: the weight of a plain layer that answers as the adapted one does."""
    generator = torch.Generator().manual_seed(1)
    alpha, rank, side = 6.0, 2, 5
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((side, side), (rank, side), (side, rank)))
    given = weight.clone()
    found = numbers(call(merged, given, a, b, alpha, copies=False), (side, side), "The merged weight")
    if not torch.equal(given, weight):
        raise Wrong(
            "your function changes the weight that it is given, and merging twice would count twice: make a new one."
        )
    change = b @ a
    compare(
        found,
        weight + alpha / rank * change,
        {
            "the change is not scaled: multiply it by alpha / rank.": weight + change,
            "the change is multiplied by alpha alone: divide by the rank, which is A's number of rows.": (
                weight + alpha * change
            ),
            "you divide by A's number of columns: the rank is its number of rows.": weight + alpha / side * change,
            "you return the change alone: add it to the weight.": alpha / rank * change,
            "the product is transposed: B, whose rows are the outputs, stands first.": weight + alpha / rank * change.T,
        },
        "the merged weight is the weight plus alpha / rank times B A.",
    )
    kernel = torch.randn(4, 3, 3, 3, generator=generator)
    a, b = torch.randn(rank, 3, 3, 3, generator=generator), torch.randn(4, rank, 1, 1, generator=generator)
    try:
        found = merged(kernel.clone(), a, b, alpha)
    except Exception as error:
        raise Wrong(
            f"on the kernel of a convolution it stops with {type(error).__name__}: write both kernels as matrices "
            "(`flatten(1)`), multiply, and give the product the shape of the weight."
        ) from error
    right = kernel + alpha / rank * (b.flatten(1) @ a.flatten(1)).view_as(kernel)
    if not close(numbers(found, tuple(kernel.shape), "The merged kernel"), right):
        raise Wrong(
            "on the kernel of a convolution the numbers are not right: multiply B and A as matrices, `flatten(1)`."
        )
    return "merged, the adapter costs nothing when the model draws."
