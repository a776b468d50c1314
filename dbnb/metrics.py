"""How well it worked, in numbers: subject fidelity, prompt fidelity, prior preservation, diversity. Notebook 08.

The measures are DreamBooth's (Ruiz et al., 2023, section 4.1): mean cosine similarity of generated and real pictures in
the space of an image encoder, and of pictures and prompts in CLIP's. For the miniature the encoders ship with it; for
real bases they are DINO ViT-S/16 and CLIP ViT-B/32 from transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from transformers import AutoModel, CLIPModel, CLIPTokenizer

from dbnb import miniature
from dbnb.models import Components, upcast
from dbnb.tables import Table
from dbnb.toybox.scenes import SCENES
from dbnb.validation import ValidationImages

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass
class Encoders:
    """An identity encoder and a CLIP, each with the size and normalisation (mean, std) it wants."""

    identity: Any
    identity_input: tuple[int, tuple]
    clip: CLIPModel
    tokenizer: CLIPTokenizer
    clip_input: tuple[int, tuple]

    @torch.no_grad()
    def identity_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(N, D) of length 1, in which pictures of one subject lie close together."""
        output = self.identity(_pixels(images, *self.identity_input))
        # A vision transformer's first token, as DINO trained it: its pooler may hold untrained weights.
        is_transformer = output.last_hidden_state.ndim == 3
        features = output.last_hidden_state[:, 0] if is_transformer else output.pooler_output.flatten(1)
        return F.normalize(features, dim=1)

    @torch.no_grad()
    def stages(self, images: Sequence[Image.Image]) -> list[torch.Tensor]:
        """What the identity encoder sees at each of its stages, (N, P, D): at each of P places a vector of length 1."""
        found = self.identity(_pixels(images, *self.identity_input), output_hidden_states=True).hidden_states
        places = [stage.flatten(2).mT if stage.ndim == 4 else stage[:, 1:] for stage in found]  # [:, 0] has no place
        return [F.normalize(stage, dim=2) for stage in places]

    @torch.no_grad()
    def clip_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(N, D) of length 1."""
        return F.normalize(self.clip.get_image_features(_pixels(images, *self.clip_input)).pooler_output, dim=1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        """(N, D) of length 1."""
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        return F.normalize(self.clip.get_text_features(**tokens).pooler_output, dim=1)


def _pixels(images: Sequence[Image.Image], size: int, normalization: tuple) -> torch.Tensor:
    mean, std = (torch.tensor(values)[None, :, None, None] for values in normalization)
    arrays = [
        np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)) for image in images
    ]
    return (torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255.0 - mean) / std


def load_encoders(base: Path) -> Encoders:
    """The encoders that ship with a base (the miniature's), else DINO and CLIP from the hub or its cache.

    Other bases that were trained on the toy world, of which their `training.json` tells, are measured by the
    miniature's. Raises OSError where those are not available: metrics are then left out, with that reason.
    """
    if (base / "training.json").is_file() and not (base / "identity").is_dir():
        base = miniature.path()
    if (base / "identity").is_dir():
        identity = AutoModel.from_pretrained(base / "identity").float().eval()
        return Encoders(
            identity,
            (getattr(identity.config, "image_size", 64), _HALF),
            CLIPModel.from_pretrained(base / "clip").float().eval(),
            CLIPTokenizer.from_pretrained(base / "tokenizer"),
            (64, _HALF),
        )
    name = "openai/clip-vit-base-patch32"
    return Encoders(
        AutoModel.from_pretrained("facebook/dino-vits16").eval(),
        (224, _IMAGENET),
        CLIPModel.from_pretrained(name).eval(),
        CLIPTokenizer.from_pretrained(name),
        (224, _CLIP),
    )


@torch.no_grad()
def through_vae(components: Components, images: Sequence[Image.Image], size: int) -> list[Image.Image]:
    """Pictures as the base's autoencoder gives them back, so that its blur is not counted as lost identity."""
    if components.vae is None:
        return [ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS) for image in images]
    vae, decoded = components.vae, []
    with upcast(vae):
        for image in images:
            pixels = _pixels([image], size, _HALF).to(vae.device, vae.dtype)
            decoded += VaeImageProcessor().postprocess(vae.decode(vae.encode(pixels).latent_dist.mode()).sample)
    return decoded


def subject_fidelity(features: torch.Tensor, references: torch.Tensor) -> float:
    """Mean cosine similarity of every picture, (N, D), with every reference picture, (M, D): -1 to 1."""
    return float((features @ references.T).mean())


def diversity(features: torch.Tensor) -> float:
    """Mean pairwise cosine distance of features, (N, D): 0 to 2. Raises ValueError for fewer than two."""
    n = len(features)
    if n < 2:
        raise ValueError("Diversity needs at least two images.")
    return float((1.0 - features @ features.T).sum() / (n * (n - 1)))


def perceptual_diversity(stages: Sequence[torch.Tensor]) -> float:
    """Mean perceptual distance of all pairs of pictures, given their `Encoders.stages`: 0 for equal ones.

    The distance is that of LPIPS (Zhang et al., 2018, equation 1) with all weights 1: squared differences of the
    vectors, averaged over places and added up over stages. Since places are compared one by one, another pose counts.
    Raises ValueError for fewer than two pictures.
    """
    n = len(stages[0])
    if n < 2:
        raise ValueError("Diversity needs at least two images.")
    distances = sum(
        (stage[:, None] - stage[None]).square().sum(3).mean(2) for stage in stages
    )  # (N, N), the diagonal 0
    return float(distances.sum() / (n * (n - 1)))


# Student's t, 97.5 %, by degrees of freedom, as any table of it has it; the normal distribution's beyond.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def paired_differences(runs: Mapping[str, Mapping[Any, float]], reference: str) -> dict[str, tuple[float, float]]:
    """How far each row's numbers lie from a reference row's, seed by seed: name -> (mean, half of a 95 % interval).

    `runs` is row -> seed -> number. With several seeds in common the interval is Student's, of the row's own
    differences. A row with one seed in common borrows the spread of all other rows together, and where there is none
    its half-width is infinite. Rows without a common seed are left out, and so is the reference.
    """
    base = runs[reference]
    paired = {
        name: [values[seed] - base[seed] for seed in values if seed in base]
        for name, values in runs.items()
        if name != reference
    }
    paired = {name: found for name, found in paired.items() if found}
    freedom = {name: len(found) - 1 for name, found in paired.items()}
    squares = {name: sum((d - sum(found) / len(found)) ** 2 for d in found) for name, found in paired.items()}
    differences = {}
    for name, found in paired.items():
        own = freedom[name] > 0
        degrees = freedom[name] if own else sum(freedom.values())
        spread = squares[name] if own else sum(squares.values())
        half = math.inf
        if degrees:
            quantile = _STUDENT[degrees - 1] if degrees <= len(_STUDENT) else 1.96
            half = quantile * math.sqrt(spread / degrees / len(found))
        differences[name] = (sum(found) / len(found), half)
    return differences


def evaluate(
    encoders: Encoders,
    images: ValidationImages,
    instances: Sequence[Image.Image],
    class_prompt: str,
    scenes: Mapping[str, str] = SCENES,
) -> dict[str, float]:
    """The numbers for one state of the model.

    subject_fidelity, clip_i: subject images (alone and in scenes) against instance images. clip_t: scene images
    against their prompts. scene_recognised: share of scene images whose own scene CLIP finds likeliest among all.
    class_diversity: mean pairwise distance of class images. class_subject_similarity: class images against instance
    images (lower is better: the paper's PRES). sentence_fidelity: images asked for in other sentences against instance
    images, and worst_sentence_fidelity the mean of the sentence that does worst. What a prompt set is too small for is
    left out.
    """
    real, subject = encoders.identity_features(instances), [*images.subject, *images.scenes]
    numbers = {
        "subject_fidelity": subject_fidelity(encoders.identity_features(subject), real),
        "clip_i": subject_fidelity(encoders.clip_features(subject), encoders.clip_features(instances)),
    }
    if images.scenes:
        found = encoders.clip_features(images.scenes)
        guesses = (found @ encoders.text_features([f"{class_prompt} {p}" for p in scenes.values()]).T).argmax(1)
        right = [list(scenes)[int(guess)] == name for guess, name in zip(guesses, images.scene_names, strict=True)]
        numbers["clip_t"] = float((found * encoders.text_features(images.scene_prompts)).sum(1).mean())
        numbers["scene_recognised"] = sum(right) / len(right)
    if images.classes:
        classes = encoders.identity_features(images.classes)
        if len(classes) > 1:
            numbers["class_diversity"] = diversity(classes)
        numbers["class_subject_similarity"] = subject_fidelity(classes, real)
    if images.sentences:
        by_sentence: dict[str, list[float]] = {}
        similarity = (encoders.identity_features(images.sentences) @ real.T).mean(1)
        for prompt, found in zip(images.sentence_prompts, similarity.tolist(), strict=True):
            by_sentence.setdefault(prompt, []).append(found)
        numbers["sentence_fidelity"] = float(similarity.mean())
        numbers["worst_sentence_fidelity"] = min(sum(found) / len(found) for found in by_sentence.values())
    return numbers


def who_looks_like_whom(
    encoders: Encoders, pictures: Mapping[str, Sequence[Image.Image]], photographs: Mapping[str, Sequence[Image.Image]]
) -> dict[str, dict[str, float]]:
    """Subject fidelity of each subject's pictures against each one's photographs, by name.

    Where two subjects have not mixed, every row is highest under its own name.
    """
    real = {name: encoders.identity_features(images) for name, images in photographs.items()}
    found = {name: encoders.identity_features(images) for name, images in pictures.items()}
    return {a: {b: subject_fidelity(of_a, of_b) for b, of_b in real.items()} for a, of_a in found.items()}


def likeness_table(likeness: Mapping[str, Mapping[str, float]]) -> Table:
    """`who_looks_like_whom` as a table: a row for whom the pictures were asked for, a column for whose photographs."""
    return Table(
        {"pictures of": name} | {f"like {other}": format(value, ".3f") for other, value in row.items()}
        for name, row in likeness.items()
    )


def ceiling(
    encoders: Encoders,
    components: Components,
    instances: Sequence[Image.Image],
    references: Sequence[Image.Image],
    resolution: int,
) -> dict[str, float]:
    """What other real photographs of the subject reach; without any, each instance image against the others."""
    pictures = through_vae(components, references or instances, resolution)
    numbers = {}
    for name, encode in (("subject_fidelity", encoders.identity_features), ("clip_i", encoders.clip_features)):
        similarity = encode(pictures) @ encode(instances).T
        if not references:
            similarity = similarity[~torch.eye(len(instances), dtype=torch.bool)]
        if similarity.numel():  # one photograph alone has nothing to be compared with
            numbers[name] = float(similarity.mean())
    return numbers


def report(before: dict, after: dict, top: dict) -> dict[str, dict[str, float]]:
    """What `metrics.json` holds: before, after, floor, ceiling.

    `after` also holds normalized_subject_fidelity = (after - floor) / (ceiling - floor), class_diversity_ratio =
    after / before, and sentence_fidelity_ratio = (sentence_fidelity - floor) / (subject_fidelity - floor), where those
    can be formed; worst_sentence_fidelity_ratio likewise.
    """
    floor = {name: before[name] for name in ("subject_fidelity", "clip_i")}
    after = dict(after)
    span = top.get("subject_fidelity", 0.0) - floor["subject_fidelity"]
    if span > 0:
        after["normalized_subject_fidelity"] = (after["subject_fidelity"] - floor["subject_fidelity"]) / span
    gained = after["subject_fidelity"] - floor["subject_fidelity"]
    for name in ("sentence_fidelity", "worst_sentence_fidelity"):
        if gained > 0 and name in after:
            after[f"{name}_ratio"] = (after[name] - floor["subject_fidelity"]) / gained
    if before.get("class_diversity", 0.0) > 0:
        after["class_diversity_ratio"] = after["class_diversity"] / before["class_diversity"]
    return {"before": before, "after": after, "floor": floor, "ceiling": top}


def metrics_table(metrics: dict[str, dict[str, float]]) -> Table:
    """One row a number, one column a state."""
    states = ("before", "after", "floor", "ceiling")
    return Table(
        {"": name} | {state: format(metrics[state][name], ".3f") if name in metrics[state] else "" for state in states}
        for name in metrics["after"]
    )
