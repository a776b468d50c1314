"""The parts of a base as ONNX graphs, and what else the live page must know to draw with them.

The denoiser's graph takes an adapter as further inputs, under the names of its file, and the adapter's strength as a
number: y = W x + strength B A x (Hu et al., 2021, eq. 3). Any adapter with these layers, and at most this rank, can so
be drawn with; the page multiplies B by alpha / rank.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open

from dbnb import toybox
from dbnb.config import DreamBoothConfig
from dbnb.files import whole
from dbnb.models import Components

_ADAPTER = ("a", "b", "strength")
_SMALL = 64  # numbers; shorter tensors (biases of a norm, constants of a formula) keep float32


class _Adapted(torch.nn.Module):
    """A Linear or Conv2d with an adapter, whose weights and strength `_Denoiser` puts in at each call."""

    def __init__(self, layer: torch.nn.Linear | torch.nn.Conv2d):
        super().__init__()
        self.layer = layer
        for name in _ADAPTER:
            self.register_buffer(name, torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.layer, torch.nn.Linear):
            change = F.linear(F.linear(x, self.a), self.b)
        else:
            change = F.conv2d(F.conv2d(x, self.a, None, self.layer.stride, self.layer.padding), self.b)
        return self.layer(x) + self.strength * change


class _Denoiser(torch.nn.Module):
    """(B, C, h, w) latents, timestep, (B, L, D) hidden states, strength, the layers' A and B -> (B, C, h, w)."""

    def __init__(self, unet: UNet2DConditionModel, layers: Sequence[str]):
        super().__init__()
        self.unet, self.layers = unet, list(layers)
        for name in layers:
            unet.set_submodule(name, _Adapted(unet.get_submodule(name)))

    def forward(self, sample, timestep, states, strength, a, b):
        tensors = {
            f"{name}.{part}": value
            for name, *adapter in zip(self.layers, a, b, [strength] * len(a), strict=True)
            for part, value in zip(_ADAPTER, adapter, strict=True)
        }
        call = torch.func.functional_call(self.unet, tensors, (sample, timestep, states), {"return_dict": False})
        return call[0]


class _TextEncoder(torch.nn.Module):
    """(1, L) token ids -> (1, L, D) hidden states."""

    def __init__(self, encoder: torch.nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, ids):
        return self.encoder(ids.long(), return_dict=False)[0]


class _Decoder(torch.nn.Module):
    """(1, C, h, w) latents as the UNet draws them -> (1, 3, H, W) in [0, 1]."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, latents):
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        return (self.vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)


def _make_small(model: onnx.ModelProto) -> None:
    """Leave out where in the code each node came from, and store weights in half precision.

    They are cast back where the graph starts, which a session does once, as it loads. The UNet and the autoencoder are
    shipped in half precision, and lose nothing.
    """
    graph, casts, tensors = model.graph, [], []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        # A mask's "minus infinity" has no place in half precision.
        if values.dtype == np.float32 and values.size >= _SMALL and np.abs(values).max() <= np.finfo(np.float16).max:
            half = numpy_helper.from_array(values.astype(np.float16), f"{tensor.name}.half")
            casts.append(helper.make_node("Cast", [half.name], [tensor.name], to=TensorProto.FLOAT))
            tensor = half
        tensors.append(tensor)
    nodes = [*casts, *graph.node]
    for old, new in ((graph.initializer, tensors), (graph.node, nodes), (graph.value_info, [])):
        del old[:]
        old.extend(new)
    for part in (model, graph, *graph.input, *graph.output, *graph.initializer, *graph.node):
        del part.metadata_props[:]


def _export(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor | Sequence[torch.Tensor]], path: Path) -> None:
    """Write a module's graph for inputs of these shapes; a list is named by its own dictionary's keys."""
    names = [name for key, value in inputs.items() for name in (value if isinstance(value, dict) else [key])]
    values = tuple(list(value.values()) if isinstance(value, dict) else value for value in inputs.values())
    logging.getLogger("torch.onnx").setLevel(
        logging.ERROR
    )  # says that there is no torchvision, which nothing here needs
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of torch's own code
        program = torch.onnx.export(
            module.eval(), values, input_names=names, output_names=["output"], dynamo=True, verbose=False
        )
    model = program.model_proto
    _make_small(model)
    with whole(path) as temporary:
        onnx.save(model, temporary)


def read_adapter(adapter: Path) -> dict[str, dict[str, list[int]]]:
    """Layer of the UNet -> {"A": shape, "B": shape}. Raises ValueError where a page could not draw with the adapter."""
    with safe_open(adapter, "pt") as file:
        keys = {key: file.get_slice(key).get_shape() for key in file.keys()}
    layers: dict[str, dict[str, list[int]]] = {}
    for key, shape in keys.items():
        # Files that adapt attention alone call the halves down and up.
        part, _, rest = key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.").partition(".")
        name, found, half = rest.removesuffix(".weight").rpartition(".lora_")
        if part != "unet" or not found or half not in ("A", "B"):
            raise ValueError(
                f"{adapter} has {key}, and the page can draw with LoRA layers of the UNet alone: train without "
                "--train_text_encoder and --use_dora."
            )
        layers.setdefault(name, {})[half] = shape
    return layers


def export_graphs(components: Components, layers: Mapping[str, Mapping[str, list[int]]], folder: Path) -> None:
    """Write text_encoder.onnx, decoder.onnx and, last, unet.onnx, which takes an adapter with these layers."""
    unet, length = components.unet, components.tokenizer.model_max_length
    latents = torch.zeros(1, *latent_shape(components))
    ids = torch.zeros(1, length, dtype=torch.int32)
    _export(_TextEncoder(components.text_encoder), {"ids": ids}, folder / "text_encoder.onnx")
    _export(_Decoder(components.vae), {"latents": latents}, folder / "decoder.onnx")
    inputs = {
        "sample": torch.cat([latents, latents]),  # two at a time: guidance asks for the empty prompt too
        "timestep": torch.tensor(0.0),
        "states": torch.zeros(2, length, unet.config.cross_attention_dim),
        "strength": torch.tensor(1.0),
    }
    for half in ("A", "B"):
        inputs[half] = {tensor_name(name, half): torch.zeros(shape[half]) for name, shape in layers.items()}
    _export(_Denoiser(unet, list(layers)), inputs, folder / "unet.onnx")


def tensor_name(layer: str, half: str) -> str:
    """What a tensor is called in adapter files, and so in the graph."""
    return f"unet.{layer}.lora_{half}.weight"


def latent_shape(components: Components) -> tuple[int, int, int]:
    """(C, h, w) of what the UNet draws."""
    config = components.unet.config
    return config.in_channels, config.sample_size, config.sample_size


def description(
    components: Components, layers: Mapping[str, Mapping[str, list[int]]], config: DreamBoothConfig
) -> dict[str, object]:
    """What the page must know of the base, the adapter's layers, and the config's subject and ways of drawing."""
    tokenizer, schedule = components.tokenizer, components.noise_scheduler
    return {
        "latents": latent_shape(components),
        "tokenizer": {
            "length": tokenizer.model_max_length,
            "start": tokenizer.bos_token_id,
            "end": tokenizer.eos_token_id,
            "padding": tokenizer.pad_token_id,
        },
        "schedule": {
            "alphas_cumprod": schedule.alphas_cumprod.tolist(),
            "prediction_type": schedule.config.prediction_type,
            "timestep_spacing": schedule.config.timestep_spacing,
            "steps_offset": schedule.config.steps_offset,
        },
        "adapter": {tensor_name(name, half): shape[half] for name, shape in layers.items() for half in ("A", "B")},
        "defaults": {"steps": config.num_inference_steps, "guidance": config.guidance_scale, "strength": 1.0},
        "subject": {"identifier": config.identifier, "class_word": config.class_word},
        "kinds": toybox.KINDS,
        "places": list(toybox.SCENES.values()),
    }
