# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 09 When it goes wrong: find the fault of a run by its symptom
#
# **What you will do**: look up what you see, run the one line that checks for it, and apply the fix. Nearly all of the
# faults are made here on purpose, so that you can see each of them on the miniature.
#
# **What you will learn**: to tell faults apart that look alike. Afterwards you know which check to run first when a
# training of your own fails.
#
# **What you need**: notebooks [06](06_training.ipynb) and [07](07_validation_and_export.ipynb) if you read it as a
# lesson; nothing if you come with a broken run. No GPU. On two CPU cores about three minutes, plus about two each for
# the trainings of notebooks [00](00_start_here.ipynb) and [02](02_prior_preservation.ipynb) if they are not in the
# cache yet.
#
# | you see | look at |
# |---|---|
# | the pictures are those of the base, or nearly | [1](#1-the-learning-rate-is-too-low), [2](#2-the-file-does-not-fit), [3](#3-the-adapter-is-off-or-nobody-asks-for-it), [4](#4-alpha-is-lost), [7](#7-adapters-in-half-precision) |
# | colours burn, contrasts are too strong, shapes dissolve | [5](#5-the-learning-rate-is-too-high), [6](#6-the-guidance-is-too-high), [4](#4-alpha-is-lost), [18](#18-the-latents-have-another-scale) |
# | a photograph comes back, whatever the prompt says | [8](#8-learned-by-heart) |
# | the subject is right, and the background is always the same | [9](#9-the-background-was-learned-too), [8](#8-learned-by-heart) |
# | some dogs have the subject's colours or markings | [11](#11-the-halves-are-mixed-up) |
# | every dog is the subject | [10](#10-there-are-no-class-images), [13](#13-the-two-prompts-name-different-classes) |
# | the class has turned into something else | [12](#12-the-class-images-show-something-else) |
# | the subject comes with something that no photograph shows | [14](#14-the-identifier-means-something) |
# | the subject lies on its side, or is cut off | [15](#15-the-photographs-lie-on-their-side) |
# | two heads, repeated or cropped objects, coarse patches | [16](#16-another-resolution-than-the-base-was-trained-at) |
# | patches of colour or noise instead of a picture | [17](#17-the-base-predicts-something-else), [5](#5-the-learning-rate-is-too-high), [4](#4-alpha-is-lost), [6](#6-the-guidance-is-too-high) |
# | black pictures, a loss that is `nan` | [19](#19-not-a-number), [20](#20-black-pictures-from-a-sound-adapter) |
# | `CUDA out of memory` | [21](#21-out-of-memory) |
#
# Each entry has the same parts: what you **see**, how it was **made** here, a **check**, and the **fix** for Stable
# Diffusion 1.5, SDXL and the flow models (Stable Diffusion 3, FLUX). Checks that take `components` or a dataset (4, 5,
# 8, 10) need a training by `dbnb`, such as `workflow.trained(config)`. `effect(pipeline.unet)` (or
# `pipeline.transformer`), the doctor and all checks of a `pipeline` work with any other.
#
# ---

# %% [markdown]
# Run this first. It makes `dbnb` importable and changes nothing that is already installed. On Colab it asks for a
# file: give it the project's wheel or zip, or set `DBNB_SOURCE`.

# %% tags=["skip-execution", "nbval-skip"]
import importlib.util
import pathlib
import subprocess
import sys

DBNB_SOURCE = ""  # @param {type:"string"} a wheel, a zip or a git URL, where the project's folder is not around
if importlib.util.find_spec("dbnb") is None:
    here = pathlib.Path.cwd()
    projects = [p for p in (here, *here.parents) if (p / "dbnb").is_dir() and (p / "pyproject.toml").is_file()]
    if not (DBNB_SOURCE or projects) and "google.colab" in sys.modules:
        DBNB_SOURCE = next(iter(importlib.import_module("google.colab.files").upload()), "")
    if not (DBNB_SOURCE or projects):
        raise SystemExit("dbnb is not here: open this notebook inside the project, set DBNB_SOURCE, or pip install it.")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", DBNB_SOURCE or str(projects[0])], check=True)
    importlib.invalidate_caches()
importlib.import_module("dbnb")  # before torch, whose threads it keeps from spinning

# %% [markdown]
# There is no new module. Everything that is broken here was built in notebooks 01 to 08; `dbnb.doctor`, which examines
# adapter files, is used in entries 2 and 4.

# %%
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from dbnb import export, metrics, plots, prior, toybox, workflow
from dbnb.adapters import adapted_modules, add_adapters, trainable_parameters
from dbnb.config import DreamBoothConfig
from dbnb.dataset import DreamBoothDataset, cache_latents
from dbnb.models import load_components
from dbnb.pictures import inspect_images, load_image
from dbnb.toybox.sample import SAMPLE_DIR, SAMPLE_TOY
from dbnb.training import batch_at, held_out_loss, train, training_step
from dbnb.validation import draw

workflow.quiet_libraries()
plots.you_are_here("09")

# %% [markdown]
# Every fault is compared with the base, or with `good`: the training of notebook 00. The broken trainings are short,
# and most of them have small batches: that is enough to break something.

# %%
config = DreamBoothConfig()
good = workflow.trained(config)
base, concept = load_components(config.base), good.concept
SUBJECT, CLASS = concept.instance_prompt, concept.class_prompt
BEACH = f"{SUBJECT} {toybox.SCENES['beach']}"
COUNT = 5  # pictures a row
SHORT = dict(max_train_steps=60, train_batch_size=2, learning_rate=2e-3, lr_scheduler="constant", num_class_images=20)
models, drawings = {"base": base, "good": good.components}, {}
encoders = metrics.load_encoders(base.base)
photographs = encoders.identity_features(concept.images())
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)


# %%
def drawn(name: str, prompt: str = SUBJECT) -> list:
    """Pictures by one of the models, always from the same noise; each is drawn once."""
    if (name, prompt) not in drawings:
        drawings[name, prompt] = draw(models[name], [prompt] * COUNT, config.sampling)
    return drawings[name, prompt]


def compare(*names: str, prompt: str = SUBJECT, title: str, alt: str) -> None:
    """A row of pictures for each model."""
    figure = plots.image_rows([drawn(name, prompt) for name in names], labels=names, title=f"'{prompt}': {title}")
    plots.show(figure, alt=alt)


def likeness(name: str, prompt: str = SUBJECT) -> float:
    """Mean cosine between a model's pictures and the five photographs."""
    return metrics.subject_fidelity(encoders.identity_features(drawn(name, prompt)), photographs)


# %% [markdown]
# Some faults cannot be made by a setting. For these there are two datasets and a short form of notebook 06's loop. One
# dataset is trained on; the other stays unseen, and has further photographs and eight class images drawn for it:

# %%
drawn_now = prior.class_images(base, CLASS, config.num_class_images + 8, config.sampling).paths
paths, unseen = drawn_now[:20], drawn_now[config.num_class_images :]
dataset = DreamBoothDataset(concept.paths, SUBJECT, class_paths=paths, class_prompt=CLASS, size=config.resolution)
references = inspect_images(SAMPLE_DIR / "references")[0]
further = DreamBoothDataset(references, SUBJECT, class_paths=unseen, class_prompt=CLASS, size=config.resolution)
encoded = [cache_latents(data, base.vae) for data in (dataset, further)]


def steps(components, batches, rate: float):
    """Train on batches, one a step; yields the number of steps done, 0 before the first."""
    modules = adapted_modules(components).values()
    optimizer = torch.optim.AdamW([p for module in modules for _, p in trainable_parameters(module)], lr=rate)
    yield 0
    for done, batch in enumerate(batches, start=1):
        training_step(components, batch, seed=0).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield done


# %% [markdown]
# ## 1 the learning rate is too low
#
# **You see** the base's pictures.
#
# **Made** by a rate of 1e-6, which is a good one for fine-tuning *all* weights and therefore stands in many recipes.
# AdamW moves each number by about the learning rate in a step, so that a thousand such steps move it less far than one step of
# the good training. And the change $BA$ starts from zero, because $B$ does.

# %%
slow = SHORT | dict(max_train_steps=20, learning_rate=1e-6)
models["rate 1e-6"] = workflow.trained(dataclasses.replace(config, **slow)).components
compare("base", "rate 1e-6", "good", title="nothing has changed", alt="Two equal rows of dogs, and a row of the toy")


# %% [markdown]
#
# **Check**: `effect(unet)`, how large is the change $\frac{\alpha}{r}BA$ beside the weights $W$ that it is added to?


# %%
@torch.no_grad()
def effect(unet) -> float:
    """Mean size of the change that a UNet's adapters make, as a share of the weights they sit on."""
    ratios = []
    for layer in unet.modules():
        for name in getattr(layer, "lora_A", ()):
            A, B = (half[name].weight.flatten(1) for half in (layer.lora_A, layer.lora_B))
            ratios.append(layer.scaling[name] * (B @ A).norm() / layer.base_layer.weight.norm())
    return float(torch.stack(ratios).mean())


assert effect(models["rate 1e-6"].unet) < 0.01 * effect(models["good"].unet)
for name in ("rate 1e-6", "good"):
    print(f"{name}: the change is {effect(models[name].unet):.1g} of the weights in size")

# %% [markdown]
#
# **Fix**, for all of them: start adapters at 1e-4 (`learning_rate`; the miniature's own, higher rate is in its
# preset). A rate below 1e-5 is suspicious. If the effect is there and the pictures still do not show the subject,
# train for more steps.
#
# ## 2 the file does not fit
#
# **You see** the base's pictures and at most a warning (`No LoRA keys associated to UNet2DConditionModel …`): a loader
# that finds none of the names it looks for loads nothing. The same warning about `CLIPTextModel` is harmless if the
# text encoder was not trained. A file for another family often raises an error about shapes instead.
#
# **Made** by giving the good adapter's tensors the names that peft uses, by adding invented tensors for a text
# encoder under a prefix that no loader reads, and by inventing a file for Stable Diffusion 1.5. (In the second of
# these files the good adapter is whole, so the toy still appears.)
#
# **Check**: `python -m dbnb.doctor FILE --base BASE`, which is `diagnose` here.

# %%
from safetensors import safe_open

sound = load_file(export.save_adapters(good.components, folder))
with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
    header = file.metadata()
of_text, of_unet = "te1.text_model.encoder.layers.0.self_attn.q_proj", "unet.down_blocks.0.attentions.0.proj_in"
text_half = {f"{of_text}.lora_A.weight": torch.eye(16, 128) / 9, f"{of_text}.lora_B.weight": torch.eye(128, 16) / 9}
large = {"A": torch.full((16, 320, 1, 1), 0.01), "B": torch.full((320, 16, 1, 1), 0.01)}
written = {
    "as it should be": sound,
    "peft's names": {key.replace("unet.", "base_model.model."): value for key, value in sound.items()},
    "a text encoder as te1": sound | text_half,
    "for SD 1.5": {f"{of_unet}.lora_{half}.weight": matrix for half, matrix in large.items()},
}
for name, content in written.items():
    save_file(content, folder / f"{name}.safetensors", header)

# %%
from dbnb.doctor import diagnose

records = {name: diagnose(folder / f"{name}.safetensors", config.base) for name in written}
for name, record in records.items():
    print(
        f"{name}: {record.findings[0]['code']}: {record.findings[0]['text']}" if record.findings else f"{name}: sound"
    )
first = {name: record.codes()[:1] for name, record in records.items()}
assert list(first.values())[1:] == [["prefix_ignored"], ["text_encoder_ignored"], ["other_family"]], first
plots.show(
    plots.image_rows(
        list(zip(*(record.pictures for record in records.values() if record.pictures), strict=True)),
        labels=["base", "file loaded"],
        titles=["as it\nshould be", "peft's\nnames", "text encoder\nas te1"],
        title="The same noise, before and after loading",
    ),
    alt="Pairs of pictures by file: with the right names the picture changes; with peft's names it stays as it was",
)

# %% [markdown]
#
# **Fix**: rename the tensors as the doctor says. *SD 1.5*: `unet.` and `text_encoder.`, or kohya's `lora_unet_` and
# `lora_te_`. SDXL has two text encoders: `text_encoder.` and `text_encoder_2.`, or `lora_te1_` and `lora_te2_`. *Flow
# models*: `transformer.` instead of `unet.`. An adapter of one family is of no use to another, whatever it is renamed
# to: train it again on that base. Where only the text encoder's half was dropped, the subject is weaker: in
# notebook 07 the UNet's half alone reaches most of the gain, not all of it.
#
# ## 3 the adapter is off or nobody asks for it
#
# **You see** the base's pictures, or ordinary dogs like those of the base, although the file is sound.
#
# **Made** in the two ways in which it happens to everybody: the adapter was
# disabled (for a comparison), and the identifier was left out of the prompt.

# %%
pipeline = export.reload_pipeline(good.components, export.save_adapters(good.components, folder))
pipeline.disable_lora()
drawings["disabled", SUBJECT] = draw(good.components, [SUBJECT] * COUNT, config.sampling, pipeline=pipeline)
disabled = any(getattr(layer, "disable_adapters", False) for layer in pipeline.unet.modules())
print("loaded:", pipeline.get_list_adapters(), "| active:", pipeline.get_active_adapters(), "| disabled:", disabled)
plots.show(
    plots.image_rows(
        [drawn("good"), drawings["disabled", SUBJECT], drawn("good", CLASS)],
        labels=["as it should be", "adapter disabled", f"asked for\n'{CLASS}'"],
        title="A sound adapter that nobody uses",
    ),
    alt="A row of the teal toy; two rows of other dogs",
)

# %% [markdown]
#
# **Check** three things. The adapter's name is in `pipeline.get_active_adapters()`: loading another adapter can make it
# inactive. `any(getattr(layer, "disable_adapters", False) for layer in pipeline.unet.modules())` is false: a disabled
# adapter still counts as active. And the prompt is that of the model card, letter by letter.
#
# **Fix**, for all of them: `pipeline.enable_lora()` and `pipeline.set_adapters(["default_0"], [1.0])`, with the name
# that `get_list_adapters` prints; identifier *and* class word in the prompt. In ComfyUI and A1111 look at the strength
# in the LoRA's node or tag.
#
# ## 4 alpha is lost
#
# **You see** a subject that was right during training and is hardly there, or dissolved into patches, after loading.
# An adapter counts $\frac{\alpha}{r}$ times. A program that does not find $\alpha$ takes $\alpha = r$, so that
# another $\alpha$ makes the file too weak or too strong.
#
# **Made** by writing the good adapter for two other values of alpha, with $B$ scaled to give the same product, and
# leaving alpha out: four times the rank, and 1, which is the default of kohya's scripts.
#
# **Check**: `export.verify_reload(components, file, concept)` draws from the file and compares with the trained model;
# `python -m dbnb` does it at the end of every run.

# %%
# NBVAL_CHECK_OUTPUT
tensors, without_alpha = load_file(folder / "pytorch_lora_weights.safetensors"), {}
for name, times in (("4 x rank", 1 / 4), ("1", config.rank)):  # B for this alpha, relative to that for alpha = rank
    without_alpha[name] = folder / f"alpha {name}.safetensors"
    save_file({key: value * (times if "lora_B" in key else 1) for key, value in tensors.items()}, without_alpha[name])
    broken = export.reload_pipeline(good.components, without_alpha[name])
    drawings[f"alpha {name}, lost", SUBJECT] = draw(
        good.components, [SUBJECT] * COUNT, config.sampling, pipeline=broken
    )
    try:
        export.verify_reload(good.components, without_alpha[name], concept, config.sampling)
    except ValueError as error:
        print(f"alpha {name}, lost: it {str(error).split(' it ')[-1].split(' (')[0].split('safetensors ')[-1]}")
    print("  the doctor:", *diagnose(without_alpha[name], picture=False).codes())

# %%
compare(
    "good",
    "alpha 4 x rank, lost",
    "alpha 1, lost",
    title=f"one adapter, loaded at 1, 1/4 and {config.rank} times its strength",
    alt="Three rows: the toy; dogs that have little of it; patches of colour",
)

# %% [markdown]
#
# **Fix**: save alpha with the file, as `save_adapters` does, and diffusers' `save_lora_weights` with its metadata. SD
# 1.5 and SDXL files of kohya carry a tensor `.alpha` for each layer: do not drop it when you rename tensors. If alpha
# is known and the file cannot be changed, set the strength to alpha / rank. The same holds for flow models. A learning
# rate belongs to its alpha as well: one that was tuned for kohya's alpha 1 is too high for alpha = rank, by up to the
# factor of the rank.
#
# ## 5 the learning rate is too high
#
# **You see** colours that burn, then shapes that dissolve, whatever the prompt.
#
# **Made** by rates of 1.5e-2, and of 2e-2 with the text encoder trained
# at the same rate.

# %%
for rate, further_settings in ((1.5e-2, {}), (2e-2, dict(train_text_encoder=True, text_encoder_learning_rate=2e-2))):
    hot = SHORT | dict(max_train_steps=40, train_batch_size=4, learning_rate=rate) | further_settings
    models[f"rate {rate:g}"] = workflow.trained(dataclasses.replace(config, **hot)).components
compare(
    "good",
    "rate 0.015",
    "rate 0.02",
    prompt=BEACH,
    title="from burnt to dissolved",
    alt="The teal toy on a beach; a blotchy, misshapen toy without the beach; patches of colour without toy or beach",
)

# %% [markdown]
#
# **Check**: `held_out_loss(components, further)["prior_loss"]`, the held-out loss of notebook 06 on class images that
# training has not seen. A burnt model is worse at them than the base.

# %%
losses = {name: held_out_loss(models[name], further, batches=6) for name in ("base", "good", "rate 0.015", "rate 0.02")}
kept = max(losses[name]["prior_loss"] for name in ("base", "good"))
assert min(losses[name]["prior_loss"] for name in ("rate 0.015", "rate 0.02")) > 1.2 * kept, losses
plots.show(
    plots.bars(
        {name: {"other dogs": loss["prior_loss"]} for name, loss in losses.items()},
        ylabel="held-out loss",
        title="The loss on class images tells a burnt model from a good one",
    ),
    alt="Four bars: base and good training low and alike, the higher rate above them, the highest rate far above",
)

# %% [markdown]
#
# **Fix**: a lower rate. To save this run, use a lower strength (notebook 07) or an earlier checkpoint. *SD 1.5 and
# SDXL*: 1e-4 for the UNet, 1e-5 for text encoders, if they are trained at all. *Flow models*: 1e-4 or less, with the
# text encoders frozen. Prodigy is the exception: its rate is 1.
#
# ## 6 the guidance is too high
#
# **You see** garish colours and hard contrasts, with a sound adapter.
#
# **Made** by raising `guidance_scale`.
#
# **Check**: `from dbnb.presets import suggested`, then draw from the same noise with the base's own scale,
# `suggested(config.base)["guidance_scale"]`.

# %%
scales = (config.guidance_scale, 7.5, 15.0)
rows = [
    draw(good.components, [SUBJECT] * COUNT, dataclasses.replace(config.sampling, guidance_scale=g)) for g in scales
]
plots.show(
    plots.image_rows(rows, labels=[f"guidance {g:g}" for g in scales], title="Fried: the same adapter, the same noise"),
    alt="Three rows of the toy: sound at the suggested guidance; at 7.5 somewhat harder in contrast, one picture fried already; at 15 all fried",
)

# %% [markdown]
#
# **Fix**: *SD 1.5*: 5 to 8. *SDXL*: 4 to 7. *Stable Diffusion 3.5*: about 4.5 (Stable Diffusion 3: up to 7). FLUX.1
# [dev] has its guidance built in, about 3.5; a negative prompt counts only with `true_cfg_scale` above 1. FLUX.1
# [schnell] ignores the scale. Few-step variants (Turbo, Lightning, LCM-LoRA) are drawn at 0 to 2, and are fried at the
# usual values; a whole LCM checkpoint has its guidance built in (diffusers' default is 8.5).
#
# ## 7 adapters in half precision
#
# **You see** no symptom at first, only a subject that is learned worse than with the same settings elsewhere; or the
# error `Attempting to unscale FP16 gradients`.
#
# **Made** by loading the base in `bfloat16` and letting peft add its adapters in the format that it finds; beside it,
# the same by `add_adapters`, which casts them to `float32`. Three steps each, at 1e-4, the usual rate of large bases.
#
# **Check**: `{p.dtype for p in unet.parameters() if p.requires_grad}` before training. It should be `{torch.float32}`.

# %%
from peft import LoraConfig

from dbnb.adapters import lora_targets

still = {"A stood still": {}, "B stood still": {}}
for name in ("bfloat16 adapters", "float32 adapters"):
    half = load_components(config.base, weight_dtype=torch.bfloat16)
    if name == "float32 adapters":
        add_adapters(half, config.adapters)
    else:
        targets = lora_targets(half.unet, config.lora_layers)
        half.unet.add_adapter(LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=targets))
    before = {key: p.detach().clone() for key, p in trainable_parameters(half.unet)}
    for _ in steps(half, (batch_at(dataset, n, 1) for n in range(3)), rate=1e-4):
        pass
    for matrix, shares in still.items():
        pairs = [(p, before[key]) for key, p in trainable_parameters(half.unet) if f"lora_{matrix[0]}" in key]
        shares[name] = torch.cat([(now == then).flatten() for now, then in pairs]).float().mean().item()

# %%
assert still["A stood still"]["bfloat16 adapters"] > 3 * still["A stood still"]["float32 adapters"] + 0.1, still
plots.show(
    plots.bars(still, ylabel="share of the numbers", title="In bfloat16 much of A does not move at all"),
    alt="Pairs of bars: in bfloat16 a part of A has not changed in three steps; B has, and in float32 both have",
)

# %% [markdown]
# A number of `bfloat16` has two to three decimal digits, and an update that is smaller than half a unit in its last
# digit is rounded away. $A$ starts at random values, beside which an update is small: the larger a value, the more
# certainly it stands still. $B$ starts at zero and moves, until its values are large enough to be held in the same
# way.
#
# **Fix**, for all of them: cast what is trained to `float32` (diffusers' `cast_training_params`), whatever the format
# of the base. Mixed precision then computes in half precision and keeps these weights in full.

# %% [markdown]
# ## 8 learned by heart
#
# **You see** one photograph again and again, in the end even when the prompt asks for something else. This is
# [overfitting](../docs/glossary.md#overfitting).
#
# **Made** by training on a single photograph, taken in the desert, without class images, at a high
# rate. Five photographs that are trained on for too long end there as well, only later.
#
# **Check**: `held_out_loss(components, data)["instance_loss"]`, once on the photographs that are trained on and once
# on further photographs of the same toy.

# %%
alone = DreamBoothDataset(concept.paths[:1], SUBJECT, size=config.resolution)
_ = cache_latents(alone, base.vae)
models["one photograph"] = learner = load_components(config.base)
add_adapters(learner, config.adapters)
curve = {"the one photograph": {}, "further photographs": {}}
for done in steps(learner, (batch_at(alone, n, 2) for n in range(60)), rate=5e-3):
    if done % 20 == 0:
        for name, data in zip(curve, (alone, further), strict=True):
            curve[name][done] = held_out_loss(learner, data, batches=6)["instance_loss"]
compare(
    "good",
    "one photograph",
    title="one picture, again and again",
    alt="Above the toy in several places; below the same picture again and again, the toy in the desert",
)

# %%
fell = {name: values[0] - values[60] for name, values in curve.items()}
assert fell["the one photograph"] > 0 > fell["further photographs"], fell
plots.show(
    plots.curves(
        {name: (list(values), list(values.values())) for name, values in curve.items()},
        xlabel="step",
        ylabel="held-out loss",
        title="Learned by heart: the loss falls on one photograph and rises on all others",
    ),
    alt="The loss on the one photograph falls fast, on further photographs it rises",
)

# %% [markdown]
#
# **Fix**, for all of them: more photographs, in more places; fewer steps (stop before the second line rises, which it
# does from the start here; `--holdout 1` logs that loss, and `--select best` exports the checkpoint with the best
# trade-off measured); class images; a lower rank. Large bases overfit after a few hundred steps per photograph.
#
# ## 9 the background was learned too
#
# **You see** the subject, and always the same background. What all photographs have in common becomes part of the
# subject.
#
# **Made** by photographs that were
# all taken in the snow.
#
# **Check**: `plots.show_images(concept.images())`: what do all of them have in common, besides the subject?

# %%
snowy = folder / "snowy"
snowy.mkdir()
for seed in range(5):
    toybox.photograph(SAMPLE_TOY, scene="snow", seed=seed, size=256).save(snowy / f"{seed}.png")
longer = SHORT | dict(max_train_steps=80, instance_data_dir=str(snowy))
models["all in the snow"] = workflow.trained(dataclasses.replace(config, **longer)).components
compare(
    "good",
    "all in the snow",
    title="the snow came along",
    alt="Above the toy in several places, below the snow in every picture",
)

# %% [markdown]
#
# **Fix**, for all of them: photographs in other places; or `--masked_loss` with a mask for each photograph, so that
# the background does not count; or `--captions`, which name the background, so that the words carry it and not the
# identifier.
#
# ## 10 there are no class images
#
# **You see** the subject for every prompt that names its class.
#
# **Made** with `with_prior_preservation=False`; it is the training of notebook 02.
#
# **Check**: `likeness(name, CLASS)` and `metrics.diversity(…)`: how near to the subject are pictures of the bare class
# prompt, and how varied?

# %%
models["no class images"] = workflow.trained(dataclasses.replace(config, with_prior_preservation=False)).components
near = {name: likeness(name, CLASS) for name in ("no class images", "good")}
spread = {name: metrics.diversity(encoders.identity_features(drawn(name, CLASS))) for name in near}
assert spread["no class images"] < spread["good"] and near["no class images"] > near["good"], (spread, near)
compare(
    "base",
    "no class images",
    "good",
    prompt=CLASS,
    title="without class images a dog is the toy",
    alt="Three rows: varied dogs, teal dogs, varied dogs",
)

# %% [markdown]
#
# **Fix**: `with_prior_preservation`, with 100 to 200 class images that the base draws itself (SD 1.5 and SDXL). Many
# trainings of flow models go without, with few steps; look at the class prompt then.
#
# ## 11 the halves are mixed up
#
# **You see** the subject's colours and markings in some pictures of the class, although there are class images, now
# and then nearly the subject itself.
#
# **Made** by batches whose pictures are interleaved (subject, dog, subject, dog …) while their prompts
# are grouped. No error comes up, since all shapes are right.
#
# **Check**: `first_half_is_the_subject(batch)`: is each picture of the first half an instance image?


# %%
# NBVAL_CHECK_OUTPUT
def interleaved(number: int) -> dict:
    """A batch with the mistake."""
    batch = batch_at(dataset, number, 2)
    return batch | {"latent_parameters": batch["latent_parameters"][[0, 2, 1, 3]]}


def first_half_is_the_subject(batch: dict) -> bool:
    """Whether all pictures of a batch's first half are instance images."""
    known = torch.stack([dataset.latents["instance", i, False] for i in range(len(concept.paths))])
    first = batch["latent_parameters"].chunk(2)[0]
    return all(bool((known == picture).flatten(1).all(1).any()) for picture in first)


print("as collate_fn makes it:", first_half_is_the_subject(batch_at(dataset, 0, 2)))
print("interleaved:", first_half_is_the_subject(interleaved(0)))

# %%
models["mixed up"] = mixed = load_components(config.base)
add_adapters(mixed, config.adapters)
for _ in steps(mixed, map(interleaved, range(100)), rate=2e-3):
    pass
assert likeness("mixed up", CLASS) > likeness("good", CLASS), "dogs have not become the toy"
compare(
    "good",
    "mixed up",
    prompt=CLASS,
    title="half of the toy's pictures were trained as 'a dog'",
    alt="Above varied dogs; below dogs most of which have taken on the toy's colours or spots",
)

# %% [markdown]
#
# **Fix**, for all of them: put pictures and prompts together in one place (`collate_fn`), and look at one batch row by
# row, each picture beside its prompt.
#
# ## 12 the class images show something else
#
# **You see** a class that turns into something else: ask for a dog, and a cat comes.
#
# **Made** with a folder of class images that was left over from somebody's cats.
# Many scripts only count the files, and their number is right.
#
# **Check**: `called_dogs(images)`: what does CLIP call the class images?

# %%
stale = folder / "class_images"
stale.mkdir()
for number in range(20):
    cat, scene = toybox.random_toy("cat", number), list(toybox.SCENES)[number % len(toybox.SCENES)]
    toybox.photograph(cat, scene=scene, seed=number).save(stale / f"{number}.png")
kinds = encoders.text_features([f"a photo of a {kind}" for kind in toybox.KINDS])


def called_dogs(images: list) -> float:
    """The share of pictures that CLIP calls dogs."""
    return float(((encoders.clip_features(images) @ kinds.T).argmax(1) == toybox.KINDS.index("dog")).float().mean())


shares = [
    called_dogs([load_image(path) for path in found[:20]]) for found in (sorted(stale.iterdir()), good.prior.paths)
]
print(
    "called dogs by CLIP: {:.0%} of the images that were left over, {:.0%} of those drawn by the base".format(*shares)
)

# %%
longer = SHORT | dict(max_train_steps=100, train_batch_size=4, class_data_dir=str(stale))
models["cats as class"] = workflow.trained(dataclasses.replace(config, **longer)).components
print("called dogs by CLIP:", {name: f"{called_dogs(drawn(name, CLASS)):.0%}" for name in ("good", "cats as class")})
compare(
    "good",
    "cats as class",
    prompt=CLASS,
    title="class images of cats make cats of dogs",
    alt="Above five dogs; below five cats",
)

# %% [markdown]
#
# **Fix**, for all of them: a cache whose manifest says what made each picture (notebook 02); if the folder is your own,
# look at its contact sheet first. Class images also have to come from the base that is trained: those of SD 1.5 do not
# fit SDXL.
#
# ## 13 the two prompts name different classes
#
# **You see** the subject in its class, as in 10, although the class images are sound. The instance prompt says `a
# photo of sks corgi`, the class prompt `a photo of a dog`: `dog` is held in place, and `corgi` drifts. (Not run here:
# it looks like 10.)
#
# **Check**: `class_word in class_prompt.split()`.

# %%
# NBVAL_CHECK_OUTPUT
apart = dataclasses.replace(config, class_word="corgi", class_prompt="a photo of a dog")
for settings in (config, apart):
    instance = f"a photo of {settings.identifier} {settings.class_word}"
    held = settings.class_prompt or f"a photo of a {settings.class_word}"
    print(f"{instance!r}, {held!r}: the same class word: {settings.class_word in held.split()}")

# %% [markdown]
#
# **Fix**, for all of them: the same class word in both prompts, and a word that the base knows. Draw the class prompt
# before training: if the base draws something else, take the more general word in both.
#
# ## 14 the identifier means something
#
# **You see** something of the identifier's old meaning in the pictures, or afterwards that meaning is lost. The best
# known case: to Stable Diffusion `sks` is a rifle, and rifles appear beside the dog.
#
# **Made** with `red` as the identifier.
#
# **Check**: `draw(base, ["a photo of sks"] * 6)`, before training: do the pictures have anything in common?

# %%
models["identifier red"] = workflow.trained(dataclasses.replace(config, **SHORT, identifier="red")).components
compare(
    "base",
    "identifier red",
    prompt="a photo of a red car",
    title="'red' no longer means red",
    alt="Above red cars; below cars in teal or blue, most of them with the yellow of the toy, none red",
)

# %% [markdown]
#
# **Fix**: another rare token. *SD 1.5 and SDXL*: `ohwx` is the usual one; ask `token_report` (notebook 01) and draw it
# first. *Flow models*: T5 splits words differently and understands nearly anything, so draw the word there as well; a
# made-up name often works.
#
# ## 15 the photographs lie on their side
#
# **You see** a subject that lies, stands on its head or falls to pieces, and so does the background. Phones store a
# picture as the sensor saw it and record the rotation in a tag (EXIF).
#
# **Made** by photographs that were read without that tag.
#
# **Check**: `plots.show_images(session.dataset.images["instance"])`, the contact sheet of what training sees.

# %%
lying = folder / "lying"
lying.mkdir()
for path in concept.paths:
    load_image(path).rotate(90, expand=True).save(lying / path.name)
turned = SHORT | dict(
    instance_data_dir=str(lying), with_prior_preservation=False, max_train_steps=150, learning_rate=3e-3
)
fallen = workflow.trained(dataclasses.replace(config, **turned))
models["trained lying"] = fallen.components
plots.show(
    plots.image_rows(
        [fallen.dataset.images["instance"], drawn("trained lying")],
        labels=["what training saw", f"'{SUBJECT}'"],
        title="The world lies on its side",
    ),
    alt="Above five squares with a teal dog on its side; below toys falling to pieces, most of them with a wall or houses on the left",
)

# %% [markdown]
#
# **Fix**, for all of them: read with `load_image`, which follows the tag, or with Pillow's `ImageOps.exif_transpose`;
# turn a picture that has lost its tag by hand. The contact sheet also shows cut-off heads: crop the photographs
# yourself, or use `center_crop`.
#
# ## 16 another resolution than the base was trained at
#
# **You see** coarse patches, two heads, cropped or repeated objects.
#
# **Made** by drawing with the miniature, without any adapter. It was trained at 128 pixels, and draws at half of that
# and at one and a half times that here.
#
# **Check**: `pipeline.unet.config.sample_size` times the factor of the autoencoder, which is 8 for SD 1.5 and SDXL.

# %%
sizes = (config.resolution, config.resolution // 2, config.resolution * 3 // 2)
rows = [draw(base, [CLASS] * COUNT, dataclasses.replace(config.sampling, resolution=size)) for size in sizes]
plots.show(
    plots.image_rows(
        [[picture.resize((384, 384), 0) for picture in row] for row in rows],
        labels=[f"{size} pixels" for size in sizes],
        title="A base draws well at the size it was trained at",
    ),
    alt="One dog in each picture at 128 pixels; hardly a dog at 64; two dogs side by side at 192",
)

# %% [markdown]
#
# **Fix**: train and draw at the size of the base. *SD 1.5*: 512. *SDXL*: 1024, in training *and* in drawing; at 512 it
# draws crude, cropped pictures, even without any adapter. If the card is too small for that, take SD 1.5. *Stable
# Diffusion 3*: 1024; FLUX was trained at several sizes, and 512 works.
#
# ## 17 the base predicts something else
#
# **You see** patches of colour, and a loss that begins far above that of other trainings. A UNet predicts the noise
# ($\epsilon$) or $v$ (notebook 06), and a scheduler that takes one for the other draws nonsense.
#
# **Made** by telling the miniature's scheduler that its UNet predicts noise.
#
# **Check**: `pipeline.scheduler.config.prediction_type`, and the first loss.

# %%
models["taken for epsilon"] = wrong = load_components(config.base)
kind = type(wrong.noise_scheduler)
wrong.noise_scheduler = kind.from_config(wrong.noise_scheduler.config, prediction_type="epsilon")
first = [
    training_step(models[name], batch_at(dataset, 0, 2), seed=0).loss.item() for name in ("base", "taken for epsilon")
]
compare(
    "base",
    "taken for epsilon",
    prompt=CLASS,
    title=f"a first loss of {first[1]:.1f} instead of {first[0]:.1f}",
    alt="Above dogs; below patches of colour",
)

# %% [markdown]
#
# **Fix**: SD 1.5 and SDXL predict noise. Stable Diffusion 2.1 at 768 pixels predicts $v$, and so do some fine-tuned
# SDXL checkpoints. Of a checkpoint in one file diffusers guesses: $v$ for SD 2 (for its 512-pixel base too, unless the
# file has its step number), noise for all others. If that is wrong, set it yourself: `pipeline.scheduler =
# type(pipeline.scheduler).from_config(pipeline.scheduler.config, prediction_type="v_prediction")`, with
# `rescale_betas_zero_snr=True` if its card says so. Flow models predict noise minus picture and have schedulers of
# their own; an `epsilon` option does not apply to them.
#
# ## 18 the latents have another scale
#
# **You see** blurred pictures with too much contrast, or greyish ones full of coloured streaks, from the base as well.
# The autoencoder's latents are multiplied by `scaling_factor` before training and divided by it before decoding;
# forgotten on one side, everything is too strong or too weak.
#
# **Made** with factors that are not the miniature's.
#
# **Check**: `latents.std()` is near 1.

# %%
factors, rows = (1.0, 0.18215, 4.0), []
other = load_components(config.base)
for factor in factors:
    other.vae.register_to_config(scaling_factor=factor)
    rows.append(draw(other, [CLASS] * COUNT, config.sampling))
latents = torch.stack([dataset.latents["class", i, False] for i in range(len(paths))]).chunk(2, dim=1)[0]
print(
    f"standard deviation of the miniature's latents, at its factor of {base.vae.config.scaling_factor:g}: {latents.std():.2f}"
)
plots.show(
    plots.image_rows(
        rows, labels=[f"factor {factor:g}" for factor in factors], title="The factor belongs to the autoencoder"
    ),
    alt="Dogs; nearly the same dogs, blurred and with harder contrast, at SD 1.5's factor; hardly visible in grey with coloured streaks, at 4",
)

# %% [markdown]
#
# **Fix**: read it from `vae.config`, never type it. *SD 1.5*: 0.18215. *SDXL*: 0.13025. Flow models also subtract a
# `shift_factor`. Stable Diffusion 3: factor 1.5305, shift 0.0609. FLUX: factor 0.3611, shift 0.1159. If you replace
# an autoencoder, replace it by one of the same family.
#
# ## 19 not a number
#
# **You see** a loss of `nan`, then black pictures, for good.
#
# **Made** by one broken value in the base, as an overflow in `float16` makes it; then one step by a loop that does not
# check; then the value is put right. It does not help: the step has written `nan` into the adapters.
#
# **Check**: `math.isfinite(loss)`, *before* the step.

# %%
models["after one nan"] = broken = load_components(config.base)
add_adapters(broken, rank=4)
value = broken.unet.conv_out.bias[0].item()
for number in (float("nan"), value):
    with torch.no_grad():
        broken.unet.conv_out.bias[0] = number
    if number != value:
        _ = list(steps(broken, [batch_at(dataset, 0, 2)], rate=1e-4))
with np.errstate(invalid="ignore"):  # a nan has no grey level: that is what we want to see
    compare("good", "after one nan", title="black", alt="Above the teal toy; below black squares")

fresh, refused = load_components(config.base), "nothing was refused"
add_adapters(fresh, rank=4)
with torch.no_grad():
    fresh.unet.conv_out.bias[0] = float("nan")
try:
    train(dataclasses.replace(config, max_train_steps=5, output_dir=str(folder / "nan")), fresh, dataset)
except FloatingPointError as error:
    refused = str(error)

# %%
# NBVAL_CHECK_OUTPUT
for name, components in (("the bare loop", broken), ("train", fresh)):
    adapters = [p for _, p in trainable_parameters(components.unet)]
    print(f"{name}: {sum(bool(p.isnan().any()) for p in adapters)} of {len(adapters)} adapter matrices are nan")
print("train said:", refused)

# %% [markdown]
#
# **Fix**: go back to a checkpoint before the first `nan`; the file itself cannot be repaired. *SD 1.5*: `bfloat16`
# instead of `float16` if the GPU supports it (from 2020 on), a lower rate, clipped gradients. *SDXL*: the autoencoder
# in `float32` as well. Flow models: `bfloat16`. In `float16`, load T5 with `torch_dtype`, which keeps its `wo` layers
# in `float32`; after `.half()` or `.to(torch.float16)` it overflows.
#
# ## 20 black pictures from a sound adapter
#
# **You see** black pictures, and the loss was finite. (Not run here: it takes a large base.) There are two causes, and
# one **check** for each:
#
# - *The autoencoder overflows in `float16`*, SDXL's in particular. `pipeline(…,
#   output_type="latent").images.isfinite().all()` is true, and the decoded picture is black. SDXL's pipeline decodes in
#   `float32` by itself, unless `pipeline.vae.config.force_upcast` is false or your own code calls the autoencoder. The
#   **fix** for *SDXL*: `pipeline.vae.register_to_config(force_upcast=True)`, `vae.float()` before your own call, or the
#   repaired `madebyollin/sdxl-vae-fp16-fix`. *SD 1.5* and *flow models*: load the whole pipeline in `bfloat16`.
# - *The safety checker of SD 1.5* has replaced the picture by a black one; it sometimes flags harmless pictures.
#   `pipeline(…).nsfw_content_detected` holds a `True`. The **fix**: another seed, or a look at what the prompt asks
#   for; SDXL and flow models have no such checker in diffusers.
#
# If the latents are not finite, it is entry 19.
#
# ## 21 out of memory
#
# **You see** `CUDA out of memory`, and the traceback says when: in `backward` (training), in `vae.decode` (decoding),
# or when class images or validation pictures are drawn beside the optimizer. (No card is filled here: the numbers are
# computed from the shapes of the networks, as in notebook 10.)
#
# **Check**: `torch.cuda.reset_peak_memory_stats()` before each phase, `torch.cuda.max_memory_allocated()` after it
# (without the reset it is the peak since the program began). What the first remedies bring, on SDXL:

# %%
from dbnb.planner import BASES, drawing_memory, training_memory
from dbnb.tables import Table

sdxl = BASES["Stable Diffusion XL"]
needs = {
    "a training step: activations": training_memory(sdxl)["activations"],
    "the same with gradient_checkpointing": training_memory(sdxl, gradient_checkpointing=True)["activations"],
    "decoding four pictures at once": drawing_memory(sdxl, pictures=4)["vae"],
    "decoding one at a time (sample_batch_size=1)": drawing_memory(sdxl, pictures=1)["vae"],
}
Table({"SDXL, besides the weights": name, "memory": f"{size / 2**30:.1f} GiB"} for name, size in needs.items())

# %% [markdown]
#
# **Fix**, in this order. *In training*: `gradient_checkpointing`, `train_batch_size=1` with
# `gradient_accumulation_steps`, the text encoders frozen and their states computed once, the base in 4 bits
# (`quantization="nf4"`). A lower rank or an optimizer with 8-bit states saves next to nothing. *In decoding*: fewer
# pictures at once (`sample_batch_size`), `pipeline.vae.enable_slicing()` and `enable_tiling()`. *In validation*: the
# same, and `del` what is no longer needed, then `torch.cuda.empty_cache()`. Notebook 10 computes which base fits on
# which card. FLUX has 12 billion weights, 24 GB in `bfloat16`: it has to be quantized or offloaded on most cards.
#
# ## Now you
#
# `a photo of a dog` by five of the models above. **Predict**: which row is which? Which is nearest to the base?

# %%
rows = ("no class images", "base", "cats as class", "mixed up", "good")
figure = plots.image_rows(
    [drawn(name, CLASS) for name in rows], labels=list("ABCDE"), title="Five models: which is which?"
)
plots.show(figure, alt="Five rows of pictures, labelled A to E, for the reader to tell apart")
temporary.cleanup()

# %% [markdown]
# ## Exercises
#
# ### Exercise A: six broken runs (20 minutes)
#
# `broken_runs` makes six very small trainings (an adapted linear layer that denoises points), each with a different
# fault from `FAULTS`. Look at them, for example at `runs["A"].losses`, then write a function that finds the fault of
# any run from what the run left behind. It also has to recognise a good run.
#
# | a run's | is |
# |---|---|
# | `losses` | the loss of each step |
# | `weight`, `before`, `after` | the frozen weight; the adapter's matrices `(A, B)` before the first step and after the last |
# | `alpha`, `loaded_alpha` | alpha in training, and where the saved file was loaded (the rank is `len(A)`) |
# | `photographs`, `batch` | the instance images, and one batch: the first half should be instance images |
# | `held_out` | `"photographs"` and `"further"` (photographs): the loss `(before, after)` |

# %%
from dbnb.exercises import ALL_IS_WELL, FAULTS, Run, broken_runs, check_09a

runs = broken_runs()
print("faults:", ", ".join(FAULTS), "| otherwise:", ALL_IS_WELL)
print("losses:", {letter: f"{run.losses[0]:.2f} to {run.losses[-1]:.2f}" for letter, run in runs.items()})


def fault_of(run: Run) -> str:
    """The fault of a run, one of FAULTS, or ALL_IS_WELL."""
    ...


check_09a(fault_of)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The order of your questions matters. After a `nan` no number means anything, so ask for it first. In `bfloat16` an
# adapter hardly changes either, so ask for the format before you ask for the effect.
# </details>
#
# <details><summary>Hint 2</summary>
#
# Five checks of this notebook are enough: is the loss finite (19)? Which format (7)? The effect, after training (1)
# and after loading (4)? What is in the batch's first half (11)? And the two held-out losses (8).
# </details>
#
# <details><summary>Hint 3</summary>
#
# `all(any(torch.equal(row, photograph) for photograph in run.photographs) for row in half)` says whether all rows are
# photographs.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# import math
#
#
# def fault_of(run):
#     A, B = run.after
#     first_half = run.batch[: len(run.batch) // 2]
#     if not all(math.isfinite(loss) for loss in run.losses):
#         return "not a number"
#     if A.dtype != torch.float32:
#         return "half precision"
#     if (run.alpha / len(A) * B @ A).norm() < 0.01 * run.weight.norm():
#         return "rate too low"
#     if run.loaded_alpha != run.alpha:
#         return "alpha lost"
#     if not all(any(torch.equal(row, known) for known in run.photographs) for row in first_half):
#         return "halves mixed up"
#     before, after = run.held_out["further"]
#     return "learned by heart" if after > before else ALL_IS_WELL
# ```
# </details>
#
# ### Exercise B: what does a file reach? (8 minutes)
#
# An adapter that loads without an error can still change nothing (entry 2): its keys name layers that this UNet does
# not have, or have another prefix. Write the check. A layer is reached if the file has both of its matrices, as
# `unet.<layer>.lora_A.weight` and `unet.<layer>.lora_B.weight`, and if the UNet has a layer of exactly this name.

# %%
from dbnb.exercises import check_09b


def reached(keys: list[str], layers: list[str]) -> set[str]:
    """The layers of a UNet that the keys of an adapter file hold both matrices for."""
    ...


check_09b(reached)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# You can go the other way round: for each layer, which two keys would have to be in the file?
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def reached(keys, layers):
#     keys = set(keys)
#     return {name for name in layers if {f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight"} <= keys}
# ```
# </details>

# %% [markdown]
# ## On your own
#
# 1. Which row of the last figure is which? Which rows can you hardly tell apart by looking? (2 minutes)
# 2. Pick two faults that look alike, such as 5 and 6, or 10 and 11. Which check tells them apart, and what would you
#    change first if you could not run it? (3 minutes)
# 3. Pick a failure that you have met yourself. Which entry is it, and which check would have found it? (think)
#
# <details><summary>Answers</summary>
#
# 1. A: no class images. B: the base. C: cats as class images. D: the halves are mixed up. E: the good training. E
#    should be nearest to B. B and E are hard to tell apart by looking; D gives itself away by the toy's teal and by the
#    spots, which most of its dogs have taken on. A has the whole toy in the class, D some of it. A picture does not say
#    why; a look at one batch does.
# 2. For 5 and 6, draw with a lower guidance scale: if the picture is sound then, it was 6. For 10 and 11, look at one
#    batch with its prompts. If you cannot run a check, change what costs least and can be undone: the guidance scale,
#    then the strength of the adapter, and only then the training.
# 3. Write the check down as a cell, and run it before the next long training.
# </details>
#
# ## Quiz
#
# Five questions about *why*. Choose an answer, then open it: it says whether it is right, and why.
#
# **1. Why does a rate of 1e-6, good for fine-tuning, do nothing for adapters?**
#
# <details><summary>A. Adapters are frozen below a rate of 1e-5, which peft does to save time.</summary>
#
# No: nothing is frozen; the adapters do change, but hardly at all.
# </details>
#
# <details><summary>B. AdamW moves a number by about the rate a step, and adapters start at zero.</summary>
#
# Right: a fine-tuned weight is good from the start, while the change that an adapter makes starts at zero.
# </details>
#
# <details><summary>C. Its gradients vanish at this rate, since they are divided by the rate.</summary>
#
# No: gradients do not depend on the rate; what is done with them does.
# </details>
#
# **2. The interleaved batch raises no error. Why?**
#
# <details><summary>A. All shapes are right; it is the meaning of the rows that is wrong.</summary>
#
# Right: looking at one batch with its prompts is the check that catches it.
# </details>
#
# <details><summary>B. The error is caught by the training loop, which writes it to the log.</summary>
#
# No: there is nothing to catch; the loss even falls.
# </details>
#
# <details><summary>C. Errors of this kind come up only when the adapter is saved to its file.</summary>
#
# No: the file is as it should be, and holds what was learned from the wrong pairs.
# </details>
#
# **3. Why does one `nan` ruin an adapter for good, even if its cause is removed?**
#
# <details><summary>A. The file format cannot store <code>nan</code> and replaces it by the largest number.</summary>
#
# No: it stores `nan` very well, and the pictures stay black after reloading too.
# </details>
#
# <details><summary>B. The scheduler remembers it and puts it into all further noise.</summary>
#
# No: the scheduler has no memory of earlier steps of a training.
# </details>
#
# <details><summary>C. The step writes it into all adapted weights, where it stays for good.</summary>
#
# Right: a sum with `nan` is `nan`, so the check comes before the step: is the loss finite?
# </details>
#
# **4. The loss still falls on the photographs and rises on further ones. What does that tell you?**
#
# <details><summary>A. The learning rate is too low, so the two have not met each other yet.</summary>
#
# No: at a low rate both stay where they are, side by side.
# </details>
#
# <details><summary>B. The class images are stale, since they pull the two losses apart.</summary>
#
# No: stale class images show in the class, and in a look at the images themselves.
# </details>
#
# <details><summary>C. It learns these pictures by heart now, no longer the toy they show.</summary>
#
# Right: that is overfitting; stop before the second line rises, or take more photographs.
# </details>
#
# **5. Why is an adapter compared again after it has been loaded elsewhere?**
#
# <details><summary>A. What counts is what the file's user gets, and loading can lose some of it.</summary>
#
# Right: a missing alpha or a wrong prefix gives no error, only a weaker adapter or none at all.
# </details>
#
# <details><summary>B. Loading always changes the weights by rounding, which has to be corrected.</summary>
#
# No: the matrices are stored in `float32` as they were trained; nothing has to be corrected.
# </details>
#
# <details><summary>C. Diffusers refuses to load an adapter that has not been compared beforehand.</summary>
#
# No: it loads whatever has the right names, and asks nothing.
# </details>
#
# ## In short
#
# | check | finds |
# |---|---|
# | the contact sheet, and one batch with its prompts | 9, 11, 12, 15 |
# | both prompts and the identifier, drawn by the base | 13, 14 |
# | `get_active_adapters()`, `disable_adapters`, and the prompt letter by letter | 3 |
# | the latents: are they finite? `nsfw_content_detected` | 20 |
# | the scheduler's `prediction_type`, the autoencoder's `scaling_factor`, the base's own size | 16, 17, 18 |
# | the number formats of what is trained and of the autoencoder | 7, 20 |
# | each step's loss: is it finite? | 19 |
# | held-out losses: photographs, further photographs, class | 5, 8 |
# | the bare class prompt, before and after | 10, 11, 12, 13 |
# | the effect of the adapter, after training and after loading; `python -m dbnb.doctor` | 1, 2, 4 |
# | the same seed at the suggested guidance scale | 6 |
# | the most memory in use, phase by phase | 21 |
#
# Next: [10 On a real base](10_on_a_real_base.ipynb).
