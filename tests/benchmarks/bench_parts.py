"""How long each part takes: `pytest tests/benchmarks/bench_parts.py` (with pytest-benchmark; not part of the tests)."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from dbnb.adapters import adapted_modules, add_adapters, train_mode, trainable_parameters
from dbnb.config import DreamBoothConfig
from dbnb.dataset import cache_latents
from dbnb.drawing import build_pipeline, draw_images
from dbnb.models import embed_prompts
from dbnb.training import batch_at, precompute_embeds, train, training_step
from dbnb.validation import validation_images


@pytest.fixture(params=[True, False], ids=["text encoder trained", "text encoder frozen"])
def ready(request, components, dataset):
    """Adapters in place, latents cached, prompts encoded where they may be: (components, dataset, embeddings)."""
    add_adapters(components, rank=16, train_text_encoder=request.param)
    for module in adapted_modules(components).values():
        train_mode(module)
    cache_latents(dataset, components.vae)
    prompts = dataset.distinct_prompts()
    return components, dataset, None if request.param else precompute_embeds(components, prompts)


def _forget(components):
    for module in adapted_modules(components).values():
        for _, parameter in trainable_parameters(module):
            parameter.grad = None


def test_training_step(benchmark, ready):
    """Forward and backward of our step, batch 4 + 4."""
    components, dataset, embeds = ready

    numbers = itertools.count()

    def step():
        batch = batch_at(dataset, next(numbers), 4)
        training_step(components, batch, seed=0, prompt_embeds=embeds).loss.backward()
        _forget(components)

    benchmark.pedantic(step, rounds=40, warmup_rounds=5)


def test_bare_cost(benchmark, ready):
    """The UNet's (and text encoder's) forward and backward on the same tensors: the limit of the step above."""
    components, dataset, embeds = ready
    record = training_step(components, batch_at(dataset, 0, 4), seed=0, prompt_embeds=embeds)
    prompts = batch_at(dataset, 0, 4)["prompts"]
    hidden = None if embeds is None else torch.stack([embeds[prompt][0] for prompt in prompts])

    def step():
        states = embed_prompts(components, prompts)[0] if hidden is None else hidden
        prediction = components.unet(record.noisy_latents, record.timesteps, encoder_hidden_states=states).sample
        (prediction - record.target).square().mean().backward()
        _forget(components)

    benchmark.pedantic(step, rounds=40, warmup_rounds=5)


def test_whole_training(benchmark, components, dataset, config):
    """Sixty steps with all that surrounds them."""
    add_adapters(components, rank=16, train_text_encoder=True)
    config.max_train_steps, config.train_batch_size, config.checkpointing_steps = 60, 4, 0
    benchmark.pedantic(lambda: train(config, components, dataset), rounds=1)


def test_class_images(benchmark, components):
    """Twenty-five pictures at the default settings."""
    pipeline, count = build_pipeline(components), 25
    sampling = DreamBoothConfig().sampling
    benchmark.pedantic(
        lambda: draw_images(pipeline, ["a photo of a dog"] * count, range(count), sampling), rounds=3, warmup_rounds=1
    )


def test_validation_images(benchmark, components, concept, config):
    """Eight pictures of each prompt set."""
    config.num_inference_steps = DreamBoothConfig().num_inference_steps
    benchmark.pedantic(lambda: validation_images(components, concept, config.sampling, count=8), rounds=3)


def test_latents_cache(benchmark, components, dataset):
    """Eleven pictures through the encoder."""
    benchmark(cache_latents, dataset, components.vae)


def test_embeddings_cache(benchmark, components, dataset):
    """Two prompts through the text encoder."""
    benchmark(precompute_embeds, components, dataset.distinct_prompts())


@pytest.mark.parametrize("command", [("-c", "import dbnb"), ("-m", "dbnb", "--help")], ids=" ".join)
def test_start_up(benchmark, command):
    """A fresh interpreter."""
    run = [sys.executable, *command]
    benchmark.pedantic(lambda: subprocess.run(run, check=True, stdout=subprocess.DEVNULL), rounds=5, warmup_rounds=1)
