"""The same seven functions on every model family that the workflow names."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from families import FAMILIES, write

from dbnb import export
from dbnb.adapters import adapted_modules, add_adapters, trainable_parameters
from dbnb.checkpoints import check_resume
from dbnb.config import AdapterSettings, DreamBoothConfig, Objective
from dbnb.dataset import (
    NOISE,
    POSTERIOR,
    SMALL_NOISE,
    TIMESTEP,
    DreamBoothDataset,
    cache_latents,
    seeded,
)
from dbnb.models import embed_prompts, load_components
from dbnb.prior import class_images
from dbnb.training import batch_at, idle_parts, precompute_embeds, train, training_step
from dbnb.validation import from_references, validation_images

TEXT_ENCODERS = {
    "sd1": "CLIPTextModel",
    "sd2": "CLIPTextModel",
    "sdxl": "CLIPTextModel, CLIPTextModelWithProjection",
    "alt": "RobertaSeriesModelWithTransformation",
    "if": "T5EncoderModel",
    "if2": "T5EncoderModel",
    "sd3": "CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel",
    "sd35": "CLIPTextModelWithProjection, CLIPTextModelWithProjection",
    "flux": "CLIPTextModel, T5EncoderModel",
    "schnell": "CLIPTextModel, T5EncoderModel",
    "z_image": "Qwen3Model",
}
FLOWS = dict.fromkeys(("sd3", "sd35", "flux", "schnell", "z_image"), "transformer")
LENGTHS = dict.fromkeys(FLOWS, 16) | {"z_image": 64}  # its tokens are letters here


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(name, folder) of one family's checkpoint."""
    return request.param, write(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def base(family):
    """Its parts, loaded anew."""
    return load_components(family[1])


@pytest.fixture
def small(concept, class_paths):
    """The sample subject and six dogs at 32 px."""
    return DreamBoothDataset(
        concept.paths, concept.instance_prompt, class_paths=class_paths, class_prompt=concept.class_prompt, size=32
    )


@pytest.fixture
def settings(family, tmp_path):
    return DreamBoothConfig(
        base=str(family[1]),
        output_dir=str(tmp_path),
        resolution=32,
        max_train_steps=2,
        train_batch_size=2,
        rank=2,
        num_inference_steps=3,
        checkpointing_steps=1,
        validation_steps=0,
        num_class_images=3,
        sample_batch_size=3,
        tokenizer_max_length=LENGTHS.get(family[0]),
    )


def test_parts_are_what_the_checkpoint_says(family, base):
    name, _ = family
    rows = {row["part"]: row["class"] for row in base.table()}
    assert ", ".join(rows[part] for part in base.text_encoders()) == TEXT_ENCODERS[name]
    assert ("vae" in rows) == (name not in ("if", "if2")) and base.upscales == (name == "if2")
    if name not in FLOWS:
        prediction = {"sd2": "v_prediction"}.get(name, "epsilon")
        assert base.noise_scheduler.config.prediction_type == prediction
    assert base.absent() == (["text_encoder_3"] if name == "sd35" else [])
    assert ("absent" in str(base)) == (name == "sd35")
    add_adapters(base, AdapterSettings(rank=2, train_text_encoder=True))
    adapted = {name: list(base.text_encoders()) for name in TEXT_ENCODERS}
    adapted |= dict.fromkeys(("sd3", "sd35"), ["text_encoder", "text_encoder_2"])
    adapted |= dict.fromkeys(("flux", "schnell"), ["text_encoder"]) | {"z_image": []}
    assert set(adapted_modules(base)) == {FLOWS.get(name, "unet"), *adapted[name]}
    layers = (n.split(".lora_A")[0] for n, _ in trainable_parameters(base.denoiser) if "lora_A" in n)
    added = {"if": {"add_k_proj", "add_v_proj"}, "if2": {"add_k_proj", "add_v_proj"}}
    added |= dict.fromkeys(("sd3", "sd35", "flux", "schnell"), {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"})
    targets = {layer.rsplit(".", 1)[-1] for layer in layers}
    assert targets == {"to_q", "to_k", "to_v", "0"} | added.get(name, set())


def test_prompts_are_embedded_as_the_pipeline_does_it(family, base, settings):
    name, _ = family
    from dbnb.drawing import build_pipeline

    pipeline, prompts = build_pipeline(base), ["a photo of a sks dog", "a photo of a dog"]
    with torch.no_grad():
        hidden, pooled = embed_prompts(base, prompts)
        if name == "sdxl":
            expected, _, expected_pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
            assert torch.allclose(pooled, expected_pooled, atol=1e-6)
        elif name in ("if", "if2"):
            expected, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
            assert hidden.shape[1] == 77
        elif name == "z_image":
            encoded, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
            assert hidden.shape[1] == 512 and [len(words) for words in encoded] == [len(w[w.any(-1)]) for w in hidden]
            expected = torch.nn.utils.rnn.pad_sequence([*encoded, hidden[0]], batch_first=True)[:2]
        elif name in FLOWS:
            further = {"do_classifier_free_guidance": False} if name in ("sd3", "sd35") else {}
            prompts_3 = {"prompt_3": prompts} if name in ("sd3", "sd35") else {}
            encoded = pipeline.encode_prompt(prompts, prompts, **prompts_3, **further)
            expected, expected_pooled = [part for part in encoded if part is not None][:2]
            assert hidden.shape == expected.shape and torch.allclose(pooled, expected_pooled, atol=1e-6)
        else:
            expected, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    assert torch.allclose(hidden, expected, atol=1e-6)


def test_the_loss_is_the_one_written_out(family, base, small):
    name, _ = family
    if name in FLOWS:
        pytest.skip("a flow's is written out in the next test")
    batch = batch_at(small, 0, 2)
    record = training_step(base, batch, seed=0)
    hidden, pooled = embed_prompts(base, batch["prompts"])
    alphas = base.noise_scheduler.alphas_cumprod[record.timesteps].view(-1, 1, 1, 1)
    noisy = alphas.sqrt() * record.latents + (1 - alphas).sqrt() * record.noise
    assert torch.allclose(noisy, record.noisy_latents, atol=1e-5)
    seen, further = noisy, {}
    if name == "sdxl":
        ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 4)
        further = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
    if name == "if2":
        draws = [seeded(0, SMALL_NOISE, half, n) for half in range(2) for n in batch["n"]]
        noise = torch.stack([torch.randn(3, 32, 32, generator=generator) for generator in draws])
        large = F.interpolate(F.avg_pool2d(record.latents, 4), size=32, mode="bilinear", align_corners=True)
        seen = torch.cat([noisy, alphas.sqrt() * large + (1 - alphas).sqrt() * noise], dim=1)
        further = {"class_labels": record.timesteps}
    prediction = base.unet(seen, record.timesteps, encoder_hidden_states=hidden, **further).sample
    if name in ("if", "if2"):
        assert prediction.shape[1] == 6
        prediction = prediction[:, :3]
    target = record.noise if name != "sd2" else alphas.sqrt() * record.noise - (1 - alphas).sqrt() * record.latents
    loss = F.mse_loss(prediction[:2], target[:2]) + F.mse_loss(prediction[2:], target[2:])
    assert record.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    known = precompute_embeds(base, small.distinct_prompts())
    assert training_step(base, batch, seed=0, prompt_embeds=known).loss.item() == pytest.approx(loss.item(), rel=1e-5)


def _answered(name, base, noisy, sigmas, hidden, pooled):
    """What a transformer says about noisy latents, asked as its own pipeline asks."""
    if name in ("sd3", "sd35"):
        return base.denoiser(noisy, hidden, pooled, sigmas * 1000).sample
    if name == "z_image":
        prompts = [words[: int(words.any(-1).sum())] for words in hidden]
        pictures = [picture[:, None] for picture in noisy]
        return -torch.cat(base.denoiser(pictures, 1 - sigmas, prompts, return_dict=False)[0], dim=1).transpose(0, 1)
    count, channels, height, width = noisy.shape
    tokens = base.denoiser(
        FluxPipeline._pack_latents(noisy, count, channels, height, width),
        hidden,
        pooled,
        sigmas,
        FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32),
        torch.zeros(hidden.shape[1], 3),
        torch.ones(count) if name == "flux" else None,
    ).sample
    return FluxPipeline._unpack_latents(tokens, 2 * height, 2 * width, 2)


@pytest.mark.parametrize(
    "objective, weigh",
    [
        (Objective(), lambda s: torch.ones_like(s)),
        (Objective(weighting_scheme="logit_normal", logit_mean=0.5, logit_std=0.7), lambda s: torch.ones_like(s)),
        (Objective(weighting_scheme="mode", mode_scale=0.5), lambda s: torch.ones_like(s)),
        (Objective(weighting_scheme="sigma_sqrt"), lambda s: s**-2),
        (Objective(weighting_scheme="cosmap"), lambda s: 2 / (math.pi * (1 - 2 * s + 2 * s**2))),
        (Objective(weighting_scheme="logit_normal", precondition_outputs=True), lambda s: s**2),
    ],
    ids=["uniform", "logit_normal", "mode", "sigma_sqrt", "cosmap", "preconditioned"],
)
def test_the_loss_of_a_flow_is_the_one_written_out(family, base, small, objective, weigh):
    name, _ = family
    if name not in FLOWS:
        with pytest.raises(ValueError, match="is for bases that are trained by flow matching"):
            training_step(base, batch_at(small, 0, 2), seed=0, objective=Objective(weighting_scheme="mode"))
        return
    batch = batch_at(small, 0, 2)
    options = dict(seed=0, objective=objective, prior_loss_weight=0.7, tokenizer_max_length=LENGTHS[name])
    record = training_step(base, batch, **options)

    def share(generator):
        if objective.weighting_scheme == "logit_normal":
            deviation = objective.logit_std or 1.0
            return (torch.randn(1, generator=generator) * deviation + (objective.logit_mean or 0.0)).sigmoid()
        u = torch.rand(1, generator=generator)
        shifted = objective.weighting_scheme == "mode"
        return 1 - u - objective.mode_scale * ((math.pi * u / 2).cos() ** 2 - 1 + u) if shifted else u

    draws = [(half, n) for half in range(2) for n in batch["n"]]
    places = [int(1000 * share(seeded(0, TIMESTEP, *draw))) for draw in draws]
    sigmas = torch.tensor([1 - place / 1000 for place in places])
    if name == "flux":  # 64 tokens, on the line through (256, 0.5) and (4096, 1.15)
        shift = math.exp(0.5 + (1.15 - 0.5) * (64 - 256) / (4096 - 256))
        sigmas = shift / (shift + 1 / sigmas - 1)
    elif name != "schnell":
        sigmas = 3 * sigmas / (1 + 2 * sigmas)
    assert torch.allclose(record.timesteps, 1000 * sigmas, rtol=1e-5)

    posteriors = [base.vae.encode(picture[None]).latent_dist for picture in batch["pixel_values"]]
    drawn = [torch.randn(4, 16, 16, generator=seeded(0, POSTERIOR, *draw)) for draw in draws]
    latents = torch.stack([p.mean[0] + p.std[0] * noise for p, noise in zip(posteriors, drawn, strict=True)])
    latents = (latents - base.vae.config.shift_factor) * base.vae.config.scaling_factor
    noise = torch.stack([torch.randn(4, 16, 16, generator=seeded(0, NOISE, *draw)) for draw in draws])
    s = sigmas.view(-1, 1, 1, 1)
    noisy = (1 - s) * latents + s * noise
    assert torch.allclose(noisy, record.noisy_latents, atol=1e-5)
    hidden, pooled = embed_prompts(base, batch["prompts"], max_length=LENGTHS[name])
    errors = weigh(s) * (_answered(name, base, noisy, sigmas, hidden, pooled) - (noise - latents)) ** 2
    loss = errors[:2].mean() + 0.7 * errors[2:].mean()
    assert record.loss.item() == pytest.approx(loss.item(), rel=1e-4)

    known = precompute_embeds(base, small.distinct_prompts(), max_length=LENGTHS[name])
    cache_latents(small, base.vae)
    assert idle_parts(base, small, None) == ["vae"]
    assert idle_parts(base, small, known) == [*base.text_encoders(), "vae"]
    cached = training_step(base, batch_at(small, 0, 2), prompt_embeds=known, **options)
    assert cached.loss.item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("text", [False, True], ids=["text-frozen", "text-trained"])
def test_training_resumes_and_the_adapter_reloads_to_the_same_picture(
    family, base, small, settings, concept, tmp_path, text
):
    config = dataclasses.replace(settings, train_text_encoder=text, learning_rate=5e-2, text_encoder_learning_rate=5e-2)
    models = []
    for resumed in (False, True):
        components = load_components(family[1])
        add_adapters(components, rank=2, lora_alpha=4, train_text_encoder=text)
        resume = dataclasses.replace(config, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        train(resume if resumed else config, components, small)
        models.append(components)
    for part, module in adapted_modules(models[0]).items():
        other = adapted_modules(models[1])[part].state_dict()
        assert all(torch.equal(value, other[key]) for key, value in module.state_dict().items())
    if family[0] in FLOWS:
        with pytest.raises(ValueError, match="objective was .* and is {'weighting_scheme': 'mode'}"):
            other = dataclasses.replace(config, weighting_scheme="mode")
            check_resume(dataclasses.replace(other, resume_from_checkpoint=str(tmp_path / "checkpoint-1")))
    adapter = export.save_adapters(models[0], tmp_path)
    assert export.verify_reload(models[0], adapter, concept, config.sampling) <= 2
    plain = validation_images(base, concept, config.sampling, count=2, sets=("subject",))
    trained = validation_images(models[0], concept, config.sampling, count=2, sets=("subject",))
    difference = [
        np.abs(np.asarray(a, int) - np.asarray(b, int)).max()
        for a, b in zip(plain.subject, trained.subject, strict=True)
    ]
    assert max(difference) > 2


def test_images_from_prompts_and_from_references(family, base, settings, concept):
    name, _ = family
    images = validation_images(base, concept, settings.sampling, count=2, references=concept.images()[:2])
    assert all(image.size == (32, 32) for image in [*images.subject, *images.scenes, *images.classes, *images.redrawn])
    again = from_references(base, concept.images()[:2], concept.instance_prompt, settings.sampling)
    assert all(np.array_equal(a, b) for a, b in zip(images.redrawn, again, strict=True))
    sampling = dataclasses.replace(settings.sampling, num_inference_steps=2, guidance_scale=2.0, batch_size=2)
    if name == "if2":
        with pytest.raises(ValueError, match="class_data_dir"):
            class_images(base, concept.class_prompt, 3, sampling)
    else:
        made = class_images(base, concept.class_prompt, 3, sampling)
        assert made.decision == "generate" and len(made.paths) == 3


def test_redrawing_leaves_number_formats_alone(family, settings, concept):
    _, folder = family
    half = load_components(folder, weight_dtype=torch.bfloat16)
    add_adapters(half, rank=2)

    def formats():
        return [p.dtype for module in half.modules().values() for p in module.parameters()]

    before = formats()
    from_references(half, concept.images()[:1], concept.instance_prompt, settings.sampling)
    assert formats() == before and set(before) == {torch.bfloat16, torch.float32}


def test_an_unknown_architecture_is_named_with_what_is_known(family):
    name, folder = family
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"architectures": ["GPT2Model"]}))
    try:
        with pytest.raises(ValueError, match="GPT2Model.*give a base with one of CLIPTextModel, .*T5EncoderModel"):
            load_components(folder)
    finally:
        path.write_text(json.dumps(config))
