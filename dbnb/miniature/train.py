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
import copy
import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import EMAModel, compute_snr
from diffusers.utils import make_image_grid
from PIL import Image
from torch import nn
from torch.optim.swa_utils import update_bn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, ResNetForImageClassification, ResNetModel

from dbnb import toybox
from dbnb.miniature import design
from dbnb.miniature.data import (
    ALIKE,
    ATTRIBUTES,
    CHUNK,
    COLOR_NAMES,
    SHOTS,
    caption_of,
    look_alikes,
    names_of,
    photographs,
)
from dbnb.prior import fast_solver
from dbnb.toybox.captions import IDENTIFIERS, article_for, content

STAGES = ("vae", "clip", "identity", "judge", "decoder", "unet", "words")
# What the two stages give that a shipped base can be mended in alone, and where it lies in the base.
MENDABLE = {"identity": "identity", "words": "text_encoder"}
PHOTOGRAPHS = 48000
CODE = 32  # directions of the text encoder's hidden states that carry an identifier
UNET_EVERY = 6  # steps of the stage "words"; the others look at the text encoder alone
LOOK_ALIKES = 5000  # toys, each with ALIKE - 1 others
_LATENT_SAMPLE = 2000  # photographs that tell the latents' mean and deviation


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def generator(seed: int, step: int) -> torch.Generator:
    """The one source of a step's randomness."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def fit(
    name: str,
    models: nn.Module,
    loss_of_step: Callable[[int], dict[str, torch.Tensor]],
    *,
    steps: int,
    lr: float,
    folder: Path,
    made_from: dict[str, int],
    groups: list[dict] | None = None,
    weight_decay: float = 1e-2,
    ema_decay: float = 0.999,
    decay_share: float = 0.3,
    minutes: float = 1e9,
    minutes_between_checkpoints: float = 3.0,
    draw: Callable[[], Image.Image] | None = None,
    steps_between_drawings: int = 1000,
) -> bool:
    """Run one stage to `steps` or until `minutes` are over; True when it is complete.

    AdamW, warm-up over 200 steps, constant rate, linear decay over the last `decay_share`. Afterwards `models` holds
    the moving average of the weights, with which `draw` paints the pictures in samples/. Raises ValueError where the
    checkpoint in `folder` was `made_from` something else (seed, photographs, batch size).
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        groups or models.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True
    )
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    parameters = list(models.parameters())
    ema = EMAModel(parameters, decay=ema_decay, use_ema_warmup=True, power=0.75)
    path, log = folder / f"{name}.pt", folder / f"{name}.jsonl"
    step = warm_up_from = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["made_from"] != made_from:
            raise ValueError(
                f"{path} was made from {state['made_from']}, not {made_from}: take those, or another --output_dir."
            )
        models.load_state_dict(state["models"])
        step, warm_up_from = state["step"], state["warm_up_from"]
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
            ema.load_state_dict(state["ema"])
        else:
            ema = EMAModel(parameters, decay=ema_decay, use_ema_warmup=True, power=0.75)
            ema.optimization_step = step
    started = saved = time.monotonic()

    def save() -> None:
        temporary = path.with_suffix(".tmp")
        state = dict(models=models.state_dict(), optimizer=optimizer.state_dict(), ema=ema.state_dict(), step=step)
        torch.save(state | dict(warm_up_from=warm_up_from, made_from=made_from), temporary)
        os.replace(temporary, path)

    def show() -> None:
        ema.store(parameters)
        ema.copy_to(parameters)
        models.eval()
        (folder / "samples").mkdir(exist_ok=True)
        draw().save(folder / "samples" / f"{name}-{step:06d}.png")
        ema.restore(parameters)
        models.train()

    models.train()
    sums: dict[str, float] = {}
    summed = 0
    while step < steps and time.monotonic() - started < 60 * minutes:
        rate = min(1.0, (step + 1 - warm_up_from) / 200, (steps - step) / (decay_share * steps))
        for group, base in zip(optimizer.param_groups, base_lrs, strict=True):
            group["lr"] = base * rate
        losses = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        step += 1
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        summed += 1
        if step % 50 == 0 or step == steps:
            line = dict(step=step, minutes=round((time.monotonic() - started) / 60, 2))
            line |= {key: total / summed for key, total in sums.items()}
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(name, json.dumps(line), flush=True)
            sums, summed = {}, 0
        if draw is not None and step % steps_between_drawings == 0:
            show()
        if time.monotonic() - saved > 60 * minutes_between_checkpoints:
            save()
            saved = time.monotonic()
    save()
    ema.copy_to(parameters)
    models.eval()
    return step >= steps


class Photographs:
    """The training set in memory, pictures and labels, the shots of a toy side by side.

    First `count` photographs of toys in named colours, then a third as many of wild ones.
    """

    def __init__(self, count: int, folder: Path) -> None:
        chunks = [
            photographs(split, min(CHUNK, total - start), folder, start=start)
            for split, total in (("train", count), ("wild", count // 3 // SHOTS * SHOTS))
            for start in range(0, total, CHUNK)
        ]
        self.named = count
        self.images = np.concatenate([images for images, _ in chunks])
        self.labels = np.concatenate([labels for _, labels in chunks])

    def batch(self, size: int, rng: torch.Generator, *, named: bool = False) -> np.ndarray:
        """(size,) numbers of photographs; if `named`, of toys whose colours have names."""
        return torch.randint(self.named if named else len(self.images), (size,), generator=rng).numpy()

    def captions(self, indices: np.ndarray, rng: torch.Generator) -> list[str]:
        """One fresh caption for each photograph."""
        draw = np.random.default_rng(int(torch.randint(2**62, (1,), generator=rng)))
        return [caption_of(self.labels[i], draw) for i in indices]


def tokenize(words, captions: list[str]) -> torch.Tensor:
    """Captions -> (B, 24) ids."""
    return words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def _difference(decoded: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """L1 + 2 MSE."""
    return F.l1_loss(decoded, pictures) + 2.0 * F.mse_loss(decoded, pictures)


def train_vae(data: Photographs, seed: int, batch_size: int, **options):
    """Autoencoder: L1 + 2 MSE, and a KL term just strong enough to keep latents smooth."""
    vae = design.vae().to(memory_format=torch.channels_last)  # a quarter faster on a CPU

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        rng = generator(seed, step)
        pictures = to_tensor(data.images[data.batch(batch_size, rng)])
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample(rng)).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
        loss = _difference(decoded, pictures) + 3e-4 * kl
        return dict(loss=loss, mse=F.mse_loss(decoded, pictures), kl=kl)

    return vae, fit("vae", vae, loss_of_step, weight_decay=0.0, draw=lambda: _there_and_back(vae, data), **options)


@torch.no_grad()
def _there_and_back(vae, data: Photographs) -> Image.Image:
    """Photographs above what the autoencoder makes of them: eight in named colours, eight in any."""
    images = data.images[[*range(8), *range(-8, 0)]]
    decoded = vae.decode(vae.encode(to_tensor(images)).latent_dist.mode()).sample
    pairs = [Image.fromarray(image) for image in images] + VaeImageProcessor().postprocess(decoded)
    return make_image_grid(pairs, rows=2, cols=len(images))


def decoder_of(vae) -> nn.ModuleDict:
    """The half of an autoencoder that makes pictures of latents, under the names that it has there."""
    return nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})


def train_decoder(data: Photographs, vae, latents: torch.Tensor, seed: int, batch_size: int, **options):
    """The decoder alone, further, on kept latents, which stay what the UNet learns.

    As Stable Diffusion's own autoencoder was sharpened after its UNet was trained (stabilityai/sd-vae-ft-mse).
    """
    decoder = decoder_of(vae).to(memory_format=torch.channels_last)

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        rng = generator(seed, step)
        indices = data.batch(batch_size, rng)
        pictures = to_tensor(data.images[indices])
        posterior = DiagonalGaussianDistribution(latents[torch.from_numpy(indices)].float())
        decoded = vae.decode(posterior.sample(rng)).sample
        return dict(loss=_difference(decoded, pictures), mse=F.mse_loss(decoded, pictures))

    return fit("decoder", decoder, loss_of_step, weight_decay=0.0, draw=lambda: _there_and_back(vae, data), **options)


def train_clip(data: Photographs, words, seed: int, batch_size: int, **options):
    """Contrastive text and image encoders (Radford et al., 2021), on toys that captions can tell apart."""
    clip = design.clip(words)

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        rng = generator(seed, step)
        indices = data.batch(batch_size, rng, named=True)
        out = clip(
            input_ids=tokenize(words, data.captions(indices, rng)), pixel_values=to_tensor(data.images[indices]),
            return_loss=True,
        )  # fmt: skip
        hits = (out.logits_per_text.argmax(1) == torch.arange(batch_size)).float().mean()
        return dict(loss=out.loss, hits=hits)

    return clip, fit("clip", clip, loss_of_step, **options)


def _jitter(pictures: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Blur some pictures and add noise, so that the encoders judge drawings, which are softer than renders, fairly."""
    softer = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2, mode="bilinear", align_corners=False)
    amount = torch.rand(len(pictures), 1, 1, 1, generator=rng)
    mixed = pictures + amount * (softer - pictures)
    return mixed + 0.08 * torch.rand(len(pictures), 1, 1, 1, generator=rng) * torch.randn(pictures.shape, generator=rng)


def _vary(pictures: torch.Tensor, group: int, rng: torch.Generator) -> torch.Tensor:
    """Move each picture by up to 3 pixels, and turn the hue of all `group` pictures of some groups alike.

    So a group of look-alikes is another one each time it is seen: what differs between its toys stays.
    """
    count = len(pictures) // group
    angle = (torch.rand(count, generator=rng) < 0.7) * 2.0 * math.pi * torch.rand(count, generator=rng)
    # A turn about the grey axis (Rodrigues).
    axis, eye = torch.full((3, 3), 1.0 / 3.0), torch.eye(3)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / 3.0**0.5
    cos, sin = (f(angle).view(-1, 1, 1) for f in (torch.cos, torch.sin))
    turns = (cos * eye + sin * cross + (1.0 - cos) * axis).repeat_interleave(group, 0)
    turned = torch.einsum("bij,bjhw->bihw", turns, pictures).clamp(-1.0, 1.0)
    padded, side = F.pad(turned, (3, 3, 3, 3), mode="replicate"), pictures.shape[-1]
    shifts = torch.randint(7, (len(pictures), 2), generator=rng).tolist()
    return torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(padded, shifts, strict=True)])


def read_look_alikes(folder: Path, count: int = LOOK_ALIKES) -> tuple[np.ndarray, np.ndarray]:
    """`look_alikes` of `count` toys, half in named colours and half in any."""
    part = min(count // 2, 250)
    chunks = [
        look_alikes(split, part, folder, start=start)
        for split in ("train", "wild")
        for start in range(0, count // 2, part)
    ]
    return tuple(np.concatenate(arrays) for arrays in zip(*chunks, strict=True))


def train_identity(groups: np.ndarray, alike: np.ndarray, seed: int, batch_size: int, **options):
    """Identity encoder: InfoNCE (van den Oord et al., 2018) between two shots of a toy, and a scale for look-alikes.

    Among the toys are groups of look-alikes, each of which differs by one thing (`alike.DIFFERENCES`). Their
    similarities are drawn to `alike.likeness`, so that a hue or a smeared pattern counts for what an eye sees in it.
    All other toys are negatives. `batch_size` counts toys, look-alikes among them.
    """
    encoder = design.identity()

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        rng = generator(seed, step)
        chosen = torch.randperm(len(groups), generator=rng)[: batch_size // ALIKE].numpy()
        toys = groups[chosen].reshape(-1, *groups.shape[2:])  # a look-alike is a toy like any other
        pictures = _vary(to_tensor(toys.reshape(-1, *toys.shape[2:])), ALIKE * SHOTS, rng)
        features = F.normalize(encoder(_jitter(pictures, rng)).pooler_output.flatten(1), dim=1)
        first, second = features[0::SHOTS], features[1::SHOTS]
        similarity = first @ second.T
        target = torch.arange(len(toys))
        contrast = 0.5 * (F.cross_entropy(similarity / 0.1, target) + F.cross_entropy(similarity.T / 0.1, target))
        of_group = torch.block_diag(*torch.ones(len(chosen), ALIKE, ALIKE)).bool()
        scale = F.mse_loss(similarity[of_group], torch.from_numpy(alike[chosen]).flatten())
        hits = (similarity.argmax(1) == target).float().mean()
        return dict(loss=contrast + 4.0 * scale, contrast=contrast, scale=scale, hits=hits)

    return encoder, fit("identity", encoder, loss_of_step, **options)


def train_judge(data: Photographs, seed: int, batch_size: int, **options):
    """Judge: cross-entropy for each attribute."""
    judge = design.judge()
    sizes = [len(values) for values in ATTRIBUTES.values()]

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        rng = generator(seed, step)
        indices = data.batch(batch_size, rng, named=True)
        logits = judge(_jitter(to_tensor(data.images[indices]), rng)).logits.split(sizes, dim=1)
        labels = torch.from_numpy(data.labels[indices]).long()
        losses = {key: F.cross_entropy(logits[i], labels[:, i]) for i, key in enumerate(ATTRIBUTES)}
        return dict(loss=sum(losses.values()), **losses)

    return judge, fit("judge", judge, loss_of_step, **options)


@torch.no_grad()
def normalize_latents(vae, pictures: torch.Tensor) -> None:
    """Fold the latents' mean and deviation into the quant convolutions, so that `scaling_factor` = 1 is right.

    A latent z becomes (z - mean) / std per channel; `post_quant_conv` undoes it and the decoder sees what it knows.
    """
    means = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(100)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    n = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:n] /= std[:, None, None, None]
    quant.bias[:n] = (quant.bias[:n] - mean) / std
    quant.bias[n:] -= 2.0 * std.log()  # the posterior's log variance scales along
    post.bias += post.weight.flatten(1) @ mean
    post.weight *= std[None, :, None, None]


@torch.no_grad()
def encode_all(vae, images: np.ndarray, path: Path) -> torch.Tensor:
    """(N, 64, 64, 3) uint8 -> (N, 12, 16, 16) float16, mean and log variance of each latent, kept in a file."""
    weights = hashlib.sha256(b"".join(p.numpy().tobytes() for p in vae.state_dict().values())).hexdigest()
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if kept["vae"] == weights and len(kept["latents"]) == len(images):
            return kept["latents"]
    parts = [
        vae.encode(to_tensor(images[i : i + 100])).latent_dist.parameters.half() for i in range(0, len(images), 100)
    ]
    latents = torch.cat(parts)
    temporary = path.with_suffix(".tmp")
    torch.save({"vae": weights, "latents": latents}, temporary)
    os.replace(temporary, path)
    return latents


def latents_of(data: Photographs, vae, folder: Path) -> tuple[nn.Module, torch.Tensor]:
    """The autoencoder with its latents normalised, and those of all photographs."""
    vae = copy.deepcopy(vae)
    normalize_latents(vae, to_tensor(data.images[:_LATENT_SAMPLE]))
    return vae, encode_all(vae, data.images, folder / "latents.pt")


class Denoiser(nn.Module):
    """UNet and text encoder, trained together."""

    def __init__(self, unet, text_encoder) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder


def v_weights(snr: torch.Tensor) -> torch.Tensor:
    """(B,) signal-to-noise ratios -> weights of the errors of v.

    Counted on the error of the picture they are min(SNR + 1, 5): the SNR + 1 of v-prediction, cut off where there is
    little noise, as min-SNR does it (Hang et al., 2023).
    """
    return (snr + 1.0).clamp(max=5.0) / (snr + 1.0)


def as_pipeline(vae, words, model: Denoiser, noise_schedule) -> StableDiffusionPipeline:
    """The parts as they are now, to draw with."""
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=model.text_encoder, tokenizer=words, unet=model.unet, safety_checker=None,
        scheduler=fast_solver(noise_schedule), feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def train_unet(
    data: Photographs, vae, latents: torch.Tensor, words, clip, seed: int, batch_size: int, lr: float,
    mixed_precision: str = "no", noise_schedule: DDPMScheduler | None = None,
    weigh: Callable[[torch.Tensor], torch.Tensor] = v_weights, unet: UNet2DConditionModel | None = None, **options
):  # fmt: skip
    """Denoising; one caption in ten is empty, for guidance. `weigh` gives the errors' weights by their SNR.

    `unet` and `noise_schedule` are the design's where they are not given.
    `mixed_precision` "bf16" pays (a quarter more samples a second) where the processor multiplies bfloat16 itself.
    """
    noise_schedule = noise_schedule or design.scheduler()
    text_encoder = design.text_encoder(words)
    text_encoder.load_state_dict(
        {key.removeprefix("text_model."): v for key, v in clip.text_model.state_dict().items()}
    )
    model = Denoiser(unet or design.unet(), text_encoder).to(memory_format=torch.channels_last)
    # Plain products: on a CPU torch's fused attention is slow where heads are as narrow as here, above all in bfloat16.
    model.unet.set_attn_processor(AttnProcessor())

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        rng = generator(seed, step)
        indices = data.batch(batch_size, rng)
        empty = torch.rand(batch_size, generator=rng) < 0.1
        captions = ["" if e else c for c, e in zip(data.captions(indices, rng), empty, strict=True)]
        clean = DiagonalGaussianDistribution(latents[torch.from_numpy(indices)].float()).sample(rng)
        noise = torch.randn(clean.shape, generator=rng)
        # One timestep from each of B equal ranges: the batch's loss varies less (Kingma et al., 2021, appendix I).
        strata = (torch.arange(batch_size) + torch.rand(batch_size, generator=rng)) / batch_size
        t = (strata * noise_schedule.config.num_train_timesteps).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
            hidden = model.text_encoder(tokenize(words, captions)).last_hidden_state
            noisy = noise_schedule.add_noise(clean, noise, t)
            predicted = model.unet(noisy, t, encoder_hidden_states=hidden).sample.float()
        of_noise = noise_schedule.config.prediction_type == "epsilon"
        target = noise if of_noise else noise_schedule.get_velocity(clean, noise, t)
        mse = (predicted - target).square().mean((1, 2, 3))
        return dict(loss=(mse * weigh(compute_snr(noise_schedule, t))).mean(), mse=mse.mean())

    groups = [
        dict(params=list(model.unet.parameters()), lr=lr),
        dict(params=list(model.text_encoder.parameters()), lr=0.3 * lr),
    ]

    @torch.no_grad()
    def draw() -> Image.Image:
        pipeline = as_pipeline(vae, words, model, noise_schedule)
        images: list[Image.Image] = []
        for row, kind in enumerate(toybox.KINDS):
            colors = [COLOR_NAMES[(row + column) % len(COLOR_NAMES)] for column in range(len(toybox.SCENES))]
            prompts = [
                f"a photo of {article_for(color)} {color} {kind} {place}"
                for color, place in zip(colors, toybox.SCENES.values(), strict=True)
            ]
            images += pipeline(prompts, num_inference_steps=20, guidance_scale=2.5, generator=generator(seed, 0)).images
        return make_image_grid(images, rows=len(toybox.KINDS), cols=len(toybox.SCENES))

    done = fit("unet", model, loss_of_step, groups=groups, lr=lr, ema_decay=0.9998, draw=draw, **options)
    return model, done


def draw_vectors(table: nn.Embedding, words, rng: torch.Generator, *, most_alike: float = 1.0) -> None:
    """Give each identifier a vector of its own in the token embedding, as long as the words' and apart from them.

    A fifth of it is a direction that all identifiers share, by which the text encoder can tell a name from a word; the
    rest is random, drawn again until the cosine with every other token's vector is below `most_alike`.
    """
    with torch.no_grad():
        vectors = table.weight
        known = [words.convert_tokens_to_ids(f"{name}</w>") for name in (*toybox.KINDS, *COLOR_NAMES)]
        length = vectors[known].norm(dim=1).mean()
        shared = F.normalize(torch.randn(vectors.shape[1], generator=generator(0, -2)), dim=0)
        for identifier in words.convert_tokens_to_ids([f"{name}</w>" for name in IDENTIFIERS]):
            others = F.normalize(vectors[[i for i in range(len(vectors)) if i != identifier]], dim=1)
            while True:
                own = F.normalize(torch.randn(vectors.shape[1], generator=rng), dim=0)
                direction = F.normalize(0.2**0.5 * shared + 0.8**0.5 * own, dim=0)
                if (others @ direction).abs().max() < most_alike:
                    break
            vectors[identifier] = length * direction


def _pairs(data: Photographs, indices: np.ndarray, rng: torch.Generator) -> tuple[list[str], list[str], list[str]]:
    """For each photograph: a plain sentence, the same content in another sentence, and the identifier in that one.

    Half of the other sentences have an identifier, else it is "". A tenth of both are empty, for guidance; in another
    tenth the other sentence is plain as well, so that what is known stays.
    """
    draw = np.random.default_rng(int(torch.randint(2**62, (1,), generator=rng)))
    plain, free, identifiers = [], [], []
    for index in indices:
        said, kept = content(**names_of(data.labels[index]), rng=draw), draw.random()
        identifier = str(draw.choice(IDENTIFIERS)) if draw.random() < 0.5 and kept >= 0.1 else ""
        place = int(draw.integers(len(said.adjectives) + 1))
        adjectives = [*said.adjectives[:place], *([identifier] if identifier else []), *said.adjectives[place:]]
        other = dataclasses.replace(said, adjectives=tuple(adjectives))
        plain.append("" if kept < 0.1 else said.plainly())
        free.append("" if kept < 0.1 else other.plainly() if kept < 0.2 else other.freely(draw))
        identifiers.append(identifier)
    return plain, free, identifiers


def unheard_directions(unet, count: int) -> torch.Tensor:
    """(D, count): orthonormal directions of the text's hidden states that the UNet's cross-attention hears least."""
    projections = [
        layer.weight.float() for name, layer in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))
    ]
    # Each layer counts alike, however wide its weights are.
    stacked = torch.cat([weight / weight.norm() for weight in projections])
    return torch.linalg.svd(stacked, full_matrices=True).Vh[-count:].T


def train_words(
    data: Photographs, latents: torch.Tensor, unet, text_encoder, words, seed: int, batch_size: int, **options
):  # fmt: skip
    """The text encoder alone, further: the same content means the same in any sentence, and a name is heard in it.

    The UNet is frozen, and what it predicts for a plain sentence, encoded as before this stage, is the target for any
    other (knowledge distillation, Hinton et al., 2015). An identifier is a new random vector at every step, so that any
    vector is treated alike: it must not change the prediction, yet the noun and all that follows carry a code of it, in
    directions that this UNet does not hear and an adapter can. Without that code an unknown word is lost after its own
    position, and subject and class look the same to whatever is trained.
    """
    teacher, schedule = copy.deepcopy(text_encoder), design.scheduler()
    for frozen in (teacher, unet):
        frozen.requires_grad_(False).eval()
    unet.set_attn_processor(AttnProcessor())
    table = text_encoder.get_input_embeddings()
    nouns = torch.tensor([words.convert_tokens_to_ids(f"{name}</w>") for name in toybox.KINDS])
    numbers = {name: words.convert_tokens_to_ids(f"{name}</w>") for name in IDENTIFIERS}
    unheard = unheard_directions(unet, CODE)
    to_code = torch.randn(table.embedding_dim, CODE, generator=generator(seed, -1))

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        rng = generator(seed, step)
        draw_vectors(table, words, rng)
        indices = data.batch(batch_size, rng)
        plain, free, identifiers = _pairs(data, indices, rng)
        tokens, tokens_plain = tokenize(words, free), tokenize(words, plain)
        hidden = text_encoder(tokens).last_hidden_state
        with torch.no_grad():
            wanted = teacher(tokens_plain).last_hidden_state
            named = torch.tensor([bool(identifier) for identifier in identifiers])
            vectors = table.weight[[numbers.get(identifier, 0) for identifier in identifiers]]
            codes = named[:, None] * F.normalize(vectors @ to_code, dim=1) @ unheard.T  # (B, D), of length 1 or 0
        said = torch.isin(tokens, nouns).any(1)  # all but the empty ones
        noun = hidden[torch.isin(tokens, nouns)] - wanted[torch.isin(tokens_plain, nouns)] - 2.0 * codes[said]
        ended = (tokens == words.eos_token_id) & (tokens_plain == words.eos_token_id)
        end = (hidden - wanted - codes[:, None])[ended]
        losses = dict(noun=noun.square().mean(), end=end.square().mean())
        loss = 0.15 * (losses["noun"] + losses["end"])
        if step % UNET_EVERY == 0:  # a step with the UNet takes as long as these
            few = slice(None, batch_size // UNET_EVERY)
            clean = DiagonalGaussianDistribution(latents[torch.from_numpy(indices[few])].float()).sample(rng)
            noise = torch.randn(clean.shape, generator=rng)
            t = (torch.arange(len(clean)) + torch.rand(len(clean), generator=rng)) / len(clean)
            t = (t * schedule.config.num_train_timesteps).long()
            noisy = schedule.add_noise(clean, noise, t)
            with torch.no_grad():
                target = unet(noisy, t, encoder_hidden_states=wanted[few]).sample
            mse = F.mse_loss(unet(noisy, t, encoder_hidden_states=hidden[few]).sample, target)
            loss, losses["mse"] = loss + UNET_EVERY * mse, UNET_EVERY * mse
        return dict(loss=loss, **losses)

    done = fit("words", text_encoder, loss_of_step, weight_decay=0.0, **options)
    return text_encoder, done


def adopt(base: Path, folder: Path, made_from: Callable[[str], dict[str, int]]) -> None:
    """Checkpoints of the stages from a shipped base, for those that `folder` lacks: weights and steps, no optimizer.

    The stage "words" is not among them: it starts from the text encoder as the UNet's training left it.
    """
    recipe = json.loads((base / "training.json").read_text())
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
    state = torch.load(folder / f"{name}.pt", weights_only=True)
    models.load_state_dict(state["models"])
    if "ema" in state:
        for parameter, average in zip(models.parameters(), state["ema"]["shadow_params"], strict=True):
            parameter.data.copy_(average)
    return models.eval()


def settle(model: nn.Module, images: np.ndarray, seed: int) -> nn.Module:
    """Measure the batch norms' statistics anew: those of training belong to other weights than the average."""
    pictures = [to_tensor(images[start : start + 100]) for start in range(0, min(len(images), 6000), 100)]
    update_bn((_jitter(part, generator(seed, i)) for i, part in enumerate(pictures)), model)
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
    normalize_latents(vae, to_tensor(data.images[:_LATENT_SAMPLE]))
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
    _finish(temporary, target, recipe)


def mend(base: Path, stages: Sequence[str], folder: Path, target: Path, recipe: dict) -> None:
    """A copy of a shipped base in which the parts that `stages` made are new."""
    temporary = target.with_name(f".{target.name}")
    shutil.copytree(base, temporary)
    for stage in stages:
        save_mendable(stage, folder, temporary)
    _finish(temporary, target, recipe)


def _finish(temporary: Path, target: Path, recipe: dict) -> None:
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
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no", help="of the UNet's training")
    parser.add_argument("--ship", type=Path, help="write the finished base to this folder")
    parser.add_argument("--note", default="", help="what the card says besides of this training")
    args = parser.parse_args(argv)
    mends = args.start_from is not None and set(args.stages) <= set(MENDABLE)
    if args.ship is not None and set(args.stages) != set(STAGES) and not mends:
        parser.error(f"--ship with some --stages alone mends {', '.join(MENDABLE)} of a base given by --start_from.")
    steps = dict(zip(STAGES, args.steps, strict=True))
    batch = dict(zip(STAGES, args.batch_sizes, strict=True))
    torch.manual_seed(args.seed)  # the parts' first weights
    folder = args.output_dir

    def made_from(stage: str) -> dict[str, int]:
        seen = {"look_alikes": args.look_alikes} if stage == "identity" else {"photographs": args.photographs}
        return {"seed": args.seed, "batch_size": batch[stage]} | seen

    def options(stage: str) -> dict:
        return dict(
            seed=args.seed,
            batch_size=batch[stage],
            steps=steps[stage],
            lr=1e-3,
            folder=folder,
            made_from=made_from(stage),
        )

    if args.start_from is not None:
        adopt(args.start_from, folder, made_from)
    if "identity" in args.stages:
        train_identity(*read_look_alikes(folder / "data", args.look_alikes), **options("identity"))
    data = None
    if set(args.stages) - {"identity"}:
        data, words = Photographs(args.photographs, folder / "data"), design.tokenizer()
    if "vae" in args.stages:
        train_vae(data, **options("vae"))
    if "clip" in args.stages:
        train_clip(data, words, **options("clip"))
    if "judge" in args.stages:
        train_judge(data, **options("judge"))
    if {"decoder", "unet", "words"} & set(args.stages):
        vae, latents = latents_of(data, restore("vae", design.vae(), folder), folder)
    if "decoder" in args.stages:
        train_decoder(data, vae, latents, **options("decoder"))
    if "unet" in args.stages:
        further = {"lr": 8e-4, "minutes": args.minutes, "mixed_precision": args.mixed_precision}
        clip = restore("clip", design.clip(words), folder)
        restore("decoder", decoder_of(vae), folder)  # the samples are drawn with it
        train_unet(data, vae, latents, words, clip, **options("unet") | further)
    if "words" in args.stages:
        denoiser = restore("unet", Denoiser(design.unet(), design.text_encoder(words)), folder)
        train_words(data, latents, denoiser.unet, denoiser.text_encoder, words, **options("words") | {"lr": 5e-4})
    if args.ship is not None:
        recipe = {"photographs": args.photographs, "seed": args.seed, "note": args.note, "stages": {}}
        if mends:
            recipe = json.loads((args.start_from / "training.json").read_text())
            recipe["note"] = f"{recipe['note']} {args.note}".strip()
        recipe["look_alikes"] = args.look_alikes
        recipe["stages"] |= {name: stage_record(name, batch[name], folder) for name in args.stages}
        if mends:
            mend(args.start_from, args.stages, folder, args.ship, recipe)
        else:
            assemble(folder, data, args.ship, recipe)


if __name__ == "__main__":
    main()
