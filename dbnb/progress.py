"""What a run draws at its validation steps, and measures where that is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from dbnb import metrics, plots
from dbnb.concept import Concept
from dbnb.config import DreamBoothConfig
from dbnb.dataset import DreamBoothDataset, Mixture
from dbnb.files import whole
from dbnb.forecast import images_during
from dbnb.models import Components
from dbnb.selection import HELD_OUT, SEEN, TRADE_OFF, shares, trade_off
from dbnb.training import held_out_loss
from dbnb.validation import SETS, ValidationImages, validation_images


def load_encoders(config: DreamBoothConfig, base: Path) -> metrics.Encoders | None:
    """The encoders that measure at validation steps; None where the settings ask for no measures.

    Raises OSError where the settings cannot do without them.
    """
    if not config.measures:
        return None
    try:
        return metrics.load_encoders(base)
    except OSError as error:
        raise OSError(
            f"The encoders that measure pictures cannot be loaded ({str(error).splitlines()[0]}): check the network, "
            "or leave out --select best, --patience and --measure_validation."
        ) from error


def _first(images: ValidationImages, count: int) -> ValidationImages:
    """The first `count` images of each set that is drawn during training."""
    cut = {item.name: list(getattr(images, item.name))[:count] for item in dataclasses.fields(images)}
    return ValidationImages(**cut | {"redrawn": [], "sentences": [], "sentence_prompts": []})


@dataclass
class Progress:
    """Called with the number of a step, it draws a few pictures of each concept at the same seeds, and saves them.

    Returns what it measured: with `encoders` the numbers of `metrics.evaluate`, their `selection.shares` (of several
    concepts the mean) and the trade-off; with `held_out` the losses of photographs that training never sees, and of
    those that it does, at the same noise. `before` are the pictures of the base, `references` further photographs.
    """

    config: DreamBoothConfig
    components: Components
    concepts: Sequence[Concept]
    dataset: DreamBoothDataset | Mixture
    before: Sequence[ValidationImages] = ()
    references: Sequence[Sequence[Image.Image]] = ()
    held_out: DreamBoothDataset | Mixture | None = None
    encoders: metrics.Encoders | None = None

    def __call__(self, step: int) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.before:
            found |= self._pictures(step)
        if self.held_out is not None:
            length = self.config.tokenizer_max_length
            for name, dataset in ((HELD_OUT, self.held_out), (SEEN, self.dataset)):
                losses = held_out_loss(self.components, dataset, batches=4, tokenizer_max_length=length)
                found[name] = losses["instance_loss"]
        return found

    def _pictures(self, step: int) -> dict[str, float]:
        """Draw, save and perhaps measure pictures."""
        sets, count = SETS if self.encoders is not None else SETS[:2], images_during(self.config)
        now = [
            validation_images(self.components, concept, self.config.sampling, count=count, sets=sets)
            for concept in self.concepts
        ]
        rows = {}
        for concept, images in zip(self.concepts, now, strict=True):
            bare = concept.class_prompt
            rows |= {concept.instance_prompt: images.subject, f"{concept.instance_prompt}\nin places": images.scenes}
            rows[bare] = images.classes
        rows = {label: images for label, images in rows.items() if images}
        folder = Path(self.config.output_dir) / "samples"
        folder.mkdir(exist_ok=True)
        with whole(folder / f"step-{step:06d}.png") as temporary:
            plots.image_rows(list(rows.values()), labels=list(rows), title=f"step {step}").savefig(temporary)
        return self.measure(now) if self.encoders is not None else {}

    @cached_property
    def _start(self) -> list[tuple[dict[str, float], dict[str, float]]]:
        """Of each concept the numbers of the base's pictures, as many as are drawn now, and the ceiling."""
        references = self.references or [()] * len(self.concepts)
        start = []
        for concept, before, further in zip(self.concepts, self.before, references, strict=True):
            photographs = concept.images()
            before = _first(before, images_during(self.config))
            start.append(
                (
                    metrics.evaluate(self.encoders, before, photographs, concept.class_prompt),
                    metrics.ceiling(self.encoders, self.components, photographs, further, self.config.resolution),
                )
            )
        return start

    def measure(self, now: Sequence[ValidationImages]) -> dict[str, float]:
        """The numbers of pictures, of one set of them a concept; see the class."""
        found: dict[str, float] = {}
        parts: list[Mapping[str, float]] = []
        for concept, images, (before, ceiling) in zip(self.concepts, now, self._start, strict=True):
            numbers = metrics.evaluate(self.encoders, images, concept.images(), concept.class_prompt)
            parts.append(shares(numbers, before, ceiling))
            prefix = "" if len(now) == 1 else f"{concept.name}: "
            found |= {prefix + name: value for name, value in numbers.items()}
        mean = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        return found | mean | {TRADE_OFF: trade_off(mean)}


def figure(log: Sequence[Mapping[str, Any]], chosen: int | None = None):
    """Of a log that was measured: what was gained against what was kept, over the steps; None where nothing was."""
    points = {0: (1.0, 0.0)}
    points |= {line["step"]: (line.get("prior_kept", 1.0), line["subject_gained"]) for line in log if TRADE_OFF in line}
    if len(points) == 1:
        return None
    values = {line["step"]: line[TRADE_OFF] for line in log if TRADE_OFF in line}
    return plots.trade_off(points, values, chosen=chosen)
