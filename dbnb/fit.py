"""Is a picture in the base's world? What a base cannot draw well, no training of a few hundred steps will teach it.

Two looks before training: how much of a picture the autoencoder gives back (PSNR), and how well the base's own denoiser
knows it (its loss, under the class prompt). Both are compared with class images, which the base drew itself. Built in
notebook 01.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dbnb.dataset import DreamBoothDataset, collate_fn, posterior_parameters
from dbnb.models import Components, upcast
from dbnb.tables import Table, printable
from dbnb.training import precompute_embeds, training_step

DRAWS = 4  # noises and timesteps for each picture, the same ones for all
CLASS_IMAGES = 16  # as many as are looked at
FEWEST = 8  # with fewer, their spread is hardly known
# In standard deviations of the class images. Measured on the miniature against eight sets of them: renders that it has
# never seen, and learns well, lie at 7 and below; photographs and noise, which end as smears, at 8 and far above.
FAR = 8.0
_ROUNDING = (2 / 255) ** 2 / 12  # mean squared error of rounding to 8 bits: no picture comes back better


@dataclass(frozen=True)
class PictureFit:
    """One picture: `psnr` in dB, None without an autoencoder; `distance` in standard deviations of the class images."""

    name: str
    loss: float
    psnr: float | None
    distance: float


@dataclass(frozen=True, repr=False)
class Fit:
    """Every photograph, beside the class images' own losses and PSNRs. Shows itself as a table."""

    pictures: tuple[PictureFit, ...]
    class_losses: tuple[float, ...]
    class_psnrs: tuple[float, ...]  # empty without an autoencoder

    def outside(self) -> list[PictureFit]:
        """The pictures far outside of what the base draws."""
        return [picture for picture in self.pictures if picture.distance > FAR]

    def table(self) -> Table:
        """One row a picture, and one for the class images."""
        rows = Table(
            {
                "picture": picture.name,
                "denoising loss": f"{picture.loss:.3f}",
                "PSNR": "" if picture.psnr is None else f"{picture.psnr:.1f} dB",
                "distance": f"{picture.distance:.1f}",
                "far outside": "yes" if picture in self.outside() else "",
            }
            for picture in self.pictures
        )
        rows.append(
            {
                "picture": "(class images, mean)",
                "denoising loss": f"{np.exp(np.log(self.class_losses).mean()):.3f}",
                "PSNR": f"{np.mean(self.class_psnrs):.1f} dB" if self.class_psnrs else "",
                "distance": "",
                "far outside": "",
            }
        )
        return rows

    def remark(self) -> str:
        """One sentence that names the pictures far outside and what to do; "" where there are none."""
        if not (outside := self.outside()):
            return ""
        names = ", ".join(printable(picture.name) for picture in outside)
        return (
            f"{names}: far outside of what this base draws, so that a training is likely to end in smears; take a base "
            "that knows such pictures (--base sd15, sdxl ...), or for the miniature a toy of your own (python -m "
            "dbnb.toybox)."
        )

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


@torch.no_grad()
def autoencoder_psnr(components: Components, pixels: torch.Tensor) -> float:
    """(3, H, W) in [-1, 1] -> peak signal-to-noise ratio, in dB, of what the autoencoder gives back.

    10 log10(2^2 / mean squared error): -1 and 1 are 2 apart. The picture is moved by half a latent first: one that the
    same autoencoder has painted would otherwise come back nearly whole, and no photograph would compare with it.
    """
    vae, shift = components.vae, components.downsampling // 2
    pixels = pixels.roll((shift, shift), dims=(1, 2))
    with upcast(vae):
        latent = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.mode()
        back = vae.decode(latent).sample[0].float().clamp(-1, 1).cpu()
    error = (back - pixels).square().mean().item()
    return 10 * math.log10(4 / max(error, _ROUNDING))


@torch.no_grad()
def denoising_losses(
    components: Components, pictures: Sequence[torch.Tensor], prompt: str, *, batch_size: int = DRAWS
) -> list[float]:
    """(3, H, W) in [-1, 1] each -> the base's own loss on each, under one prompt, at the same noises."""
    embeds, losses = precompute_embeds(components, [prompt]), []
    for pixels in pictures:
        seen = {"instance_pixels": pixels}
        if components.vae is not None:
            seen = {"instance_latents": posterior_parameters(components.vae, pixels)}  # once for all draws
        samples = [{"n": n, "instance_prompt": prompt} | seen for n in range(DRAWS)]
        total = 0.0
        for start in range(0, DRAWS, batch_size):
            chunk = samples[start : start + batch_size]
            record = training_step(components, collate_fn(chunk), seed=0, prompt_embeds=embeds)
            total += len(chunk) * record.loss.item()
        losses.append(total / DRAWS)
    return losses


def base_fit(
    components: Components,
    paths: Sequence[Path],
    class_paths: Sequence[Path],
    class_prompt: str,
    *,
    resolution: int,
    batch_size: int = DRAWS,
) -> Fit:
    """Look at each photograph as training would see it, beside class images that the base drew.

    The distance is that of (log loss, PSNR) from the class images' mean, in their standard deviations, towards a higher
    loss and a lower PSNR. Look before adapters are trained. Raises ValueError with fewer than `FEWEST` class images.
    """
    if len(class_paths) < FEWEST:
        raise ValueError(f"{len(class_paths)} class images tell too little of what the base draws: give {FEWEST}.")
    dataset = DreamBoothDataset(paths, class_prompt, class_paths=class_paths[:CLASS_IMAGES], size=resolution)
    photographs, drawn = (
        [dataset.pixels(half, index, flip=False) for index in range(len(dataset.images[half]))]
        for half in dataset.halves
    )
    losses, class_losses = (
        denoising_losses(components, pictures, class_prompt, batch_size=batch_size) for pictures in (photographs, drawn)
    )
    squares = _beyond(np.log(losses), np.log(class_losses)) ** 2
    psnrs, class_psnrs = [None] * len(photographs), []
    if components.vae is not None:
        psnrs, class_psnrs = (
            [autoencoder_psnr(components, pixels) for pixels in some] for some in (photographs, drawn)
        )
        squares += _beyond(-np.array(psnrs), -np.array(class_psnrs)) ** 2
    found = zip(paths, losses, psnrs, np.sqrt(squares), strict=True)
    pictures = [PictureFit(Path(path).name, loss, psnr, float(distance)) for path, loss, psnr, distance in found]
    return Fit(tuple(pictures), tuple(class_losses), tuple(class_psnrs))


def _beyond(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """How far each value is above the mean of the known ones, in their standard deviations; 0 for those below."""
    return np.maximum(values - known.mean(), 0) / max(known.std(ddof=1), 1e-6)
