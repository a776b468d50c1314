"""What a training needs in memory, computed from the model's shapes before anything is downloaded.

The UNet is built without storage (torch's "meta" device) from its published config; one forward pass is run, and what
autograd would keep for the backward pass is counted. Built in notebook 10.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from peft import LoraConfig

from dbnb.adapters import lora_targets, trainable_parameters


@dataclass(frozen=True)
class Base:
    """The published sizes of a base: its UNet's config, and the parameters of what runs before and after it."""

    unet: dict
    resolution: int
    text_parameters: int
    vae_parameters: int
    text_length: int = 77


# From the configs of the checkpoints on the hub.
_SD = dict(sample_size=64, attention_head_dim=8, cross_attention_dim=768)
BASES = {
    "Stable Diffusion 1.5": Base(_SD, 512, 123_060_480, 83_653_863),
    "Stable Diffusion 2.1": Base(
        dict(sample_size=96, attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True),
        768,
        340_387_840,
        83_653_863,
    ),
    "Stable Diffusion XL": Base(
        dict(
            sample_size=128,
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        1024,
        123_060_480 + 694_659_840,
        83_653_863,
    ),
    # Its T5 is larger than its UNet.
    "DeepFloyd IF": Base(
        dict(
            sample_size=64,
            in_channels=3,
            out_channels=6,
            layers_per_block=3,
            attention_head_dim=64,
            block_out_channels=(704, 1408, 2112, 2816),
            cross_attention_dim=2816,
            cross_attention_norm="group_norm",
            down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
            up_block_types=("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
            encoder_hid_dim=4096,
            addition_embed_type="text",
            addition_embed_type_num_heads=64,
        ),
        64,
        4_762_310_656,
        0,
    ),
}


def training_memory(
    base: Base,
    *,
    rank: int = 16,
    batch: int = 2,
    bytes_per_weight: int = 2,
    gradient_checkpointing: bool = False,
    lora_layers: str = "attention",
) -> dict[str, int]:
    """Bytes by purpose for training the UNet's adapters; `batch` counts all pictures, instance and class;
    `lora_layers` is as in `adapters.lora_targets`.

    "weights": all frozen parts; "adapters": float32 weights, gradients and AdamW's two moments; "activations": what
    autograd keeps of the UNet's forward pass. Libraries, the CUDA context and fragmentation come on top.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**base.unet).requires_grad_(False)
        unet.add_adapter(LoraConfig(r=rank, target_modules=lora_targets(unet, lora_layers)))
        side = unet.config.sample_size
        noisy = torch.empty(batch, unet.config.in_channels, side, side)
        width = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
        hidden = torch.empty(batch, base.text_length, width)
        steps, further = torch.empty(batch, dtype=torch.long), {}
        if unet.config.addition_embed_type == "text_time":
            numbers = 6
            pooled = unet.config.projection_class_embeddings_input_dim - numbers * unet.config.addition_time_embed_dim
            further = {"text_embeds": torch.empty(batch, pooled), "time_ids": torch.empty(batch, numbers)}
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        adapters = sum(p.numel() for _, p in trainable_parameters(unet))
        frozen = sum(p.numel() for p in unet.parameters() if not p.requires_grad)
        weights = {p.untyped_storage()._cdata for p in unet.parameters()}
        heads = {m.heads for m in unet.modules() if isinstance(m, Attention)}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            key = tensor.untyped_storage()._cdata
            # Attention weights, (…, queries, keys), are recomputed by the fused kernels that GPUs run.
            queries = tensor.shape[-2] if tensor.ndim > 2 else 0
            keys = (queries, base.text_length, queries + base.text_length)
            square = tensor.ndim > 2 and tensor.shape[-1] in keys
            attention = square and (tensor.ndim == 3 or tensor.shape[1] in heads)
            if key not in weights and not attention:
                kept[key] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            unet.train()(noisy, steps, encoder_hidden_states=hidden, added_cond_kwargs=further)
    activations = sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values())
    return {
        "weights": bytes_per_weight * (frozen + base.text_parameters + base.vae_parameters),
        "adapters": 4 * 4 * adapters,
        "activations": bytes_per_weight * activations,
    }
