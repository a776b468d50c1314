"""The networks that denoise, one row each: what the workflow must know to prompt, call and adapt them.

A family is a row in `NETWORKS`, a path (`dbnb.paths`), and a call: a function that tells its network what it wants to
be told. Where a family's text encoder is new, it has a row in `models.ARCHITECTURES` too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    DiffusionPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)

from dbnb.paths import Diffusion, Flow

# What a network with a guidance input (FLUX.1 [dev]) is told in training: by 1 the prompt alone speaks.
TRAINING_GUIDANCE = 1.0
_LONGEST = 512  # tokens that the pipelines of FLUX.1 and Stable Diffusion 3 take of a prompt


@dataclass(frozen=True)
class Read:
    """What the text encoders made of prompts: their outputs and attention masks by name, and how many tokens of a long
    prompt were asked for."""

    outputs: Mapping[str, Any]
    masks: Mapping[str, torch.Tensor]
    length: int | None


@dataclass(frozen=True)
class Told:
    """What a network is told about a batch: (B,) timesteps, (B, L, D) hidden states of the prompts, their pooled ones
    (B, P) or None, and the side of the picture in pixels."""

    timesteps: torch.Tensor
    hidden: torch.Tensor
    pooled: torch.Tensor | None
    side: int


@dataclass(frozen=True)
class Network:
    """What the workflow must know of a network that denoises."""

    network_class: Any
    part: str  # its name in a pipeline
    path: type[Diffusion | Flow]
    attention: tuple[str, ...]  # the projections of its attention layers, as peft's `target_modules`
    blocks: re.Pattern[str]  # the name of a layer within its blocks; the group is its name within one
    first: Callable[[Any], torch.nn.Module]  # the layer that the latents meet first
    prompts: Callable[[Read, Any], tuple[torch.Tensor, torch.Tensor | None]]  # with its config -> hidden, pooled
    call: Callable[[Any, torch.Tensor, Told], torch.Tensor]
    pipelines: tuple[str, ...] = ()  # those that draw from a prompt alone; none are named where all of them do
    patch: int = 1  # latents along one side of a token
    packed: int = 1  # latents that its `in_channels` hold of each of the VAE's channels
    text: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # what differs from `models.ARCHITECTURES`
    adapted: tuple[str, ...] = ("text_encoder", "text_encoder_2")  # whose adapters its pipeline loads
    optional: tuple[str, ...] = ()  # text encoders that it can do without
    unguided: float = 1.0  # the `guidance_scale` of its pipeline by which the prompt alone speaks

    @property
    def word(self) -> str:
        """What people call it."""
        return {"unet": "UNet"}.get(self.part, self.part)

    def linear_layers(self, denoiser: torch.nn.Module) -> dict[str, torch.nn.Linear]:
        """The linear layers within its blocks, by their names: nearly all of a transformer's weights."""
        layers = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, torch.nn.Linear)}
        return {name: layer for name, layer in layers.items() if self.blocks.fullmatch(name)}


def _unet_prompts(read: Read, config: Any):
    if "text_encoder_2" not in read.outputs:
        return read.outputs["text_encoder"][0], None
    # SDXL takes the last layer but one of both encoders, and the second one's pooled output.
    hidden = torch.cat([output.hidden_states[-2] for output in read.outputs.values()], dim=-1)
    return hidden, read.outputs["text_encoder_2"][0]


def unet_conditions(unet: UNet2DConditionModel, told: Told) -> dict[str, Any]:
    """What a UNet is told besides the prompt, as its own config asks for it.

    SDXL: the pooled prompt, and six numbers, the original height and width, the crop's top and left, the target height
    and width; here a whole square, as its pipeline assumes. IF's second stage: how noisy the small picture is, which in
    training is as noisy as the large one.
    """
    if unet.config.addition_embed_type == "text_time":
        pooled, side = told.pooled, told.side
        numbers = torch.tensor([side, side, 0, 0, side, side], device=pooled.device, dtype=pooled.dtype)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": numbers.repeat(len(pooled), 1)}}
    if unet.config.class_embed_type is not None:
        return {"class_labels": told.timesteps}
    return {}


def _call_unet(unet: UNet2DConditionModel, latents: torch.Tensor, told: Told) -> torch.Tensor:
    conditions = unet_conditions(unet, told)
    return unet(latents, told.timesteps, encoder_hidden_states=told.hidden, **conditions).sample


def _sd3_prompts(read: Read, config: Any):
    """Both CLIPs side by side, padded to the T5's width, with the T5 behind them; without one, zeros in its place."""
    clips = [read.outputs["text_encoder"], read.outputs["text_encoder_2"]]
    hidden = torch.cat([output.hidden_states[-2] for output in clips], dim=-1)
    hidden = F.pad(hidden, (0, config.joint_attention_dim - hidden.shape[-1]))
    if "text_encoder_3" in read.outputs:
        long = read.outputs["text_encoder_3"][0]
    else:
        length = read.length or NETWORKS["SD3Transformer2DModel"].text["T5EncoderModel"]["max_length"]
        long = hidden.new_zeros(len(hidden), length, hidden.shape[-1])
    return torch.cat([hidden, long], dim=1), torch.cat([output[0] for output in clips], dim=-1)


def _call_sd3(transformer: SD3Transformer2DModel, latents: torch.Tensor, told: Told) -> torch.Tensor:
    return transformer(
        hidden_states=latents,
        timestep=told.timesteps,
        encoder_hidden_states=told.hidden,
        pooled_projections=told.pooled,
    ).sample


def _flux_prompts(read: Read, config: Any):
    return read.outputs["text_encoder_2"][0], read.outputs["text_encoder"].pooler_output


def _call_flux(transformer: FluxTransformer2DModel, latents: torch.Tensor, told: Told) -> torch.Tensor:
    """Four neighbouring latents make a token, which is told its row and its column; a word's place is not told."""
    device = latents.device
    height, width = (side // 2 for side in latents.shape[-2:])
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    guided = transformer.config.guidance_embeds
    tokens = transformer(
        hidden_states=F.pixel_unshuffle(latents, 2).flatten(2).mT,
        timestep=told.timesteps / 1000,
        guidance=torch.full((len(latents),), TRAINING_GUIDANCE, device=device) if guided else None,
        encoder_hidden_states=told.hidden,
        pooled_projections=told.pooled,
        txt_ids=torch.zeros(told.hidden.shape[1], 3, device=device),
        img_ids=places.to(device, torch.float32),
    ).sample
    return F.pixel_shuffle(tokens.mT.unflatten(2, (height, width)), 2)


def _z_image_prompts(read: Read, config: Any):
    """The last layer but one of a language model; zeros where the prompt has ended, which no token's states are."""
    hidden = read.outputs["text_encoder"].hidden_states[-2]
    return hidden.masked_fill(~read.masks["text_encoder"].bool()[..., None], 0), None


def _call_z_image(transformer: ZImageTransformer2DModel, latents: torch.Tensor, told: Told) -> torch.Tensor:
    """It is told how much of the picture there is, answers with the way to the picture, and takes each prompt as long
    as it is."""
    prompts = [hidden[hidden.any(dim=-1)] for hidden in told.hidden]
    answers = transformer(list(latents.unsqueeze(2)), 1 - told.timesteps / 1000, prompts).sample
    return -torch.stack(answers).squeeze(2)


_UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
_JOINT_ATTENTION = (*_UNET_ATTENTION[:4], "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_TRANSFORMER_BLOCKS = re.compile(r"(?:single_)?transformer_blocks\.\d+\.(.+)")


def _long_prompts(max_length: int) -> dict[str, dict[str, Any]]:
    """A T5 that reads a prompt as it is, beside CLIPs that always read their own number of tokens."""
    reads = dict(always_masked=False, lowercase=False, max_length=max_length, positions=lambda config: _LONGEST)
    clip = dict(fixed_length=True)
    return {"T5EncoderModel": reads, "CLIPTextModel": clip, "CLIPTextModelWithProjection": clip}


# One row a network: the name is what `model_index.json` says of it.
NETWORKS = {
    "UNet2DConditionModel": Network(
        UNet2DConditionModel,
        part="unet",
        path=Diffusion,
        attention=_UNET_ATTENTION,
        blocks=re.compile(r"(?:down_blocks|mid_block|up_blocks)\.(?:.*\.\d+\.)?(.+)"),
        first=lambda unet: unet.conv_in,
        prompts=_unet_prompts,
        call=_call_unet,
    ),
    "SD3Transformer2DModel": Network(
        SD3Transformer2DModel,
        part="transformer",
        path=Flow,
        attention=_JOINT_ATTENTION,
        blocks=_TRANSFORMER_BLOCKS,
        first=lambda transformer: transformer.pos_embed.proj,
        prompts=_sd3_prompts,
        call=_call_sd3,
        pipelines=("StableDiffusion3Pipeline",),
        patch=2,
        text=_long_prompts(256),
        optional=("text_encoder_3",),
    ),
    "FluxTransformer2DModel": Network(
        FluxTransformer2DModel,
        part="transformer",
        path=Flow,
        attention=_JOINT_ATTENTION,
        blocks=_TRANSFORMER_BLOCKS,
        first=lambda transformer: transformer.x_embedder,
        prompts=_flux_prompts,
        call=_call_flux,
        pipelines=("FluxPipeline",),
        patch=2,
        packed=4,
        text=_long_prompts(512),
        adapted=("text_encoder",),
    ),
    "ZImageTransformer2DModel": Network(
        ZImageTransformer2DModel,
        part="transformer",
        path=Flow,
        attention=_UNET_ATTENTION[:4],
        blocks=re.compile(r"(?:layers|noise_refiner|context_refiner)\.\d+\.(.+)"),
        first=lambda transformer: transformer.all_x_embedder["2-1"],
        prompts=_z_image_prompts,
        call=_call_z_image,
        pipelines=("ZImagePipeline",),
        patch=2,
        adapted=(),
        unguided=0.0,
    ),
}


def network_in(pipeline: DiffusionPipeline) -> Network:
    """The row of the network that a pipeline draws with."""
    return NETWORKS[type(getattr(pipeline, "unet", None) or pipeline.transformer).__name__]
