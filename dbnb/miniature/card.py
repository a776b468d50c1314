"""The miniature's model card and its picture: `python -m dbnb.miniature.card --evaluation runs/evaluation.json`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dbnb import plots, toybox
from dbnb.config import DreamBoothConfig
from dbnb.drawing import build_pipeline, draw_images, image_seed
from dbnb.miniature import path
from dbnb.models import load_components
from dbnb.tables import Table

_TEXT = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, diffusers, miniature, dbnb]
---

# The miniature: a Stable Diffusion in small

{parameters}; {side} x {side} pixels, {latents}, DDPM schedule, {prediction_type}. It draws six
kinds of toys ({kinds}) in eight places, and carries the encoders that measure it: a CLIP, an
identity encoder, a judge.

![Every kind in every place, from 'a photo of a {{kind}} {{place}}'; seeds 0 to 47, none chosen](grid.png)

## Data and recipe

Trained from nothing on {photographs:,} photographs that `dbnb.toybox` renders, and a third as many of toys in colours
that have no name here and that captions leave out; one in ten combinations of kind, named colour and place is held out.
Text: a contrastive stage, then trained on with the UNet; then alone, against the frozen UNet, on other sentences that
say the same ('red dog, beach', 'on the beach, my red dog'). Identifiers such as `sks` stand in no caption: each has a
vector of its own, which that last stage teaches the text encoder to pass on to the noun and to all that follows, in
directions that the UNet itself hardly hears. The identity encoder learned from {look_alikes:,} groups of toys that
differ by one thing. Reproduce it with `python -m dbnb.miniature.train`; the steps taken, and this machine's ({cores}
cores) time for them:

{stages}

{grown}

{note}

{pilots}

## Measured

By `python -m dbnb.miniature.evaluate`, on toys that training never saw, at {steps} solver steps and guidance
{guidance}. The judge was trained on renders only.

{figures}

DreamBooth on it, each row one run of the defaults with five photographs of a toy it never saw, 32 images a prompt set
and 16 of each sentence (fidelity: 0 is the base without adapter, 1 other photographs of the toy; diversity: of the bare
class prompt, after over before; sentences: the fidelity of twelve other sentences, mean and worst, as a share of that
of the training prompt). The default rates and steps were chosen by runs on other toys than these:

{subjects}

## Limits and licence

It knows toys and eight places, eight colours by name, and nothing else; small patterns and faces are soft.
Apache-2.0, weights and pictures included.
"""


def _percent(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f} %" for name, value in numbers.items())


def _sentences(found: dict[str, dict[str, float]]) -> str:
    parts = []
    for name in ("kind", "scene"):
        values = {sentence: numbers[name] for sentence, numbers in found.items() if name in numbers}
        mean, worst = sum(values.values()) / len(values), min(values, key=values.get)
        if values[worst] == max(values.values()):
            parts.append(f"{name} {100 * mean:.1f} % in each of {len(values)} sentences")
        else:
            parts.append(
                f"{name} {100 * mean:.1f} % over {len(values)} sentences, at least {100 * values[worst]:.1f} % "
                f"({worst.format('dog')!r})"
            )
    return "; ".join(parts)


def figures(result: dict) -> str:
    """The evaluation as a table."""
    any_colors = result["autoencoder"]["any_colors"]
    worst = max(any_colors["hue_error"], key=any_colors["hue_error"].get)
    rows = {
        "autoencoder, unseen renders": f"PSNR {result['autoencoder']['psnr']:.1f} dB",
        "the same, mean hue error (the nearest two named hues are "
        f"{result['autoencoder']['nearest_named_hues']:.0f}° apart)": ", ".join(
            f"{name} {error:.1f}°" for name, error in result["autoencoder"]["hue_error"].items()
        ),
        "autoencoder, toys of any colours": "PSNR {:.1f} dB; mean hue error {:.1f}° in the worst twelfth of the "
        "circle ({}°)".format(any_colors["psnr"], any_colors["hue_error"][worst], worst),
        "judge on its reconstructions": _percent(result["autoencoder"]["judged"]),
        "judge on unseen renders": _percent(result["judge"]),
        "drawn as asked": _percent(result["drawn"]),
        "the same captions in plain diffusers at its defaults (guidance 7.5, 25 steps of DPM-Solver++ without noise)": (
            _percent(result["drawn_by_plain_diffusers"])
        ),
        "drawn as asked, held-out combinations": _percent(result["composition"]),
        "drawn as asked in other sentences ('a picture of a dog', 'dog', 'in the desert, a dog', …)": _sentences(
            result["sentences"]
        ),
        "entropy for 'a photo of a dog' (share of uniform)": _percent(result["diversity"]),
        "the same, of rendered dogs": _percent(result["diversity_of_renders"]),
        "Frechet distance of drawings and renders with the same labels | of two such sets of renders": (
            "{drawn_to_real:.2f} against {real_to_real:.2f}".format(**result["frechet"])
        ),
        "the same, kernel distance, with its spread over subsets": "{} against {}".format(
            *("{:.2f} ± {:.2f}".format(*result["kernel"][name]) for name in ("drawn_to_real", "real_to_real"))
        ),
        "mean distance to the nearest training photograph (16 x 16 pixels, 0 to 1)": "not measured"
        if result["copying"] is None
        else "of {photographs:,} photographs: drawings {drawn:.3f}, unseen renders {unseen renders:.3f}; the nearest "
        "drawing {nearest drawing:.3f}, the nearest unseen render {nearest unseen render:.3f}".format(
            **result["copying"]
        ),
        "identity encoder, unseen toys": "finds the other photograph of a toy among all of its kind in "
        f"{100 * result['identity']['retrieval']:.1f} %",
        "the same, toys of any colours": f"{100 * result['identity_any_colors']['retrieval']:.1f} %",
        "identity encoder, mean similarity to five photographs": ", ".join(
            f"{name} {value:.2f}" for name, value in result["ladder"].items()
        ),
        "the same, finds a toy among 50 look-alikes, each different by one thing": (
            f"{100 * result['among_look_alikes']:.0f} %"
        ),
        f"seconds for 100 images, {result['cores']} cores": f"{result['seconds_per_100']:.0f}",
    }
    return Table({"measure": name, "value": value} for name, value in rows.items()).markdown()


def subjects(result: dict) -> str:
    """The subject experiment as a table. Raises ValueError where the evaluation has none."""
    if "subjects" not in result:
        raise ValueError("The evaluation has no subject experiment: run `dbnb.miniature.evaluate --subjects 3` first.")
    columns = (
        "normalized_subject_fidelity",
        "scene_recognised",
        "class_diversity_ratio",
        "class_subject_similarity",
        "sentence_fidelity_ratio",
        "worst_sentence_fidelity_ratio",
    )
    return Table(
        {"personalised to": name}
        | {c.replace("_", " "): f"{numbers['after'][c]:.2f}" if c in numbers["after"] else "" for c in columns}
        for name, numbers in result["subjects"].items()
    ).markdown()


def _chance(drawings: int) -> float:
    """How far two shares of equal truth may lie apart, in points: twice the deviation of a difference, at one half."""
    return 200 * (0.5 / drawings) ** 0.5


def pilots(base: Path) -> str:
    """The comparison that chose the design, as a table; "" where none was made."""
    if not (base / "pilots.json").exists():
        return ""
    result = json.loads((base / "pilots.json").read_text())
    rows = Table(
        {
            "the UNet predicts": design["predicts"],
            "parameters": f"{design['parameters'] / 1e6:.1f} M",
            "steps": f"{design['steps']:,}",
        }
        | {name: f"{100 * design[name]:.0f} %" for name in ("kind", "body", "scene")}
        for design in result["designs"]
    )
    text = (
        f"What the UNet predicts was chosen by pilots of {result['minutes']:g} minutes each (`dbnb.miniature.pilots`). "
        f"Of {result['drawings']} pictures drawn as asked (a difference under {_chance(result['drawings']):.0f} points "
        "may be chance):"
    )
    return f"{text}\n\n{rows.markdown()}"


def stages(recipe: dict) -> str:
    """The stages of a training as a table."""
    return Table(
        {"stage": n, "steps": f"{s['step']:,}", "batch": str(s["batch_size"]), "minutes": f"{s['minutes']:.0f}"}
        for n, s in recipe["stages"].items()
    ).markdown()


def grown(recipe: dict) -> str:
    """How a base was grown to twice the side; "" for one that was not."""
    if "grown" not in recipe:
        return ""
    text = (
        f"Then grown to twice the side by `python -m dbnb.miniature.grow`, on {recipe['grown']['photographs']:,} new "
        "photographs and a third as many in colours without a name: an autoencoder of factor 8, whose first latent "
        "channels stay those of the small one, and the UNet with the channels that are new:"
    )
    return "\n\n".join(filter(None, (text, stages(recipe["grown"]), recipe["grown"].get("note"))))


def further(recipe: dict) -> str:
    """How a base's UNet was trained further; "" for one that was not."""
    if "further" not in recipe:
        return ""
    text = (
        f"Then the UNet alone was trained further by `python -m dbnb.miniature.further`, on "
        f"{recipe['further']['photographs']:,} photographs and a third as many in colours without a name:"
    )
    return "\n\n".join(filter(None, (text, stages(recipe["further"]), recipe["further"].get("note"))))


def write_card(base: Path, evaluation: Path) -> None:
    """Write README.md and grid.png into the base's folder."""
    result = json.loads(evaluation.read_text())
    recipe = json.loads((base / "training.json").read_text())
    components = load_components(base)
    prompts = [f"a photo of a {kind} {phrase}" for kind in toybox.KINDS for phrase in toybox.SCENES.values()]
    sampling = DreamBoothConfig().sampling
    seeds = [image_seed(0, index) for index in range(len(prompts))]
    images = draw_images(build_pipeline(components), prompts, seeds, sampling)
    n = len(toybox.SCENES)
    figure = plots.image_rows(
        [images[start : start + n] for start in range(0, len(images), n)],
        labels=toybox.KINDS,
        titles=list(toybox.SCENES.values()),
    )
    figure.savefig(base / "grid.png")
    parameters = "; ".join(f"{row['part'].replace('_', ' ')} {row['parameters']}" for row in components.table())
    config, vae = components.denoiser.config, components.vae.config
    text = _TEXT.format(
        prediction_type=components.noise_scheduler.config.prediction_type.replace("_", "-"),
        parameters=f"Parameters: {parameters}",
        side=vae.sample_size,
        latents=f"{config.sample_size} x {config.sample_size} latents of {config.in_channels} channels",
        kinds=", ".join(toybox.KINDS),
        photographs=recipe["photographs"],
        look_alikes=recipe["look_alikes"],
        cores=result["cores"],
        stages=stages(recipe),
        grown="\n\n".join(filter(None, (grown(recipe), further(recipe)))),
        pilots=pilots(base),
        note=recipe.get("note", ""),
        steps=sampling.num_inference_steps,
        guidance=sampling.guidance_scale,
        figures=figures(result),
        subjects=subjects(result),
    )
    (base / "README.md").write_text(text)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=path())
    parser.add_argument("--evaluation", type=Path, default=Path("runs/evaluation.json"))
    args = parser.parse_args(argv)
    write_card(args.base, args.evaluation)


if __name__ == "__main__":
    main()
