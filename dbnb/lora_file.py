"""What is in a LoRA file: its layers, under any of the names in use, and the base it was made for."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dbnb import miniature
from dbnb.planner import BASES
from dbnb.presets import one_file_family, read_config

# What a key ends in -> which part of a layer it holds. A peft model's own state has its adapter's name in between.
_ENDS = re.compile(
    r"(?:[._]lora(?:_linear_layer)?[._](?P<half>A|B|down|up)(?:\.(?!weight)\w+)?\.weight"
    r"|\.(?P<alpha>alpha)"
    r"|\.(?P<magnitude>dora_scale|lora_magnitude_vector(?:\.(?!weight)\w+)?(?:\.weight)?))$"
)
_HALF = {"A": "A", "down": "A", "B": "B", "up": "B"}
# Other factorisations than B A, which are adapters but no LoRA.
_OTHER_KINDS = {"hada_w": "LoHa", "lokr_w": "LoKr", "lora_mid": "LoCon with a middle matrix", "oft_": "OFT"}
# Where in a key the name within a part begins. Kohya's names have underscores for dots.
_IN_TEXT_ENCODER = re.compile(
    r"(?:text_model|roberta)[._]|encoder[._](?:layers|layer|block)[._]\d|layers[._]\d+[._](?:self_attn|mlp)"
)
_IN_UNET = re.compile(r"(?:(?:down|up|input|output)_blocks[._]\d|(?:mid_block|middle_block)[._])")
_IN_TRANSFORMER = re.compile(
    r"(?:single_transformer_blocks|transformer_blocks|double_blocks|single_blocks|joint_blocks)[._]\d"
)
_BLOCK = re.compile(
    r"(mid_block|middle_block)|((?:(?:down|up|input|output|double|joint|(?:single_)?transformer|single)_)?blocks|layers?|block)"
    r"[._](\d+)"
)
# What a key begins with -> who names them so. Diffusers' loaders read the first two.
_NAMINGS = {
    r"(?:unet|transformer|text_encoder(?:_[23])?)\.": "diffusers",
    r"lora_(?:unet|transformer|te[123]?)_": "kohya",
    r"(?:\w+\.)?base_model\.model\.": "PEFT",
    r"(?:model\.)?diffusion_model\.|text_encoders\.": "ComfyUI",
    r"$": "no prefix",
}


@dataclass
class Layer:
    """One adapted layer: the part and the name that it has there, and the keys of its matrices in the file.

    `alpha` and `scale` are those of its training, None where the file does not tell; `loads_at` is the scale after
    loading, None where a loader leaves it out; `weight_norm` is ||W|| of what it is added to, where a base is there.
    """

    part: str
    name: str
    prefix: str
    keys: dict[str, str] = field(default_factory=dict)  # "A", "B", "alpha", "magnitude" -> key
    alpha: float | None = None
    scale: float | None = None
    loads_at: float | None = None
    weight_norm: float | None = None

    @property
    def matrices(self) -> list[str]:
        """The keys of A and B, as far as they are there."""
        return [self.keys[half] for half in "AB" if half in self.keys]

    @property
    def flat_name(self) -> str:
        """The name in a form that all namings share: dots are underscores, without the level that CLIP's may have."""
        return self.name.replace(".", "_").removeprefix("text_model_")

    @property
    def block(self) -> str:
        """The block of the network it sits in, such as "down_blocks.0"; "(outside)" for what is in none."""
        found = _BLOCK.search(self.name)
        return "(outside)" if found is None else found[1] or f"{found[2]}.{found[3]}"


@dataclass
class LoraFile:
    """A LoRA file's tensors and header, and the layers that they make; `strange` are the keys that make none."""

    path: Path
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    layers: list[Layer]
    strange: list[str]

    def halves(self, layer: Layer) -> tuple[torch.Tensor, torch.Tensor] | None:
        """B and A as matrices, (out, r) and (r, in), in float32; None where one is missing or they do not fit."""
        if not {"A", "B"} <= set(layer.keys):
            return None
        b, a = (self.tensors[layer.keys[half]].float().flatten(1) for half in "BA")
        return (b, a) if b.shape[1] == a.shape[0] else None

    def rank(self, layer: Layer) -> int:
        """Of A, or where only B is there of that."""
        half = "A" if "A" in layer.keys else "B"
        return self.tensors[layer.keys[half]].shape[0 if half == "A" else 1]

    def outputs(self, layer: Layer) -> int:
        """Features that come out of a layer; of half a layer without B, those that go in stand for them."""
        half = "B" if "B" in layer.keys else "A"
        return self.tensors[layer.keys[half]].shape[0 if half == "B" else 1]

    def norm(self, layer: Layer) -> float:
        """||B A||, Frobenius, without forming the product: the trace of (B'B)(AA'). 0 for half a layer."""
        if (halves := self.halves(layer)) is None:
            return 0.0
        b, a = halves
        return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())

    def own_alpha(self, layer: Layer) -> float | None:
        """What the file has as this layer's alpha beside its matrices; None where it has none."""
        return float(self.tensors[layer.keys["alpha"]]) if "alpha" in layer.keys else None

    @cached_property
    def header(self) -> dict[str, Any]:
        """peft's settings by part and name ("unet.r"), as diffusers keeps them in a file's header."""
        return _json(self.metadata.get("lora_adapter_metadata", ""))

    @cached_property
    def beside(self) -> dict[str, Any]:
        """peft's settings in the `adapter_config.json` beside the file, which diffusers' loaders do not look at."""
        path = self.path.with_name("adapter_config.json")
        try:
            return _json(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, UnicodeError):
            return {}

    @property
    def naming(self) -> str:
        """Whose names the keys have; of several, the most frequent."""
        return Counter(naming(layer.prefix) for layer in self.layers).most_common(1)[0][0]

    def parts(self) -> dict[str, list[Layer]]:
        """Part -> its layers, in the order of the network where names tell it."""
        found = {}
        for layer in sorted(self.layers, key=lambda layer: (layer.part, _natural(layer.block), layer.name)):
            found.setdefault(layer.part, []).append(layer)
        return found


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _natural(text: str) -> list[Any]:
    """A key that sorts the network's blocks in order: down, middle, up; and 2 before 10."""
    order = {"down_blocks": 0, "input_blocks": 0, "mid_block": 1, "middle_block": 1, "up_blocks": 2, "output_blocks": 2}
    stem, _, number = text.partition(".")
    return [order.get(stem, 3), stem, int(number or 0)]


def naming(prefix: str) -> str:
    """Whose names begin so: diffusers, kohya, PEFT, ComfyUI; "unknown" for others."""
    return next((name for pattern, name in _NAMINGS.items() if re.match(pattern, prefix)), "unknown")


def _placed(name: str) -> tuple[str, str, str] | None:
    """(part, prefix, name within the part) of a layer; None where neither the name nor its prefix tells the part."""
    name = re.sub(r"\.processor\.(to_[qkv])$", r".\1", re.sub(r"\.processor\.to_out$", ".to_out.0", name))
    for part, pattern in (("text_encoder", _IN_TEXT_ENCODER), ("unet", _IN_UNET), ("transformer", _IN_TRANSFORMER)):
        if found := pattern.search(name):
            prefix = name[: found.start()]
            number = re.search(r"(?:te|encoder_?)([23])|clip_(g)", prefix) if part == "text_encoder" else None
            return part + (f"_{number[1] or 2}" if number else ""), prefix, name[found.start() :]
    for prefix, part in {"unet.": "unet", "transformer.": "transformer", "lora_unet_": "unet"}.items():
        if name.startswith(prefix):  # layers outside of the blocks, such as conv_in
            return part, prefix, name.removeprefix(prefix)
    return None


def _layers(keys: Iterable[str]) -> tuple[list[Layer], list[str]]:
    """The layers that a file's keys make, and the keys that make none."""
    found: dict[str, Layer] = {}
    strange = []
    for key in keys:
        end = _ENDS.search(key)
        placed = _placed(key[: end.start()]) if end else None
        if placed is None:
            strange.append(key)
            continue
        what = _HALF.get(end["half"]) or ("alpha" if end["alpha"] else "magnitude")
        found.setdefault("".join(placed[1:]), Layer(placed[0], placed[2], placed[1])).keys[what] = key
    whole = {name: layer for name, layer in found.items() if {"A", "B"} & set(layer.keys)}
    strange += [key for name, layer in found.items() if name not in whole for key in layer.keys.values()]
    return list(whole.values()), strange


def read_lora(path: str | Path) -> LoraFile:
    """Read a LoRA file of any naming.

    Raises FileNotFoundError, or ValueError in one sentence where it is no safetensors file, is cut short, or holds
    something else than a LoRA: a whole checkpoint, an embedding, another kind of adapter.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the path of a LoRA file.")
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path.name} is no safetensors file, and others could run code: convert it first.")
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} cannot be read ({str(error).rstrip('.')}): copy it again.") from error
    layers, strange = _layers(tensors)
    if not layers:
        raise ValueError(_what_else(path, tensors))
    file = LoraFile(path, tensors, metadata, layers, strange)
    for layer in layers:
        layer.alpha, layer.scale = _trained(file, layer) or (None, None)
        layer.loads_at = _loads_at(file, layer)
    return file


def _what_else(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """What a file without LoRA layers is instead, and where it belongs."""
    keys = list(tensors)
    for mark, kind in _OTHER_KINDS.items():
        if any(mark in key for key in keys):
            return f"{path.name} is an adapter of the kind {kind} and no LoRA: look at it with the tool that made it."
    if any(key.startswith(("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")) for key in keys):
        try:
            family = one_file_family(path)
        except ValueError:
            return f"{path.name} is a checkpoint that --base cannot read, and no adapter: give the LoRA file itself."
        return f"{path.name} is a whole checkpoint of the family {family} and no adapter: it can be a --base."
    if any(_IN_UNET.match(key) or _IN_TRANSFORMER.match(key) or _IN_TEXT_ENCODER.search(key) for key in keys):
        return f"{path.name} holds a network's own weights and no adapter: give the LoRA file that was trained on it."
    if keys and len(keys) <= 2 and all(tensor.ndim in (1, 2) for tensor in tensors.values()):
        width = tensors[keys[0]].shape[-1]
        return (
            f"{path.name} looks like an embedding of textual inversion ({width} numbers a token) and is no LoRA: "
            "pipeline.load_textual_inversion reads it."
        )
    return f"{path.name} holds no LoRA layers in any known naming: is it an adapter?"


# Family -> how people call it. The first four are told apart by the width of what attention gets from the text encoder.
FAMILIES = {
    "miniature": "the miniature",
    "sd1": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "sdxl": "SDXL",
    "if": "DeepFloyd IF",
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX",
}
_PUBLISHED = {"sd1": "Stable Diffusion 1.5", "sd2": "Stable Diffusion 2.1", "sdxl": "Stable Diffusion XL"}
# Width of the transformer's own stream: 64 times its depth in Stable Diffusion 3 (24 and 38 blocks), 24 x 128 in FLUX.
_TRANSFORMERS = {1536: "sd3", 2432: "sd3", 3072: "flux"}
_FLUX_BLOCKS = 19  # of two streams; 38 of one
# Width of CLIP: OpenAI's (of the first encoder in SDXL, SD 3 and FLUX too), OpenCLIP's H and bigG.
_CLIP = {("text_encoder", 768): "sd1", ("text_encoder", 1024): "sd2", ("text_encoder_2", 1280): "sdxl"}
# Two trainers' words for a family, in kohya's `ss_base_model_version` and in `modelspec.architecture`.
_NAMED = {
    "sdxl": "sdxl",
    "stable-diffusion-xl": "sdxl",
    "sd_v1": "sd1",
    "stable-diffusion-v1": "sd1",
    "sd_v2": "sd2",
    "stable-diffusion-v2": "sd2",
    "sd3": "sd3",
    "stable-diffusion-3": "sd3",
    "flux": "flux",
}


def _context_widths() -> dict[int, str]:
    """Features of the text encoder's states, as the UNet's attention gets them -> family."""
    widths = {BASES[name].denoiser["cross_attention_dim"]: family for family, name in _PUBLISHED.items()}
    return widths | {read_config(miniature.path() / "unet")["cross_attention_dim"]: "miniature"}


def family_of(file: LoraFile) -> tuple[str | None, str]:
    """The family that a file was made for, or None, and how that was seen.

    The layers' names and shapes count first, since they cannot lie; then what the file's header says.
    """
    widths = {}
    for layer in file.layers:
        if "A" in layer.keys:
            widths.setdefault(layer.part, []).append((layer, file.tensors[layer.keys["A"]].shape[1]))
    if "transformer" in widths:
        family, seen = _transformer_family(widths["transformer"])
    elif "unet" in widths:
        family, seen = _unet_family(widths["unet"], file)
    else:
        family, seen = _text_family(widths)
    if family is None:
        for name in ("ss_base_model_version", "modelspec.architecture"):
            said = file.metadata.get(name, "").lower()
            if found := next((family for word, family in _NAMED.items() if said.startswith(word)), None):
                return found, f"its header says {name} = {said!r}; {seen}"
    return family, seen


def _transformer_family(layers: Sequence[tuple[Layer, int]]) -> tuple[str | None, str]:
    of_flux = [layer for layer, _ in layers if re.match(r"single_(?:transformer_)?blocks|double_blocks", layer.name)]
    if of_flux:
        return "flux", f"a transformer with {of_flux[0].name.split('.')[0].split('_blocks')[0]}_blocks"
    if any(layer.name.startswith("joint_blocks") for layer, _ in layers):
        return "sd3", "a transformer with joint_blocks"
    numbers = {int(number[0]) for layer, _ in layers if (number := re.search(r"\d+", layer.name))}
    places = r"transformer_blocks[._]\d+[._]attn[._](?:to_[qkv]|add_[qkv]_proj)$"
    width = next((width for layer, width in layers if re.match(places, layer.name)), None)
    family = _TRANSFORMERS.get(width)
    if family == "flux" and max(numbers) >= _FLUX_BLOCKS:
        family = None  # others are as wide
    return family, f"a transformer of {width} features" if width else "a transformer, whose width no key tells"


def _unet_family(layers: Sequence[tuple[Layer, int]], file: LoraFile) -> tuple[str | None, str]:
    if any("add_k_proj" in layer.name or "add_v_proj" in layer.name for layer, _ in layers):
        return "if", "a UNet whose attention adds projections of the text (add_k_proj)"
    context = [width for layer, width in layers if re.search(r"attn2[._]to_[kv]$", layer.name)]
    if context:
        family = _context_widths().get(context[0])
        return family, f"a UNet with cross-attention of {context[0]} features"
    encoder_2 = any(layer.part == "text_encoder_2" for layer in file.layers)
    if encoder_2 or any(re.search(r"transformer_blocks[._][2-9][._]", layer.name) for layer, _ in layers):
        return "sdxl", "a second text encoder" if encoder_2 else "a UNet with more than two transformer blocks a layer"
    projections = [layer for layer, _ in layers if layer.name.endswith("proj_in") and "A" in layer.keys]
    first = [width for layer, width in layers if re.match(r"down_blocks[._]0[._]attentions", layer.name)]
    if projections and first and first[0] == 320:  # SDXL has no attention there
        linear = file.tensors[projections[0].keys["A"]].ndim == 2
        return (
            "sd2" if linear else "sd1"
        ), f"a UNet of 320 features whose proj_in is {'linear' if linear else 'a convolution'}"
    return None, "a UNet without an adapter on cross-attention, whose width would tell"


def _text_family(widths: Mapping[str, Sequence[tuple[Layer, int]]]) -> tuple[str | None, str]:
    own = read_config(miniature.path() / "text_encoder")["hidden_size"]
    for part in ("text_encoder_2", "text_encoder"):
        for layer, width in widths.get(part, ()):
            if re.search(r"[qkv]_proj$", layer.name):
                family = "miniature" if width == own else _CLIP.get((part, width))
                return family, f"adapters on the text encoder alone, of {width} features"
    return None, "adapters on a text encoder alone, whose width no key tells"


def settings(file: LoraFile) -> dict[str, str]:
    """The training settings that a file carries, as they stand there: kohya's, modelspec's, peft's."""
    said = {name: value for name, value in file.metadata.items() if name.startswith(("ss_", "modelspec."))}
    kept = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora")
    said |= {name: str(value) for name, value in file.header.items() if name.rpartition(".")[2] in kept}
    return {name: value for name, value in said.items() if value not in ("", "None", "{}", "null")}


def scale_of(rank: int, alpha: float, rslora: bool) -> float:
    """What B A is multiplied by: alpha / rank, or alpha / sqrt(rank) (Kalajdzievski, 2023)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def by_pattern(found: Mapping[str, Any], name: str, default: Any) -> Any:
    """peft's value for a layer: of the first pattern that its name ends in, else what all others have."""
    return next((value for end, value in found.items() if name == end or name.endswith(f".{end}")), default)


def _by_peft(config: Mapping[str, Any], name: str, prefix: str = "") -> tuple[float, float] | None:
    """(alpha, scale) that peft's settings give a layer; None where they are not there, or are no numbers."""
    try:
        alpha = by_pattern(config.get(f"{prefix}alpha_pattern") or {}, name, config[f"{prefix}lora_alpha"])
        rank = by_pattern(config.get(f"{prefix}rank_pattern") or {}, name, config[f"{prefix}r"])
        return float(alpha), scale_of(rank, float(alpha), bool(config.get(f"{prefix}use_rslora")))
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return None


def _by_kohya(file: LoraFile) -> tuple[float, float] | None:
    """(alpha, scale) by the header that kohya's scripts write."""
    metadata = file.metadata
    try:
        alpha, rank = float(metadata["ss_network_alpha"]), float(metadata["ss_network_dim"])
        return alpha, scale_of(rank, alpha, rslora_of_kohya(file))
    except (KeyError, ValueError, ZeroDivisionError):
        return None


def rslora_of_kohya(file: LoraFile) -> bool:
    """Whether the header of kohya's scripts says that LyCORIS scaled by alpha / sqrt(rank)."""
    return bool(re.search(r'"?rs_lora"?\s*[:=]\s*"?true', file.metadata.get("ss_network_args", ""), re.IGNORECASE))


def _trained(file: LoraFile, layer: Layer) -> tuple[float, float] | None:
    """(alpha, scale) of a layer in training, by the first that tells it; None where nothing does.

    Its own alpha, the header's (peft's or kohya's), the `adapter_config.json` beside the file, the alpha that others of
    its part have.
    """
    alpha, rslora = file.own_alpha(layer), rslora_of_kohya(file)
    if alpha is not None:
        return alpha, scale_of(file.rank(layer), alpha, rslora)
    if told := _by_peft(file.header, layer.name, f"{layer.part}.") or _by_kohya(file):
        return told
    if told := _by_peft(file.beside, layer.name):
        return told
    others = Counter(
        file.own_alpha(other) for other in file.layers if other.part == layer.part and "alpha" in other.keys
    )
    if not others:
        return None
    alpha = others.most_common(1)[0][0]
    return alpha, scale_of(file.rank(layer), alpha, rslora)


def _loads_at(file: LoraFile, layer: Layer) -> float | None:
    """What diffusers' loaders will multiply a layer's B A by; None where they do not read its name."""
    if naming(layer.prefix) not in ("diffusers", "kohya", "ComfyUI") or not {"A", "B"} <= set(layer.keys):
        return None
    alpha = file.own_alpha(layer)
    if alpha is not None:
        return alpha / file.rank(layer)
    told = _by_peft(file.header, layer.name, f"{layer.part}.") if naming(layer.prefix) == "diffusers" else None
    return told[1] if told else 1.0
