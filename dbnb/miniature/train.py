"""Train the miniature from nothing: `python -m dbnb.miniature.train --output_dir runs/miniature`.

Stages, each resumable from its last checkpoint: photographs, autoencoder, contrastive text and image encoders,
identity encoder, judge, latents, the decoder alone on them, UNet (with the text encoder). Every step is a function of
(seed, step), so stopping and going on changes nothing. Losses go to <stage>.jsonl in the output folder, pictures to
samples/.
`--start_from` goes on from a base that was shipped, where the checkpoints of its training are gone.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
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
from transformers import CLIPModel, CLIPTextModel, ResNetForImageClassification, ResNetModel

from dbnb import toybox
from dbnb.miniature import design
from dbnb.miniature.data import ATTRIBUTES, CHUNK, COLOR_NAMES, SHOTS, caption_of, photographs
from dbnb.prior import fast_solver
from dbnb.toybox.captions import article_for

STAGES = ("vae", "clip", "identity", "judge", "decoder", "unet")
PHOTOGRAPHS = 48000
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


def train_identity(data: Photographs, seed: int, batch_size: int, **options):
    """Identity encoder: InfoNCE (van den Oord et al., 2018) between two shots of a toy, against others of its kind."""
    encoder = design.identity()
    first = np.arange(0, len(data.images), SHOTS)
    by_kind = [first[data.labels[first, 0] == kind] for kind in range(len(ATTRIBUTES["kind"]))]

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        rng = generator(seed, step)
        toys = by_kind[step % len(by_kind)]
        chosen = toys[torch.randperm(len(toys), generator=rng)[:batch_size].numpy()]
        pictures = to_tensor(data.images[np.concatenate([chosen, chosen + 1])])
        features = F.normalize(encoder(_jitter(pictures, rng)).pooler_output.flatten(1), dim=1)
        logits = features[: len(chosen)] @ features[len(chosen) :].T / 0.1
        target = torch.arange(len(chosen))
        loss = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
        return dict(loss=loss, hits=(logits.argmax(1) == target).float().mean())

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


def adopt(base: Path, folder: Path) -> None:
    """Checkpoints of all stages from a shipped base, for those that `folder` lacks: weights and steps, no optimizer."""
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
        made_from = {key: recipe[key] for key in ("seed", "photographs")} | {"batch_size": stage["batch_size"]}
        state = dict(models=model.float().state_dict(), step=stage["step"], warm_up_from=stage["step"])
        torch.save(state | dict(made_from=made_from), folder / f"{name}.pt")
        (folder / f"{name}.jsonl").write_text(json.dumps({key: stage[key] for key in ("step", "minutes")}) + "\n")


def restore(name: str, models: nn.Module, folder: Path) -> nn.Module:
    """Put a stage's averaged weights, as far as training has come, into `models`."""
    state = torch.load(folder / f"{name}.pt", weights_only=True)
    models.load_state_dict(state["models"])
    for parameter, average in zip(models.parameters(), state["ema"]["shadow_params"], strict=True):
        parameter.data.copy_(average)
    return models.eval()


def settle(model: nn.Module, data: Photographs, seed: int) -> nn.Module:
    """Measure the batch norms' statistics anew: those of training belong to other weights than the average."""
    pictures = [to_tensor(data.images[start : start + 100]) for start in range(0, min(len(data.images), 6000), 100)]
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
        vae=vae.half(), text_encoder=denoiser.text_encoder, tokenizer=words, unet=denoiser.unet.half(),
        scheduler=design.scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(temporary)  # fmt: skip
    restore("clip", design.clip(words), folder).half().save_pretrained(temporary / "clip")
    for name, model in (("identity", design.identity()), ("judge", design.judge())):
        settle(restore(name, model, folder), data, recipe["seed"]).half().save_pretrained(temporary / name)
    if (folder / "pilots.json").exists():
        shutil.copy(folder / "pilots.json", temporary)
    (temporary / "training.json").write_text(json.dumps(recipe, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/miniature"))
    parser.add_argument("--photographs", type=int, default=PHOTOGRAPHS)
    parser.add_argument("--steps", type=int, nargs=6, default=(6800, 800, 1200, 2400, 2600, 25500), metavar=STAGES)
    parser.add_argument("--batch_sizes", type=int, nargs=6, default=(8, 128, 96, 64, 16, 24), metavar=STAGES)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop this run's UNet stage after so many minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start_from", type=Path, help="a shipped base, for stages of which no checkpoint is there")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to run")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no", help="of the UNet's training")
    parser.add_argument("--ship", type=Path, help="write the finished base to this folder")
    parser.add_argument("--note", default="", help="what the card says besides of this training")
    args = parser.parse_args(argv)
    steps = dict(zip(STAGES, args.steps, strict=True))
    batch = dict(zip(STAGES, args.batch_sizes, strict=True))
    torch.manual_seed(args.seed)  # the parts' first weights
    folder, last = args.output_dir, STAGES.index(args.until)
    if args.start_from is not None:
        adopt(args.start_from, folder)
    data = Photographs(args.photographs, folder / "data")
    words = design.tokenizer()

    def options(stage: str) -> dict:
        made_from = {"seed": args.seed, "photographs": args.photographs, "batch_size": batch[stage]}
        return dict(
            seed=args.seed, batch_size=batch[stage], steps=steps[stage], lr=1e-3, folder=folder, made_from=made_from
        )

    vae, _ = train_vae(data, **options("vae"))
    if last >= 1:
        clip, _ = train_clip(data, words, **options("clip"))
    if last >= 2:
        train_identity(data, **options("identity"))
    if last >= 3:
        train_judge(data, **options("judge"))
    if last >= 4:
        vae, latents = latents_of(data, vae, folder)
        train_decoder(data, vae, latents, **options("decoder"))
    if last >= 5:
        further = {"lr": 8e-4, "minutes": args.minutes, "mixed_precision": args.mixed_precision}
        train_unet(data, vae, latents, words, clip, **options("unet") | further)
    if args.ship is not None:
        recipe = {"photographs": args.photographs, "seed": args.seed, "note": args.note}
        recipe["stages"] = {name: stage_record(name, batch[name], folder) for name in STAGES}
        assemble(folder, data, args.ship, recipe)


if __name__ == "__main__":
    main()
