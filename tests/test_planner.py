"""The memory plan: counted without storage, and equal to what a real forward pass keeps."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from dbnb.adapters import lora_targets
from dbnb.planner import BASES, Base, training_memory

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


@pytest.mark.parametrize("lora_layers", ["attention", "all"])
def test_the_plan_is_what_a_real_forward_pass_keeps(lora_layers):
    unet = UNet2DConditionModel(**SMALL.unet).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, target_modules=lora_targets(unet, lora_layers)))
    weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = unet(torch.randn(4, 4, 32, 32), torch.tensor([1, 2, 3, 4]), torch.randn(4, 24, 48)).sample
    real = sum(size for pointer, size in kept.items() if pointer not in weights)
    plan = training_memory(SMALL, rank=4, batch=4, bytes_per_weight=4, lora_layers=lora_layers)
    assert output.requires_grad and plan["activations"] == pytest.approx(real, rel=0.1)
    trainable = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in unet.parameters() if not p.requires_grad)
    assert plan["adapters"] == 16 * trainable and plan["weights"] == 4 * (frozen + 3000)


def test_published_sizes_and_what_checkpointing_saves():
    base = BASES["Stable Diffusion 1.5"]
    plan = training_memory(base, batch=2)
    assert plan["weights"] == 2 * (859_520_964 + 123_060_480 + 83_653_863)
    assert training_memory(base, batch=2, gradient_checkpointing=True)["activations"] < plan["activations"] / 3
    assert training_memory(base, batch=4)["activations"] == pytest.approx(2 * plan["activations"], rel=0.01)


def test_every_base_has_its_published_size_and_activations_in_proportion_to_the_pictures():
    published = {"Stable Diffusion 2.1": 865_910_724, "Stable Diffusion XL": 2_567_463_684, "DeepFloyd IF": 4.3e9}
    for name, parameters in published.items():
        base = BASES[name]
        plan = training_memory(base, batch=2, bytes_per_weight=1, gradient_checkpointing=True)
        unet = plan["weights"] - base.text_parameters - base.vae_parameters
        assert unet == pytest.approx(parameters, rel=0.002), name
        twice = training_memory(base, batch=4, bytes_per_weight=1, gradient_checkpointing=True)
        assert twice["activations"] == pytest.approx(2 * plan["activations"], rel=0.05), name
