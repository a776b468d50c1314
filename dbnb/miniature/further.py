"""Train the UNet of a shipped base further: `python -m dbnb.miniature.further --ship runs/base`.

Autoencoder and text encoder stay, so latents, words and the encoders that measure it mean what they meant; the new UNet
takes the old one's place. Made for a GPU, where a batch of hundreds takes as long as one of 24 on a CPU. Resumable as
`dbnb.miniature.train` is.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from dbnb.miniature import path
from dbnb.miniature.fit import Stage
from dbnb.miniature.stages import Denoiser, Photographs, encode_all, train_unet
from dbnb.miniature.train import PHOTOGRAPHS, finish, recipe_of, restore, stage_record


def ship(base: Path, model: Denoiser, target: Path, recipe: dict) -> None:
    """Write a copy of `base` with another UNet."""
    temporary = target.with_name(f".{target.name}")
    shutil.copytree(base, temporary)
    model.unet.half().save_pretrained(temporary / "unet")
    finish(temporary, target, recipe_of(base) | {"further": recipe})


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start_from", type=Path, default=path(), help="the base whose UNet is trained")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/further"))
    parser.add_argument("--photographs", type=int, default=PHOTOGRAPHS)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many minutes; a later run goes on")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--note", default="", help="what the card says besides of this training")
    parser.add_argument("--ship", type=Path, help="write the base, as far as it is trained, to this folder")
    args = parser.parse_args(argv)
    folder, base = args.output_dir, args.start_from
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = AutoencoderKL.from_pretrained(base / "vae").float().eval().to(device)
    data = Photographs(args.photographs, folder / "data", vae.config.sample_size)
    unet = UNet2DConditionModel.from_pretrained(base / "unet").float()
    model = Denoiser(unet, CLIPTextModel.from_pretrained(base / "text_encoder"))
    stage = Stage(
        name="unet",
        steps=args.steps,
        batch_size=args.batch_size,
        folder=folder,
        made_from={"seed": args.seed, "batch_size": args.batch_size, "photographs": args.photographs},
        seed=args.seed,
        lr=args.learning_rate,
        minutes=args.minutes,
        mixed_precision=args.mixed_precision,
        device=device,
    )
    latents = encode_all(vae, data.images, folder / "latents.pt")
    train_unet(data, vae, latents, model, stage, words_too=False)
    if args.ship is not None:
        record = stage_record("unet", args.batch_size, folder)
        recipe = {"photographs": args.photographs, "seed": args.seed, "stages": {"unet": record}, "note": args.note}
        ship(base, restore("unet", model, folder), args.ship, recipe)


if __name__ == "__main__":
    main()
