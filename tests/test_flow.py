"""A small Stable Diffusion 3 on the miniature's latents: what it takes over, and a command that resumes and ships."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPTextModel

from dbnb import miniature, toybox
from dbnb.config import DreamBoothConfig
from dbnb.drawing import build_pipeline, draw_images
from dbnb.metrics import load_encoders
from dbnb.miniature import design, flow
from dbnb.miniature.evaluate import Judge
from dbnb.miniature.stages import tokenize
from dbnb.models import embed_prompts, load_components
from dbnb.presets import suggested

CAPTIONS = ["a photo of a red dog on the beach", "a photo of a sks cat", ""]


def test_words_are_told_as_the_trained_encoder_understands_them():
    trained = CLIPTextModel.from_pretrained(miniature.path() / "text_encoder")
    tokens = tokenize(design.tokenizer(), CAPTIONS)
    with torch.no_grad():
        before = trained(tokens, output_hidden_states=True).hidden_states[-1]
        told = flow.first_text_encoder(trained)(tokens, output_hidden_states=True).hidden_states[-2]
    assert torch.cosine_similarity(before.flatten(), told.flatten(), dim=0) > 1 - 1e-6
    assert told.std() == pytest.approx(1, rel=0.2)


def test_an_untrained_transformer_changes_nothing_and_says_nothing():
    torch.manual_seed(0)
    model = flow.Model(miniature.path())
    latents = torch.randn(3, model.transformer.config.in_channels, design.LATENT_SIZE, design.LATENT_SIZE)
    told = model.conditions(tokenize(design.tokenizer(), CAPTIONS))
    assert told["encoder_hidden_states"].shape == (
        3,
        design.TEXT_LENGTH + flow.FEW,
        design.TEXT_WIDTH + flow.SECOND_WIDTH,
    )
    assert not told["encoder_hidden_states"][:, -flow.FEW :].any()
    predicted = model.transformer(latents, timestep=torch.full((3,), 500.0), **told).sample
    assert predicted.shape == latents.shape and not predicted.any()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "text_encoder.text_projection.weight" in trained
    assert not any(name.startswith("text_encoder.text_model.encoder.layers.0.") for name in trained)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of the training, its options, the shipped base) after four steps."""
    folder = tmp_path_factory.mktemp("flow")
    options = ["--output_dir", str(folder / "run"), "--photographs", "24", "--batch_size", "4"]
    flow.main([*options, "--steps", "4", "--ship", str(folder / "base")])
    return folder / "run", options, folder / "base"


@pytest.mark.long
def test_plain_diffusers_draws_with_what_is_shipped(run, tmp_path):
    code = (
        "import sys; from diffusers import StableDiffusion3Pipeline as P; "
        f"p = P.from_pretrained({str(run[2])!r}); "
        "i = p('a photo of a red dog on the beach', num_inference_steps=2).images[0]; "
        "print(i.size, 'dbnb' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert output.stdout.strip().endswith("(128, 128) False")
    assert sum(path.stat().st_size for path in run[2].rglob("*") if path.is_file()) <= 20e6


def test_the_command_resumes_and_trains_what_is_to_be_trained(run):
    folder, options, base = run
    first = torch.load(folder / "flow.pt", weights_only=True)
    flow.main([*options, "--steps", "6"])
    resumed = torch.load(folder / "flow.pt", weights_only=True)
    assert (first["step"], resumed["step"]) == (4, 6)
    moved = {name for name, value in first["models"].items() if not torch.equal(value, resumed["models"][name])}
    assert "transformer.proj_out.weight" in moved
    assert "text_encoder.text_model.embeddings.token_embedding.weight" not in moved
    with pytest.raises(ValueError, match="was made from"):
        flow.main([*options, "--steps", "8", "--seed", "1"])
    assert json.loads((base / "training.json").read_text())["stages"]["flow"]["step"] == 4


def test_the_workflow_takes_it_for_a_small_flow(run):
    components = load_components(run[2])
    assert components.absent() == [] and suggested(str(run[2]))["resolution"] == 128
    model, words = flow.Model(miniature.path()), design.tokenizer()
    flow.restore("flow", model, run[0])
    assert load_encoders(run[2]).identity.config.model_type == "resnet"
    with torch.no_grad():
        hidden, pooled = embed_prompts(components, CAPTIONS, max_length=flow.FEW)
        told = model.conditions(tokenize(words, CAPTIONS))
    assert hidden.shape == told["encoder_hidden_states"].shape and pooled.shape == told["pooled_projections"].shape
    pipeline = StableDiffusion3Pipeline.from_pretrained(run[2])
    with torch.no_grad():
        expected = pipeline.encode_prompt(
            CAPTIONS, None, None, max_sequence_length=flow.FEW, do_classifier_free_guidance=False
        )
    assert torch.allclose(hidden, expected[0], atol=1e-5) and torch.allclose(pooled, expected[2], atol=1e-5)


def test_the_embedded_flow_base_is_a_preset_that_draws_and_is_small_enough():
    config = DreamBoothConfig(base="miniature-flow")
    components = load_components(config.base)
    assert components.absent() == [] and config.tokenizer_max_length == flow.FEW
    pictures = draw_images(
        build_pipeline(components), ["a photo of a red dog on the beach"] * 8, range(8), config.sampling
    )
    found = Judge(miniature.path())(np.stack([np.asarray(picture) for picture in pictures]))
    kind, scene = toybox.KINDS.index("dog"), [*toybox.SCENES].index("beach")
    assert (found[:, 0] == kind).all() and (found[:, 5] == scene).all()
    assert sum(path.stat().st_size for path in miniature.flow_path().rglob("*") if path.is_file()) <= 20e6
