"""Step 4: low-rank adapters on the UNet or transformer and the text encoders. Built in notebook 04.

LoRA (Hu et al., 2021): W x becomes W x + (alpha / rank) B A x, with A random and B zero, so that at first nothing
changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners import lora
from torch.nn.grad import conv2d_input, conv2d_weight

from dbnb.config import AdapterSettings, adapters_of
from dbnb.denoisers import NETWORKS
from dbnb.models import Components
from dbnb.tables import Table

ATTENTION = NETWORKS["UNet2DConditionModel"].attention  # of a UNet
_NARROW = 384  # features: the miniature's layers have at most 384, nearly all of Stable Diffusion's more


def lora_targets(denoiser: ModelMixin, lora_layers: str = "attention") -> list[str]:
    """The names of the UNet's or transformer's layers that get an adapter, as peft's `target_modules`.

    "attention": the projections of the attention layers, which is what LoRA usually adapts. "all": every Linear and
    Conv2d inside the blocks as well (feed-forward layers and modulations; of a UNet the resnets' convolutions and time
    projections, down- and upsamplers). Otherwise names, separated by commas, of layers such as "to_q,to_v,conv1", or of
    blocks such as "up_blocks.1,up_blocks.2", all of whose layers are meant. Raises ValueError for a name that neither a
    layer nor a block has.
    """
    network = NETWORKS[type(denoiser).__name__]
    if lora_layers == "attention":
        return list(network.attention)
    layers = [name for name, layer in denoiser.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    # What a layer is called within its block, such as "conv1" or "attn1.to_q", whatever the block's number.
    inside = {name: match[1] for name in layers if (match := network.blocks.fullmatch(name))}
    names = sorted(set(inside.values()))
    if lora_layers == "all":
        # FLUX.1's last layer is called like one of its blocks': then each is named in full.
        outside = {layer for layer in layers if layer not in inside}
        unsure = {name for name in names if any(f".{layer}".endswith(f".{name}") for layer in outside)}
        return [name for name in names if name not in unsure] + [n for n, name in inside.items() if name in unsure]
    targets = []
    for name in (name.strip() for name in lora_layers.split(",")):
        if any(layer == name or layer.endswith(f".{name}") for layer in layers):
            targets.append(name)
        elif of_block := [layer for layer in inside if layer.startswith(f"{name}.")]:
            targets += of_block
        else:
            block = ".".join(next(iter(inside)).split(".")[:2])
            raise ValueError(
                f"lora_layers={lora_layers!r}: no layer or block of this base is called {name!r}; give 'attention', "
                f"'all', a block such as {block!r}, or names from {', '.join(names)}."
            )
    return targets


def add_adapters(components: Components, settings: AdapterSettings | None = None, **changed: Any) -> None:
    """Put adapters on the denoiser and, if asked, on the text encoders; trainable weights are float32 in any case.

    `lora_layers` says which layers of the denoiser, as `lora_targets` reads it; on a text encoder it is always the
    attention projections, and a T5 beside CLIPs gets none, since pipelines would not load them. A is drawn from a
    normal of deviation 1/rank and B is zero (peft's "gaussian"). The same seed gives the same A. A convolution's A is a
    convolution of the same kernel, its B one of 1 x 1. `use_dora` is Liu et al., 2024; `use_rslora` Kalajdzievski,
    2023. Raises ValueError for a layer that is not there. The fields of `settings` can be given by name instead:
    `add_adapters(components, rank=4)`.
    """
    settings = adapters_of(settings, **changed)
    targets = lora_targets(components.denoiser, settings.lora_layers)
    kind = {"use_dora": settings.use_dora, "use_rslora": settings.use_rslora}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        config = _lora_config(settings.rank, settings.lora_alpha, settings.lora_dropout, targets, **kind)
        components.denoiser.add_adapter(config)
        if settings.train_text_encoder:
            rank, alpha = settings.text_encoder_rank or settings.rank, settings.text_encoder_lora_alpha
            for name, (_, encoder, architecture) in components.text_encoders().items():
                if name not in components.network.adapted:
                    continue
                dropout = settings.text_encoder_lora_dropout
                encoder.add_adapter(_lora_config(rank, alpha, dropout, architecture.lora_targets, **kind))
    # peft creates adapters in the base layer's dtype: half-precision updates would be rounded away.
    cast_training_params([module for module in components.modules().values()], dtype=torch.float32)
    for module in adapted_modules(components).values():
        module.eval()  # peft's new layers would drop out at once
        for layer in module.modules():
            # Layers around weights in fewer bits are of further classes, and compute as these do.
            if type(layer) in (lora.Linear, lora.Conv2d) and max(layer.base_layer.weight.shape[:2]) <= _NARROW:
                layer.forward = MethodType(_forward, layer)


def _forward(layer: lora.Linear | lora.Conv2d, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What peft's layer computes, x (W + s B A)' + b (Hu et al., 2021, eq. 3), as one product on a CPU.

    There a narrow layer's time goes into the number of operations: with peft's three products and their gradients a
    training step takes a tenth longer, and a picture half as long again. Wherever the result would not be the same,
    peft's own forward is called.
    """
    weight = layer.base_layer.weight
    same = (
        x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and x.dtype == weight.dtype == torch.float32
        and not (args or kwargs)
        and layer.active_adapters == ["default"]
        and not (layer.disable_adapters or layer.merged)
        and isinstance(layer.lora_dropout["default"], torch.nn.Identity)
        and not layer.use_dora.get("default")
    )
    if not same:
        return type(layer).forward(layer, x, *args, **kwargs)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scale, bias = layer.scaling["default"], layer.base_layer.bias
    if isinstance(layer, lora.Conv2d) and weight.shape[2:] != (1, 1):
        return _LowRankConv2d.apply(x, weight, a, b, scale, bias, layer.base_layer.stride, layer.base_layer.padding)
    folded = torch.addmm(weight.flatten(1), b.flatten(1), a.flatten(1), alpha=scale)
    if isinstance(layer, lora.Linear):
        return F.linear(x, folded, bias)
    product = folded @ x.flatten(2)  # a convolution of 1 x 1: torch has no fast one for narrow layers
    return (product if bias is None else product + bias[:, None]).unflatten(2, x.shape[2:])


class _LowRankConv2d(torch.autograd.Function):
    """A convolution with the kernel W + s B A whose gradients stop at A and B.

    Autograd would form the whole kernel's gradient first, which costs as much as the convolution itself.
    """

    @staticmethod
    def forward(ctx, x, weight, a, b, scale, bias, stride, padding):
        kernel = torch.addmm(weight.flatten(1), b.flatten(1), a.flatten(1), alpha=scale).view_as(weight)
        ctx.save_for_backward(x, kernel, a, b)
        ctx.call = (scale, stride, padding)
        return F.conv2d(x, kernel, bias, stride, padding)

    @staticmethod
    def backward(ctx, grad):
        x, kernel, a, b = ctx.saved_tensors
        scale, stride, padding = ctx.call
        grad_x = conv2d_input(x.shape, kernel, grad, stride, padding) if ctx.needs_input_grad[0] else None
        by_channel = grad.transpose(0, 1).flatten(1)  # (outputs, B h w)
        down = F.conv2d(x, a, None, stride, padding).transpose(0, 1).flatten(1)  # (rank, B h w)
        grad_b = (by_channel @ down.T).mul_(scale)
        grad_down = (b.flatten(1).T @ by_channel).mul_(scale)
        grad_down = grad_down.view(len(a), len(x), *grad.shape[2:]).transpose(0, 1)
        grad_a = conv2d_weight(x, a.shape, grad_down, stride, padding)
        return grad_x, None, grad_a, grad_b.view_as(b), None, None, None, None


def _lora_config(rank: int, alpha: float | None, dropout: float, targets: Sequence[str], **kind: bool) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        init_lora_weights="gaussian",
        target_modules=list(targets),
        **kind,
    )


def adapted_modules(components: Components) -> dict[str, torch.nn.Module]:
    """The parts that carry an adapter."""
    return {
        name: module
        for name, module in components.modules().items()
        if name != "vae" and getattr(module, "peft_config", None)
    }


@contextmanager
def strength(components: Components, factor: float, *, only: str = "") -> Iterator[None]:
    """Within the block the trained adapters count `factor` times: 0 is the base, 1 what was trained.

    With `only`, the beginning of a layer's name such as "mid_block.", the adapters of all other layers count nothing.
    Raises ValueError where no adapted layer's name begins so.
    """
    scaled = [
        (name, layer, layer.scaling["default"])
        for module in adapted_modules(components).values()
        for name, layer in module.named_modules()
        if isinstance(layer, lora.LoraLayer) and "default" in layer.scaling
    ]
    if only and not any(name.startswith(only) for name, _, _ in scaled):
        raise ValueError(f"only={only!r} is the beginning of no adapted layer's name.")
    try:
        for name, layer, scale in scaled:
            layer.scaling["default"] = factor * scale if name.startswith(only) else 0.0
        yield
    finally:
        for _, layer, scale in scaled:
            layer.scaling["default"] = scale


@contextmanager
def without_adapters(components: Components) -> Iterator[None]:
    """Within the block the base is plain, as before `add_adapters`, so that a file can be loaded into it.

    What was loaded goes with the block, and the same adapters, parameter by parameter, are in place again.
    """
    modules = adapted_modules(components).values()
    kept = [(module, module.peft_config, _lora_layers(module)) for module in modules]

    def unwrap(module: torch.nn.Module) -> None:
        for name, layer in _lora_layers(module).items():
            _put(module, name, layer.base_layer)
        vars(module).pop("peft_config", None)
        module._hf_peft_config_loaded = False

    try:
        for module, _, _ in kept:
            unwrap(module)
        yield
    finally:
        for module, config, layers in kept:
            unwrap(module)
            for name, layer in layers.items():
                _put(module, name, layer)
            module.peft_config, module._hf_peft_config_loaded = config, True


def _lora_layers(module: torch.nn.Module) -> dict[str, lora.LoraLayer]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, lora.LoraLayer)}


def _put(module: torch.nn.Module, name: str, layer: torch.nn.Module) -> None:
    """Put a layer in the place of that name."""
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)


def train_mode(module: torch.nn.Module) -> None:
    """Dropout in the adapters alone: a frozen T5 or Roberta has dropout of its own, which training should not meet."""
    module.eval()
    for name, part in module.named_modules():
        # transformers recomputes activations only in layers that think they are training.
        if ".lora_dropout" in name or getattr(part, "gradient_checkpointing", False):
            part.training = True


def trainable_parameters(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of what an optimizer should see, in a fixed order."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def adapter_table(components: Components) -> Table:
    """One row an adapted layer: part, layer, rank, alpha, parameters."""
    rows = Table()
    for part, module in adapted_modules(components).items():
        for name, layer in module.named_modules():
            if hasattr(layer, "lora_A") and "default" in layer.lora_A:
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                rows.append(
                    {
                        "part": part,
                        "layer": name,
                        "rank": str(layer.r["default"]),
                        "alpha": f"{layer.lora_alpha['default']:g}",
                        "A": " x ".join(map(str, a.shape)),
                        "B": " x ".join(map(str, b.shape)),
                        "parameters": f"{a.numel() + b.numel():,}",
                    }
                )
    return rows
