"""A transformer on the miniature's latents: `python -m dbnb.miniature.flow --output_dir runs/flow --ship runs/sd3`.

A small Stable Diffusion 3, trained from nothing by flow matching (Lipman et al., 2023; Esser et al., 2024), which plain
diffusers loads as `StableDiffusion3Pipeline`. Autoencoder and first text encoder are those of a trained miniature; the
transformer is new, and so is what only its pooled text needs: a layer on that encoder, and a tiny second one, since the
pipeline has two. It wants a T5 as well, and gets one that says nothing. Resumable as `dbnb.miniature.train` is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dbnb import toybox
from dbnb.miniature import design, path
from dbnb.miniature.fit import Stage, fit, generator
from dbnb.miniature.stages import Photographs, encode_all, sample_grid, some_empty, tokenize
from dbnb.miniature.train import PHOTOGRAPHS, finish, restore, stage_record

NAME = "flow"
WIDTH, HEAD, BLOCKS = 160, 32, 7
SECOND_WIDTH = 32  # of the second text encoder
# Tokens of the T5, all of them zeros: as many as the pipeline takes when it is told nothing, and as few as a T5 reads.
# A picture should be the same with both.
_MANY, FEW = 256, 2
_LONG_EVERY = 16  # steps


def transformer(channels: int) -> SD3Transformer2DModel:
    """(B, `channels`, 16, 16) latents in 64 tokens of 2 x 2 -> the direction from picture to noise.

    Each block adds nothing, and the direction is 0, until it is trained (adaLN-Zero of Peebles and Xie, 2023).
    """
    text = design.TEXT_WIDTH + SECOND_WIDTH
    model = SD3Transformer2DModel(
        sample_size=design.LATENT_SIZE,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=BLOCKS,
        attention_head_dim=HEAD,
        num_attention_heads=WIDTH // HEAD,
        caption_projection_dim=WIDTH,
        joint_attention_dim=text,
        pooled_projection_dim=text,
        pos_embed_max_size=design.LATENT_SIZE // 2,
        qk_norm="rms_norm",
    )
    for name, layer in model.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear")) or name in ("norm_out.linear", "proj_out"):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def first_text_encoder(trained: CLIPTextModel) -> CLIPTextModelWithProjection:
    """A trained text encoder with a new layer behind its own.

    The pipeline tells each word by the layer before the last, which is where the trained encoder ended; what the new
    one adds is seen by the pooled text alone. There no norm follows: all that layers add up is divided by one number,
    so that it has a deviation of 1, which changes nothing else, since each layer begins with a norm.
    """
    deviation = _deviation(trained)
    changed = {
        "num_hidden_layers": trained.config.num_hidden_layers + 1,
        "layer_norm_eps": trained.config.layer_norm_eps / deviation**2,
    }
    model = CLIPTextModelWithProjection(CLIPTextConfig(**trained.config.to_dict() | changed))
    own = {key.removeprefix("text_model."): value for key, value in trained.state_dict().items()}
    model.text_model.load_state_dict(own, strict=False)
    added = [*model.text_model.embeddings.parameters()]
    for layer in model.text_model.encoder.layers[:-1]:
        added += [*layer.self_attn.out_proj.parameters(), *layer.mlp.fc2.parameters()]
    with torch.no_grad():
        for parameter in added:
            parameter /= deviation
    return model


@torch.no_grad()
def _deviation(trained: CLIPTextModel) -> float:
    """Of a text encoder's states before its last norm, over a caption of every kind in every place."""
    captions = [f"a photo of a {kind} {place}" for kind in toybox.KINDS for place in toybox.SCENES.values()]
    states = trained(tokenize(design.tokenizer(), captions), output_hidden_states=True).hidden_states[-1]
    return states.std().item()


def second_text_encoder(words: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """One narrow layer: (B, 24) token ids -> (B, 24, 32) and (B, 32)."""
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=SECOND_WIDTH,
        intermediate_size=4 * SECOND_WIDTH,
        projection_dim=SECOND_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=design.TEXT_LENGTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def mute_t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    """Tokenizer and encoder of the pipeline's third place, whose states are zeros, as without a T5.

    Stable Diffusion 3 does without its own where the pipeline is told so; a folder that plain diffusers loads has one.
    """
    words = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0, model_max_length=_MANY)
    width = design.TEXT_WIDTH + SECOND_WIDTH
    config = T5Config(vocab_size=len(words), d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    model = T5EncoderModel(config).eval()
    nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return words, model


class Model(nn.Module):
    """What is trained together: the transformer, and of the text encoders what no trained base has."""

    def __init__(self, base: Path) -> None:
        super().__init__()
        self.transformer = transformer(AutoencoderKL.load_config(base / "vae")["latent_channels"])
        self.text_encoder = first_text_encoder(CLIPTextModel.from_pretrained(base / "text_encoder"))
        self.text_encoder_2 = second_text_encoder(CLIPTokenizer.from_pretrained(base / "tokenizer"))
        text = self.text_encoder.text_model
        for part in (text.embeddings, *text.encoder.layers[:-1]):
            part.requires_grad_(False)

    def conditions(self, tokens: torch.Tensor, zeros: int = FEW) -> dict[str, torch.Tensor]:
        """(B, 24) token ids -> what the transformer is told of the text, as the pipeline tells it: (B, 24 + `zeros`, D)
        and (B, D)."""
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        return {"encoder_hidden_states": F.pad(hidden, (0, 0, 0, zeros)), "pooled_projections": pooled}

    def pipeline(self, vae: AutoencoderKL, words: CLIPTokenizer) -> StableDiffusion3Pipeline:
        """The parts as they are now, to draw with."""
        words_3, text_encoder_3 = mute_t5()
        vae.register_to_config(shift_factor=0.0)  # the pipeline adds it
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=words,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=words,
            text_encoder_3=text_encoder_3.to(self.transformer.device),
            tokenizer_3=words_3,
        )


def train_flow(data: Photographs, vae: AutoencoderKL, latents: torch.Tensor, model: Model, stage: Stage) -> bool:
    """Flow matching; one caption in ten is empty, for guidance. True when the stage is complete.

    Times are logit-normal (Esser et al., 2024, 3.1), one from each of B equally likely ranges.
    """
    words = design.tokenizer()
    latents = latents.to(stage.device)

    def batch_of_step(step: int) -> dict[str, Any]:
        rng = generator(stage.seed, step)
        long = step % _LONG_EVERY == _LONG_EVERY - 1
        size = max(1, stage.batch_size // 4) if long else stage.batch_size  # as much to compute
        indices = data.batch(size, rng)
        ranges = (torch.arange(size) + torch.rand(size, generator=rng)) / size
        return dict(
            step=step,
            zeros=_MANY if long else FEW,
            indices=torch.from_numpy(indices),
            tokens=tokenize(words, some_empty(data.captions(indices, rng), rng)),
            shares=torch.special.ndtri(ranges.clamp(1e-4, 1 - 1e-4)).sigmoid(),
        )

    def loss_of_batch(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        rng = generator(stage.seed + 1, batch["step"], stage.device)
        indices, tokens, shares = (batch[name].to(stage.device) for name in ("indices", "tokens", "shares"))
        clean = DiagonalGaussianDistribution(latents[indices].float()).sample(rng)
        noise, share = torch.randn(clean.shape, generator=rng, device=stage.device), shares.view(-1, 1, 1, 1)
        noisy = (1.0 - share) * clean + share * noise
        with torch.autocast(stage.device, torch.bfloat16, enabled=stage.mixed_precision == "bf16"):
            told = model.conditions(tokens, batch["zeros"])
            predicted = model.transformer(noisy, timestep=1000.0 * shares, **told).sample.float()
        return dict(loss=F.mse_loss(predicted, noise - clean))

    @torch.no_grad()
    def draw() -> Image.Image:
        pipeline = model.pipeline(vae.to(stage.device), words)
        pipeline.set_progress_bar_config(disable=True)
        return sample_grid(pipeline, stage.seed, max_sequence_length=FEW)

    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": stage.lr}]
    return fit(stage, model, loss_of_batch, batch_of_step=batch_of_step, groups=groups, ema_decay=0.9998, draw=draw)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start_from", type=Path, default=path(), help="the base whose latents and words are learned")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/flow"))
    parser.add_argument("--photographs", type=int, default=PHOTOGRAPHS)
    parser.add_argument("--steps", type=int, default=40000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many minutes; a later run goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--ship", type=Path, help="write the base, as far as it is trained, to this folder")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)  # the new parts' first weights
    folder, model = args.output_dir, Model(args.start_from)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = AutoencoderKL.from_pretrained(args.start_from / "vae").float().eval().to(device)
    data = Photographs(args.photographs, folder / "data", vae.config.sample_size)
    stage = Stage(
        name=NAME,
        steps=args.steps,
        batch_size=args.batch_size,
        folder=folder,
        made_from={"seed": args.seed, "batch_size": args.batch_size, "photographs": args.photographs},
        seed=args.seed,
        lr=8e-4,
        minutes=args.minutes,
        mixed_precision=args.mixed_precision,
        device=device,
    )
    train_flow(data, vae, encode_all(vae, data.images, folder / "latents.pt"), model, stage)
    if args.ship is not None:
        stages = {NAME: stage_record(NAME, args.batch_size, folder)}
        recipe = {"photographs": args.photographs, "seed": args.seed, "stages": stages}
        ship(restore(NAME, model, folder), vae, args.ship, recipe)


def ship(model: Model, vae: AutoencoderKL, target: Path, recipe: dict) -> None:
    """Write a Stable Diffusion 3 folder: transformer and autoencoder in half precision, text encoders in float32."""
    temporary = target.with_name(f".{target.name}")
    model.transformer.half()
    model.pipeline(vae.half(), design.tokenizer()).save_pretrained(temporary)
    finish(temporary, target, recipe)


if __name__ == "__main__":
    main()
