"""Which pixels a word paints: the maps of the UNet's cross-attention. Used in notebooks 03 and 07.

At every place of a latent, cross-attention gives each token of the prompt a share; the shares sum to 1 (Hertz et al.,
2022, section 3; Tang et al., 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor
from PIL import Image

from dbnb.config import Sampling
from dbnb.drawing import build_pipeline, draw_images
from dbnb.models import Components


@dataclass(frozen=True)
class AttentionMaps:
    """A picture and what each word of its prompt has painted of it.

    `maps` is (steps, words, h, w), the mean over layers and heads at each solver step. What the tokens at the
    beginning, the end and in the padding get is left out, so the words' shares sum to less than 1.
    """

    image: Image.Image
    words: tuple[str, ...]
    maps: torch.Tensor

    def overlay(self, word: int, steps: slice = slice(None)) -> Image.Image:
        """The picture in grey, and in red where a word's share, averaged over some steps, is large."""
        share = self.maps[steps, word].mean(0)
        low, high = share.min(), share.max()
        share = F.interpolate(
            ((share - low) / (high - low + 1e-8))[None, None], size=self.image.size[::-1], mode="bilinear"
        )
        heat, gray = share[0, 0].numpy()[..., None], np.asarray(self.image.convert("L"))[..., None] / 255.0
        mixed = (1.0 - 0.75 * heat) * gray + 0.75 * heat * np.array([0.84, 0.15, 0.0])
        return Image.fromarray((mixed * 255.0).round().astype(np.uint8))


class _Recording(AttnProcessor):
    """diffusers' plain attention, which also keeps the shares that a prompt's tokens get."""

    def __init__(self, side: int, kept: list[torch.Tensor]) -> None:
        self.side, self.kept = side, kept

    def __call__(self, attn: Attention, *args, **kwargs) -> torch.Tensor:
        scores = attn.get_attention_scores

        def recorded(*of_scores) -> torch.Tensor:
            shares = scores(*of_scores)  # (B * heads, places, tokens)
            with_prompt = shares.float().chunk(2)[-1].mean(0)  # guidance asks without the prompt first
            side = int(len(with_prompt) ** 0.5)
            maps = with_prompt.T.reshape(-1, 1, side, side)
            self.kept.append(F.interpolate(maps, size=(self.side, self.side), mode="bilinear")[:, 0].cpu())
            return shares

        attn.get_attention_scores = recorded
        try:
            return super().__call__(attn, *args, **kwargs)
        finally:
            del attn.get_attention_scores


def _spans(components: Components, prompt: str) -> dict[str, list[int]]:
    """The words of a prompt, each with the places of its tokens."""
    spans, place = {}, 1  # after the token that begins every prompt
    for number, word in enumerate(prompt.split()):
        count = len(components.tokenizer(word, add_special_tokens=False).input_ids)
        spans[f"{word}\0{number}"] = list(range(place, place + count))
        place += count
    return spans


@torch.no_grad()
def attention_maps(components: Components, prompt: str, sampling: Sampling, *, seed: int = 0) -> AttentionMaps:
    """Draw one picture and keep what each word of its prompt painted, step by step.

    Needs a base whose prompt reaches the UNet by cross-attention alone, on squares, with guidance above 1; raises
    ValueError otherwise.
    """
    if components.text_encoder_2 is not None or components.upscales or sampling.guidance_scale <= 1:
        raise ValueError(
            "Attention maps need a base with one text encoder and a guidance_scale above 1: choose another base or "
            "value."
        )
    pipeline, before, kept = build_pipeline(components), dict(components.unet.attn_processors), []
    side = sampling.resolution // components.downsampling
    recorders = {name: _Recording(side, kept) if ".attn2." in name else processor for name, processor in before.items()}
    components.unet.set_attn_processor(recorders)  # which empties the dict
    try:
        image = draw_images(pipeline, [prompt], [seed], sampling)[0]
    finally:
        components.unet.set_attn_processor(dict(before))
    spans = _spans(components, prompt)
    layers = sum(".attn2." in name for name in before)
    steps = torch.stack(kept).unflatten(0, (-1, layers)).mean(1)  # (steps, tokens, h, w)
    maps = torch.stack([steps[:, places].sum(1) for places in spans.values()], dim=1)
    return AttentionMaps(image, tuple(word.split("\0")[0] for word in spans), maps)


def attention_rows(found: Sequence[AttentionMaps], steps: slice = slice(None)) -> list[list[Image.Image]]:
    """For each set of maps a row for a figure: the picture, then the picture under each word."""
    return [[one.image, *(one.overlay(word, steps) for word in range(len(one.words)))] for one in found]
