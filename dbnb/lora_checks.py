"""What can be told of a LoRA file without a base: each check yields findings, `{code, text}`, in plain words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from dbnb.lora_file import Layer, LoraFile, by_pattern, rslora_of_kohya

LARGE = 100 * 2**20  # bytes of a file for which half of them would matter
_NAMED = 3  # examples of keys that a sentence gives


def check_file(file: LoraFile) -> list[dict[str, str]]:
    """All findings about a file by itself; `loads_at` of its layers may have been measured on a base before."""
    checks = (_check_tensors, _check_pairs, _check_prefixes, _check_ranks, _check_kinds, _check_dtype, _check_scales)
    return [found for check in checks for found in check(file)]


def dtypes(file: LoraFile) -> list[str]:
    """The number formats of the matrices."""
    kinds = {str(file.tensors[key].dtype).removeprefix("torch.") for layer in file.layers for key in layer.matrices}
    return sorted(kinds)


def finding(code: str, text: str) -> dict[str, str]:
    """A code for programs, a sentence for people."""
    return {"code": code, "text": text}


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def several(number: int, what: str) -> str:
    """A number of things: "1 layer", "2 layers"."""
    return f"{number} {what}" if number != 1 else f"1 {what.removesuffix('s')}"


def _check_scales(file: LoraFile) -> Iterator[dict[str, str]]:
    told = all(layer.scale is not None for layer in file.layers)
    for part, layers in file.parts().items():
        other: Counter[tuple[float, int, float]] = Counter()
        for layer in layers:
            loads_at = layer.loads_at
            if loads_at is None and not is_read(layer):
                loads_at = 1.0  # once its name is mended
            if layer.scale and loads_at is not None and not math.isclose(layer.scale, loads_at, rel_tol=1e-3):
                other[layer.alpha, file.rank(layer), loads_at / layer.scale] += 1
        for (alpha, rank, times), count in other.items():
            lost, code = ("rsLoRA", "rslora_lost") if rslora_of_kohya(file) else ("alpha", "alpha_lost")
            yield finding(
                code,
                f"{lost} is lost: it will load at {times:.3g} x the strength. {count} of {len(layers)} layers of the "
                f"{part} were trained with alpha {alpha:g} at rank {rank}, and where a loader looks the file does not "
                f"say so: save it again with its alpha, or use it at strength {1 / times:.3g}.",
            )
    if not told:
        yield finding(
            "alpha_unknown",
            "no alpha is told, neither by the file nor by an adapter_config.json beside it: it loads as if alpha were "
            "the rank (scale 1), which is wrong if it was trained with another one.",
        )


def _check_tensors(file: LoraFile) -> Iterator[dict[str, str]]:
    broken = [key for key, tensor in file.tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        yield finding(
            "not_finite",
            f"{several(len(broken), 'tensors')} of {len(file.tensors)} hold NaN or infinity ({some(broken)}): it draws "
            "black pictures. Its training diverged, or was saved in a format too small; nothing can mend the file.",
        )
    for part, layers in file.parts().items():
        ups = [file.tensors[layer.keys["B"]] for layer in layers if "B" in layer.keys]
        still = [tensor for tensor in ups if not tensor.float().any()]
        if ups and len(still) == len(ups):
            yield finding(
                "zero",
                f"every B of the {part} is zero, as before the first step: this half was never trained, and changes "
                "nothing.",
            )
        elif still:
            yield finding(
                "zero_layers",
                f"{len(still)} of {len(ups)} layers of the {part} have a B of zeros and change nothing.",
            )


def _check_pairs(file: LoraFile) -> Iterator[dict[str, str]]:
    halved = [layer for layer in file.layers if len(layer.matrices) == 1]
    if halved:
        lacking = "B" if "A" in halved[0].keys else "A"
        yield finding(
            "half",
            f"{several(len(halved), 'layers')} of {len(file.layers)} have only one of their two matrices (such as "
            f"{halved[0].matrices[0]}, which lacks its {lacking}) and do nothing, or are refused: save the file again.",
        )
    apart = [layer for layer in file.layers if len(layer.matrices) == 2 and file.halves(layer) is None]
    if apart:
        yield finding(
            "pair",
            f"the two matrices of {several(len(apart), 'layers')} are of different ranks ({apart[0].matrices[0]}): "
            "they cannot be multiplied. Save the file again.",
        )
    if file.strange:
        yield finding(
            "strange_keys",
            f"{several(len(file.strange), 'keys')} belong to no LoRA layer ({some(file.strange)}): loaders leave them "
            "out, or refuse the file.",
        )


def _check_prefixes(file: LoraFile) -> Iterator[dict[str, str]]:
    unread: dict[tuple[str, str], list[Layer]] = {}
    for layer in file.layers:
        if not is_read(layer):
            unread.setdefault((layer.part, layer.prefix), []).append(layer)
    for (part, prefix), layers in unread.items():
        text = part.startswith("text_encoder")
        count = sum(len(layer.keys) for layer in layers)
        begin = f"begin with {prefix!r}" if prefix else "have no prefix"
        yield finding(
            "text_encoder_ignored" if text else "prefix_ignored",
            f"{several(count, 'tensors')} of the {part} {begin}, under which diffusers finds nothing: they would be "
            f"dropped without an error. Rename them to begin with '{part}.'.",
        )


def is_read(layer: Layer) -> bool:
    """Whether diffusers' loaders look for this part of a model under this prefix."""
    known = {f"{layer.part}."}
    if layer.part == "transformer":
        known |= {"lora_unet_", "lora_transformer_", "diffusion_model."}
    elif layer.part == "unet":
        known |= {"lora_unet_"}
    elif layer.part in ("text_encoder", "text_encoder_2"):
        known |= {"lora_te_", "lora_te1_"} if layer.part == "text_encoder" else {"lora_te2_"}
    # No loader of diffusers has adapters on a third text encoder (T5 in Stable Diffusion 3).
    return layer.prefix in known and layer.part != "text_encoder_3"


def _check_ranks(file: LoraFile) -> Iterator[dict[str, str]]:
    told = []
    for part, layers in file.parts().items():
        ranks = Counter(file.rank(layer) for layer in layers)
        if len(ranks) > 1:
            shown = ", ".join(f"{rank} ({count} layers)" for rank, count in sorted(ranks.items()))
            yield finding(
                "mixed_ranks",
                f"the layers of the {part} are of several ranks: {shown}. That is allowed, but a merger of adapters "
                "may want a single one.",
            )
        header, pattern = file.header.get(f"{part}.r"), file.header.get(f"{part}.rank_pattern") or {}
        told += [
            (part, by_pattern(pattern, layer.name, header), file.rank(layer))
            for layer in layers
            if isinstance(header, int) and by_pattern(pattern, layer.name, header) != file.rank(layer)
        ]
    kohya = file.metadata.get("ss_network_dim", "")
    ranks = {file.rank(layer) for layer in file.layers}
    if kohya.isdecimal() and int(kohya) not in ranks:
        told += [(layer.part, int(kohya), file.rank(layer)) for layer in file.layers]
    if told:
        part, said, is_ = told[0]
        yield finding(
            "rank_mismatch",
            f"the header says rank {said} for the {part}, and {several(len(told), 'layers')} are of another, such as "
            f"{is_}: the file was changed after training. Its alpha may be of the former rank, and diffusers refuses a "
            "header of its own that does not fit.",
        )


def _check_kinds(file: LoraFile) -> Iterator[dict[str, str]]:
    magnitudes = [layer for layer in file.layers if "magnitude" in layer.keys]
    if magnitudes:
        lost = " Diffusers leaves kohya's 'dora_scale' out, and draws something else than was trained."
        named = any(layer.keys["magnitude"].endswith("dora_scale") for layer in magnitudes)
        yield finding(
            "dora",
            f"{several(len(magnitudes), 'layers')} carry a magnitude of their own (DoRA): norms of B A tell only part "
            f"of what it changes.{lost if named else ''}",
        )
    if any(value is True for name, value in file.header.items() if name.endswith("use_rslora")):
        yield finding(
            "rslora",
            "it was trained with rsLoRA: the scale is alpha / sqrt(rank). The header says so, which diffusers reads "
            "and other programs may not.",
        )


def _check_dtype(file: LoraFile) -> Iterator[dict[str, str]]:
    size = file.path.stat().st_size
    if size > LARGE and dtypes(file) == ["float32"]:
        yield finding(
            "float32",
            f"{size / 2**20:.0f} MiB in float32: in bfloat16 or float16 it would be half of that and draw the same.",
        )
