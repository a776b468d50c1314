"""Grow a base to twice the side: `python -m dbnb.miniature.grow --start_from runs/small --ship runs/large`.

`runs/small` is what `python -m dbnb.miniature.train --ship runs/small` writes.

128-pixel pictures from latents of the same 16 x 16, with twice the channels. The first half of them is taught to stay
what it was, the latents of the picture at half its side; the other half holds what those pictures lack. So the UNet and
the text encoder go on from where their training has come, and learn the new channels besides (progressive growing,
Karras et al., 2018). Resumable as `dbnb.miniature.train` is.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from transformers import CLIPTextModel

from dbnb.miniature import design
from dbnb.miniature.fit import Stage, fit, generator
from dbnb.miniature.stages import (
    Denoiser,
    Photographs,
    difference,
    latents_of,
    there_and_back,
    to_tensor,
    train_unet,
    train_words,
)
from dbnb.miniature.train import PHOTOGRAPHS, finish, recipe_of, restore, save_mendable, stage_record

SIZE = 2 * design.RESOLUTION
STAGES = ("vae", "unet", "words")
_TIE = 0.5  # weight of the error by which the first channels miss the small autoencoder's latents


@torch.no_grad()
def grow_vae(small: AutoencoderKL) -> AutoencoderKL:
    """`design.large_vae` with all of the small autoencoder that fits it: its blocks, and the way to its own channels.

    The blocks of the largest pictures are new, so what it encodes is near the small one's latents only once trained.
    """
    large = design.large_vae()
    old, new, kept = small.state_dict(), large.state_dict(), small.config.latent_channels
    channels = large.config.latent_channels
    for name, value in old.items():
        parts = name.split(".")
        if parts[1] == "down_blocks":  # counted from the largest pictures on
            parts[2] = str(int(parts[2]) + 1)
        elif parts[:2] in (["encoder", "conv_in"], ["decoder", "conv_norm_out"], ["decoder", "conv_out"]):
            continue  # at the side of the picture
        target = new[".".join(parts)]
        if target.shape == value.shape:
            target.copy_(value)
    rows = [*range(kept), *range(channels, channels + kept)]  # means and log variances
    for part in ("weight", "bias"):
        new[f"encoder.conv_out.{part}"][rows] = old[f"encoder.conv_out.{part}"]
    new["encoder.conv_out.bias"][channels + kept :] = -3.0  # little noise to begin with
    for name, own in (("quant_conv", rows), ("post_quant_conv", list(range(kept)))):
        weight, bias = new[f"{name}.weight"], new[f"{name}.bias"]
        weight.copy_(torch.eye(len(weight))[:, :, None, None])
        bias.zero_()
        weight[torch.tensor(own)[:, None], torch.tensor(own)] = old[f"{name}.weight"]
        bias[own] = old[f"{name}.bias"]
    new["decoder.conv_in.weight"][:, :kept] = old["decoder.conv_in.weight"]
    return large


@torch.no_grad()
def widen_unet(unet: UNet2DConditionModel, channels: int) -> UNet2DConditionModel:
    """Make `unet` read and predict `channels` latent channels, in place.

    Where the new ones are 0 it predicts for the others what it did; for the new ones it predicts 0 until it is trained.
    """
    kept, old_in, old_out = unet.config.in_channels, unet.conv_in, unet.conv_out
    unet.conv_in = nn.Conv2d(channels, old_in.out_channels, 3, padding=1)
    unet.conv_in.weight[:, :kept] = old_in.weight
    unet.conv_in.bias.copy_(old_in.bias)
    unet.conv_out = nn.Conv2d(old_out.in_channels, channels, 3, padding=1)
    for new, old in zip(unet.conv_out.parameters(), old_out.parameters(), strict=True):
        new.zero_()
        new[:kept] = old
    unet.register_to_config(in_channels=channels, out_channels=channels)
    return unet


def train_grown_vae(data: Photographs, small: AutoencoderKL, stage: Stage):
    """The large autoencoder, as `stages.train_vae` trains the small one, its first channels tied to the small one's."""
    vae = grow_vae(small).to(memory_format=torch.channels_last)
    small = small.to(stage.device).requires_grad_(False).eval()
    kept = small.config.latent_channels

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        rng = generator(stage.seed, step)
        pictures = to_tensor(data.images[data.batch(stage.batch_size, rng)]).to(stage.device)
        with torch.autocast(stage.device, torch.bfloat16, enabled=stage.mixed_precision == "bf16"):
            with torch.no_grad():
                wanted = small.encode(F.avg_pool2d(pictures, 2)).latent_dist.mean.float()
            posterior = DiagonalGaussianDistribution(vae.encode(pictures).latent_dist.parameters.float())
            decoded = vae.decode(posterior.sample(rng)).sample.float()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
        tie = F.mse_loss(posterior.mean[:, :kept], wanted)
        loss = difference(decoded, pictures) + 3e-4 * kl + _TIE * tie
        return dict(loss=loss, mse=F.mse_loss(decoded, pictures), kl=kl, tie=tie)

    return vae, fit(stage, vae, loss_of_step, weight_decay=0.0, draw=lambda: there_and_back(vae, data))


def ship(base: Path, vae: AutoencoderKL, model: Denoiser, folder: Path, target: Path, recipe: dict) -> None:
    """Write a copy of `base` in which autoencoder, UNet and text encoder are the grown ones.

    The encoders that measure it stay, and read its pictures at half their side.
    """
    temporary = target.with_name(f".{target.name}")
    shutil.copytree(base, temporary)
    vae.half().save_pretrained(temporary / "vae")
    model.unet.half().save_pretrained(temporary / "unet")
    if (folder / "words.pt").exists():
        save_mendable("words", folder, temporary)
    else:
        model.text_encoder.save_pretrained(temporary / "text_encoder")
    finish(temporary, target, recipe_of(base) | {"grown": recipe})


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start_from", type=Path, required=True, help="the base that is grown, of 64 pixels")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/grown"))
    parser.add_argument("--photographs", type=int, default=PHOTOGRAPHS)
    parser.add_argument("--steps", type=int, nargs=len(STAGES), default=(4000, 12000, 4000), metavar=STAGES)
    parser.add_argument("--batch_sizes", type=int, nargs=len(STAGES), default=(8, 24, 96), metavar=STAGES)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop the stage that runs after so many minutes")
    parser.add_argument("--stages", choices=STAGES, nargs="+", default=STAGES, help="the stages to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--ship", type=Path, help="write the grown base to this folder")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)  # the new parts' first weights
    folder, base = args.output_dir, args.start_from
    steps, batch = (dict(zip(STAGES, numbers, strict=True)) for numbers in (args.steps, args.batch_sizes))
    data = Photographs(args.photographs, folder / "data", SIZE)

    def stage(name: str, lr: float) -> Stage:
        return Stage(
            name=name,
            steps=steps[name],
            batch_size=batch[name],
            folder=folder,
            made_from={"seed": args.seed, "batch_size": batch[name], "photographs": args.photographs},
            seed=args.seed,
            lr=lr,
            minutes=args.minutes,
            mixed_precision=args.mixed_precision,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )

    if "vae" in args.stages:
        train_grown_vae(data, AutoencoderKL.from_pretrained(base / "vae").float(), stage("vae", 1e-3))
    vae, latents = latents_of(data, restore("vae", design.large_vae(), folder), folder)
    unet = widen_unet(UNet2DConditionModel.from_pretrained(base / "unet").float(), vae.config.latent_channels)
    model = Denoiser(unet, CLIPTextModel.from_pretrained(base / "text_encoder"))
    if "unet" in args.stages:
        train_unet(data, vae, latents, model, stage("unet", 4e-4))
    restore("unet", model, folder)
    if "words" in args.stages:
        train_words(data, latents, model.unet, model.text_encoder, stage("words", 5e-4))
    if args.ship is not None:
        stages = {name: stage_record(name, batch[name], folder) for name in args.stages}
        recipe = {"photographs": args.photographs, "seed": args.seed, "stages": stages}
        ship(base, vae, restore("unet", model, folder), folder, args.ship, recipe)


if __name__ == "__main__":
    main()
