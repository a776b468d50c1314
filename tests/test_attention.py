"""Maps of cross-attention: shares of a whole, and a picture that is none the worse for being watched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dbnb.attention import attention_maps, attention_rows
from dbnb.config import Sampling
from dbnb.drawing import build_pipeline, draw_images

SAMPLING = Sampling(num_inference_steps=4)


def test_words_get_shares_of_every_place_at_every_step(components):
    found = attention_maps(components, "a photo of a red dog", SAMPLING)
    assert found.words == ("a", "photo", "of", "a", "red", "dog") and found.maps.shape == (4, 6, 16, 16)
    assert (found.maps >= 0).all() and (found.maps.sum(1) < 1).all()
    assert [len(row) for row in attention_rows([found])] == [7]
    assert found.overlay(5).size == found.image.size == (128, 128)


def test_the_picture_is_the_one_that_is_drawn_unwatched(components):
    prompt, before = "a photo of a red dog", dict(components.unet.attn_processors)
    watched = attention_maps(components, prompt, SAMPLING, seed=3).image
    plain = draw_images(build_pipeline(components), [prompt], [3], SAMPLING)[0]
    assert np.abs(np.asarray(watched, dtype=int) - np.asarray(plain, dtype=int)).max() <= 2
    assert components.unet.attn_processors == before


def test_the_word_for_the_toy_paints_the_toy(components):
    """In the middle, where the toy stands, the noun gets more than at the edges."""
    maps = attention_maps(components, "a photo of a red dog", Sampling(), seed=1).maps[5:, 5].mean(0)
    assert maps[4:12, 4:12].mean() > maps[0].mean() and torch.isfinite(maps).all()


def test_without_guidance_or_with_another_base_it_is_refused(components):
    with pytest.raises(ValueError, match="guidance_scale above 1"):
        attention_maps(components, "a dog", Sampling(guidance_scale=1.0))
