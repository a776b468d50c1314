"""What is the matter with a LoRA file: `python -m dbnb.doctor FILE [--base ...]`. Used in notebook 09."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from peft.tuners.lora import LoraLayer
from PIL import Image

from dbnb import plots
from dbnb.config import DreamBoothConfig
from dbnb.drawing import build_pipeline
from dbnb.files import whole
from dbnb.lora_checks import check_file, dtypes, finding, is_read, several
from dbnb.lora_file import FAMILIES, Layer, LoraFile, family_of, read_lora, settings
from dbnb.models import Components, dtype_of, load_components
from dbnb.pictures import load_image
from dbnb.processes import processes
from dbnb.tables import Table, printable
from dbnb.toybox.sample import SAMPLE_DIR
from dbnb.validation import draw

PROMPT = "a photo of sks dog"
SEED = 0
# A block's change as large as the weights that it is added to leaves little of them. Without a base these are guessed:
# a layer that leaves the size of what goes through it alone has rows of length 1.
TOO_STRONG = 1.0
LARGE = 100 * 2**20  # bytes of a file for which half of them would matter
_NAMED = 3  # examples of keys that a sentence gives


@dataclass
class Diagnosis:
    """What was found about a LoRA file. `parts` has ranks, alphas, scales and blocks by part.

    `scale` is what B A was multiplied by in training, where it is the same everywhere and the file tells; `loads_at` is
    what diffusers' loader will multiply it by. `effect` is the mean difference, in 1/255, between one picture with and
    without the adapter. `findings` are a list of `{code, text}` in plain words, empty where nothing is the matter.
    """

    file: str
    family: str | None
    seen: str
    naming: str
    ranks: list[int]
    scale: float | None
    loads_at: float | None
    dtypes: list[str]
    parts: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    base: str | None = None
    dropped: list[str] = field(default_factory=list)
    effect: float | None = None
    findings: list[dict[str, str]] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list, repr=False)  # without and with

    def codes(self) -> list[str]:
        """The findings' codes, in order."""
        return [finding["code"] for finding in self.findings]

    def to_dict(self) -> dict[str, Any]:
        """All but the pictures, as JSON takes it: a number that is not finite becomes None."""
        record = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "pictures"}
        return _finite(record)

    def blocks(self) -> Table:
        """One row a block: how many layers it has, how strong the adapter is there."""
        rows = Table()
        for part, found in self.parts.items():
            for name, block in found["blocks"].items():
                row = {"part": part, "block": name, "layers": str(block["layers"]), "||s B A||": f"{block['norm']:.3g}"}
                share = block["share"]
                rows.append(row | {"of ||W||": "" if share is None else f"{share:.1%}"})
        return rows

    def __str__(self) -> str:
        of = {name: f", {label}" for name, label in FAMILIES.items()}.get(self.family, "")
        lines = [
            f"{printable(self.file)}: a LoRA in the naming of {self.naming}, {', '.join(self.dtypes)}",
            f"made for: {self.family or 'unknown'}{of} ({self.seen})",
        ]
        for part, found in self.parts.items():
            trained, loads = (", ".join(f"{value:g}" for value in found[key]) for key in ("scales", "loads_at"))
            alphas = ", ".join(f"{alpha:g}" for alpha in found["alphas"]) or "unknown"
            ranks = ", ".join(map(str, found["ranks"]))
            lines.append(
                f"{part}: {found['layers']} layers, rank {ranks}, alpha {alphas}; scale in training "
                f"{trained or 'unknown'}, after loading {loads or 'none'}"
            )
        lines += ["", str(self.blocks())]
        if self.metadata:
            lines += ["", "settings that it carries: " + ", ".join(f"{k} = {v}" for k, v in self.metadata.items())]
        if self.base is not None:
            seen = "no picture was drawn" if self.effect is None else f"one picture changes by {self.effect:.1f}/255"
            lines += ["", f"on {self.base}: {len(self.dropped)} keys are dropped; {seen}"]
        lines += ["", "findings:"] + [f"- {finding['code']}: {finding['text']}" for finding in self.findings]
        # A header holds whatever its writer put there.
        lines = [printable(line) for text in lines for line in text.split("\n")]
        return "\n".join(lines) + ("" if self.findings else " none")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def diagnose(
    path: str | Path, base: str | Path | None = None, *, prompt: str = PROMPT, picture: bool = True
) -> Diagnosis:
    """Look at any LoRA file: what it was made for, how strong it is, what a loader will make of it.

    With a `base` (as `--base` takes it) plain diffusers loads it there: which keys land, and what `prompt` draws with
    and without, from the same noise; `picture=False` leaves the drawing out. Without one, a file for the miniature is
    looked at on the miniature, any other by itself.

    Raises FileNotFoundError or ValueError in one sentence where the file is no LoRA, or the base cannot be loaded.
    """
    file = read_lora(path)
    family, seen = family_of(file)
    if base is None and family == "miniature":
        base = "miniature"
    record = Diagnosis(
        file=file.path.name,
        family=family,
        seen=seen,
        naming=file.naming,
        ranks=sorted({file.rank(layer) for layer in file.layers}),
        scale=None,
        loads_at=None,
        dtypes=dtypes(file),
        parts={},
        metadata=settings(file),
    )
    on_base = [] if base is None else _on_base(file, record, str(base), prompt if picture else None)
    record.parts = {part: _part(file, layers) for part, layers in file.parts().items()}
    record.scale = _same([layer.scale for layer in file.layers])
    record.loads_at = _same([layer.loads_at for layer in file.layers])
    record.findings = on_base + check_file(file) + _check_strength(record)
    if record.effect == 0:
        text = f"the same noise gives the same picture on {base}, with the adapter and without."
        record.findings.append(finding("no_effect", text))
    return record


def _same(values: Sequence[float | None]) -> float | None:
    """The number that all are; None where they differ, or one is not known."""
    found = {None if value is None else round(value, 6) for value in values}
    return found.pop() if len(found) == 1 else None


@contextmanager
def _quiet() -> Iterator[None]:
    """What loaders warn of is what is found out here."""
    logger = logging.getLogger("diffusers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _weights(components: Components) -> dict[tuple[str, str], torch.Tensor]:
    """(part, flat name) -> the weight that an adapter there would be added to."""
    found = {}
    for part, module in components.modules().items():
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                found[part, name.replace(".", "_").removeprefix("text_model_")] = layer.weight
    return found


def _fits(file: LoraFile, layer: Layer, weight: torch.Tensor | None) -> bool:
    """Whether a layer's matrices are of the shape that a base's weight wants: A its inputs, B its outputs."""
    if weight is None:
        return False
    shapes = {half: file.tensors[layer.keys[half]].shape for half in "AB" if half in layer.keys}
    a, b = shapes.get("A"), shapes.get("B")
    return (a is None or a[1:].numel() == weight[0].numel()) and (b is None or b[0] == len(weight))


def _on_base(file: LoraFile, record: Diagnosis, base: str, prompt: str | None) -> list[dict[str, str]]:
    """Load the file into a base: sets what its layers are there and the record's `dropped` and `effect`."""
    config = DreamBoothConfig(base=base)
    record.base = base
    components = load_components(base, weight_dtype=dtype_of(config.mixed_precision)).to(processes().device)
    weights = _weights(components)
    for layer in file.layers:
        weight = weights.get((layer.part, layer.flat_name))
        if _fits(file, layer, weight):
            layer.weight_norm = float(weight.detach().float().norm())
    # Names of the original code (input_blocks) are translated by the loader: whether they fit is seen when it has.
    translated = any("put_blocks" in layer.name for layer in file.layers)
    if not translated and all(layer.weight_norm is None for layer in file.layers):
        made = FAMILIES.get(record.family, "another base")
        _drop_all(file, record)
        return [finding("other_family", f"no key fits this base: made for {made} ({record.seen}), not for {base}.")]
    given = [load_image(path) for path in sorted((SAMPLE_DIR / "photos").iterdir())[:1]]  # for bases that enlarge

    def picture(pipeline: DiffusionPipeline) -> list[Image.Image]:
        prompts = [] if prompt is None else [prompt]
        return draw(components, prompts, config, seeds=[SEED], references=given, pipeline=pipeline)

    pipeline = build_pipeline(components)
    before = picture(pipeline)
    try:
        with _quiet():
            pipeline.load_lora_weights(file.path.parent, weight_name=file.path.name)
    except Exception as error:  # diffusers, peft and torch raise a dozen kinds
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160].rstrip('.')}"
        _drop_all(file, record)
        return [finding("refused", f"diffusers refuses to load it into {base} ({why}).")]
    found = _landed(file, record, components)
    with _quiet():
        record.pictures = before + picture(pipeline)
    if record.pictures:
        before, after = (np.asarray(image, dtype=float) for image in record.pictures)
        record.effect = float(np.abs(before - after).mean())
    return found


def _drop_all(file: LoraFile, record: Diagnosis) -> None:
    record.dropped = list(file.tensors)
    for layer in file.layers:
        layer.loads_at = None


def _landed(file: LoraFile, record: Diagnosis, components: Components) -> list[dict[str, str]]:
    """Which layers a loader has put into the parts of a base, at which scale, and which not."""
    scales = {}
    for part, module in components.modules().items():
        for loaded in module.modules():
            if isinstance(loaded, LoraLayer) and loaded.scaling:
                [(name, scale)] = loaded.scaling.items()
                a, b = loaded.lora_A[name].weight, loaded.lora_B[name].weight
                if not (a.is_meta or b.is_meta):  # where it found no tensor of the right name
                    scales[part, _content(a)] = float(scale)
    for layer in file.layers:
        whole = len(layer.matrices) == 2
        layer.loads_at = scales.get((layer.part, _content(file.tensors[layer.keys["A"]]))) if whole else None
    lost = [layer for layer in file.layers if layer.loads_at is None]
    record.dropped = [key for layer in lost for key in layer.keys.values()] + file.strange
    # What else is wrong with a layer that is left out, the checks of the file itself say.
    unexplained = [layer for layer in lost if is_read(layer) and len(layer.matrices) == 2]
    if not unexplained:
        return []
    parts = Counter(layer.part for layer in unexplained)
    where = ", ".join(f"{count} of the {part}" for part, count in parts.items())
    return [
        finding(
            "keys_dropped",
            f"{several(len(unexplained), 'layers')} of {len(file.layers)} have no place in {record.base} and are left "
            f"out without an error ({where}; such as {unexplained[0].matrices[0]}): they were made for another "
            "base, or for a changed one.",
        )
    ]


def _content(tensor: torch.Tensor) -> bytes:
    """By which a matrix is found again after loading, whatever it is called then and in whatever format it is kept."""
    return tensor.detach().cpu().to(torch.float16).flatten().contiguous().view(torch.uint8).numpy().tobytes()


def _part(file: LoraFile, layers: Sequence[Layer]) -> dict[str, Any]:
    """Of one part: layers, ranks, alphas, scales, and by block how strong the change is."""
    blocks: dict[str, list[Layer]] = {}
    for layer in layers:
        blocks.setdefault(layer.block, []).append(layer)

    def values(name: str) -> list[float]:
        return sorted({round(value, 6) for layer in layers if (value := getattr(layer, name)) is not None})

    return {
        "layers": len(layers),
        "ranks": sorted({file.rank(layer) for layer in layers}),
        "alphas": values("alpha"),
        "scales": values("scale"),
        "loads_at": values("loads_at"),
        "blocks": {name: _strength(file, inside) for name, inside in blocks.items()},
    }


def _strength(file: LoraFile, layers: Sequence[Layer]) -> dict[str, Any]:
    """Of one block: ||s B A|| of all its layers together, as a share of ||W|| where a base is there, and the gain.

    The gain is the root mean square of what comes out where features of mean square 1, not correlated, go in.
    """
    norms = []
    for layer in layers:
        scale = layer.loads_at if layer.loads_at is not None else layer.scale  # as strong as it was meant to be
        norms.append(abs(1.0 if scale is None else scale) * file.norm(layer))
    norm, outputs = math.hypot(*norms), sum(file.outputs(layer) for layer in layers)
    known = [layer.weight_norm for layer in layers if layer.weight_norm is not None]
    share = norm / math.hypot(*known) if len(known) == len(layers) else None
    return {"layers": len(layers), "norm": norm, "share": share, "gain": norm / math.sqrt(outputs)}


def _check_strength(record: Diagnosis) -> list[dict[str, str]]:
    strong = []
    for part, found in record.parts.items():
        for name, block in found["blocks"].items():
            by_base = block["share"] is not None
            measure = block["share" if by_base else "gain"]
            if measure > TOO_STRONG:
                strong.append((measure, f"{part} {name}", by_base))
    if not strong:
        return []
    times, worst, by_base = max(strong)
    than = "the weights that it is added to" if by_base else "the weights of a layer that neither amplifies nor damps"
    text = (
        f"far too strong in {several(len(strong), 'blocks')}: in {worst} the change is {times:.3g} x as large as "
        f"{than}; shapes and colours burn: use it at strength {0.5 / times:.2g} or less, or train at a lower rate."
    )
    return [finding("too_strong", text)]


def _norms(record: Diagnosis) -> dict[str, dict[str, float]]:
    return {part: {name: block["norm"] for name, block in of["blocks"].items()} for part, of in record.parts.items()}


def norm_figure(record: Diagnosis) -> Figure:
    """How strong the adapter is by block: ||s B A|| as bars, as it will load."""
    return plots.bar_rows(
        _norms(record), xlabel="norm of s B A, as it loads", title=f"{record.file}: how strong by block"
    )


def norm_alt(record: Diagnosis) -> str:
    """A text for those who do not see the figure."""
    parts = []
    for part, norms in _norms(record).items():
        largest = max(norms, key=norms.get)
        parts.append(f"{len(norms)} of the {part}, the largest {norms[largest]:.3g} in {largest}")
    return f"Bars of the adapter's norm by block: {'; '.join(parts)}"


def effect_figure(record: Diagnosis) -> Figure:
    """The same noise and prompt without and with the adapter. Raises ValueError where none was drawn."""
    if not record.pictures:
        raise ValueError("No picture was drawn: diagnose with a base that the file fits, and picture=True.")
    return plots.image_rows([record.pictures], titles=["without", "with the adapter"], inches=2.0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dbnb.doctor", description="Say what is the matter with a LoRA file, in plain words."
    )
    parser.add_argument("file", metavar="FILE", help="a LoRA file (.safetensors) of any naming")
    parser.add_argument("--base", help="load it there: a preset, hub id, folder or .safetensors file, as in dbnb")
    parser.add_argument("--prompt", default=PROMPT, help="of the picture with and without it (default: %(default)s)")
    parser.add_argument("--no_picture", action="store_true", help="load, but draw nothing")
    parser.add_argument("--json", action="store_true", help="print the same as data")
    parser.add_argument("--output_dir", help="write norms.png and, where it was drawn, effect.png there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the diagnosis; returns the exit code: 0, or after one sentence 2 for what is no LoRA or no base."""
    from dbnb.workflow import quiet_libraries

    args = _parser().parse_args(argv)
    quiet_libraries()
    try:
        record = diagnose(args.file, args.base, prompt=args.prompt, picture=not args.no_picture)
        if args.output_dir is not None:
            _write_figures(record, Path(args.output_dir))
    except (ValueError, OSError) as error:
        print(f"dbnb.doctor: {error}", file=sys.stderr)
        return 2
    print(json.dumps(record.to_dict(), indent=2) if args.json else record)
    return 0


def _write_figures(record: Diagnosis, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"norms.png": norm_figure(record)}
    if record.pictures:
        figures["effect.png"] = effect_figure(record)
    for name, figure in figures.items():
        with whole(folder / name) as temporary:
            figure.savefig(temporary)


if __name__ == "__main__":
    sys.exit(main())
