"""A frozen base in fewer bits: what is kept so, and that adapters train, resume and reload on it."""

from __future__ import annotations

import dataclasses
import re
import sys

import numpy as np
import pytest
import torch
from families import write
from torch.nn import Linear

from dbnb import export
from dbnb.adapters import add_adapters, trainable_parameters
from dbnb.checkpoints import check_resume
from dbnb.config import DreamBoothConfig
from dbnb.dataset import DreamBoothDataset
from dbnb.models import ARCHITECTURES, check_base, load_components
from dbnb.planner import BASES
from dbnb.prior import class_images
from dbnb.quantization import QUANTIZATIONS, check_quantization, size_of
from dbnb.training import batch_at, train, training_step
from dbnb.validation import draw

FORMATS = {"nf4": "nf4", "int8": "int8", "fp8": "float8_e4m3fn"}
# A prediction's distance from the whole base's: 4 bits round more than 8, and fp8 has fewer for the digits than int8.
FAR = {"nf4": 0.4, "int8": 0.05, "fp8": 0.15}


@pytest.fixture(params=QUANTIZATIONS)
def kind(request, monkeypatch):
    """A quantization whose library is installed."""
    pytest.importorskip(QUANTIZATIONS[request.param].package)
    if request.param == "nf4":
        # diffusers wants a GPU for it, which transformers and bitsandbytes itself do not.
        from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

        monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda _, places: places or {"": "cpu"})
        # Some CPUs pack weights anew when they draw, which layers narrower than 64 cannot have.
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> the folder of its checkpoint: UNets, transformers, a large text encoder of each kind."""
    return {name: write(name, tmp_path_factory.mktemp(name)) for name in ("sdxl", "if", "sd3", "flux", "z_image")}


@pytest.fixture
def small(concept, class_paths):
    """The sample subject and six dogs at 32 px."""
    return DreamBoothDataset(
        concept.paths, concept.instance_prompt, class_paths=class_paths, class_prompt=concept.class_prompt, size=32
    )


def _formats(module: torch.nn.Module, names) -> set[str]:
    """The formats of the weights of some layers."""
    return {size_of(module.get_submodule(name).weight).format for name in names}


@pytest.mark.parametrize("family", ["sdxl", "if", "sd3", "flux", "z_image"])
def test_blocks_and_large_text_encoders_are_in_fewer_bits_and_all_else_is_whole(kind, folders, family):
    base, whole = load_components(folders[family], quantization=kind), load_components(folders[family])
    linear = {name for name, layer in base.denoiser.named_modules() if isinstance(layer, Linear)}
    inside = set(base.network.linear_layers(base.denoiser))
    outside = linear - inside - ({"proj_out"} if family == "flux" else set())  # called like a block's
    assert inside and _formats(base.denoiser, inside) == {FORMATS[kind]}
    assert outside and _formats(base.denoiser, outside) == {"float32"}
    for name, (_, encoder, architecture) in base.text_encoders().items():
        formats = {size_of(p).format for p in encoder.parameters()}
        assert formats == ({"float32", FORMATS[kind]} if architecture.large else {"float32"}), name
    for few, many in zip(base.table(), whole.table(), strict=True):
        assert few["parameters"] == many["parameters"] and few["class"] == many["class"]
    few, many = (sum(size_of(p).bytes for p in parts.denoiser.parameters()) for parts in (base, whole))
    weights = sum(whole.denoiser.get_submodule(name).weight.numel() for name in inside)
    assert many - few == pytest.approx((4 - QUANTIZATIONS[kind].bytes_per_weight) * weights, rel=0.1)  # small layers
    assert base.dtype == torch.float32 and FORMATS[kind] in str(base)


@pytest.mark.parametrize("family", ["sdxl", "if", "sd3", "flux", "z_image"])
def test_training_resumes_and_the_adapter_reloads_on_a_base_in_fewer_bits(
    kind, folders, family, small, concept, tmp_path
):
    text = family != "z_image" and (family, kind) != ("if", "nf4")  # refused by name
    config = DreamBoothConfig(
        base=str(folders[family]),
        quantization=kind,
        output_dir=str(tmp_path),
        resolution=32,
        max_train_steps=2,
        train_batch_size=2,
        train_text_encoder=text,
        learning_rate=5e-2,
        text_encoder_learning_rate=5e-2,
        rank=2,
        num_inference_steps=3,
        checkpointing_steps=1,
        validation_steps=0,
        gradient_checkpointing=True,
        sample_batch_size=3,
        tokenizer_max_length=64 if family == "z_image" else 16,
    )

    def trained(config):
        components = load_components(folders[family], quantization=kind)
        add_adapters(components, config.adapters)
        train(config, components, small)
        return components

    # What a run asks first would refuse nf4 here.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dbnb.training.check_quantization", lambda *_: None)
        through = trained(config)
        resumed = trained(dataclasses.replace(config, resume_from_checkpoint=str(tmp_path / "checkpoint-1")))
    for (name, mine), (_, other) in zip(
        trainable_parameters(through.denoiser), trainable_parameters(resumed.denoiser), strict=True
    ):
        assert mine.dtype == torch.float32 and torch.equal(mine, other), name
    assert any(p.any() for name, p in trainable_parameters(through.denoiser) if "lora_B" in name)

    adapter = export.save_adapters(through, tmp_path)
    assert export.verify_reload(through, adapter, concept, config.sampling) <= 2
    prompts = [concept.instance_prompt] * 2
    pictures = [
        np.stack([np.asarray(picture, int) for picture in draw(through, prompts, config.sampling, pipeline=pipeline)])
        for pipeline in (None, export.reload_pipeline(through, adapter))
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2
    with pytest.raises(ValueError, match=f"quantization was '{kind}' and is None"):
        check_resume(
            dataclasses.replace(config, quantization=None, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_predictions_and_gradients_are_near_the_whole_bases(kind, folders, small, dtype):
    records = []
    for quantization in (None, kind):
        base = load_components(folders["flux"], quantization=quantization, weight_dtype=dtype)
        add_adapters(base, rank=2)
        record = training_step(base, batch_at(small, 0, 2), seed=0, tokenizer_max_length=16)
        record.loss.backward()
        gradients = torch.cat([p.grad.flatten() for _, p in trainable_parameters(base.denoiser)])
        records.append((record.prediction.detach().float(), gradients))
    for (whole, fewer), what in zip(zip(*records, strict=True), ("prediction", "gradients"), strict=True):
        distance = (whole - fewer).norm() / whole.norm()
        assert 0 < distance < FAR[kind], what


def test_class_images_of_a_base_in_fewer_bits_are_others(kind, folders, concept):
    made = []
    for quantization in (None, kind):
        base = load_components(folders["sd3"], quantization=quantization)
        options = dict(resolution=32, num_inference_steps=2, batch_size=2, max_sequence_length=16)
        made.append(class_images(base, concept.class_prompt, 2, **options))
    assert made[1].decision == "generate"
    assert made[0].paths[0].parent != made[1].paths[0].parent


def test_what_is_missing_is_said_with_the_line_that_mends_it(monkeypatch):
    cpu = torch.device("cpu")
    check_quantization(None, cpu)
    with pytest.raises(
        ValueError, match="'nf4' needs a CUDA device, and there is none: use int8, fp8, or leave it out"
    ):
        check_quantization("nf4", cpu)
    for kind, device in (("int8", cpu), ("fp8", cpu), ("nf4", torch.device("cuda"))):
        package = QUANTIZATIONS[kind].package
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=rf"'{kind}' needs {package} \(.*\): pip install -U {package}\.$"):
            check_quantization(kind, device)


def test_adapters_that_could_not_be_loaded_again_are_refused(folders):
    options = dict(resolution=32, train_text_encoder=True)
    with pytest.raises(ValueError, match="quantization='nf4': diffusers loads no adapters of a large text encoder"):
        check_base(folders["if"], quantization="nf4", **options)
    check_base(folders["if"], quantization="int8", **options)
    check_base(folders["flux"], quantization="nf4", **options)  # its T5 gets none


def test_options_and_plans_name_what_there_is():
    with pytest.raises(ValueError, match=re.escape("quantization='int4' must be one of nf4, int8, fp8")):
        DreamBoothConfig(quantization="int4")
    for kind in QUANTIZATIONS:
        assert DreamBoothConfig(quantization=kind).quantization == kind
    large = {name for name, row in ARCHITECTURES.items() if row.large}
    assert large == {"T5EncoderModel", "Qwen3ForCausalLM", "Qwen3Model"}
    planned = [base for base in BASES.values() if base.text_fewer_bits]
    assert len(planned) == 3 and all(set(base.text_fewer_bits) == set(QUANTIZATIONS) for base in planned)
