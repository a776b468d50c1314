"""A frozen base in fewer bits, so that a large one fits on a small card: its linear layers hold most of its weights.

As in QLoRA (Dettmers et al., 2023), the weights are stored in few bits, here 4 or 8, and dequantised for each product;
adapters, and all that is computed, stay as they were. The libraries that do it are loaded only where it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin

from dbnb.denoisers import Network


@dataclass(frozen=True)
class Quantization:
    """A way to keep a weight in fewer bits: who does it, what a weight takes with its share of the layer's scales."""

    package: str
    bytes_per_weight: float
    cuda_only: bool = False


# nf4 has a scale of one byte for each 64 weights, and a number for each 256 of those scales.
QUANTIZATIONS = {
    "nf4": Quantization("bitsandbytes", 0.5 + 1 / 64 + 4 / (64 * 256), cuda_only=True),
    "int8": Quantization("torchao", 1.0),
    "fp8": Quantization("torchao", 1.0),
}


def check_quantization(kind: str | None, device: torch.device) -> None:
    """Raise the ValueError that says what `kind`, a key of `QUANTIZATIONS` or None, wants and does not have here."""
    if kind is None:
        return
    wanted = QUANTIZATIONS[kind]
    if wanted.cuda_only and device.type != "cuda":
        others = ", ".join(name for name, other in QUANTIZATIONS.items() if not other.cuda_only)
        raise ValueError(
            f"quantization={kind!r} needs a CUDA device, and there is none: use {others}, or leave it out."
        )
    try:
        importlib.import_module(wanted.package)
        quantization_config(kind, "diffusers", dtype=torch.float32)
    except (ImportError, ValueError) as error:  # not there, or older than diffusers wants
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"quantization={kind!r} needs {wanted.package} ({why}): pip install -U {wanted.package}."
        ) from error


def quantization_config(kind: str, library: str, *, dtype: torch.dtype, whole: Sequence[str] = ()) -> Any:
    """What `from_pretrained` of diffusers or transformers is told: their own config for one of `QUANTIZATIONS`.

    Products are computed in `dtype`; layers whose names end with one of `whole` stay as they are.
    """
    configs = importlib.import_module(library)
    if kind == "nf4":
        return configs.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(whole),
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    weights = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind]()
    return configs.TorchAoConfig(weights, modules_to_not_convert=list(whole))


def whole_layers(network: Network, denoiser: ModelMixin) -> list[str]:
    """The linear layers outside a network's blocks, which stay as they are: they are small, and first or last.

    The libraries would leave out every layer that is called like one of them: FLUX.1's last layer, called like one of
    its blocks', is in fewer bits too.
    """
    inside = network.linear_layers(denoiser)
    linear = (name for name, layer in denoiser.named_modules() if isinstance(layer, torch.nn.Linear))
    outside = [name for name in linear if name not in inside]
    return [name for name in outside if not any(f"{name}." in f"{layer}." for layer in inside)]


@dataclass(frozen=True)
class Size:
    """What a parameter is and takes: how many numbers, how many bytes, and in which format."""

    numbers: int
    bytes: int
    format: str


def size_of(parameter: torch.nn.Parameter) -> Size:
    """Of a parameter as it is stored: one in fewer bits is several tensors, and says that it is of another format."""
    if (state := getattr(parameter, "quant_state", None)) is not None:  # bitsandbytes
        scales = [state.absmax, *(() if state.state2 is None else (state.state2.absmax,))]
        return Size(state.shape.numel(), parameter.nbytes + sum(scale.nbytes for scale in scales), state.quant_type)
    if hasattr(parameter, "__tensor_flatten__"):  # torchao
        stored = [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
        stored = [tensor for tensor in stored if tensor is not None]
        return Size(parameter.numel(), sum(tensor.nbytes for tensor in stored), _word(stored[0].dtype))
    return Size(parameter.numel(), parameter.nbytes, _word(parameter.dtype))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
