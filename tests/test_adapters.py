"""Step 4: where adapters sit, how many weights they have, and that they change nothing at first."""

from __future__ import annotations

import pytest
import torch
from peft.tuners import lora

from dbnb.adapters import (
    ATTENTION,
    adapted_modules,
    adapter_table,
    add_adapters,
    lora_targets,
    strength,
    train_mode,
    trainable_parameters,
)
from dbnb.config import AdapterSettings, DreamBoothConfig, adapters_of, sampling_of
from dbnb.models import encode_prompts, load_components


def test_adapters_change_nothing_at_first(components):
    sample, t = torch.randn(2, 12, 16, 16), torch.tensor([10, 900])
    with torch.no_grad():
        hidden = encode_prompts(components, ["a dog", "a cat"])
        before = components.unet(sample, t, encoder_hidden_states=hidden).sample
        add_adapters(components, rank=4, train_text_encoder=True)
        assert torch.equal(encode_prompts(components, ["a dog", "a cat"]), hidden)
        assert torch.equal(components.unet(sample, t, encoder_hidden_states=hidden).sample, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trainable_weights_are_float32_whatever_the_base(dtype):
    components = load_components("miniature", weight_dtype=dtype)
    add_adapters(components, rank=2, train_text_encoder=True)
    for module in adapted_modules(components).values():
        assert {p.dtype for _, p in trainable_parameters(module)} == {torch.float32}
        assert dtype in {p.dtype for p in module.parameters()}


def test_rank_and_alpha_are_separate_and_counted(components):
    add_adapters(
        components,
        AdapterSettings(rank=4, lora_alpha=8, train_text_encoder=True, text_encoder_rank=2, text_encoder_lora_alpha=1),
    )
    rows = adapter_table(components)
    assert {(row["part"], row["rank"], row["alpha"]) for row in rows} == {
        ("unet", "4", "8"),
        ("text_encoder", "2", "1"),
    }
    # Four projections in each of the text encoder's three layers.
    assert sum(row["part"] == "text_encoder" for row in rows) == 12
    total = sum(int(row["parameters"].replace(",", "")) for row in rows)
    assert total == sum(p.numel() for m in adapted_modules(components).values() for _, p in trainable_parameters(m))


def test_rslora_scales_by_the_root_of_the_rank(components):
    add_adapters(components, rank=16, lora_alpha=8, use_rslora=True)
    scales = {m.scaling["default"] for m in components.unet.modules() if hasattr(m, "lora_A")}
    assert scales == {8 / 16**0.5}


def test_dora_keeps_magnitude_and_direction_apart(components):
    add_adapters(components, rank=4, use_dora=True)
    layer = next(m for m in components.unet.modules() if hasattr(m, "lora_A"))
    magnitude = layer.lora_magnitude_vector["default"].weight
    weight = layer.base_layer.weight.detach()
    assert magnitude.requires_grad and torch.allclose(magnitude, weight.norm(dim=1), rtol=1e-5)
    torch.manual_seed(0)
    layer.lora_B["default"].weight.data.normal_()
    moved = weight + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    x = torch.randn(2, weight.shape[1])
    # Liu et al., 2024, eq. 5: the magnitude stays what it was while the direction turns.
    expected = x @ (magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)).T
    bias = layer.base_layer.bias
    assert torch.allclose(layer(x), expected if bias is None else expected + bias, atol=1e-4)


def test_in_training_only_the_adapters_drop_out():
    components = load_components("miniature")
    add_adapters(
        components, AdapterSettings(rank=2, lora_dropout=0.5, train_text_encoder=True, text_encoder_lora_dropout=0.5)
    )
    own = torch.nn.Dropout(0.9)  # as T5 and Roberta have them
    components.text_encoder.add_module("own", own)
    train_mode(components.text_encoder)
    training = [name for name, part in components.text_encoder.named_modules() if part.training]
    assert training and all("lora_dropout" in name for name in training)


def test_the_same_seed_gives_the_same_adapters_and_leaves_global_randomness_alone():
    states = []
    for _ in range(2):
        components = load_components("miniature")
        state = torch.get_rng_state()
        add_adapters(components, rank=2, seed=7)
        assert torch.equal(torch.get_rng_state(), state)
        states.append([p.clone() for _, p in trainable_parameters(components.unet)])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_on_a_cpu_a_layer_takes_one_product_and_computes_what_peft_computes(components, part, monkeypatch):
    add_adapters(components, rank=4, lora_alpha=8, train_text_encoder=True)
    module = components.modules()[part]
    layer = next(m for m in module.modules() if isinstance(m, lora.Linear))
    layer.lora_B["default"].weight.data.normal_()
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)

    def compute(forward):
        layer.zero_grad()
        x.grad = None
        y = forward(x)
        y.square().sum().backward()
        return y, x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad

    ours, theirs = compute(layer), compute(lambda x: lora.Linear.forward(layer, x))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max()
    asked = []
    monkeypatch.setattr(lora.Linear, "forward", lambda self, x, *_, **__: asked.append(1))
    layer(x)
    with torch.no_grad():  # as pictures are drawn
        layer(x)
    assert not asked
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    module.disable_adapters()
    layer(x)
    assert len(asked) == 2


_PARTS = ("down_blocks", "mid_block", "up_blocks")


def test_lora_layers_say_where_adapters_sit(components):
    unet = components.unet
    of_blocks = {
        name
        for name, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and name.startswith(_PARTS)
    }
    add_adapters(components, rank=2, lora_layers="all")
    adapted = {name for name, layer in unet.named_modules() if hasattr(layer, "lora_A")}
    assert adapted == of_blocks and any(name.endswith("conv1") for name in adapted)
    rows = adapter_table(components)
    assert {row["layer"] for row in rows} == adapted
    total = sum(int(row["parameters"].replace(",", "")) for row in rows)
    assert total == sum(p.numel() for _, p in trainable_parameters(unet))
    assert lora_targets(unet, "attention") == list(ATTENTION)
    named = load_components("miniature")
    add_adapters(named, rank=2, lora_layers="to_q, conv1")
    ends = {name.rsplit(".", 1)[1] for name, layer in named.unet.named_modules() if hasattr(layer, "lora_A")}
    assert ends == {"to_q", "conv1"}


def test_a_block_stands_for_all_of_its_layers_and_no_gradient_is_computed_before_it(components):
    unet, last = components.unet, "up_blocks.2"
    wanted = {name for name in lora_targets(unet, f"to_q,{last}") if name != "to_q"}
    assert wanted == {
        name
        for name, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and name.startswith(f"{last}.")
    }
    add_adapters(components, rank=2, lora_layers=last)
    assert {name for name, layer in unet.named_modules() if hasattr(layer, "lora_A")} == wanted
    needs_gradient = {}
    hooks = [
        unet.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: needs_gradient.update({name: output.requires_grad})
        )
        for name in ("up_blocks.1.resnets.1", f"{last}.resnets.1")
    ]
    sample, hidden = torch.randn(1, unet.config.in_channels, 16, 16), torch.randn(1, 24, 128)
    unet(sample, 500, encoder_hidden_states=hidden)
    assert [hook.remove() for hook in hooks] and needs_gradient == {
        "up_blocks.1.resnets.1": False,
        f"{last}.resnets.1": True,
    }


@pytest.mark.parametrize("only, counts", [("", 1), ("up_blocks.2.", 1), ("down_blocks.0.", 0)])
def test_strength_counts_the_layers_it_is_told_and_puts_all_back(components, only, counts):
    add_adapters(components, lora_layers="all", rank=2)
    layers = {name: m for name, m in components.unet.named_modules() if isinstance(m, lora.LoraLayer)}
    nudged = next(name for name in layers if name.startswith("up_blocks.2."))
    torch.nn.init.ones_(layers[nudged].lora_B["default"].weight)
    trained = {name: layer.scaling["default"] for name, layer in layers.items()}
    sample, hidden = torch.randn(1, components.unet.config.in_channels, 16, 16), torch.randn(1, 24, 128)

    def answer() -> torch.Tensor:
        with torch.no_grad():
            return components.unet(sample, 500, encoder_hidden_states=hidden).sample

    whole = answer()
    with strength(components, 0.0):
        plain = answer()
    with strength(components, 1.0, only=only):
        assert torch.allclose(answer(), whole if counts else plain, atol=1e-5)
    assert not torch.allclose(whole, plain, atol=1e-3)
    assert {name: layer.scaling["default"] for name, layer in layers.items()} == trained
    with pytest.raises(ValueError, match="no adapted layer"), strength(components, 1.0, only="up_block.2"):
        pass


@pytest.mark.parametrize("wrong", ["to_z", "to_q,conv9", "to_q,", "Attention"])
def test_a_layer_that_no_base_has_is_refused_by_name(components, wrong):
    with pytest.raises(ValueError, match="lora_layers=.*no layer or block of this base.*conv1"):
        lora_targets(components.unet, wrong)


@pytest.mark.parametrize("place", ["conv1", "conv_shortcut", "downsamplers.0.conv", "proj_in", "ff.net.2"])
def test_a_narrow_layer_of_any_kind_trains_as_pefts_own(components, place):
    add_adapters(components, rank=4, lora_alpha=8, lora_layers="all")
    layer = next(m for name, m in components.unet.named_modules() if name.endswith(place) and hasattr(m, "lora_A"))
    torch.manual_seed(0)
    layer.lora_B["default"].weight.data.normal_()
    channels = layer.base_layer.weight.shape[1]
    x = torch.randn(3, channels, 6, 6) if isinstance(layer, lora.Conv2d) else torch.randn(3, 5, channels)
    results = []
    for forward in (layer.forward, lambda x: type(layer).forward(layer, x)):
        x = x.detach().requires_grad_()
        layer.zero_grad()
        y = forward(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append([y, x.grad, *(half["default"].weight.grad.clone() for half in (layer.lora_A, layer.lora_B))])
    for mine, other in zip(*results, strict=True):
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("options", [dict(lora_dropout=0.5), dict(use_dora=True)], ids=str)
def test_dropout_and_dora_are_pefts_own(components, options, monkeypatch):
    add_adapters(components, rank=4, **options)
    layer = next(m for m in components.unet.modules() if isinstance(m, lora.Linear))
    asked = []
    monkeypatch.setattr(lora.Linear, "forward", lambda self, x, *_, **__: asked.append(1))
    layer(torch.randn(2, 5, layer.in_features))
    assert asked


def test_settings_are_said_as_a_record_as_a_runs_or_by_name():
    config = DreamBoothConfig(rank=4, lora_layers="attention", seed=3)
    said = (adapters_of(config), adapters_of(config.adapters), adapters_of(lora_layers="attention", rank=4, seed=3))
    assert said[0] == said[1] == said[2] and adapters_of(config, rank=2).rank == 2
    drawn = (sampling_of(config), sampling_of(config.sampling), sampling_of(resolution=128, seed=3))
    assert drawn[0] == drawn[1] == drawn[2] and sampling_of().num_inference_steps == config.num_inference_steps
    with pytest.raises(TypeError, match="ranks"):
        adapters_of(ranks=4)
