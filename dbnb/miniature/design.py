"""The parts of the miniature, each a plain diffusers or transformers class, only smaller."""

from __future__ import annotations

import json
from collections.abc import Sequence

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

from dbnb.miniature.data import ALIKE_SIZE, ATTRIBUTES
from dbnb.toybox.captions import IDENTIFIERS

RESOLUTION = 64
LATENT_SIZE = 16  # to a side
LATENT_CHANNELS = 6
TEXT_LENGTH = 24
TEXT_WIDTH = 128
# How often each word stood in 4,000 captions of the first training, which decided the order of the merges, and so ids.
_COUNTS = {
    "a": 9636, "of": 4000, "photo": 3339, "with": 2152, "the": 1965, "in": 1612, "scarf": 840, "hat": 812,
    "robot": 712, "dog": 690, "on": 686, "duck": 671, "car": 655, "cat": 639, "teapot": 633, "yellow": 588,
    "purple": 577, "orange": 565, "blue": 554, "white": 552, "pink": 549, "spotted": 543, "red": 538, "striped": 521,
    "green": 505, "picture": 403, "moon": 349, "an": 349, "beach": 337, "room": 333, "grass": 333, "at": 332,
    "night": 332, "snow": 330, "desert": 318, "city": 298, "render": 258, "spots": 253, "stripes": 247, "and": 174,
}  # fmt: skip  # a table of data
# Words of prompts that a learner is likely to try; no caption says them, so their tokens carry no picture.
_FURTHER_WORDS = (
    "small big toy my the and of on in at with wearing shiny happy old new cute his her one two photo".split()
)


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges were learned from captions: every word of a caption is one token.

    Identifiers are learned last, so they have the highest ids, as rare words do in CLIP's own vocabulary.
    """
    corpus = [word for word, times in _COUNTS.items() for _ in range(times)]
    # Each so often and no other so often: between equals the order in which pairs are merged would be left to chance.
    corpus += [word for times, word in enumerate(_FURTHER_WORDS, start=20) for _ in range(times)]
    corpus += list(IDENTIFIERS) * 4
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(c) for c in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=3, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    state = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    # CLIP's layout: single characters, the same ending a word, merges in order, then the two special tokens.
    names = [*letters, *(letter + "</w>" for letter in letters)]
    names += [a + b for a, b in merges if a + b not in set(names)] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)


def _text_config(words: CLIPTokenizer) -> dict:
    return dict(
        vocab_size=len(words),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def clip(words: CLIPTokenizer) -> CLIPModel:
    """Text and image halves of a small CLIP: its text half starts the text encoder, both measure prompt fidelity."""
    vision = dict(
        hidden_size=128,
        intermediate_size=512,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=RESOLUTION,
        patch_size=8,
    )
    return CLIPModel(CLIPConfig(text_config=_text_config(words), vision_config=vision, projection_dim=TEXT_WIDTH))


def text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    """(B, 24) token ids -> (B, 24, 128) hidden states."""
    return CLIPTextModel(CLIPTextConfig(**_text_config(words)))


def vae(block_out_channels: tuple[int, ...] = (24, 48, 96), latent_channels: int = LATENT_CHANNELS) -> AutoencoderKL:
    """(B, 3, 64, 64) in [-1, 1] <-> (B, 6, 16, 16) latents; each block more doubles the side of the picture."""
    blocks = len(block_out_channels)
    return AutoencoderKL(
        block_out_channels=block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=LATENT_SIZE * 2 ** (blocks - 1),
        scaling_factor=1.0,
    )


def large_vae() -> AutoencoderKL:
    """(B, 3, 128, 128) in [-1, 1] <-> (B, 12, 16, 16) latents: twice the side."""
    return vae((16, 24, 48, 96), 2 * LATENT_CHANNELS)


def unet(block_out_channels: tuple[int, int, int] = (48, 96, 192)) -> UNet2DConditionModel:
    """Noise predictor on (B, 6, 16, 16). Attention at the highest level too, since LoRA paints only where it is."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=block_out_channels,
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
    )


def scheduler() -> DDPMScheduler:
    """Stable Diffusion's noise schedule; the UNet predicts v, as Stable Diffusion 2's does.

    Asked for the noise, so small a model draws places and colours that fall apart: where nearly all is noise, an answer
    can be nearly right and say nothing about the picture. There v is the picture (Salimans and Ho, 2022).

    Drawing begins at the noisiest timestep, where the noise that it is given belongs ("trailing", Lin et al., 2023).
    """
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def _resnet(depths: Sequence[int] = (1, 1, 1, 1), **further) -> ResNetConfig:
    return ResNetConfig(
        embedding_size=32, hidden_sizes=[48, 96, 128, 192], depths=list(depths), layer_type="basic", **further
    )


def identity() -> ResNetModel:
    """Our DINO: pictures of one toy land close together, of two toys of a kind apart. It reads 128 pixels to a side."""
    return ResNetModel(_resnet(depths=[1, 2, 2, 2], image_size=ALIKE_SIZE))


def judge() -> ResNetForImageClassification:
    """Names kind, colours, pattern, accessory and scene of a picture: one group of logits an attribute."""
    names = [f"{attribute}:{value}" for attribute, values in ATTRIBUTES.items() for value in values]
    return ResNetForImageClassification(_resnet(id2label=dict(enumerate(names)), num_labels=len(names)))
