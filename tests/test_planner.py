"""The memory plan: counted without storage, and equal to what a real step and a real picture take."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from peft import LoraConfig
from resident import measured_and_planned

from dbnb import planner
from dbnb.adapters import lora_targets
from dbnb.denoisers import NETWORKS, Told
from dbnb.planner import BASES, CARDS, Base, LiveTensors, drawing_memory, peak_memory, training_memory, weight_memory
from dbnb.quantization import QUANTIZATIONS

SMALL = Base(
    dict(
        sample_size=32,
        attention_head_dim=4,
        cross_attention_dim=48,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    256,
    1000,
    2000,
    text_length=24,
)


SMALL_FLOWS = [
    Base(
        dict(
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=48,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        ),
        256,
        1000,
        2000,
        text_length=24,
        network="SD3Transformer2DModel",
    ),
    Base(
        dict(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=True,
        ),
        256,
        1000,
        2000,
        text_length=24,
        network="FluxTransformer2DModel",
    ),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora_layers", ["attention", "all"])
@pytest.mark.parametrize("base", [SMALL, *SMALL_FLOWS], ids=lambda base: base.network)
def test_the_plan_is_what_is_alive_in_a_real_training_step(base, lora_layers, checkpointing):
    network = NETWORKS[base.network]
    denoiser = network.network_class(**base.denoiser).requires_grad_(False)
    denoiser.add_adapter(LoraConfig(r=4, target_modules=lora_targets(denoiser, lora_layers)))
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    told = Told(torch.tensor([1, 2, 3, 4]), torch.randn(4, 24, 48), torch.randn(4, 32), 256)
    noisy = torch.randn(4, denoiser.config.in_channels // network.packed, 32, 32)
    with LiveTensors() as live:
        network.call(denoiser.train(), noisy, told).square().mean().backward()
    options = dict(lora_layers=lora_layers, gradient_checkpointing=checkpointing)
    plan = training_memory(base, rank=4, batch=4, bytes_per_weight=4, **options)
    assert plan["activations"] == pytest.approx(live.peak, rel=0.1)
    trainable = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in denoiser.parameters() if not p.requires_grad)
    frozen += sum(buffer.numel() for buffer in denoiser.buffers())
    assert plan["adapters"] == 16 * trainable and plan["weights"] == 4 * (frozen + 3000)


def test_with_checkpointing_the_recomputed_block_counts():
    kept, recomputed = (training_memory(SMALL, gradient_checkpointing=on)["activations"] for on in (True, False))
    hidden = 2 * 32 * 32 * 32  # elements of one tensor of the first block, for two pictures
    assert 2 * 10 * hidden < kept < recomputed  # a block alone holds a dozen of them


def test_live_tensors_follow_storages_and_not_views():
    before = torch.ones(100)
    with LiveTensors() as live:
        first = torch.ones(1000) + 1.0  # the ones and their sum at once
        view = first.view(10, 100)[:, :50]
        first.add_(before.sum())
        assert live.now == 4000 and live.peak >= 8000
        del first, view
        assert live.now == 0


def test_the_peaks_of_a_run_hold_all_that_is_there_at_once():
    step, drawing = training_memory(SMALL, batch=2), drawing_memory(SMALL, pictures=4)
    peaks = peak_memory(SMALL, pictures=4, batch=2)
    assert peaks["training"] == sum(step.values()) and drawing["vae"] == 0
    assert peaks["drawing"] == step["weights"] + step["adapters"] + drawing["denoiser"]
    resting = peak_memory(SMALL, pictures=4, batch=2, cached=True)
    assert peaks["training"] - resting["training"] == 2 * 3000 and peaks["drawing"] == resting["drawing"]
    twice = drawing_memory(SMALL, pictures=8)
    assert twice["denoiser"] == pytest.approx(2 * drawing["denoiser"], rel=0.02)
    assert 12 in CARDS


def test_a_network_that_is_told_its_guidance_draws_with_one_prediction_a_picture():
    told = next(base for base in SMALL_FLOWS if base.denoiser.get("guidance_embeds"))
    untold = dataclasses.replace(told, denoiser=told.denoiser | {"guidance_embeds": False})
    one, two = (drawing_memory(base, pictures=8)["denoiser"] for base in (told, untold))
    assert two == pytest.approx(2 * one, rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's account of a process")
@pytest.mark.parametrize("phase", ["training", "checkpointing", "drawing", "decoding"])
def test_the_plan_holds_in_resident_memory_within_15_percent(phase):
    numbers = measured_and_planned(phase)
    assert numbers["planned"] == pytest.approx(numbers["measured"], rel=0.15)


@pytest.mark.parametrize("base", [SMALL, *SMALL_FLOWS], ids=lambda base: base.network)
def test_layouts_that_are_known_from_an_earlier_operation_change_no_number(monkeypatch, base):
    plans = [training_memory(base, gradient_checkpointing=on) for on in (True, False)]
    monkeypatch.setattr(planner, "_shares_no_storage", lambda function: False)
    assert [training_memory(base, gradient_checkpointing=on) for on in (True, False)] == plans


@pytest.mark.long
def test_published_sizes_and_what_checkpointing_saves():
    base = BASES["Stable Diffusion 1.5"]
    plan = training_memory(base, batch=2)
    assert plan["weights"] == 2 * (859_520_964 + 123_060_480 + 83_653_863)
    assert training_memory(base, batch=2, gradient_checkpointing=True)["activations"] < plan["activations"] / 3
    assert training_memory(base, batch=4)["activations"] == pytest.approx(2 * plan["activations"], rel=0.01)


def test_every_base_has_its_published_size():
    published = {"Stable Diffusion 2.1": 865_910_724, "Stable Diffusion XL": 2_567_463_684, "DeepFloyd IF": 4.3e9}
    published |= {"Stable Diffusion 3.5 medium": 2.47e9, "FLUX.1 [dev]": 11.9e9}
    for name, parameters in published.items():
        base = BASES[name]
        denoiser = weight_memory(base, bytes_per_weight=1) - base.text_parameters - base.vae_parameters
        assert denoiser == pytest.approx(parameters, rel=0.002), name
    for name, base in BASES.items():
        if base.vae is not None:
            with torch.device("meta"):
                vae = AutoencoderKL(**base.vae)
            assert sum(p.numel() for p in vae.parameters()) == base.vae_parameters, name


@pytest.mark.parametrize("base", [SMALL, *SMALL_FLOWS], ids=lambda base: base.network)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_grow_in_proportion_to_the_pictures(base, checkpointing):
    plans = [training_memory(base, batch=batch, gradient_checkpointing=checkpointing) for batch in (2, 4)]
    assert plans[1]["activations"] == pytest.approx(2 * plans[0]["activations"], rel=0.05)
    assert plans[1]["weights"] == plans[0]["weights"]


@pytest.mark.long
@pytest.mark.parametrize("base", [SMALL, *SMALL_FLOWS], ids=lambda base: base.network)
def test_what_rests_and_what_is_in_fewer_bits_is_not_counted_in_full(base):
    whole = training_memory(base, batch=2)
    alone = training_memory(base, batch=2, cached=True)
    assert whole["weights"] - alone["weights"] == 2 * 3000
    blocks, fewer_texts = NETWORKS[base.network].blocks, dataclasses.replace(base, text_fewer_bits={"int8": 700})
    denoiser = NETWORKS[base.network].network_class(**base.denoiser)
    layers = [m for n, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear) and blocks.fullmatch(n)]
    for kind, how in QUANTIZATIONS.items():
        fewer = training_memory(base, batch=2, cached=True, quantization=kind)
        saved = (2 - how.bytes_per_weight) * sum(layer.weight.numel() for layer in layers)
        assert saved > 0 and alone["weights"] - fewer["weights"] == pytest.approx(saved, abs=1)
        assert fewer["activations"] == alone["activations"]
    whole, fewer = (weight_memory(one, quantization="int8") for one in (base, fewer_texts))
    assert whole - fewer == 700
