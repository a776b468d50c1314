"""Train the miniature from nothing: `python -m dbnb.miniature.train --output_dir runs/miniature`.

Stages, each resumable from its last checkpoint: photographs, autoencoder, contrastive text and image encoders,
identity encoder, judge, latents, the decoder alone on them, UNet (with the text encoder), the text encoder alone on
other ways to say the same. Every step is a function of (seed, step), so stopping and going on changes nothing. Losses
go to <stage>.jsonl in the output folder, pictures to samples/.
`--start_from` goes on from a base that was shipped, where the checkpoints of its training are gone; with `--stages` it
mends parts of that base and ships the others as they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from torch.optim.swa_utils import update_bn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, ResNetForImageClassification, ResNetModel

from dbnb.miniature import design
from dbnb.miniature.fit import Stage, generator
from dbnb.miniature.stages import (
    LATENT_SAMPLE,
    LOOK_ALIKES,
    Denoiser,
    Photographs,
    decoder_of,
    draw_vectors,
    jitter,
    latents_of,
    normalize_latents,
    read_look_alikes,
    to_tensor,
    train_clip,
    train_decoder,
    train_identity,
    train_judge,
    train_unet,
    train_vae,
    train_words,
)

STAGES = ("vae", "clip", "identity", "judge", "decoder", "unet", "words")
# What the two stages give that a shipped base can be mended in alone, and where it lies in the base.
MENDABLE = {"identity": "identity", "words": "text_encoder"}
PHOTOGRAPHS = 48000


def recipe_of(base: Path) -> dict:
    """How a base was trained."""
    return json.loads((base / "training.json").read_text())


def adopt(base: Path, folder: Path, made_from: Callable[[str], dict[str, int]]) -> None:
    """Checkpoints of the stages from a shipped base, for those that `folder` lacks: weights and steps, no optimizer.

    The stage "words" is not among them: it starts from the text encoder as the UNet's training left it.
    """
    recipe = recipe_of(base)
    folder.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(base / "vae")
    models = {
        "vae": vae,
        "decoder": decoder_of(vae),
        "clip": CLIPModel.from_pretrained(base / "clip"),
        "identity": ResNetModel.from_pretrained(base / "identity"),
        "judge": ResNetForImageClassification.from_pretrained(base / "judge"),
        "unet": Denoiser(
            UNet2DConditionModel.from_pretrained(base / "unet"), CLIPTextModel.from_pretrained(base / "text_encoder")
        ),
    }
    if models["identity"].state_dict().keys() != design.identity().state_dict().keys():
        del models["identity"]  # of another design, so it starts from nothing
    for name, model in models.items():
        if (folder / f"{name}.pt").exists() or name not in recipe["stages"]:
            continue
        stage = recipe["stages"][name]
        state = dict(models=model.float().state_dict(), step=stage["step"], warm_up_from=stage["step"])
        torch.save(state | dict(made_from=made_from(name)), folder / f"{name}.pt")
        (folder / f"{name}.jsonl").write_text(json.dumps({key: stage[key] for key in ("step", "minutes")}) + "\n")


def restore(name: str, models: nn.Module, folder: Path) -> nn.Module:
    """Put a stage's averaged weights, as far as training has come, into `models`.

    What was adopted from a shipped base is an average already.
    """
    state = torch.load(folder / f"{name}.pt", weights_only=True, map_location="cpu")
    models.load_state_dict(state["models"])
    if "ema" in state:
        for parameter, average in zip(models.parameters(), state["ema"]["shadow_params"], strict=True):
            parameter.data.copy_(average)
    return models.eval()


def settle(model: nn.Module, images: np.ndarray, seed: int) -> nn.Module:
    """Measure the batch norms' statistics again, on `images`, (N, H, W, 3) uint8.

    Those of training belong to other weights than the average.
    """
    pictures = [to_tensor(images[start : start + 100]) for start in range(0, min(len(images), 6000), 100)]
    update_bn((jitter(part, generator(seed, i)) for i, part in enumerate(pictures)), model)
    return model


def stage_record(name: str, batch_size: int, folder: Path) -> dict[str, float]:
    """Steps, batch size and minutes of a stage, the minutes summed over the sittings that its log shows.

    Where a line took five times as long as lines usually do, the training was halted: it counts as a usual one.
    """
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    total, sitting = 0.0, [0.0]
    for now, following in zip(lines, [*lines[1:], {"minutes": -1.0}], strict=True):
        sitting.append(now["minutes"])
        if following["minutes"] < now["minutes"]:  # the last line of a sitting
            taken = np.diff(sitting)
            total += np.minimum(taken, np.where(taken > 5 * np.median(taken), np.median(taken), np.inf)).sum()
            sitting = [0.0]
    return {"step": lines[-1]["step"] if lines else 0, "batch_size": batch_size, "minutes": round(float(total), 1)}


def save_mendable(stage: str, folder: Path, target: Path) -> None:
    """Write what a stage of `MENDABLE` made into a base's folder."""
    if stage == "identity":
        images = np.concatenate([np.load(path)["images"] for path in sorted((folder / "data").glob("alike-*"))])
        images = images.reshape(-1, *images.shape[-3:])
        some = torch.randperm(len(images), generator=generator(0, 0))[:6000].numpy()
        model = settle(restore(stage, design.identity(), folder), images[some], 0).half()
    else:
        words = CLIPTokenizer.from_pretrained(target / "tokenizer")
        model = restore(stage, design.text_encoder(words), folder)
        draw_vectors(model.get_input_embeddings(), words, generator(0, 0), most_alike=0.3)
    model.save_pretrained(target / MENDABLE[stage])


def assemble(folder: Path, data: Photographs, target: Path, recipe: dict) -> None:
    """Write the trained parts as a Stable Diffusion folder, with the encoders that measure it beside them.

    UNet, VAE and encoders in half precision; the text encoder in float32, since transformers keeps a file's precision
    and plain `from_pretrained` without a dtype must draw.
    """
    words = design.tokenizer()
    vae = restore("vae", design.vae(), folder)
    normalize_latents(vae, to_tensor(data.images[:LATENT_SAMPLE]))
    restore("decoder", decoder_of(vae), folder)
    denoiser = restore("unet", Denoiser(design.unet(), design.text_encoder(words)), folder)
    temporary = target.with_name(f".{target.name}")
    StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=denoiser.text_encoder,
        tokenizer=words,
        unet=denoiser.unet.half(),
        scheduler=design.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(temporary)
    restore("clip", design.clip(words), folder).half().save_pretrained(temporary / "clip")
    settle(restore("judge", design.judge(), folder), data.images, recipe["seed"]).half().save_pretrained(
        temporary / "judge"
    )
    for stage in MENDABLE:
        save_mendable(stage, folder, temporary)
    if (folder / "pilots.json").exists():
        shutil.copy(folder / "pilots.json", temporary)
    finish(temporary, target, recipe)


def mend(base: Path, stages: Sequence[str], folder: Path, target: Path, recipe: dict) -> None:
    """A copy of a shipped base in which the parts that `stages` made are new."""
    temporary = target.with_name(f".{target.name}")
    shutil.copytree(base, temporary)
    for stage in stages:
        save_mendable(stage, folder, temporary)
    finish(temporary, target, recipe)


def finish(temporary: Path, target: Path, recipe: dict) -> None:
    """Note the recipe in a base's folder, and put that in the place of `target`.

    Where a part was read from, which diffusers notes in its config, is left out: it is a folder of this machine.
    """
    for path in temporary.glob("*/config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (temporary / "training.json").write_text(json.dumps(recipe, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/miniature"))
    parser.add_argument("--photographs", type=int, default=PHOTOGRAPHS)
    parser.add_argument("--look_alikes", type=int, default=LOOK_ALIKES, help="groups that the identity encoder sees")
    steps, batch_sizes = (6800, 800, 5200, 2400, 2600, 25500, 4000), (8, 128, 96, 64, 16, 24, 96)
    parser.add_argument("--steps", type=int, nargs=len(STAGES), default=steps, metavar=STAGES)
    parser.add_argument("--batch_sizes", type=int, nargs=len(STAGES), default=batch_sizes, metavar=STAGES)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop this run's UNet stage after so many minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start_from", type=Path, help="a shipped base, for stages of which no checkpoint is there")
    parser.add_argument("--stages", choices=STAGES, nargs="+", default=STAGES, help="the stages to run")
    parser.add_argument(
        "--mixed_precision", choices=("no", "bf16"), default="no", help="of the UNet and the identity encoder"
    )
    parser.add_argument("--ship", type=Path, help="write the finished base to this folder")
    parser.add_argument("--note", default="", help="what the card says besides of this training")
    args = parser.parse_args(argv)
    mends = args.start_from is not None and set(args.stages) <= set(MENDABLE)
    if args.ship is not None and set(args.stages) != set(STAGES) and not mends:
        parser.error(f"--ship with some --stages alone mends {', '.join(MENDABLE)} of a base given by --start_from.")
    if args.start_from is not None and set(args.stages) != {"identity"} and "grown" in recipe_of(args.start_from):
        parser.error(
            f"--start_from {args.start_from} has been grown to twice the side: only its identity encoder can be mended "
            "here, its words by `python -m dbnb.miniature.grow --stages words` with the folder in which it was grown."
        )
    steps = dict(zip(STAGES, args.steps, strict=True))
    batch = dict(zip(STAGES, args.batch_sizes, strict=True))
    torch.manual_seed(args.seed)  # the parts' first weights
    folder = args.output_dir

    def made_from(stage: str) -> dict[str, int]:
        seen = {"look_alikes": args.look_alikes} if stage == "identity" else {"photographs": args.photographs}
        return {"seed": args.seed, "batch_size": batch[stage]} | seen

    def stage(name: str, **changed) -> Stage:
        return Stage(
            name=name,
            steps=steps[name],
            batch_size=batch[name],
            folder=folder,
            made_from=made_from(name),
            seed=args.seed,
            device="cuda" if torch.cuda.is_available() else "cpu",
            **changed,
        )

    if args.start_from is not None:
        adopt(args.start_from, folder, made_from)
    if "identity" in args.stages:
        train_identity(
            *read_look_alikes(folder / "data", args.look_alikes),
            stage("identity", mixed_precision=args.mixed_precision),
        )
    data = None
    if set(args.stages) - {"identity"}:
        data, words = Photographs(args.photographs, folder / "data"), design.tokenizer()
    if "vae" in args.stages:
        train_vae(data, stage("vae"))
    if "clip" in args.stages:
        train_clip(data, stage("clip"))
    if "judge" in args.stages:
        train_judge(data, stage("judge"))
    if {"decoder", "unet", "words"} & set(args.stages):
        vae, latents = latents_of(data, restore("vae", design.vae(), folder), folder)
    if "decoder" in args.stages:
        train_decoder(data, vae, latents, stage("decoder"))
    if "unet" in args.stages:
        clip = restore("clip", design.clip(words), folder)
        restore("decoder", decoder_of(vae), folder)  # the samples are drawn with it
        train_unet(
            data,
            vae,
            latents,
            Denoiser.from_clip(clip, design.unet()),
            stage("unet", lr=8e-4, minutes=args.minutes, mixed_precision=args.mixed_precision),
        )
    if "words" in args.stages:
        denoiser = restore("unet", Denoiser(design.unet(), design.text_encoder(words)), folder)
        train_words(data, latents, denoiser.unet, denoiser.text_encoder, stage("words", lr=5e-4))
    if args.ship is not None:
        recipe = {"photographs": args.photographs, "seed": args.seed, "note": args.note, "stages": {}}
        if mends:
            recipe = recipe_of(args.start_from)
            recipe["note"] = f"{recipe['note']} {args.note}".strip()
        recipe["look_alikes"] = args.look_alikes
        recipe["stages"] |= {name: stage_record(name, batch[name], folder) for name in args.stages}
        if mends:
            mend(args.start_from, args.stages, folder, args.ship, recipe)
        else:
            assemble(folder, data, args.ship, recipe)


if __name__ == "__main__":
    main()
