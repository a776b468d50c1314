"""A base grown to twice the side: what it knew is kept, and the command resumes."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from dbnb import miniature
from dbnb.miniature import design, evaluate, grow
from dbnb.miniature.data import photographs


@pytest.fixture
def base(small_base):
    return StableDiffusionPipeline.from_pretrained(small_base)


def test_a_widened_unet_predicts_what_it_did_and_nothing_new(base):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 6, 16, 16, generator=generator)
    text = torch.randn(2, 24, design.TEXT_WIDTH, generator=generator)
    with torch.no_grad():
        before = base.unet(latents, 500, text).sample
        wide = grow.widen_unet(base.unet, 12)
        after = wide(torch.cat([latents, torch.zeros_like(latents)], 1), 500, text).sample
        assert torch.allclose(after[:, :6], before, atol=1e-5) and not after[:, 6:].any()
        assert not torch.allclose(wide(latents.repeat(1, 2, 1, 1), 500, text).sample[:, :6], before, atol=1e-2)
    assert wide.config.in_channels == wide.config.out_channels == 12


def test_a_grown_autoencoder_has_twice_the_side_and_most_of_the_small_one(base):
    large = grow.grow_vae(base.vae)
    pictures = torch.zeros(1, 3, 128, 128)
    with torch.no_grad():
        posterior = large.encode(pictures).latent_dist
        assert posterior.mean.shape == (1, 12, 16, 16) and large.decode(posterior.mean).sample.shape == pictures.shape
        latents = torch.randn(1, 6, 16, 16, generator=torch.Generator().manual_seed(0))
        inner = [
            vae.decoder.mid_block(vae.decoder.conv_in(vae.post_quant_conv(z)))
            for vae, z in ((base.vae, latents), (large, torch.cat([latents, torch.zeros_like(latents)], 1)))
        ]
    assert torch.allclose(*inner, atol=1e-4)


@pytest.mark.long
@pytest.mark.commands
def test_the_command_grows_a_base_resumes_and_ships(small_base, tmp_path):
    options = [
        "--start_from",
        str(small_base),
        "--output_dir",
        str(tmp_path / "run"),
        "--photographs",
        "24",
        "--batch_sizes",
        *"226",
    ]
    grow.main([*options, "--steps", *"222", "--ship", str(tmp_path / "large")])
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "large")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a photo of a red dog", num_inference_steps=2).images[0]
    assert image.size == (128, 128)
    configs = [json.loads(path.read_text()) for path in (tmp_path / "large").glob("*/config.json")]
    assert len(configs) > 5 and not any("_name_or_path" in config for config in configs)
    recipe = json.loads((tmp_path / "large" / "training.json").read_text())
    assert [stage["step"] for stage in recipe["grown"]["stages"].values()] == [2, 2, 2]
    grow.main([*options, "--steps", *"232", "--stages", "unet"])
    assert torch.load(tmp_path / "run" / "unet.pt", weights_only=True)["step"] == 3
    with pytest.raises(ValueError, match="was made from"):
        grow.main([*options, "--steps", *"242", "--stages", "unet", "--seed", "1"])


@pytest.mark.long
def test_the_judge_reads_large_photographs_of_the_same_toys(tmp_path):
    small, labels = photographs("test", 24, tmp_path)
    large, same = photographs("test", 24, tmp_path, size=grow.SIZE)
    assert large.shape == (24, 128, 128, 3) and (labels == same).all() and len(list(tmp_path.iterdir())) == 2
    judge = evaluate.Judge(miniature.path())
    assert min(evaluate.accuracy(judge(large), labels).values()) > 0.9
    assert abs(large.reshape(24, 64, 2, 64, 2, 3).mean((2, 4)) - small).mean() < 2.0
