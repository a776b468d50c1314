"""Measure the miniature: `python -m dbnb.miniature.evaluate --output runs/evaluation.json`.

Pictures are drawn from captions of toys that training never saw; the judge that reads them was trained on renders only,
and its own accuracy on unseen renders stands beside.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from PIL import Image, ImageFilter
from transformers import AutoModelForImageClassification

from dbnb import metrics, toybox, workflow
from dbnb.config import DreamBoothConfig
from dbnb.drawing import build_pipeline, draw_images, image_seed
from dbnb.miniature import path
from dbnb.miniature.alike import differences_of, look_alike, turned
from dbnb.miniature.data import (
    ATTRIBUTES,
    CHUNK,
    SHOTS,
    SIZE,
    draw,
    held_out,
    is_kept,
    labels_of,
    photographs,
    rendered,
)
from dbnb.models import load_components
from dbnb.toybox.captions import whole_content
from dbnb.toybox.sample import SAMPLE_TOY
from dbnb.validation import SENTENCES, SETS, validation_images

PER_SET = 32  # pictures of each prompt set of a subject
PER_SENTENCE = 16  # of each sentence: the worst of twelve is one of chance where each has few pictures


class Judge:
    """Reads kind, colours, pattern, accessory and scene off pictures."""

    def __init__(self, base: Path) -> None:
        self.model = AutoModelForImageClassification.from_pretrained(base / "judge").float().eval()

    @staticmethod
    def _pixels(images: np.ndarray) -> torch.Tensor:
        """(N, H, W, 3) uint8 -> (N, 3, 64, 64) in [-1, 1]: it learned at that size, and larger ones are averaged."""
        return F.adaptive_avg_pool2d(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0, SIZE)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 -> (N, 6) numbers in the order of `ATTRIBUTES`."""
        pixels = self._pixels(images)
        logits = torch.cat([self.model(part).logits for part in pixels.split(128)])
        groups = logits.split([len(values) for values in ATTRIBUTES.values()], dim=1)
        return torch.stack([group.argmax(1) for group in groups], dim=1).numpy()

    @torch.no_grad()
    def features(self, images: np.ndarray) -> np.ndarray:
        """(N, D) activations before the last layer, for the distances of two sets of pictures."""
        pixels = self._pixels(images)
        parts = [self.model.resnet(part).pooler_output.flatten(1) for part in pixels.split(128)]
        return torch.cat(parts).double().numpy()


def accuracy(found: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Share of pictures in which each attribute is read as asked; both are labels, (N, 6)."""
    return {name: float((found[:, i] == true[:, i]).mean()) for i, name in enumerate(ATTRIBUTES)}


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of two sets of features taken as Gaussians (Heusel et al., 2017)."""
    ca, cb = np.cov(a.T), np.cov(b.T)
    # The trace of the square root of a product, through its eigenvalues.
    root = np.sqrt(np.maximum(np.linalg.eigvals(ca @ cb).real, 0.0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2.0 * root)


def kernel_distance(a: np.ndarray, b: np.ndarray, *, subsets: int = 50, size: int = 100) -> tuple[float, float]:
    """Kernel distance of two sets of features (Bińkowski et al., 2018): its mean over random subsets, and their spread.

    The unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3: 0 for two samples of one
    distribution, however few they are, and then as often below 0 as above. Features at the same place in the two sets
    may belong to the same labels: such pairs are left out between the sets, as each feature with itself is within one.
    """
    rng, values = np.random.default_rng(0), []
    for _ in range(subsets):
        chosen = rng.choice(min(len(a), len(b)), min(size, len(a), len(b)), replace=False)
        x, y = a[chosen], b[chosen]
        means = []
        for p, q in ((x, x), (y, y), (x, y)):
            kernel = (p @ q.T / p.shape[1] + 1.0) ** 3
            means.append((kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1)))
        values.append(means[0] + means[1] - 2.0 * means[2])
    return float(np.mean(values)), float(np.std(values))


def entropy(numbers: np.ndarray, bins: int) -> float:
    """Entropy of whole numbers below `bins`, (N,), as a share of the largest possible: 0 to 1."""
    p = np.bincount(numbers, minlength=bins) / len(numbers)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum() / np.log(bins))


def full_caption(names: dict[str, str]) -> str:
    """A caption that says all the judge can read."""
    return whole_content(**names).plainly()


def hue(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, H, W, 3) in [0, 1] -> hue in degrees and chroma, (N, H, W) each."""
    red, green, blue = np.moveaxis(pictures, -1, 0)
    alpha, beta = red - 0.5 * (green + blue), np.sqrt(0.75) * (green - blue)
    return np.degrees(np.arctan2(beta, alpha)) % 360.0, np.hypot(alpha, beta)


def turn(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Degrees between two hues, element by element: 0 to 180."""
    return np.abs((a - b + 180.0) % 360.0 - 180.0)


def hue_errors(images: np.ndarray, back: np.ndarray, body: np.ndarray) -> dict[str, float]:
    """Mean turn of the hue, in degrees, for each body colour that has one, on the pixels that show it.

    `images` and `back` are (N, H, W, 3) uint8, `body` the number of each picture's body colour, (N,).
    """
    (hues, chroma), (hues_back, _) = hue(images / 255.0), hue(back / 255.0)
    errors = {}
    for number, name in enumerate(ATTRIBUTES["body"]):
        own, strength = hue(np.array(toybox.COLORS[name])[None, None, None])
        if strength > 0.1:
            shown = (turn(hues, own) < 15.0) & (chroma > 0.15) & (body == number)[:, None, None]
            if shown.any():
                errors[name] = float(turn(hues, hues_back)[shown].mean())
    return errors


def hue_errors_by_sector(images: np.ndarray, back: np.ndarray) -> dict[str, float]:
    """Mean turn of the hue, in degrees, of the clearly coloured pixels of each twelfth of the circle.

    Both are (N, H, W, 3) uint8.
    """
    (hues, chroma), (hues_back, _) = hue(images / 255.0), hue(back / 255.0)
    turned, sector = turn(hues, hues_back), (hues // 30.0).astype(int)
    return {
        f"{30 * s} to {30 * (s + 1)}": float(turned[shown].mean())
        for s in range(12)
        if (shown := (sector == s) & (chroma > 0.3)).any()
    }


def there_and_back(components, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pictures, (N, H, W, 3) uint8, through the autoencoder, and the PSNR of each in decibels, (N,)."""
    pictures = [Image.fromarray(image) for image in images]
    back = np.stack([np.asarray(i) for i in metrics.through_vae(components, pictures, images.shape[1])])
    return back, -10.0 * np.log10((((back.astype(np.float64) - images) / 255.0) ** 2).mean((1, 2, 3)))


def autoencoder(components, judge: Judge, images: np.ndarray, labels: np.ndarray, any_colors: np.ndarray) -> dict:
    """PSNR on unseen renders, hue errors, what the judge reads off the reconstructions, the nearest two named hues.

    `images` and `any_colors`, renders in colours without a name as a learner's own toy has, are (N, H, W, 3) uint8;
    `labels` are (N, 6).
    """
    back, per_image = there_and_back(components, images)
    back_any, per_image_any = there_and_back(components, any_colors)
    hues, chroma = hue(np.array([list(toybox.COLORS.values())]))
    named = np.sort(hues[chroma > 0.1])
    return {
        "psnr": float(per_image.mean()),
        "psnr_worst_percent": float(np.quantile(per_image, 0.01)),
        "hue_error": hue_errors(images, back, labels[:, 1]),
        "nearest_named_hues": float(turn(named, np.roll(named, 1)).min()),
        "judged": accuracy(judge(back), labels),
        "any_colors": {
            "psnr": float(per_image_any.mean()),
            "hue_error": hue_errors_by_sector(any_colors, back_any),
        },
    }


def nearest(pictures: np.ndarray, photos: np.ndarray) -> np.ndarray:
    """Root mean square difference (0 to 1) of each picture from the photograph most like it, both at 16 x 16 pixels."""

    def small(images: np.ndarray) -> torch.Tensor:
        return F.adaptive_avg_pool2d(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0, 16).flatten(1)

    known, distances = small(photos), []
    for part in small(pictures).split(64):
        distances.append(torch.cdist(part, known).min(1).values)
    return torch.cat(distances).numpy() / np.sqrt(known.shape[1])


def side_of(pipeline) -> int:
    """Pixels to a side of the pictures that a base was trained on."""
    return pipeline.vae.config.sample_size


def drawings(pipeline, prompts: list[str], seed: int = 5, **changed) -> np.ndarray:
    """One picture a prompt, of the base's size, at the default `Sampling` except for `changed`: (N, H, W, 3) uint8."""
    sampling = dataclasses.replace(DreamBoothConfig().sampling, seed=seed, resolution=side_of(pipeline), **changed)
    seeds = [image_seed(sampling.seed, index) for index in range(len(prompts))]
    images = draw_images(pipeline, prompts, seeds, sampling)
    return np.stack([np.asarray(image) for image in images])


def drawn_by_plain_diffusers(pipeline, prompts: list[str]) -> np.ndarray:
    """One picture a prompt with diffusers' own defaults, (N, H, W, 3) uint8: others will load the base like that.

    They are 25 steps of DPM-Solver++ without noise at a guidance of 7.5.
    """
    solver = pipeline.scheduler
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(solver.config, algorithm_type="dpmsolver++")
    try:
        return drawings(pipeline, prompts, num_inference_steps=25, guidance_scale=7.5)
    finally:
        pipeline.scheduler = solver


def sentences_understood(pipeline, judge: Judge, count: int) -> dict[str, dict[str, float]]:
    """How often each of `validation.SENTENCES` draws the kind and the place that it names, of `count` pictures.

    A class word stands where the subject's name will; a sentence that names no place is judged by the kind alone.
    """
    found = {}
    kinds = [toybox.KINDS[number % len(toybox.KINDS)] for number in range(count)]
    for number, sentence in enumerate(SENTENCES):
        read = judge(drawings(pipeline, [sentence.format(kind) for kind in kinds], seed=20 + number))
        found[sentence] = {"kind": float((read[:, 0] == [toybox.KINDS.index(kind) for kind in kinds]).mean())}
        for place, phrase in enumerate(toybox.SCENES.values()):
            if phrase in sentence:
                found[sentence]["scene"] = float((read[:, 5] == place).mean())
    return found


def measure(base: Path, count: int, unseen: int, data: Path) -> dict:
    """Autoencoder, judge, drawings, sentences, diversity, copying, distances to renders, identity encoder, speed.

    `count` pictures are drawn for each measure; autoencoder and encoders are tested on `unseen` photographs of toys in
    named colours and as many in any. `data` keeps photographs; copying is measured on those of the training that are
    there.
    """
    components, judge = load_components(base), Judge(base)
    pipeline = build_pipeline(components)
    side = side_of(pipeline)
    images, labels = photographs("test", unseen, data, size=side)
    result: dict = {"judge": accuracy(judge(images), labels)}
    # Colours as a learner's own toy may have; far above the numbers that training uses.
    any_colors, any_labels = photographs("wild", unseen, data, start=10**6, size=side)
    result["autoencoder"] = autoencoder(components, judge, images, labels, any_colors)

    names = [draw("test", index)[1] for index in range(8 * count)]
    seen = [n for n in names if not held_out(n["kind"], n["body"], n["scene"])][:count]
    new = [n for n in names if held_out(n["kind"], n["body"], n["scene"])][: count // 3]
    started = time.perf_counter()
    pictures = drawings(pipeline, [full_caption(n) for n in seen])
    result["seconds_per_100"] = (time.perf_counter() - started) / len(seen) * 100
    result["drawn"] = accuracy(judge(pictures), np.stack([labels_of(n) for n in seen]))
    result["drawn_by_plain_diffusers"] = accuracy(
        judge(drawn_by_plain_diffusers(pipeline, [full_caption(n) for n in seen])),
        np.stack([labels_of(n) for n in seen]),
    )
    result["sentences"] = sentences_understood(pipeline, judge, max(1, count // 10))
    result["composition"] = accuracy(
        judge(drawings(pipeline, [full_caption(n) for n in new], seed=6)), np.stack([labels_of(n) for n in new])
    )
    # Like with like: two sets of renders of the very labels that the drawings were asked for.
    drawn, *real = (judge.features(p) for p in (pictures, renders_of(seen, 1, side), renders_of(seen, 2, side)))
    for name, distance in (("frechet", frechet), ("kernel", kernel_distance)):
        result[name] = {"drawn_to_real": distance(drawn, real[0]), "real_to_real": distance(real[1], real[0])}
    result["copying"] = copying(base, pictures, images, data)
    dogs = judge(drawings(pipeline, ["a photo of a dog"] * count, seed=7))
    result["diversity"] = {
        name: entropy(dogs[:, i], len(values)) for i, (name, values) in enumerate(ATTRIBUTES.items()) if name != "kind"
    }
    result["diversity_of_renders"] = {
        name: entropy(labels[labels[:, 0] == 0][:, i], len(values))
        for i, (name, values) in enumerate(ATTRIBUTES.items())
        if name != "kind"
    }
    encoders = metrics.load_encoders(base)
    result["identity"] = identity_accuracy(encoders, images, labels)
    result["identity_any_colors"] = identity_accuracy(encoders, any_colors, any_labels)
    result["ladder"], result["among_look_alikes"] = look_alike_tests(encoders, components, max(1, count // 5), side)
    return result


def renders_of(names: Sequence[dict[str, str]], seed: int, size: int = SIZE) -> np.ndarray:
    """(N, size, size, 3) uint8: for each set of attribute names another toy that has them, from another side."""
    shots = []
    for number, n in enumerate(names):
        rng = np.random.default_rng((number, seed, 7))
        toy = toybox.named_toy(n["kind"], n["body"], n["accent"], n["pattern"], n["accessory"], rng)
        shots.append((toy, n["scene"], int(rng.integers(2**31))))
    return rendered(shots, size)


def look_alike_tests(
    encoders: metrics.Encoders, components, count: int, side: int = SIZE
) -> tuple[dict[str, float], float]:
    """What the identity encoder makes of known damage, and whether it finds a toy among 50 look-alikes.

    For `count` toys that training never saw, each shown by five photographs of `side` pixels: the mean similarity of
    another photograph, rung by rung the less alike; and the share of toys whose sixth photograph is more alike than
    those of 50 others of its kind, each of which differs from it by one of `alike.DIFFERENCES`.
    """
    rng, scenes, number = np.random.default_rng(0), list(toybox.SCENES), 10**6
    rungs: dict[str, list[float]] = {}
    found = []
    while len(found) < count:
        number += 1
        toy = draw(("test", "wild")[number % 2], SHOTS * number)[0]
        if toy.pattern == "plain" or "hue" not in differences_of(toy):
            continue  # it cannot lose what it does not have
        order, views = rng.permutation(scenes), rng.integers(2**31, size=len(scenes))
        shots = [(toy, str(scene), int(view)) for scene, view in zip(order, views, strict=True)]
        turn_by = 15.0 * rng.choice((-1, 1))
        changed = {
            "hue 15° off": dataclasses.replace(toy, body=turned(toy.body, turn_by)),
            "hue 30° off": dataclasses.replace(toy, body=turned(toy.body, 2 * turn_by)),
            "another pattern": look_alike(toy, "pattern", rng),
            "another toy": toybox.random_toy(toy.kind, number),
        }
        others = [look_alike(toy, str(rng.choice(differences_of(toy))), rng) for _ in range(50)]
        places = [(str(rng.choice(scenes)), int(rng.integers(2**31))) for _ in others]
        pictures = [
            Image.fromarray(p)
            for p in rendered(
                [
                    *shots[:7],
                    *((t, *shots[5][1:]) for t in changed.values()),
                    *((t, *place) for t, place in zip(others, places, strict=True)),
                ],
                side,
            )
        ]
        known, photograph = encoders.identity_features(pictures[:5]), pictures[5]
        seen = {
            "photograph": photograph,
            "through the autoencoder": metrics.through_vae(components, [photograph], side)[0],
            "blurred": photograph.filter(ImageFilter.GaussianBlur(1.5 * side / SIZE)),
            **dict(zip(changed, pictures[7:11], strict=True)),
        }
        for name, similarity in zip(
            seen, (encoders.identity_features(list(seen.values())) @ known.T).mean(1), strict=True
        ):
            rungs.setdefault(name, []).append(float(similarity))
        similarity = (encoders.identity_features([pictures[6], *pictures[11:]]) @ known.T).mean(1)
        found.append(int(similarity.argmax()) == 0)
    return {name: float(np.mean(values)) for name, values in rungs.items()}, float(np.mean(found))


def copying(base: Path, pictures: np.ndarray, unseen: np.ndarray, data: Path) -> dict[str, float] | None:
    """Mean distance to the nearest training photograph: of drawings, and of unseen renders, which copy nothing.

    `pictures` and `unseen` are (N, H, W, 3) uint8. Those training photographs count that are kept in `data`, which
    "photographs" numbers; None where there are none.
    """
    recipe = json.loads((base / "training.json").read_text())
    count = recipe.get("further", recipe.get("grown", recipe))["photographs"]
    parts = [
        photographs("train", min(CHUNK, count - start), data, start=start, size=pictures.shape[1])[0]
        for start in range(0, count, CHUNK)
        if is_kept("train", min(CHUNK, count - start), data, start=start, size=pictures.shape[1])
    ]
    if not parts:
        return None
    known = np.concatenate(parts)
    return {
        "photographs": len(known),
        "drawn": float(nearest(pictures, known).mean()),
        "unseen renders": float(nearest(unseen, known).mean()),
        "nearest drawing": float(nearest(pictures, known).min()),
        "nearest unseen render": float(nearest(unseen, known).min()),
    }


def identity_accuracy(encoders: metrics.Encoders, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How often the other shot of an unseen toy is nearer than any other toy of its kind; and mean similarities.

    `images`, (N, H, W, 3) uint8, show each toy twice in a row; `labels` are (N, 6).
    """
    features = encoders.identity_features([Image.fromarray(image) for image in images])
    first, second = features[0::SHOTS], features[1::SHOTS]
    kinds = torch.from_numpy(labels[0::SHOTS, 0])
    similarity = first @ second.T
    other_kind = kinds[:, None] != kinds[None]
    right = similarity.masked_fill(other_kind, -2.0).argmax(1) == torch.arange(len(first))
    different = ~other_kind & ~torch.eye(len(first), dtype=torch.bool)
    return {
        "retrieval": float(right.float().mean()),
        "same_toy": float(similarity.diagonal().mean()),
        "other_toy_of_kind": float(similarity[different].mean()),
    }


def _metrics_of(config: DreamBoothConfig) -> dict:
    """What a run measures, from more pictures."""
    session, base = workflow.trained(config), load_components(config.base)
    before, after, said = (
        validation_images(components, session.concept, config.sampling, count=count, sets=sets)
        for components, count, sets in (
            (base, PER_SET, SETS),
            (session.components, PER_SET, SETS),
            (session.components, PER_SENTENCE * len(SENTENCES), ("sentences",)),
        )
    )
    after = dataclasses.replace(after, sentences=said.sentences, sentence_prompts=said.sentence_prompts)
    return workflow.measured(session, before, after, metrics.load_encoders(base.base), workflow.references(config))


def subject_experiment(base: str, folder: Path, count: int, **options) -> dict[str, dict]:
    """Personalise the base to the sample toy and to `count` random ones: what `metrics.json` would hold, by run.

    Each is run with the defaults, the sample also without prior preservation, with its text encoder trained and with
    adapters on attention alone. Each gets five photographs to learn from and six more as the ceiling. The runs share
    the cores out, one thread each: the miniature's operations are so small that two runs side by side end sooner than
    one after the other.
    """
    toys = {"the sample dog": SAMPLE_TOY}
    for i in range(count):
        kind = toybox.KINDS[(i + 1) % len(toybox.KINDS)]
        toys[f"{kind} {100 + i}"] = toybox.random_toy(kind, 100 + i)
    configs = {}
    scenes = list(toybox.SCENES)
    for number, (name, toy) in enumerate(toys.items()):
        for part, shots, start in (("photos", 5, 0), ("references", 6, 100)):
            (folder / name / part).mkdir(parents=True, exist_ok=True)
            for i in range(shots):
                scene = scenes[(number + 3 * i) % len(scenes)]
                picture = toybox.photograph(toy, scene=scene, seed=1000 * number + start + i, size=256)
                picture.save(folder / name / part / f"{i:02d}.png")
        variants: dict[str, dict] = {"with prior preservation": {}}
        if toy is SAMPLE_TOY:
            variants["without prior preservation"] = {"with_prior_preservation": False}
            variants["text encoder trained too"] = {"train_text_encoder": True}
            variants["adapters on attention alone"] = {"lora_layers": "attention"}
        for variant, changed in variants.items():
            configs[f"{name}, {variant}"] = DreamBoothConfig(
                base=base,
                class_word=toy.kind,
                instance_data_dir=str(folder / name / "photos"),
                reference_data_dir=str(folder / name / "references"),
                **options | changed,
            )
    with ProcessPoolExecutor(
        min(len(configs), os.cpu_count()), multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        return dict(zip(configs, pool.map(_metrics_of, configs.values()), strict=True))


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=path())
    parser.add_argument("--output", type=Path, default=Path("runs/evaluation.json"))
    parser.add_argument("--count", type=int, default=300, help="pictures drawn for each measure")
    parser.add_argument("--unseen", type=int, default=1024, help="photographs that the encoders are tested on")
    parser.add_argument("--data", type=Path, help="where training keeps its photographs: is anything copied from them?")
    parser.add_argument("--subjects", type=int, help="run the subject experiment on the sample and so many random toys")
    args = parser.parse_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        result = {"cores": os.cpu_count()} | measure(args.base, args.count, args.unseen, args.data or Path(folder))
        if args.subjects is not None:
            base = "miniature" if args.base == path() else str(args.base)
            result["subjects"] = subject_experiment(base, Path(folder), args.subjects)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
