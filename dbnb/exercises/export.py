"""Exercises of notebook 07: an adapter's strength, and whether two sets of pictures are the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from torch import nn

from dbnb.exercises.checking import Wrong, call, checked, close, numbers

_RANK, _ALPHA = 3, 12.0


def _adapted() -> nn.ModuleDict:
    """Two adapted layers, one of them nested, and one without an adapter."""
    generator = torch.Generator().manual_seed(0)
    block = nn.ModuleDict({"to_q": nn.Linear(4, 4), "norm": nn.Linear(4, 4)})
    model = nn.ModuleDict({"to_q": nn.Linear(4, 4), "block": block})
    config = LoraConfig(r=_RANK, lora_alpha=_ALPHA, target_modules=["to_q"], init_lora_weights=False)
    model = inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


@checked
def check_07a(set_strength: Callable) -> str:
    """`set_strength(model, strength)`: turns all adapters of a model up or down, and returns how many there are."""
    model, x = _adapted(), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    layers = {"the first layer": model["to_q"], "the nested layer": model["block"]["to_q"]}
    trained = {name: value.detach().clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        plain = {name: layer.base_layer(x) for name, layer in layers.items()}
        added = {n: layer.lora_B["default"](layer.lora_A["default"](x)) for n, layer in layers.items()}
        counted = call(set_strength, model, 0.5, copies=False)
        if any(not torch.equal(value, trained[name]) for name, value in model.state_dict().items()):
            raise Wrong(
                "the weights themselves have changed, so the trained adapter is lost: a layer's strength is its "
                "`scaling['default']`."
            )
        for strength in (0.5, 1.0, 0.0, 1.5):
            call(set_strength, model, strength, copies=False)
            for name, layer in layers.items():
                found, full = layer(x), _ALPHA / _RANK
                if close(found, plain[name] + strength * full * added[name]):
                    continue
                if strength == 0.5 and close(found, plain[name] + full * added[name]):
                    raise Wrong(
                        f"{name} is as strong as before: walk through `model.modules()`, which are all of them."
                    )
                if close(found, plain[name] + strength * added[name]):
                    raise Wrong(
                        "at strength 1 the adapter should be as strong as it was trained: the scale is the strength "
                        "times alpha / rank."
                    )
                if close(found, plain[name] + strength * _ALPHA * added[name]):
                    raise Wrong("alpha is not divided by the rank: at strength 1 the scale is alpha / rank.")
                if close(found, plain[name] + strength * _RANK / _ALPHA * added[name]):
                    raise Wrong("alpha and rank have changed places: at strength 1 the scale is alpha / rank.")
                raise Wrong(
                    f"set to strength {strength:g} after other strengths, {name} is not {strength:g} times as strong "
                    "as it was trained: compute the scale from alpha and rank, not from what it is now."
                )
    if counted != 2:
        raise Wrong(f"two layers of this model have an adapter, and you count {counted}: ask for `lora_A`.")
    return "every adapter has the strength that was asked for, whatever it was before."


@checked
def check_07b(largest_difference: Callable) -> str:
    """`largest_difference(first, second)`: of any pixel of any pair of pictures, in grey levels."""
    base = np.full((4, 4, 3), 100, dtype=np.uint8)
    changes = ([(0, 0, 103), (1, 1, 99)], [(2, 3, 107)], [(0, 0, 104)])  # row, column, grey level in the second picture
    arrays = {"first": [base] * len(changes), "second": []}
    for pixels in changes:
        arrays["second"].append(base.copy())
        for row, column, level in pixels:
            arrays["second"][-1][row, column, 0] = level
    first, second = ([Image.fromarray(array) for array in pictures] for pictures in arrays.values())
    found = float(numbers(call(largest_difference, first, second), (), "The difference"))
    wide = [np.asarray(a, dtype=int) - np.asarray(b, dtype=int) for a, b in zip(first, second, strict=True)]
    mistakes = {
        float(
            max(np.abs(one.astype(np.uint8)).max() for one in wide)
        ): "the pictures' numbers are of the type uint8, in "
        "which 100 - 107 is 249: make them integers before you subtract.",
        float(np.max(wide)): "you forget differences below zero: take absolute values.",
        float(np.abs(wide[0]).max()): "you compare only the first pair: the largest difference may be in any of them.",
        float(np.abs(wide[-1]).max()): "you keep the last pair's difference: the largest may be in any of them.",
    }
    if not close(found, 7.0):
        if found not in mistakes and found < 1.0:
            raise Wrong("a mean hides a few wrong pixels among many right ones: take the largest difference.")
        raise Wrong(mistakes.get(found, f"the largest difference of these pictures is 7, and you return {found:g}."))
    try:
        largest_difference(first, second[:1])
    except ValueError:
        return "one number tells whether a file draws what was trained."
    raise Wrong(
        "three pictures against one pass as equal, or nearly: `zip` needs `strict=True`, or ask for the lengths."
    )
