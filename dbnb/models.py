"""Step 3: load the parts of a base, pick the text encoder's class, freeze, cast. Built in notebook 03."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DConditionModel
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, Qwen3Model, T5EncoderModel

from dbnb.config import Objective
from dbnb.denoisers import NETWORKS, Network, Read
from dbnb.files import ends
from dbnb.paths import Diffusion, Flow
from dbnb.presets import PRESETS, read_config
from dbnb.quantization import quantization_config, size_of, whole_layers
from dbnb.single_file import converted
from dbnb.tables import Table


def _roberta_series() -> type:
    import diffusers.pipelines
    from diffusers.pipelines.deprecated import alt_diffusion

    # Checkpoints name this class by the module's old place, where diffusers itself no longer finds it.
    diffusers.pipelines.alt_diffusion = alt_diffusion
    return alt_diffusion.RobertaSeriesModelWithTransformation


@dataclass(frozen=True)
class Architecture:
    """What the workflow must know of a text encoder: how to get its class, where its adapters sit, its call."""

    text_encoder_class: Any
    lora_targets: tuple[str, ...]
    always_masked: bool = False  # the padding is hidden from it; otherwise its config's `use_attention_mask` decides
    max_length: int | None = None  # tokens, where the tokenizer itself would allow more than the base was trained with
    positions: Callable[[Any], int | None] = lambda config: config.max_position_embeddings  # tokens it can take at all
    lowercase: bool = False
    chat: bool = False  # it reads a prompt as what a user says, in the tokenizer's own template
    fixed_length: bool = False  # always the tokenizer's own, whatever is asked: another encoder reads long prompts
    large: bool = False  # billions of weights, where a CLIP has hundreds of millions: in fewer bits with the denoiser


_QWEN3 = Architecture(
    lambda: Qwen3Model, (), always_masked=True, max_length=512, positions=lambda c: 512, chat=True, large=True
)
_CLIP_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
# One row an architecture: the name is what `text_encoder/config.json` says in `architectures`.
ARCHITECTURES = {
    "CLIPTextModel": Architecture(lambda: CLIPTextModel, _CLIP_TARGETS),
    "CLIPTextModelWithProjection": Architecture(lambda: CLIPTextModelWithProjection, _CLIP_TARGETS),
    "T5EncoderModel": Architecture(
        lambda: T5EncoderModel,
        ("q", "k", "v", "o"),
        always_masked=True,
        max_length=77,
        positions=lambda config: None,  # it knows relative ones
        lowercase=True,
        large=True,
    ),
    "RobertaSeriesModelWithTransformation": Architecture(
        _roberta_series,
        ("query", "key", "value", "output.dense"),
        positions=lambda config: config.max_position_embeddings - config.pad_token_id - 1,  # counted from behind it
    ),
    "Qwen3ForCausalLM": _QWEN3,
    "Qwen3Model": _QWEN3,
}


@dataclass(repr=False)
class Components:
    """The parts of a base, frozen. `vae` is None for pixel-space models. Shows itself as a table."""

    base: Path
    tokenizer: Any
    text_encoder: torch.nn.Module
    vae: AutoencoderKL | None
    denoiser: ModelMixin  # the UNet or transformer
    network: Network  # what there is to know of its kind
    noise_scheduler: SchedulerMixin
    architecture: Architecture
    # Stable Diffusion XL and FLUX.1 have a second text encoder, and Stable Diffusion 3 a third.
    tokenizer_2: Any = None
    text_encoder_2: torch.nn.Module | None = None
    architecture_2: Architecture | None = None
    tokenizer_3: Any = None
    text_encoder_3: torch.nn.Module | None = None
    architecture_3: Architecture | None = None
    variant: str | None = None  # of the base's files, such as "fp16"
    quantization: str | None = None  # of the denoiser and of large text encoders, a key of `QUANTIZATIONS`
    # What only the base's pipeline needs (a safety checker): read once, by `build_pipeline`.
    further: dict[str, Any] = field(default_factory=dict)

    def modules(self) -> dict[str, torch.nn.Module]:
        """The parts that hold parameters."""
        parts = {
            "text_encoder": self.text_encoder,
            "text_encoder_2": self.text_encoder_2,
            "text_encoder_3": self.text_encoder_3,
            "vae": self.vae,
            self.network.part: self.denoiser,
        }
        return {name: module for name, module in parts.items() if module is not None}

    def to(self, device: torch.device | str) -> Components:
        """Move every part."""
        for module in self.modules().values():
            module.to(device)
        return self

    def tokenizers(self) -> dict[str, Any]:
        """The tokenizers, by the names that a pipeline gives them."""
        found = {"tokenizer": self.tokenizer, "tokenizer_2": self.tokenizer_2, "tokenizer_3": self.tokenizer_3}
        return {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}

    def absent(self) -> list[str]:
        """The text encoders that this base could have and does without."""
        return [name for name in self.network.optional if getattr(self, name) is None]

    def parts(self) -> dict[str, Any]:
        """All that a pipeline of this base shares with training."""
        found = self.modules() | self.tokenizers()
        for name in self.absent():  # a pipeline would look for it
            found |= {name: None, name.replace("text_encoder", "tokenizer"): None}
        return found

    def text_encoders(self) -> dict[str, tuple[Any, torch.nn.Module, Architecture]]:
        """Name -> tokenizer, text encoder, architecture."""
        found = {"text_encoder": (self.tokenizer, self.text_encoder, self.architecture)}
        if self.text_encoder_2 is not None:
            found["text_encoder_2"] = (self.tokenizer_2, self.text_encoder_2, self.architecture_2)
        if self.text_encoder_3 is not None:
            found["text_encoder_3"] = (self.tokenizer_3, self.text_encoder_3, self.architecture_3)
        return found

    @property
    def unet(self) -> UNet2DConditionModel:
        """The denoiser of a base that has a UNet. Raises AttributeError where it is a transformer."""
        if self.network.part != "unet":
            raise AttributeError(f"This base denoises with a {self.network.part}: take `denoiser`.")
        return self.denoiser

    @property
    def path(self) -> Diffusion | Flow:
        """The way from a picture to noise that this base was trained on."""
        return self.network.path(self.noise_scheduler)

    @property
    def upscales(self) -> bool:
        """Whether the UNet enlarges a small picture (DeepFloyd IF's second stage): it sees two pictures at once."""
        return self.vae is None and self.denoiser.config.in_channels == 6

    # Read off one weight: the network's own properties walk through all of its modules, milliseconds at each step.
    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.network.first(self.denoiser).weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's weights; adapters are float32."""
        return self.network.first(self.denoiser).weight.dtype

    @property
    def downsampling(self) -> int:
        """Pixels a latent, along one side; 1 in pixel space."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    def table(self) -> Table:
        """One row a part: class, parameters, dtype, how many are trainable, memory."""
        rows = Table()
        for name, module in self.modules().items():
            sizes = [size_of(p) for p in module.parameters()]
            rows.append(
                {
                    "part": name,
                    "class": type(module).__name__,
                    "parameters": f"{sum(size.numbers for size in sizes):,}",
                    "dtype": ", ".join(sorted({size.format for size in sizes})),
                    "trainable": f"{sum(p.numel() for p in module.parameters() if p.requires_grad):,}",
                    "memory": f"{sum(size.bytes for size in sizes) / 2**20:.1f} MiB",
                }
            )
        for name in self.absent():
            absent = {"class": "absent: its tokens are zeros", "parameters": "0", "dtype": "", "trainable": "0"}
            rows.append({"part": name, **absent, "memory": "0.0 MiB"})
        return rows

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _why_not_fetched(error: BaseException | None, variant: str | None) -> str:
    """What the hub's error, or what it came from, means, and what to do."""
    while error is not None:
        if isinstance(error, GatedRepoError):
            return "it is gated: accept its licence on the hub, and log in with `hf auth login`"
        if isinstance(error, RevisionNotFoundError):
            return "the repository has no such revision: check --revision"
        if isinstance(error, RepositoryNotFoundError):
            return "there is no such repository, or it is private: check the spelling, and log in with `hf auth login`"
        if variant is not None and isinstance(error, ValueError) and "variant" in str(error):
            return f"it has no files of the variant {variant!r}: leave --variant out"
        if isinstance(error, RemoteEntryNotFoundError):
            return f"it is no diffusers pipeline ({error.args[0].splitlines()[0]}): give the id of a whole pipeline"
        error = error.__cause__ or error.__context__
    return "no answer, and it is not in the cache: check the network"


def resolve_base(base: str, *, revision: str | None = None, variant: str | None = None) -> Path:
    """A preset, a path or a hub id -> a local pipeline folder (the hub's files land in huggingface_hub's cache).

    `revision` and `variant` are the hub's. A checkpoint in one file is converted, once. Raises FileNotFoundError in one
    sentence when it is neither here nor to be had on the hub.
    """
    if base in ("miniature", "miniature-flow"):
        from dbnb import miniature

        return miniature.path() if base == "miniature" else miniature.flow_path()
    base = PRESETS.get(base, {}).get("base", base)
    path = Path(os.path.expanduser(base))
    if os.path.isfile(path):
        return converted(path)
    if os.path.isdir(path):
        if not (path / "model_index.json").is_file():
            raise FileNotFoundError(
                f"--base {path} has no model_index.json: give the folder of a whole diffusers pipeline."
            )
        return path
    if base.count("/") != 1 or base.startswith((".", "/", "~")):
        raise FileNotFoundError(f"Base {base!r} is no folder here and no hub id (owner/name): check the spelling.")
    try:
        return Path(DiffusionPipeline.download(base, revision=revision, variant=variant, use_safetensors=True))
    except Exception as error:  # huggingface_hub and diffusers raise a dozen kinds, one inside the other
        raise FileNotFoundError(
            f"Base {base!r} cannot be fetched from the hub ({type(error).__name__}): {_why_not_fetched(error, variant)}"
            "; --base miniature needs none of it."
        ) from error


def fingerprint(base: Path) -> str:
    """A short hash of a base: every file's name and size, and up to 64 MiB from its start and from its end."""
    digest = hashlib.sha256()
    for path in sorted(base.rglob("*")):
        if path.suffix in (".json", ".safetensors", ".bin", ".txt") and path.is_file():
            digest.update(str(path.relative_to(base)).encode())
            digest.update(str(path.stat().st_size).encode())
            digest.update(ends(path))
    return digest.hexdigest()[:16]


def text_architecture(base: Path, part: str = "text_encoder") -> tuple[str, Architecture]:
    """Name and row of a base's text encoder. Raises ValueError that names an unknown one and lists the known."""
    names = read_config(base / part).get("architectures") or ["(none)"]
    if names[0] not in ARCHITECTURES:
        raise ValueError(
            f"Text encoder {names[0]} of {base} is not supported: give a base with one of {', '.join(ARCHITECTURES)}."
        )
    different = network_of(base).text.get(names[0], {})
    return names[0], dataclasses.replace(ARCHITECTURES[names[0]], **different)


def read_tokenizer(base: Path, part: str = "tokenizer") -> Any:
    """A base's tokenizer, or its second one. Raises ValueError where it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(base / part, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise a dozen kinds
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"The base's {base / part} holds no tokenizer that can be read ({why}): copy it again."
        ) from error


def _index(base: Path) -> dict[str, Any]:
    """A pipeline's `model_index.json`, part -> (library, class). Raises ValueError for what is not known here."""
    try:
        index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{base / 'model_index.json'} cannot be read ({error}): copy the base again.") from error
    if not isinstance(index, dict):
        raise ValueError(
            f"{base / 'model_index.json'} is no pipeline's: give the folder of a whole diffusers pipeline."
        )
    network, pipeline = _network(index), index.get("_class_name")
    if network is None or not _has(index, "text_encoder") or pipeline not in (network.pipelines or (pipeline,)):
        raise ValueError(
            f"{base} is a {pipeline}: give a text-to-image base that has a text encoder and one of "
            f"{', '.join(NETWORKS)}."
        )
    return index


def _network(index: Mapping[str, Any]) -> Network | None:
    """The row of the network that a pipeline denoises with, if it is known."""
    if _has(index, "unet"):
        return NETWORKS["UNet2DConditionModel"]
    return NETWORKS.get(index["transformer"][1]) if _has(index, "transformer") else None


def network_of(base: Path) -> Network:
    """The row of the network that a base denoises with. Raises ValueError where none is known."""
    return _network(_index(base))


def _has(index: Mapping[str, Any], part: str) -> bool:
    entry = index.get(part)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def check_base(
    base: Path,
    *,
    resolution: int,
    tokenizer_max_length: int | None = None,
    objective: Objective | None = None,
    train_text_encoder: bool = False,
    quantization: str | None = None,
    export: str = "diffusers",
) -> None:
    """Raise the ValueError that names a setting which this base cannot take: read off its configs, not its weights.

    The arguments are the options of the same names; `objective` holds those that say what training asks.
    """
    index = _index(base)
    network = _network(index)
    _check_resolution(base, index, resolution)
    if objective is not None:
        network.path.check(objective)
    if train_text_encoder and not any(_has(index, part) for part in network.adapted):
        raise ValueError(
            "train_text_encoder: this base's pipeline loads no adapters of its text encoder: leave it out."
        )
    if train_text_encoder and quantization == "nf4":
        adapted = [part for part in network.adapted if _has(index, part)]
        if any(text_architecture(base, part)[1].large for part in adapted):
            raise ValueError(
                "quantization='nf4': diffusers loads no adapters of a large text encoder into it: use int8 or fp8, or "
                "leave train_text_encoder out."
            )
    if export == "kohya" and network.part != "unet":
        raise ValueError(
            "export='kohya' is for bases with a UNet: of this family ComfyUI reads the diffusers file as it is."
        )
    if tokenizer_max_length is None:
        return
    for part in ("", "_2", "_3"):
        if not _has(index, f"text_encoder{part}") or not (base / f"text_encoder{part}").is_dir():
            continue
        name, architecture = text_architecture(base, f"text_encoder{part}")
        if architecture.fixed_length:
            continue
        most = architecture.positions(
            architecture.text_encoder_class().config_class.from_pretrained(base / f"text_encoder{part}")
        )
        least = read_tokenizer(base, f"tokenizer{part}").num_special_tokens_to_add() + 1
        if tokenizer_max_length < least or (most is not None and tokenizer_max_length > most):
            bounds = f"at least {least}" if most is None else f"from {least} to {most}"
            raise ValueError(
                f"tokenizer_max_length={tokenizer_max_length} must be {bounds} for this base's text encoder ({name})."
            )


def _check_resolution(base: Path, index: Mapping[str, Any], resolution: int) -> None:
    """Raise the ValueError that names the resolutions nearest to one which a base cannot draw."""
    network = _network(index)
    config, most = read_config(base / network.part), None
    if _has(index, "vae"):  # pipelines ask for a multiple of 8, whatever the VAE
        pixels = 2 ** (len(read_config(base / "vae").get("block_out_channels", [0] * 4)) - 1) * network.patch
        step = math.lcm(8, pixels)
        if "pos_embed_max_size" in config:
            most = config["pos_embed_max_size"] * pixels // step * step
    else:
        levels = len(config.get("block_out_channels", [0] * 4))
        step = math.lcm(4 if config.get("in_channels") == 6 else 1, 2 ** (levels - 1))
    if resolution % step:
        lower = resolution // step * step
        nearest = f"{lower} or {lower + step}" if lower else str(step)
        raise ValueError(f"resolution={resolution} must be a multiple of {step} for this base: take {nearest}.")
    if most is not None and resolution > most:
        raise ValueError(f"resolution={resolution} must be at most {most} for this base: it knows no further places.")


def dtype_of(mixed_precision: str) -> torch.dtype:
    """What the base's own weights are kept in, for a setting of `mixed_precision`."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision, torch.float32)


def read_part(
    base: Path,
    part: str,
    *,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    quantization: str | None = None,
) -> torch.nn.Module:
    """A text encoder, the VAE or the denoiser of a base, from its files, frozen; `quantization` as `load_components`
    has it. Raises FileNotFoundError where there are no weights as safetensors."""
    network, options = network_of(base), {}
    if part == "vae":
        model_class = AutoencoderKL
    elif part == network.part:
        model_class = network.network_class
        if quantization is not None:
            with torch.device("meta"):
                whole = whole_layers(network, model_class.from_config(read_config(base / part)))
            options["quantization_config"] = quantization_config(quantization, "diffusers", dtype=dtype, whole=whole)
    else:
        row = text_architecture(base, part)[1]
        model_class = row.text_encoder_class()
        if quantization is not None and row.large:
            options["quantization_config"] = quantization_config(quantization, "transformers", dtype=dtype)
    try:  # the library is told the dtype, since it keeps what would overflow (T5's `wo`) in float32
        module = model_class.from_pretrained(
            base / part, use_safetensors=True, torch_dtype=dtype, variant=variant, **options
        )
    except (OSError, ValueError) as error:
        of = "" if variant is None else f" of the variant {variant!r}"
        raise FileNotFoundError(f"{base / part} has no weights{of} as safetensors: {error}") from error
    return module.requires_grad_(False).eval()


def load_components(
    base: str | Path,
    *,
    weight_dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    quantization: str | None = None,
) -> Components:
    """Load tokenizers, text encoders, VAE (if `model_index.json` names one), denoiser and schedule; freeze; cast.

    `weight_dtype` is one dtype for all, or one for each of "text_encoder", "vae", "unet" (float32 if not named). The
    scheduler is the base's own schedule as its path has it (DDPM, or flow matching), whatever solver it ships. Weights
    are read from safetensors only, of the `variant` that is asked for. Stable Diffusion 3 works without its T5: where
    that is named nowhere, or its folder left out, it is absent, which the table says.

    With `quantization`, a key of `QUANTIZATIONS`, the linear layers of the denoiser's blocks and of large text encoders
    are kept in fewer bits; `quantization.check_quantization` says whether that can be done here.

    Raises ValueError that names a pipeline of a network that is not known, or one of another task, and
    FileNotFoundError where the weights are missing.
    """
    folder = resolve_base(str(base), revision=revision, variant=variant)
    index = _index(folder)
    network = _network(index)

    def load(part: str) -> Any:
        dtype = weight_dtype if isinstance(weight_dtype, torch.dtype) else weight_dtype.get(part, torch.float32)
        return read_part(folder, part, dtype=dtype, variant=variant, quantization=quantization)

    further: dict[str, Any] = {}
    for number in ("_2", "_3"):
        part = f"text_encoder{number}"
        if not _has(index, part) or (part in network.optional and not (folder / part).is_dir()):
            continue
        row = text_architecture(folder, part)[1]
        further |= {
            f"tokenizer{number}": read_tokenizer(folder, f"tokenizer{number}"),
            f"architecture{number}": row,
            part: load(part),
        }
    components = Components(
        base=folder,
        tokenizer=read_tokenizer(folder),
        text_encoder=load("text_encoder"),
        vae=load("vae") if _has(index, "vae") else None,
        denoiser=load(network.part),
        network=network,
        noise_scheduler=network.path.schedule_class.from_pretrained(folder, subfolder="scheduler"),
        architecture=text_architecture(folder)[1],
        variant=variant,
        quantization=quantization,
        **further,
    )
    channels = components.denoiser.config.in_channels
    seen = (components.vae.config.latent_channels if components.vae else 3) * network.packed
    if channels != seen and not components.upscales:
        raise ValueError(
            f"The {network.word} of {folder} takes {channels} channels (inpainting?): give a text-to-image base."
        )
    return components


@contextmanager
def upcast(vae: AutoencoderKL) -> Iterator[None]:
    """An autoencoder that overflows in float16 (SDXL's: `force_upcast`) is float32 meanwhile, as in its pipelines."""
    overflows = vae.dtype == torch.float16 and vae.config.force_upcast
    if overflows:
        vae.to(dtype=torch.float32)
    try:
        yield
    finally:
        if overflows:
            vae.to(dtype=torch.float16)


def _token_length(tokenizer: Any, architecture: Architecture, max_length: int | None) -> int:
    """Tokens a prompt is padded or cut to: what was asked, what the base was trained with, or the tokenizer's own."""
    asked = None if architecture.fixed_length else max_length
    return asked or architecture.max_length or tokenizer.model_max_length


def _texts(tokenizer: Any, architecture: Architecture, prompts: list[str]) -> list[str]:
    """Prompts as a text encoder was trained to read them."""
    if architecture.lowercase:
        return [prompt.lower().strip() for prompt in prompts]
    if not architecture.chat:
        return prompts
    said = [[{"role": "user", "content": prompt}] for prompt in prompts]
    options = dict(tokenize=False, add_generation_prompt=True, enable_thinking=True)
    return [tokenizer.apply_chat_template(messages, **options) for messages in said]


def cut_off(components: Components, prompt: str, max_length: int | None = None) -> str:
    """What of a prompt is too long for every text encoder, and so will not be read; "" where all fits."""
    unread = []
    for tokenizer, _, architecture in components.text_encoders().values():
        around = len(tokenizer(_texts(tokenizer, architecture, [""])).input_ids[0])
        room = _token_length(tokenizer, architecture, max_length) - around
        unread.append(tokenizer.decode(tokenizer(prompt, add_special_tokens=False).input_ids[room:]))
    return min(unread, key=len)


def embed_prompts(
    components: Components, prompts: list[str], *, max_length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts -> (B, L, D) hidden states, and (B, P) pooled ones where the base wants them (SDXL), else None.

    Each distinct prompt is encoded once. L is `max_length`, or what the base was trained with. Gradients flow where a
    text encoder has trainable weights.
    """
    distinct = list(dict.fromkeys(prompts))
    encoders, outputs, masks = components.text_encoders(), {}, {}
    for name, (tokenizer, encoder, architecture) in encoders.items():
        texts = _texts(tokenizer, architecture, distinct)
        length = _token_length(tokenizer, architecture, max_length)
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        if next(encoder.parameters()).device != components.device:  # it rested
            encoder.to(components.device)
        masked = architecture.always_masked or getattr(encoder.config, "use_attention_mask", False)
        tokens = tokens.to(components.device)
        mask = {"attention_mask": tokens.attention_mask} if masked else {}
        layers = {"output_hidden_states": True} if len(encoders) > 1 or architecture.chat else {}
        outputs[name], masks[name] = encoder(tokens.input_ids, **mask, **layers), tokens.attention_mask
    hidden, pooled = components.network.prompts(Read(outputs, masks, max_length), components.denoiser.config)
    order = [distinct.index(prompt) for prompt in prompts]
    return hidden[order], None if pooled is None else pooled[order]


def encode_prompts(components: Components, prompts: list[str], *, max_length: int | None = None) -> torch.Tensor:
    """Prompts -> (B, L, D) hidden states, each distinct prompt encoded once."""
    return embed_prompts(components, prompts, max_length=max_length)[0]
