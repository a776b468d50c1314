"""Everything a run can be told, in one dataclass; the command line is made from the same fields."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import numbers
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from dbnb.files import whole
from dbnb.presets import PRESETS, suggested

# transformers' name for a schedule that diffusers does not have.
STABLE_DECAY = "warmup_stable_decay"


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes, all of them finite; `off` is one more, which stands for None."""

    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None
    off: int | None = None

    def __contains__(self, value: float) -> bool:
        return (isinstance(value, numbers.Integral) or math.isfinite(value)) and not (
            (self.at_least is not None and value < self.at_least)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
            or (self.at_most is not None and value > self.at_most)
        )

    def __str__(self) -> str:
        bounds = {"at least": self.at_least, "above": self.above, "below": self.below, "at most": self.at_most}
        words = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
        return words if self.off is None else f"{words}, or {self.off}"


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: all that decides them besides the model and the prompt.

    `num_inference_steps` of the solver, the scale of classifier-free guidance, the side in pixels, how many pictures
    are drawn at once (which changes none of them), the seed of the series, and the tokens that a long prompt is padded
    to (None: the pipeline's own number; families of short prompts have no choice).
    """

    num_inference_steps: int = 6
    guidance_scale: float = 2.5
    resolution: int = 128
    batch_size: int = 25
    seed: int = 0
    max_sequence_length: int | None = None


@dataclass(frozen=True)
class AdapterSettings:
    """Which layers get low-rank adapters, and of what kind; the fields are the options of the same names.

    A `lora_alpha` of None is the rank; a `text_encoder_rank` of None is the UNet's.
    """

    lora_layers: str = "attention"
    rank: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    train_text_encoder: bool = False
    text_encoder_rank: int | None = None
    text_encoder_lora_alpha: float | None = None
    text_encoder_lora_dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Objective:
    """What a network is asked in training, and how its errors count; the fields are the options of the same names.

    The first two are for diffusion models, the others for flow matching: `dbnb.paths` says what each does.
    """

    snr_gamma: float | None = None
    noise_offset: float = 0.0
    weighting_scheme: str | None = None
    logit_mean: float | None = None
    logit_std: float | None = None
    mode_scale: float | None = None
    precondition_outputs: bool = False


def _option(default: Any, text: str, *, choices: tuple[str, ...] = (), **bounds: float) -> Any:
    """A field with its help, the words or the range of numbers it takes: `--help` and the check read them here."""
    within = Range(**bounds) if bounds else None
    return field(default=default, metadata={"help": text, "choices": choices, "range": within})


@dataclass
class DreamBoothConfig:
    """The settings of one run, named as in diffusers' own DreamBooth example. `None` means: what the base suggests.

    Built in notebook 00. Raises ValueError, naming the option, when a value cannot work.
    """

    base: str = _option(
        "miniature",
        "what is personalised: a preset (miniature, miniature-flow, sd15, sd21, sdxl, if, sd35, flux; the last three "
        "are gated), hub id, folder or .safetensors file",
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
    captions: bool = _option(
        False, "train each photograph under its own caption: a .txt beside it, metadata.jsonl, or a kohya folder's name"
    )
    masked_loss: bool = _option(
        False,
        "weigh the instance loss by masks: dog.mask.png beside dog.jpg, white on the subject, or an alpha channel",
    )
    concepts: str | None = _option(
        None,
        "several subjects in one adapter: a JSON file, a list of objects that have instance_data_dir, identifier and "
        "class_word each",
    )
    output_dir: str | None = _option(None, "where results go (default: runs/<class_word>)")

    with_prior_preservation: bool = _option(True, "train on class images too, so that the class word keeps its meaning")
    prior_loss_weight: float = _option(1.0, "weight of the class images' loss", at_least=0)
    num_class_images: int = _option(100, "how many class images to draw, or to top up to", at_least=1)
    class_data_dir: str | None = _option(None, "your own class images; used as they are, topped up, never altered")
    sample_batch_size: int | None = _option(None, "images drawn at once", at_least=1)
    num_inference_steps: int | None = _option(None, "solver steps for every image that a run draws", at_least=2)
    guidance_scale: float | None = _option(
        None, "guidance (classifier-free; FLUX.1's own input) for every image that a run draws", at_least=1
    )

    resolution: int | None = _option(None, "side of the square training images, pixels", at_least=1, at_most=8192)
    center_crop: bool = _option(True, "crop the middle; otherwise another random square each time")
    random_flip: bool = _option(False, "mirror half of the images, other ones each time")
    pre_compute_text_embeddings: bool = _option(True, "encode each prompt once, where the text encoder is frozen")
    tokenizer_max_length: int | None = _option(None, "tokens that a prompt is padded or cut to", at_least=1)

    lora_layers: str | None = _option(
        None,
        "which layers of the UNet or transformer get adapters: attention, all, or names of layers or blocks",
    )
    rank: int | None = _option(None, "rank of the UNet's adapters", at_least=1)
    lora_alpha: float | None = _option(
        None, "alpha of the UNet's adapters, which count alpha / rank times (default: the rank)", above=0
    )
    lora_dropout: float = _option(0.0, "dropout in the UNet's adapters", at_least=0, below=1)
    train_text_encoder: bool | None = _option(None, "adapters on the text encoder too")
    text_encoder_rank: int | None = _option(None, "default: the UNet's rank", at_least=1)
    text_encoder_lora_alpha: float | None = _option(None, "default: the text encoder's rank", above=0)
    text_encoder_lora_dropout: float = _option(0.0, "dropout in the text encoder's adapters", at_least=0, below=1)

    use_dora: bool = _option(False, "train each adapted layer's magnitude apart from its direction (DoRA)")
    use_rslora: bool = _option(False, "scale adapters by alpha / sqrt(rank) instead of alpha / rank")

    train_batch_size: int | None = _option(
        None, "instance images a batch, in each process; as many class images come on top", at_least=1
    )
    gradient_accumulation_steps: int = _option(1, "batches whose gradients make one step", at_least=1)
    max_train_steps: int | None = _option(None, "optimizer steps", at_least=1)
    learning_rate: float | None = _option(None, "for the UNet's adapters", above=0, at_most=1)
    text_encoder_learning_rate: float | None = _option(None, "for the text encoder's adapters", above=0, at_most=1)
    lr_scheduler: str | None = _option(None, "a schedule of diffusers (constant, cosine …), or warmup_stable_decay")
    lr_warmup_steps: int = _option(0, "steps until the learning rate is reached", at_least=0)
    adam_beta1: float = _option(0.9, "AdamW", at_least=0, below=1)
    adam_beta2: float = _option(0.999, "AdamW", at_least=0, below=1)
    adam_weight_decay: float = _option(1e-2, "AdamW", at_least=0)
    adam_epsilon: float = _option(1e-8, "AdamW", above=0)
    max_grad_norm: float = _option(1.0, "gradients are scaled down to this norm; 0 leaves them as they are", at_least=0)
    snr_gamma: float | None = _option(None, "min-SNR weighting of the loss, both halves; 5.0 is usual", above=0)
    noise_offset: float = _option(
        0.0, "share of a constant shift in the noise, for darker and lighter pictures; 0.1 is usual", at_least=0
    )
    weighting_scheme: str | None = _option(
        None,
        "flow matching: which times are drawn (logit_normal, mode) or weigh more (sigma_sqrt, cosmap)",
        choices=("none", "logit_normal", "mode", "sigma_sqrt", "cosmap"),
    )
    logit_mean: float | None = _option(
        None, "of logit_normal; above 0 draws less noise (0 where left out)", at_least=-10, at_most=10
    )
    logit_std: float | None = _option(None, "of logit_normal (1 where left out)", above=0, at_most=10)
    mode_scale: float | None = _option(None, "of mode (1.29 where left out)", at_least=-1, at_most=1.75)
    precondition_outputs: bool = _option(
        False, "flow matching: the error is that of the clean picture that follows from the answer, not of the velocity"
    )
    gradient_checkpointing: bool | None = _option(None, "recompute activations: less memory, half as much time again")
    mixed_precision: str | None = _option(
        None,
        "half means bf16 where the CUDA device supports it, else fp16, and no without one; adapters stay in float32",
        choices=("no", "fp16", "bf16", "half"),
    )
    quantization: str | None = _option(
        None,
        "keep the frozen base in fewer bits: nf4 (4, by bitsandbytes, on a CUDA device), int8 or fp8 (8, by torchao)",
        choices=("nf4", "int8", "fp8"),
    )
    use_8bit_adam: bool = _option(False, "optimizer state in 8 bits, by bitsandbytes")
    allow_tf32: bool = _option(False, "faster, less exact float32 products on a CUDA device")
    seed: int = _option(0, "every draw is a function of this and the step", at_least=0, at_most=2**64 - 1)

    checkpointing_steps: int | None = _option(None, "steps between checkpoints; 0 for none", at_least=0)
    checkpoints_total_limit: int | None = _option(
        2, "checkpoints that stay: older ones go when a newer one is complete; -1 keeps all", at_least=1, off=-1
    )
    resume_from_checkpoint: str | None = _option(None, "a checkpoint's path, or 'latest'")
    validation_steps: int | None = _option(
        None, "steps between validation images during training; 0 for none", at_least=0
    )
    num_validation_images: int | None = _option(
        None, "images of each prompt set, before and after; 0 switches images and metrics off", at_least=0
    )
    select: str = _option(
        "last", "which step's adapter is exported: the last, or the best trade-off measured", choices=("last", "best")
    )
    patience: int | None = _option(
        None, "measured validation steps without a better trade-off, after which training stops", at_least=1
    )
    measure_validation: bool = _option(
        False, "measure the pictures of validation steps, and of the last; --select best and --patience do so too"
    )
    holdout: int = _option(0, "photographs, the last by name, that are left out of training to measure it", at_least=0)
    reference_data_dir: str | None = _option(None, "further photographs of the subject: the ceiling of the metrics")
    report_to: str = _option("none", "one of accelerate's trackers, such as tensorboard or wandb, or none")
    export: str = _option(
        "diffusers", "kohya writes a second file, for ComfyUI and A1111", choices=("diffusers", "kohya")
    )
    push_to_hub: bool = _option(False, "upload adapter, card, images and metrics when done")
    hub_model_id: str | None = _option(None, "owner/name on the hub (default: <identifier>-<class_word>)")

    def __post_init__(self) -> None:
        if isinstance(self.instance_prompt, str):
            self.instance_prompt = [self.instance_prompt]
        self._check_texts()
        for name, value in suggested(self.base).items():
            if name != "base" and getattr(self, name) is None:
                setattr(self, name, value)
        self._check_numbers_and_choices()
        if self.mixed_precision == "half":
            self.mixed_precision = _half_precision()
        if self.output_dir is None:
            # Where file names are ASCII (LC_ALL=C), a folder of another name could not be made.
            plain = re.ASCII if sys.getfilesystemencoding() == "ascii" else re.UNICODE
            self.output_dir = "runs/" + re.sub(r"[^\w-]+", "-", self.class_word, flags=plain)
        if self.export == "kohya" and self.use_dora:
            raise ValueError("export='kohya' does not write DoRA's magnitudes: leave out export or use_dora.")
        if self.lr_warmup_steps >= self.max_train_steps:
            raise ValueError(
                f"lr_warmup_steps={self.lr_warmup_steps} must be below max_train_steps={self.max_train_steps}: the "
                "learning rate would never be reached."
            )
        self._check_measures()
        if self.hub_model_id is not None:
            _check_repository(self.hub_model_id)

    def _check_measures(self) -> None:
        """Raise the ValueError that names an option which needs measures where there are none."""
        names = ("select", "patience", "measure_validation")
        asked = next((name for name in names if getattr(self, name) not in ("last", None, False)), None)
        missing = next(
            (name for name in ("num_validation_images", "validation_steps") if not getattr(self, name)), None
        )
        if asked and missing:
            raise ValueError(
                f"{asked}={getattr(self, asked)!r} needs pictures that are measured, and {missing}=0 draws none: raise "
                "it."
            )

    def _check_texts(self) -> None:
        """Paths become text; what is no text, or text that no file in UTF-8 can hold, is refused by its name."""
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if kind is not str or value is None:
                continue
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
                setattr(self, name, value)
            texts = list(value) if name in _SEVERAL else [value]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name}={value!r} must be a text.")
            if not texts or not all(text.strip() for text in texts):
                raise ValueError(f"{name}={value!r} is empty: give a value, or leave the option out.")
            # Photographs may lie under such names: Python's own files can read them. Other libraries cannot.
            if not name.endswith("_data_dir") and any("\ud800" <= letter <= "\udfff" for letter in "".join(texts)):
                raise ValueError(f"{name}={value!r} is not valid UTF-8 here: use another name, or set PYTHONUTF8=1.")

    def _check_numbers_and_choices(self) -> None:
        """Raise the ValueError that names the first option whose value is not among those it takes."""
        for item in dataclasses.fields(self):
            name, value, within = item.name, getattr(self, item.name), item.metadata["range"]
            choices = item.metadata["choices"]
            if value is None:
                continue
            if choices and value not in choices:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}.")
            if within is None:
                continue
            kind, called = (numbers.Integral, "a whole number") if _KINDS[name] is int else (numbers.Real, "a number")
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ValueError(f"{name}={value!r} must be {called}.")
            if value == within.off:
                setattr(self, name, None)
            elif value not in within:
                raise ValueError(f"{name}={value} must {'not be negative' if within == Range(0) else f'be {within}'}.")

    @property
    def sampling(self) -> Sampling:
        """How this run draws every picture: class images, before and after."""
        return Sampling(
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            resolution=self.resolution,
            batch_size=self.sample_batch_size,
            seed=self.seed,
            max_sequence_length=self.tokenizer_max_length,
        )

    @property
    def adapters(self) -> AdapterSettings:
        """The adapters that this run trains."""
        return AdapterSettings(**{item.name: getattr(self, item.name) for item in dataclasses.fields(AdapterSettings)})

    @property
    def objective(self) -> Objective:
        """What this run asks of the network, and how errors count."""
        return Objective(**{item.name: getattr(self, item.name) for item in dataclasses.fields(Objective)})

    @property
    def measures(self) -> bool:
        """Whether pictures are measured at validation steps."""
        return self.measure_validation or self.select == "best" or self.patience is not None

    def validated_steps(self) -> list[int]:
        """The steps after which pictures are drawn; where they are measured, the last one too."""
        every = self.validation_steps
        steps = list(range(every, self.max_train_steps + 1, every)) if every else []
        return sorted({*steps, self.max_train_steps}) if self.measures else steps

    def save(self, path: Path) -> None:
        """Write the settings as JSON."""
        with whole(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


def sampling_of(given: Sampling | DreamBoothConfig | None = None, **changed: Any) -> Sampling:
    """How to draw, however it was said: a record, a run's settings or neither, with what is `changed` by its name.

    Raises TypeError for a name that `Sampling` does not have.
    """
    record = given.sampling if isinstance(given, DreamBoothConfig) else given or Sampling()
    return dataclasses.replace(record, **changed)


def objective_of(given: Objective | DreamBoothConfig | None = None, **changed: Any) -> Objective:
    """What the network is asked, however it was said; see `sampling_of`."""
    record = given.objective if isinstance(given, DreamBoothConfig) else given or Objective()
    return dataclasses.replace(record, **changed)


def adapters_of(given: AdapterSettings | DreamBoothConfig | None = None, **changed: Any) -> AdapterSettings:
    """Which adapters, however it was said; see `sampling_of`."""
    record = given.adapters if isinstance(given, DreamBoothConfig) else given or AdapterSettings()
    return dataclasses.replace(record, **changed)


def _kinds() -> dict[str, type]:
    """Option -> the type of its value, or of each of its values, where there is just one besides None."""
    hints = get_type_hints(DreamBoothConfig)
    types = {name: [t for t in get_args(hint) or (hint,) if t is not type(None)] for name, hint in hints.items()}
    only = {name: found[0] for name, found in types.items() if len(found) == 1}
    return {name: get_args(kind)[0] if get_origin(kind) is list else kind for name, kind in only.items()}


_KINDS = _kinds()


def _check_repository(repo_id: str) -> None:
    """Raise ValueError where the hub would not take a name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # not for --help

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"hub_model_id={repo_id!r} is not a valid repository name: give owner/name in letters, digits, '-', '_' "
            "and '.', with at most 96 characters."
        ) from error


def check_libraries(config: DreamBoothConfig) -> None:
    """Raise ValueError for a schedule or a tracker that the installed diffusers and accelerate cannot use."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from diffusers.optimization import SchedulerType

    schedules = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
    schedules.append(STABLE_DECAY)
    if config.lr_scheduler == SchedulerType.PIECEWISE_CONSTANT.value:
        raise ValueError(
            f"lr_scheduler={config.lr_scheduler!r} needs rules for its steps, for which there is no option: choose one "
            f"of {', '.join(schedules)}."
        )
    if config.lr_scheduler not in schedules:
        raise ValueError(f"lr_scheduler={config.lr_scheduler!r} must be one of {', '.join(schedules)}.")
    trackers = ["none", "all", *LOGGER_TYPE_TO_CLASS]
    if config.report_to not in trackers:
        raise ValueError(f"report_to={config.report_to!r} must be one of {', '.join(trackers)}.")
    if config.report_to not in ("none", "all", *(str(name) for name in get_available_trackers())):
        raise ValueError(
            f"report_to={config.report_to!r} needs a package that is not installed: pip install {config.report_to}, or "
            "use --report_to tensorboard."
        )


def _half_precision() -> str:
    import torch  # not for the miniature, nor for --help

    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


# Options that are words, not names of files: those must stay as the file system has them.
_SEVERAL = ("instance_prompt",)  # may be given more than once
_WORDS = ("class_word", "identifier", "instance_prompt", "class_prompt")


def _words(text: str) -> str:
    """A word from the command line: in the C locale Python hands over the bytes of other letters one by one."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:  # not UTF-8 either, which the check says
        return text


def build_parser() -> argparse.ArgumentParser:
    """The command line: one option a field, booleans as --name / --no_name."""
    parser = argparse.ArgumentParser(
        prog="python -m dbnb",
        usage="%(prog)s [--option value ...]",
        description="Personalise a text-to-image model to a subject from a few photographs, and measure it.",
    )
    for item in dataclasses.fields(DreamBoothConfig):
        kind, text, remarks = _KINDS[item.name], item.metadata["help"], []
        if item.metadata["choices"]:
            remarks.append(f"one of {', '.join(item.metadata['choices'])}")
        if item.metadata["range"] is not None:
            remarks.append(str(item.metadata["range"]))
        if item.default is not None:
            remarks.append(f"default: {item.default}")
        elif any(item.name in preset for preset in PRESETS.values()):
            values = ", ".join(f"{base} {preset[item.name]}" for base, preset in PRESETS.items() if item.name in preset)
            remarks.append(f"default by base: {values}")
        if remarks:
            text += f" ({'; '.join(remarks)})"
        common = dict(dest=item.name, default=item.default, help=text.replace("%", "%%"))
        if kind is bool:
            group = parser.add_mutually_exclusive_group()
            group.add_argument(f"--{item.name}", action="store_true", **common)
            short = item.name.removeprefix("with_")
            group.add_argument(f"--no_{short}", dest=item.name, action="store_false", help="the opposite")
        else:
            several = {"action": "append"} if item.name in _SEVERAL else {}
            type_ = _words if item.name in _WORDS else kind
            parser.add_argument(f"--{item.name}", type=type_, metavar=kind.__name__.upper(), **common, **several)
    return parser


def parse_args(argv: list[str] | None = None) -> DreamBoothConfig:
    """Command line -> settings; a value that cannot work ends the program with one sentence."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        return DreamBoothConfig(**vars(args))
    except ValueError as error:
        parser.exit(2, f"dbnb: {error}\n")
