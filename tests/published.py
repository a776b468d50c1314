"""Random checkpoints of the published sizes, made from the planner's configs: the hub's gigabytes without the hub."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from families import no_safety_checker, schedule
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dbnb import miniature
from dbnb.planner import BASES


@contextmanager
def _made(dtype: torch.dtype, device: str):
    """New weights have this precision, and are on this device."""
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(default)


def _words() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(miniature.path() / "tokenizer", model_max_length=77)


def _clip(width: int, layers: int, heads: int, **changed) -> CLIPTextConfig:
    words = _words()
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        **changed,
    )


def _stable_diffusion():
    base = BASES["Stable Diffusion 1.5"]
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**base.vae, sample_size=base.resolution),
        text_encoder=CLIPTextModel(_clip(768, 12, 12)),
        tokenizer=_words(),
        unet=UNet2DConditionModel(**base.denoiser),
        scheduler=schedule(),
        **no_safety_checker(),
    )


def _stable_diffusion_xl():
    base = BASES["Stable Diffusion XL"]
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**base.vae, sample_size=base.resolution, scaling_factor=0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(_clip(768, 12, 12)),
        tokenizer=_words(),
        text_encoder_2=CLIPTextModelWithProjection(_clip(1280, 32, 20, projection_dim=1280, hidden_act="gelu")),
        tokenizer_2=_words(),
        unet=UNet2DConditionModel(**base.denoiser),
        scheduler=schedule(),
        add_watermarker=False,
    )


def _stable_diffusion_3_5():
    """Without its T5, which its pipeline does not need."""
    base = BASES["Stable Diffusion 3.5 medium"]
    return StableDiffusion3Pipeline(
        vae=AutoencoderKL(**base.vae, sample_size=base.resolution, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(_clip(768, 12, 12, projection_dim=768)),
        tokenizer=_words(),
        text_encoder_2=CLIPTextModelWithProjection(_clip(1280, 32, 20, projection_dim=1280, hidden_act="gelu")),
        tokenizer_2=_words(),
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=SD3Transformer2DModel(**base.denoiser),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


PUBLISHED = {
    "Stable Diffusion 1.5": _stable_diffusion,
    "Stable Diffusion XL": _stable_diffusion_xl,
    "Stable Diffusion 3.5 medium": _stable_diffusion_3_5,
}


def write(name: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> dict[str, int]:
    """Write the checkpoint, and return the number of parameters of each part."""
    with _made(dtype, device):
        pipeline = PUBLISHED[name]()
    pipeline.save_pretrained(folder)
    models = {part: model for part, model in pipeline.components.items() if isinstance(model, torch.nn.Module)}
    return {part: sum(p.numel() for p in model.parameters()) for part, model in models.items()}
