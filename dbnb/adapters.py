"""Step 4: low-rank adapters on the UNet and the text encoder. Built in notebook 04.

LoRA (Hu et al., 2021): W x becomes W x + (alpha / rank) B A x, with A random and B zero, so that at first nothing
changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners import lora

from dbnb.models import Components
from dbnb.tables import Table

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
_NARROW = 256  # features: the miniature's layers have at most 192, Stable Diffusion's at least 320


def add_adapters(
    components: Components,
    *,
    rank: int = 16,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    train_text_encoder: bool = False,
    text_encoder_rank: int | None = None,
    text_encoder_lora_alpha: float | None = None,
    text_encoder_lora_dropout: float = 0.0,
    use_dora: bool = False,
    use_rslora: bool = False,
    seed: int = 0,
) -> None:
    """Put adapters on the UNet and, if asked, on the text encoder; trainable weights are float32 whatever the base's.

    A is drawn from a normal of deviation 1/rank and B is zero (peft's "gaussian"). The same seed gives the same A.
    `use_dora` is Liu et al., 2024; `use_rslora` Kalajdzievski, 2023.
    """
    text_encoder_rank, kind = text_encoder_rank or rank, {"use_dora": use_dora, "use_rslora": use_rslora}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        components.unet.add_adapter(_lora_config(rank, lora_alpha, lora_dropout, UNET_TARGETS, **kind))
        if train_text_encoder:
            for _, encoder, architecture in components.text_encoders().values():
                targets = architecture.lora_targets
                encoder.add_adapter(
                    _lora_config(text_encoder_rank, text_encoder_lora_alpha, text_encoder_lora_dropout, targets, **kind)
                )
    # peft creates adapters in the base layer's dtype: half-precision updates would be rounded away.
    cast_training_params([module for module in components.modules().values()], dtype=torch.float32)
    for module in adapted_modules(components).values():
        for layer in module.modules():
            if isinstance(layer, lora.Linear) and max(layer.in_features, layer.out_features) <= _NARROW:
                layer.forward = MethodType(_forward, layer)


def _forward(layer: lora.Linear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What peft's layer computes, x (W + s B A)' + b (Hu et al., 2021, eq. 3), as one product in training on a CPU.

    There a narrow layer's time goes into the number of operations: peft's three products and their gradients take a
    tenth of a training step more. Wherever it would not be the same, peft's own way is taken.
    """
    weight = layer.base_layer.weight
    same = (
        torch.is_grad_enabled() and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        and x.dtype == weight.dtype == torch.float32 and not (args or kwargs)
        and layer.active_adapters == ["default"] and not (layer.disable_adapters or layer.merged)
        and isinstance(layer.lora_dropout["default"], torch.nn.Identity) and not layer.use_dora.get("default")
    )  # fmt: skip
    if not same:
        return lora.Linear.forward(layer, x, *args, **kwargs)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return F.linear(x, torch.addmm(weight, b, a, alpha=layer.scaling["default"]), layer.base_layer.bias)


def _lora_config(rank: int, alpha: float | None, dropout: float, targets: tuple[str, ...], **kind: bool) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, lora_dropout=dropout, init_lora_weights="gaussian",
        target_modules=list(targets), **kind,
    )  # fmt: skip


def adapted_modules(components: Components) -> dict[str, torch.nn.Module]:
    """The parts that carry an adapter."""
    return {
        name: module
        for name, module in components.modules().items()
        if name != "vae" and getattr(module, "peft_config", None)
    }


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
