"""The stages of the miniature's training, each a function that fits one part: autoencoder, encoders, judge, UNet."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_snr
from diffusers.utils import make_image_grid
from PIL import Image
from torch import nn

from dbnb import toybox
from dbnb.drawing import fast_solver
from dbnb.miniature import design
from dbnb.miniature.data import (
    ALIKE,
    ATTRIBUTES,
    CHUNK,
    COLOR_NAMES,
    SHOTS,
    SIZE,
    caption_of,
    look_alikes,
    names_of,
    photographs,
)
from dbnb.miniature.fit import Stage, fit, generator
from dbnb.toybox.captions import IDENTIFIERS, article_for, content

CODE = 32  # directions of the text encoder's hidden states that carry an identifier
UNET_EVERY = 6  # steps of the stage "words"; the others look at the text encoder alone
LOOK_ALIKES = 5000  # toys, each with ALIKE - 1 others
LATENT_SAMPLE = 2000  # photographs that tell the latents' mean and deviation


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


class Photographs:
    """The training set in memory, pictures and labels, the shots of a toy side by side.

    First `count` photographs of toys in named colours, then a third as many of wild ones.
    """

    def __init__(self, count: int, folder: Path, size: int = SIZE) -> None:
        chunks = [
            photographs(split, min(CHUNK, total - start), folder, start=start, size=size)
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
        """One fresh caption for each photograph whose number is in `indices`, (N,)."""
        draw = np.random.default_rng(int(torch.randint(2**62, (1,), generator=rng)))
        return [caption_of(self.labels[i], draw) for i in indices]


def some_empty(captions: list[str], rng: torch.Generator) -> list[str]:
    """One caption in ten is empty, on average, so that the denoiser can be guided."""
    empty = torch.rand(len(captions), generator=rng) < 0.1
    return ["" if e else caption for caption, e in zip(captions, empty, strict=True)]


def tokenize(words, captions: list[str]) -> torch.Tensor:
    """Captions -> (B, 24) ids."""
    return words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def difference(decoded: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """L1 + 2 MSE."""
    return F.l1_loss(decoded, pictures) + 2.0 * F.mse_loss(decoded, pictures)


def train_vae(data: Photographs, stage: Stage):
    """Autoencoder: L1 + 2 MSE, and a KL term just strong enough to keep latents smooth."""
    vae = design.vae().to(memory_format=torch.channels_last)  # a quarter faster on a CPU

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        rng = generator(stage.seed, step)
        pictures = to_tensor(data.images[data.batch(stage.batch_size, rng)]).to(stage.device)
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample(rng)).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
        loss = difference(decoded, pictures) + 3e-4 * kl
        return dict(loss=loss, mse=F.mse_loss(decoded, pictures), kl=kl)

    return vae, fit(stage, vae, loss_of_step, weight_decay=0.0, draw=lambda: there_and_back(vae, data))


@torch.no_grad()
def there_and_back(vae, data: Photographs) -> Image.Image:
    """Photographs above what the autoencoder makes of them: eight in named colours, eight in any."""
    images = data.images[[*range(8), *range(-8, 0)]]
    decoded = vae.decode(vae.encode(to_tensor(images).to(vae.device)).latent_dist.mode()).sample
    pairs = [Image.fromarray(image) for image in images] + VaeImageProcessor().postprocess(decoded)
    return make_image_grid(pairs, rows=2, cols=len(images))


def decoder_of(vae) -> nn.ModuleDict:
    """The half of an autoencoder that makes pictures of latents, under the names that it has there."""
    return nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})


def train_decoder(data: Photographs, vae, latents: torch.Tensor, stage: Stage):
    """The decoder alone, further, on kept latents, which stay what the UNet learns.

    As Stable Diffusion's own autoencoder was sharpened after its UNet was trained (stabilityai/sd-vae-ft-mse).
    """
    decoder = decoder_of(vae.to(stage.device)).to(memory_format=torch.channels_last)

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        rng = generator(stage.seed, step)
        indices = data.batch(stage.batch_size, rng)
        pictures = to_tensor(data.images[indices]).to(stage.device)
        posterior = DiagonalGaussianDistribution(latents[torch.from_numpy(indices)].float().to(stage.device))
        decoded = vae.decode(posterior.sample(rng)).sample
        return dict(loss=difference(decoded, pictures), mse=F.mse_loss(decoded, pictures))

    return fit(stage, decoder, loss_of_step, weight_decay=0.0, draw=lambda: there_and_back(vae, data))


def train_clip(data: Photographs, stage: Stage):
    """Contrastive text and image encoders (Radford et al., 2021), on toys that captions can tell apart."""
    words = design.tokenizer()
    clip = design.clip(words)

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        rng = generator(stage.seed, step)
        indices = data.batch(stage.batch_size, rng, named=True)
        out = clip(
            input_ids=tokenize(words, data.captions(indices, rng)).to(stage.device),
            pixel_values=to_tensor(data.images[indices]).to(stage.device),
            return_loss=True,
        )
        hits = (out.logits_per_text.argmax(1) == torch.arange(stage.batch_size, device=stage.device)).float().mean()
        return dict(loss=out.loss, hits=hits)

    return clip, fit(stage, clip, loss_of_step)


def jitter(pictures: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Blur some pictures, (B, 3, H, W), and add noise: the encoders must judge drawings fairly, which are softer.

    The blur covers a 32nd of the side, whatever the resolution.
    """
    reach = max(2, pictures.shape[-1] // 32)
    softer = F.interpolate(F.avg_pool2d(pictures, reach), scale_factor=reach, mode="bilinear", align_corners=False)
    draws = dict(generator=rng, device=pictures.device)
    amount = torch.rand(len(pictures), 1, 1, 1, **draws)
    mixed = pictures + amount * (softer - pictures)
    return mixed + 0.08 * torch.rand(len(pictures), 1, 1, 1, **draws) * torch.randn(pictures.shape, **draws)


def _vary(pictures: torch.Tensor, group: int, rng: torch.Generator) -> torch.Tensor:
    """Move each picture by up to a twentieth of its side, and turn the hue of all `group` pictures of some groups.

    So a group of look-alikes is another one each time it is seen: what differs between its toys stays.
    """
    count, draws = len(pictures) // group, dict(generator=rng, device=pictures.device)
    angle = (torch.rand(count, **draws) < 0.7) * 2.0 * math.pi * torch.rand(count, **draws)
    # A turn about the grey axis (Rodrigues).
    axis, eye = torch.full((3, 3), 1.0 / 3.0, device=pictures.device), torch.eye(3, device=pictures.device)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]], device=pictures.device) / 3.0**0.5
    cos, sin = (f(angle).view(-1, 1, 1) for f in (torch.cos, torch.sin))
    turns = (cos * eye + sin * cross + (1.0 - cos) * axis).repeat_interleave(group, 0)
    turned = torch.einsum("bij,bjhw->bihw", turns, pictures).clamp(-1.0, 1.0)
    side = pictures.shape[-1]
    most = side // 20
    padded = F.pad(turned, (most,) * 4, mode="replicate")
    first = torch.randint(2 * most + 1, (2, len(pictures), 1), **draws)
    rows, columns = first + torch.arange(side, device=pictures.device)  # (N, side) each
    each = torch.arange(len(pictures), device=pictures.device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def read_look_alikes(folder: Path, count: int = LOOK_ALIKES) -> tuple[np.ndarray, np.ndarray]:
    """`look_alikes` of `count` toys, half in named colours and half in any: the two arrays of `look_alikes`."""
    part = min(count // 2, 250)
    chunks = [
        look_alikes(split, part, folder, start=start)
        for split in ("train", "wild")
        for start in range(0, count // 2, part)
    ]
    return tuple(np.concatenate(arrays) for arrays in zip(*chunks, strict=True))


def train_identity(groups: np.ndarray, alike: np.ndarray, stage: Stage):
    """Identity encoder: InfoNCE (van den Oord et al., 2018) between two shots of a toy, and a scale for look-alikes.

    Among the toys are groups of look-alikes, each of which differs by one thing (`alike.DIFFERENCES`). Their
    similarities are drawn to `alike.likeness`, so that a hue or a smeared pattern counts for what an eye sees in it.
    All other toys are negatives. `stage.batch_size` counts toys, look-alikes among them.
    """
    encoder = design.identity().to(memory_format=torch.channels_last)
    known, wanted = (torch.from_numpy(array).to(stage.device) for array in (groups, alike))

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        rng = generator(stage.seed, step, stage.device)
        chosen = torch.randperm(len(known), generator=rng, device=stage.device)[: stage.batch_size // ALIKE]
        shots = known[chosen].flatten(0, 2).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        pictures = jitter(_vary(shots, ALIKE * SHOTS, rng), rng).contiguous(memory_format=torch.channels_last)
        with torch.autocast(stage.device, torch.bfloat16, enabled=stage.mixed_precision == "bf16"):
            features = encoder(pictures).pooler_output
        features = F.normalize(features.float().flatten(1), dim=1)
        first, second = features[0::SHOTS], features[1::SHOTS]
        similarity = first @ second.T
        target = torch.arange(len(first), device=stage.device)  # a look-alike is a toy like any other
        contrast = 0.5 * (F.cross_entropy(similarity / 0.1, target) + F.cross_entropy(similarity.T / 0.1, target))
        of_group = torch.block_diag(*torch.ones(len(chosen), ALIKE, ALIKE, device=stage.device)).bool()
        scale = F.mse_loss(similarity[of_group], wanted[chosen].flatten())
        hits = (similarity.argmax(1) == target).float().mean()
        return dict(loss=contrast + 4.0 * scale, contrast=contrast, scale=scale, hits=hits)

    return encoder, fit(stage, encoder, loss_of_step)


def train_judge(data: Photographs, stage: Stage):
    """Judge: cross-entropy for each attribute."""
    judge = design.judge()
    sizes = [len(values) for values in ATTRIBUTES.values()]

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        rng = generator(stage.seed, step)
        indices = data.batch(stage.batch_size, rng, named=True)
        logits = judge(jitter(to_tensor(data.images[indices]), rng).to(stage.device)).logits.split(sizes, dim=1)
        labels = torch.from_numpy(data.labels[indices]).long().to(stage.device)
        losses = {key: F.cross_entropy(logits[i], labels[:, i]) for i, key in enumerate(ATTRIBUTES)}
        return dict(loss=sum(losses.values()), **losses)

    return judge, fit(stage, judge, loss_of_step)


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
    """(N, H, W, 3) uint8 -> (N, 2 C, 16, 16) float16, mean and log variance of each latent, kept in a file."""
    weights = hashlib.sha256(b"".join(p.cpu().numpy().tobytes() for p in vae.state_dict().values())).hexdigest()
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if kept["vae"] == weights and len(kept["latents"]) == len(images):
            return kept["latents"]
    parts = (to_tensor(images[i : i + 100]).to(vae.device) for i in range(0, len(images), 100))
    latents = torch.cat([vae.encode(part).latent_dist.parameters.half().cpu() for part in parts])
    temporary = path.with_suffix(".tmp")
    torch.save({"vae": weights, "latents": latents}, temporary)
    os.replace(temporary, path)
    return latents


def latents_of(data: Photographs, vae, folder: Path) -> tuple[nn.Module, torch.Tensor]:
    """The autoencoder with its latents normalised, and those of all photographs: (N, 2C, h, w)."""
    vae = copy.deepcopy(vae)
    normalize_latents(vae, to_tensor(data.images[:LATENT_SAMPLE]))
    return vae, encode_all(vae, data.images, folder / "latents.pt")


class Denoiser(nn.Module):
    """UNet and text encoder, trained together."""

    def __init__(self, unet, text_encoder) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    @classmethod
    def from_clip(cls, clip, unet: UNet2DConditionModel) -> Denoiser:
        """A UNet that has learned nothing yet, and a copy of a CLIP's text half."""
        text_encoder = design.text_encoder(design.tokenizer())
        text_encoder.load_state_dict(
            {key.removeprefix("text_model."): value for key, value in clip.text_model.state_dict().items()}
        )
        return cls(unet, text_encoder)


def v_weights(snr: torch.Tensor) -> torch.Tensor:
    """(B,) signal-to-noise ratios -> weights of the errors of v.

    Counted on the error of the picture they are min(SNR + 1, 5): the SNR + 1 of v-prediction, cut off where there is
    little noise, as min-SNR does it (Hang et al., 2023).
    """
    return (snr + 1.0).clamp(max=5.0) / (snr + 1.0)


def as_pipeline(vae, words, model: Denoiser, noise_schedule) -> StableDiffusionPipeline:
    """The parts as they are now, to draw with."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=words,
        unet=model.unet,
        safety_checker=None,
        scheduler=fast_solver(noise_schedule),
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_grid(pipeline: DiffusionPipeline, seed: int, **options: int) -> Image.Image:
    """Every kind in every place, in some colour: what a base draws as it is now, from the same noise each time."""
    images: list[Image.Image] = []
    for row, kind in enumerate(toybox.KINDS):
        colors = [COLOR_NAMES[(row + column) % len(COLOR_NAMES)] for column in range(len(toybox.SCENES))]
        prompts = [
            f"a photo of {article_for(color)} {color} {kind} {place}"
            for color, place in zip(colors, toybox.SCENES.values(), strict=True)
        ]
        images += pipeline(
            prompts, num_inference_steps=20, guidance_scale=2.5, generator=generator(seed, 0), **options
        ).images
    return make_image_grid(images, rows=len(toybox.KINDS), cols=len(toybox.SCENES))


def train_unet(
    data: Photographs,
    vae,
    latents: torch.Tensor,
    model: Denoiser,
    stage: Stage,
    *,
    noise_schedule: DDPMScheduler | None = None,
    weigh: Callable[[torch.Tensor], torch.Tensor] = v_weights,
    words_too: bool = True,
) -> bool:
    """Denoising; one caption in ten is empty, for guidance. `weigh` gives the errors' weights by their SNR.

    `noise_schedule` is the design's where none is given; the text encoder learns too, or stays frozen. True when the
    stage is complete.
    On a CPU, "bf16" pays (a quarter more samples a second) where the processor multiplies bfloat16 itself.
    """
    noise_schedule = noise_schedule or design.scheduler()
    words = design.tokenizer()
    model.to(memory_format=torch.channels_last)
    if stage.device == "cpu":
        # Plain products: torch's fused attention is slow there where heads are as narrow as here, most in bfloat16.
        model.unet.set_attn_processor(AttnProcessor())
    latents = latents.to(stage.device)

    def batch_of_step(step: int) -> dict[str, Any]:
        rng = generator(stage.seed, step)
        indices = data.batch(stage.batch_size, rng)
        # One timestep from each of B equal ranges: the batch's loss varies less (Kingma et al., 2021, appendix I).
        strata = (torch.arange(stage.batch_size) + torch.rand(stage.batch_size, generator=rng)) / stage.batch_size
        return dict(
            step=step,
            indices=torch.from_numpy(indices),
            tokens=tokenize(words, some_empty(data.captions(indices, rng), rng)),
            timesteps=(strata * noise_schedule.config.num_train_timesteps).long(),
        )

    def loss_of_batch(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        rng = generator(stage.seed + 1, batch["step"], stage.device)
        indices, tokens, t = (batch[name].to(stage.device) for name in ("indices", "tokens", "timesteps"))
        clean = DiagonalGaussianDistribution(latents[indices].float()).sample(rng)
        noise = torch.randn(clean.shape, generator=rng, device=stage.device)
        with torch.autocast(stage.device, torch.bfloat16, enabled=stage.mixed_precision == "bf16"):
            hidden = model.text_encoder(tokens).last_hidden_state
            noisy = noise_schedule.add_noise(clean, noise, t)
            predicted = model.unet(noisy, t, encoder_hidden_states=hidden).sample.float()
        of_noise = noise_schedule.config.prediction_type == "epsilon"
        target = noise if of_noise else noise_schedule.get_velocity(clean, noise, t)
        mse = (predicted - target).square().mean((1, 2, 3))
        return dict(loss=(mse * weigh(compute_snr(noise_schedule, t))).mean(), mse=mse.mean())

    groups = [dict(params=list(model.unet.parameters()), lr=stage.lr)]
    if words_too:
        groups.append(dict(params=list(model.text_encoder.parameters()), lr=0.3 * stage.lr))
    else:
        model.text_encoder.requires_grad_(False)

    @torch.no_grad()
    def draw() -> Image.Image:
        return sample_grid(as_pipeline(vae.to(stage.device), words, model, noise_schedule), stage.seed)

    return fit(stage, model, loss_of_batch, batch_of_step=batch_of_step, groups=groups, ema_decay=0.9998, draw=draw)


def draw_vectors(table: nn.Embedding, words, rng: torch.Generator, *, most_alike: float = 1.0) -> None:
    """Give each identifier a vector of its own in the token embedding, as long as the words' and apart from them.

    A fifth of it is a direction that all identifiers share, by which the text encoder can tell a name from a word; the
    rest is random, drawn again until the cosine with every other token's vector is below `most_alike`.
    """
    with torch.no_grad():
        vectors = table.weight
        known = [words.convert_tokens_to_ids(f"{name}</w>") for name in (*toybox.KINDS, *COLOR_NAMES)]
        length = vectors[known].norm(dim=1).mean()
        shared = F.normalize(torch.randn(vectors.shape[1], generator=generator(0, -2)), dim=0).to(vectors.device)
        for identifier in words.convert_tokens_to_ids([f"{name}</w>" for name in IDENTIFIERS]):
            others = F.normalize(vectors[[i for i in range(len(vectors)) if i != identifier]], dim=1)
            while True:
                own = F.normalize(torch.randn(vectors.shape[1], generator=rng), dim=0).to(vectors.device)
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


def train_words(data: Photographs, latents: torch.Tensor, unet, text_encoder, stage: Stage):
    """The text encoder alone, further: the same content means the same in any sentence, and a name is heard in it.

    The UNet is frozen, and what it predicts for a plain sentence, encoded as before this stage, is the target for any
    other (knowledge distillation, Hinton et al., 2015). An identifier is a new random vector at every step, so that any
    vector is treated alike: it must not change the prediction, yet the noun and all that follows carry a code of it, in
    directions that this UNet does not hear and an adapter can. Without that code an unknown word is lost after its own
    position, and subject and class look the same to whatever is trained.
    """
    words = design.tokenizer()
    teacher, schedule = copy.deepcopy(text_encoder), design.scheduler()
    for frozen in (teacher, unet):
        frozen.requires_grad_(False).eval().to(stage.device)
    text_encoder.to(stage.device)
    unet.set_attn_processor(AttnProcessor())
    table = text_encoder.get_input_embeddings()
    nouns = torch.tensor([words.convert_tokens_to_ids(f"{name}</w>") for name in toybox.KINDS]).to(stage.device)
    numbers = {name: words.convert_tokens_to_ids(f"{name}</w>") for name in IDENTIFIERS}
    unheard = unheard_directions(unet, CODE)
    to_code = torch.randn(table.embedding_dim, CODE, generator=generator(stage.seed, -1)).to(stage.device)

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        rng = generator(stage.seed, step)
        draw_vectors(table, words, rng)
        indices = data.batch(stage.batch_size, rng)
        plain, free, identifiers = _pairs(data, indices, rng)
        tokens, tokens_plain = (tokenize(words, said).to(stage.device) for said in (free, plain))
        hidden = text_encoder(tokens).last_hidden_state
        with torch.no_grad():
            wanted = teacher(tokens_plain).last_hidden_state
            named = torch.tensor([bool(identifier) for identifier in identifiers]).to(stage.device)
            vectors = table.weight[[numbers.get(identifier, 0) for identifier in identifiers]]
            codes = named[:, None] * F.normalize(vectors @ to_code, dim=1) @ unheard.T  # (B, D), of length 1 or 0
        said = torch.isin(tokens, nouns).any(1)  # all but the empty ones
        noun = hidden[torch.isin(tokens, nouns)] - wanted[torch.isin(tokens_plain, nouns)] - 2.0 * codes[said]
        ended = (tokens == words.eos_token_id) & (tokens_plain == words.eos_token_id)
        end = (hidden - wanted - codes[:, None])[ended]
        losses = dict(noun=noun.square().mean(), end=end.square().mean())
        loss = 0.15 * (losses["noun"] + losses["end"])
        if step % UNET_EVERY == 0:  # a step with the UNet takes as long as these
            few = slice(None, stage.batch_size // UNET_EVERY)
            clean = DiagonalGaussianDistribution(latents[torch.from_numpy(indices[few])].float()).sample(rng)
            clean, noise = clean.to(stage.device), torch.randn(clean.shape, generator=rng).to(stage.device)
            t = (torch.arange(len(clean)) + torch.rand(len(clean), generator=rng)) / len(clean)
            t = (t * schedule.config.num_train_timesteps).long().to(stage.device)
            noisy = schedule.add_noise(clean, noise, t)
            with torch.no_grad():
                target = unet(noisy, t, encoder_hidden_states=wanted[few]).sample
            mse = F.mse_loss(unet(noisy, t, encoder_hidden_states=hidden[few]).sample, target)
            loss, losses["mse"] = loss + UNET_EVERY * mse, UNET_EVERY * mse
        return dict(loss=loss, **losses)

    done = fit(stage, text_encoder, loss_of_step, weight_decay=0.0)
    return text_encoder, done
