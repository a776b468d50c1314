"""Tiny random checkpoints of each model family, made from configs: what the hub would deliver, in kilobytes."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    AltDiffusionPipeline,
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    IFPipeline,
    IFSuperResolutionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import RobertaSeriesConfig
from packaging import version
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

from dbnb import miniature
from dbnb.models import ARCHITECTURES

# A test that has diffusers read a text encoder's adapters from a file without metadata.
READS_FLAT_CLIP = pytest.mark.skipif(
    version.parse(diffusers.__version__) < version.parse("0.40"),
    reason="diffusers 0.39 finds no ranks of a text encoder without a `text_model` level, unless metadata say them",
)

_WORDS = "a photo of sks dog cat on in at the beach snow grass desert night city room moon".split()
_PIECES = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")] + [("▁" + word, -1.0) for word in _WORDS]
_PIECES += [("▁", -2.0)] + [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]


def _unet(**changed) -> UNet2DConditionModel:
    options = dict(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return UNet2DConditionModel(**options | changed)


def _vae(scaling_factor: float = 0.18215, **changed) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        scaling_factor=scaling_factor,
        sample_size=32,
        **changed,
    )


def _flow_vae(scaling_factor: float, shift_factor: float) -> AutoencoderKL:
    return _vae(scaling_factor, shift_factor=shift_factor, use_quant_conv=False, use_post_quant_conv=False)


def schedule(**changed) -> DDPMScheduler:
    options = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    return DDPMScheduler(**options | changed)


def _clip_config(words, **changed) -> CLIPTextConfig:
    options = dict(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=24,
        projection_dim=32,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return CLIPTextConfig(**options | changed)


def _clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(miniature.path() / "tokenizer")


def no_safety_checker() -> dict:
    return dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _sd1():
    words = _clip_tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_config(words)),
        tokenizer=words,
        unet=_unet(),
        scheduler=schedule(),
        **no_safety_checker(),
    )


def _sd2():
    words = _clip_tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_config(words, hidden_act="gelu")),
        tokenizer=words,
        unet=_unet(use_linear_projection=True, attention_head_dim=(2, 4)),
        scheduler=schedule(prediction_type="v_prediction"),
        **no_safety_checker(),
    )


def _sdxl():
    words = _clip_tokenizer()
    unet = _unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(0.13025),
        text_encoder=CLIPTextModel(_clip_config(words)),
        tokenizer=words,
        unet=unet,
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(words)),
        tokenizer_2=words,
        scheduler=schedule(),
        add_watermarker=False,
    )


def _alt():
    words = XLMRobertaTokenizer(
        vocab=[("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + _PIECES[3:] + [("<mask>", 0.0)],
        model_max_length=24,
    )
    config = RobertaSeriesConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        project_dim=32,
        max_position_embeddings=40,
        pad_token_id=words.pad_token_id,
        type_vocab_size=1,
    )
    text_encoder_class = ARCHITECTURES["RobertaSeriesModelWithTransformation"].text_encoder_class()
    return AltDiffusionPipeline(
        vae=_vae(),
        text_encoder=text_encoder_class(config),
        tokenizer=words,
        unet=_unet(),
        scheduler=schedule(),
        **no_safety_checker(),
    )


def _t5(d_model: int = 32) -> tuple[T5Tokenizer, T5EncoderModel]:
    words = T5Tokenizer(vocab=_PIECES, extra_ids=0, model_max_length=512)
    config = T5Config(
        vocab_size=len(words), d_model=d_model, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return words, T5EncoderModel(config)


def _deepfloyd(cls, **changed):
    words, encoder = _t5()
    options = dict(
        sample_size=32,
        in_channels=3,
        out_channels=6,
        encoder_hid_dim=32,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        attention_head_dim=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )
    schedule = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True)
    further = {"image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2")} if changed else {}
    return cls(
        tokenizer=words,
        text_encoder=encoder,
        unet=_unet(**options | changed),
        scheduler=schedule,
        watermarker=None,
        **further,
        **no_safety_checker(),
    )


def _sd3(*, t5: bool, **changed):
    words = _clip_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=24,
        **changed,
    )
    tokenizer_3, text_encoder_3 = _t5(64) if t5 else (None, None)
    return StableDiffusion3Pipeline(
        vae=_flow_vae(1.5305, 0.0609),
        text_encoder=CLIPTextModelWithProjection(_clip_config(words)),
        tokenizer=words,
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(words, hidden_act="gelu")),
        tokenizer_2=words,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux(*, guidance: bool):
    words = _clip_tokenizer()
    tokenizer_2, text_encoder_2 = _t5()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance,
    )
    return FluxPipeline(
        vae=_flow_vae(0.3611, 0.1159),
        text_encoder=CLIPTextModel(_clip_config(words)),
        tokenizer=words,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance),
    )


_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _z_image():
    letters = [letter for letter, _ in _PIECES[3:] if len(letter) == 1 and letter != "▁"]
    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", "Ċ", *letters]
    words = Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[],
        unk_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=_TEMPLATE,
    )
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
    )
    return ZImagePipeline(
        vae=_flow_vae(0.3611, 0.1159),
        text_encoder=Qwen3Model(config),
        tokenizer=words,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


FAMILIES = {
    "sd1": _sd1,
    "sd2": _sd2,
    "sdxl": _sdxl,
    "alt": _alt,
    "if": lambda: _deepfloyd(IFPipeline),
    "if2": lambda: _deepfloyd(IFSuperResolutionPipeline, in_channels=6, class_embed_type="timestep"),
    "sd3": lambda: _sd3(t5=True),
    "sd35": lambda: _sd3(t5=False, qk_norm="rms_norm", dual_attention_layers=(0,)),
    "flux": lambda: _flux(guidance=True),
    "schnell": lambda: _flux(guidance=False),
    "z_image": _z_image,
}


def write(family: str, folder: Path) -> Path:
    """Write a family's checkpoint; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = FAMILIES[family]()
    pipeline.save_pretrained(folder)
    return folder


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def _original_unet(name: str, each: int) -> str:
    """A UNet's parameter as the original code names it; each level is `each` blocks long."""
    ends = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    ends |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    for new, old in ends.items():
        if name.startswith(new):
            return name.replace(new, old, 1)
    place, level, kind, number, rest = re.fullmatch(
        r"(down|up|mid)_blocks?\.?(\d*)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name
    ).groups()
    if kind == "resnets":
        part, _, last = rest.rpartition(".")
        rest = f"{_RESNET[part]}.{last}"
    if place == "mid":
        return f"middle_block.{2 * int(number) if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{each * (int(level) + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":  # behind the attention, where there is one
        return f"output_blocks.{each * int(level) + each - 1}.1.{rest}"
    block = each * int(level) + int(number) + (place == "down")
    return f"{'input' if place == 'down' else 'output'}_blocks.{block}.{int(kind == 'attentions')}.{rest}"


def _original_vae(name: str, levels: int) -> str:
    """A VAE's parameter as the original code names it."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"up_blocks\.(\d+)\.", lambda found: f"up.{levels - 1 - int(found[1])}.", name)
    name = re.sub(r"(up\.\d+)\.resnets\.", r"\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = name.replace("upsamplers.0", "upsample").replace("conv_shortcut", "nin_shortcut")
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
    for new, old in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        name = name.replace(f"attn_1.{new}", f"attn_1.{old}")
    return name


def one_file(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """A Stable Diffusion 1's weights under the names of the original code: one file, as A1111 and ComfyUI have it."""
    each, levels = pipeline.unet.config.layers_per_block + 1, len(pipeline.vae.config.block_out_channels)
    parts = {
        "model.diffusion_model.": (pipeline.unet, lambda name: _original_unet(name, each)),
        "first_stage_model.": (pipeline.vae, lambda name: _original_vae(name, levels)),
        "cond_stage_model.transformer.": (
            pipeline.text_encoder,
            lambda name: name if name.startswith("text_model.") else f"text_model.{name}",
        ),
    }
    tensors = {
        start + rename(name): value.contiguous()
        for start, (module, rename) in parts.items()
        for name, value in module.state_dict().items()
    }
    for name, value in tensors.items():  # convolutions of one pixel there
        if "mid.attn_1" in name and name.endswith("weight") and value.ndim == 2:
            tensors[name] = value[:, :, None, None].contiguous()
    return tensors
