# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 09 When it goes wrong: ten failures, made on purpose and mended
#
# **What you will do**: break DreamBooth in ten ways that people report again and again; see each as a picture or a
# curve, find the check that catches it, and mend it.
#
# **What you will learn**: to tell these failures apart from their symptoms. Afterwards you know which look to take first
# when a training of your own fails.
#
# **What you need**: notebooks [06](06_training.ipynb) and [07](07_validation_and_export.ipynb). No GPU. On two CPU cores
# about two minutes, one when you come back, plus about two for the training of notebook [00](00_start_here.ipynb) where it
# is not in the cache yet.
#
# | you see | look at |
# |---|---|
# | nothing has changed | 1, 5, 7 |
# | colours burn, shapes dissolve | 2 |
# | a photograph comes back, whatever the prompt says | 3 |
# | every dog is the subject, or no dog any more | 4, 6, 8 |
# | the subject lies on its side, or falls to pieces in its own colours | 9 |
# | black pictures, a loss that is `nan` | 10 |
#
# ---

# %% [markdown]
# Run this first. It makes `dbnb` importable and changes nothing that is already installed. On Colab it asks for a file: give
# it the project's wheel or zip, or set `DBNB_SOURCE`.

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

# %% [markdown]
# No new module: everything that is broken here was built in notebooks 01 to 08.

# %%
import dataclasses
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

from dbnb import export, metrics, plots, toybox, workflow
from dbnb.adapters import ATTENTION, adapted_modules, add_adapters, trainable_parameters
from dbnb.config import DreamBoothConfig
from dbnb.dataset import DreamBoothDataset, cache_latents
from dbnb.models import load_components
from dbnb.pictures import inspect_images, load_image
from dbnb.toybox.sample import SAMPLE_DIR
from dbnb.training import batch_at, held_out_loss, train, training_step
from dbnb.validation import draw

workflow.quiet_libraries()

# %% [markdown]
# What to compare with: the base, and the training of notebook 00, which is right. The broken trainings are short, a few dozen
# steps at a high rate. That is enough to break.

# %%
import tempfile

config = DreamBoothConfig()
good = workflow.trained(config)
base, concept = load_components(config.base), good.concept
SUBJECT, CLASS = concept.instance_prompt, concept.class_prompt
BEACH = f"{SUBJECT} {toybox.SCENES['beach']}"
SHORT = dict(max_train_steps=50, learning_rate=2e-3, num_class_images=20)
SHORT["lr_scheduler"] = "constant"
models, drawings = {"base": base, "good": good.components}, {}
encoders = metrics.load_encoders(base.base)
photographs = encoders.identity_features(concept.images())
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)


# %%
def drawn(name: str, prompt: str = SUBJECT) -> list:
    """Six pictures by one of the models, always from the same noise; each is drawn once."""
    if (name, prompt) not in drawings:
        drawings[name, prompt] = draw(models[name], [prompt] * 6, config.sampling)
    return drawings[name, prompt]


def compare(*names: str, prompt: str = SUBJECT, title: str, alt: str) -> None:
    """A row of pictures for each model."""
    figure = plots.image_rows([drawn(name, prompt) for name in names], labels=names, title=f"'{prompt}': {title}")
    plots.show(figure, alt=alt)


def likeness(name: str, prompt: str = SUBJECT) -> float:
    """Mean cosine between a model's pictures and the five photographs."""
    return metrics.subject_fidelity(encoders.identity_features(drawn(name, prompt)), photographs)


# %% [markdown]
# Two datasets with latents, one to train on and one that stays unseen, and the loop of notebook 06 in short, for failures
# that no setting can make:

# %%
paths, unseen = good.prior.paths[:20], good.prior.paths[20:28]
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
# ## 1. Nothing happens
#
# **Made**: a learning rate of 1e-6. It is a good rate for fine-tuning *all* weights, so it stands in many recipes. For
# adapters, which start at zero, it is far too low: AdamW moves a number by about the learning rate a step, so that even
# thousands of steps get nowhere. **Predict**: the two rows?

# %%
slow = SHORT | dict(max_train_steps=20, learning_rate=1e-6)
models["rate 1e-6"] = workflow.trained(dataclasses.replace(config, **slow)).components
compare("base", "rate 1e-6", title="nothing has changed", alt="Two rows of dogs, equal picture by picture")

# %% [markdown]
# **Seen**: the rows are the same. **The check**: how strong an adapter is, is a number: $\|\frac{\alpha}{r}BA\|$ against
# $\|W\|$. Measure it after training, and again after loading the file elsewhere.


# %%
@torch.no_grad()
def effect(components) -> float:
    """Mean size of the change that the UNet's adapters make, as a share of the weights they sit on."""
    layers = [m for m in components.unet.modules() if hasattr(m, "lora_A") and "default" in m.lora_A]
    pairs = [(m.lora_B["default"].weight.flatten(1), m.lora_A["default"].weight.flatten(1)) for m in layers]
    changes = [m.scaling["default"] * B @ A for m, (B, A) in zip(layers, pairs, strict=True)]
    ratios = [change.norm() / m.base_layer.weight.norm() for change, m in zip(changes, layers, strict=True)]
    return float(torch.stack(ratios).mean())


print({name: f"{effect(models[name]):.6f}" for name in ("good", "rate 1e-6")})

# %%
# NBVAL_CHECK_OUTPUT
assert effect(models["rate 1e-6"]) < 0.01 * effect(models["good"])
print("less than a hundredth of a good training's effect")

# %% [markdown]
# **Mended**: 1e-4 is a usual start for adapters on Stable Diffusion; the miniature's is in its preset. Below 1e-5, think
# again.
#
# ## 2. Burnt
#
# **Made**: a learning rate of 2e-2, and the text encoder is trained at this rate too, as a careless recipe might do it.
# **Predict**: what is left, the toy or the beach?

# %%
hot = SHORT | dict(max_train_steps=40, learning_rate=2e-2, train_text_encoder=True, text_encoder_learning_rate=2e-2)
models["rate 2e-2"] = workflow.trained(dataclasses.replace(config, **hot)).components
compare("good", "rate 2e-2", prompt=BEACH, title="burnt", alt="The teal toy on a beach; below muddy shapes, elsewhere")

# %% [markdown]
# **Seen**: muddy shapes, neither toy nor beach: the adapters outweigh what they sit on, in the UNet, and in
# the text encoder, where the words for places are. **The check**: the held-out loss of notebook 06, on pictures that no
# training has seen.

# %%
losses = {name: held_out_loss(models[name], further, batches=6) for name in ("base", "good", "rate 2e-2")}
plots.show(
    plots.bars(
        {
            "the toy": {name: loss["instance_loss"] for name, loss in losses.items()},
            "other dogs": {name: loss["prior_loss"] for name, loss in losses.items()},
        },
        ylabel="held-out loss",
        title="A burnt model is worse than the base",
    ),
    alt="Two groups of three bars: the good training is at or below the base, the burnt one above both",
)

# %%
# NBVAL_CHECK_OUTPUT
assert losses["rate 2e-2"]["prior_loss"] > losses["base"]["prior_loss"], losses
assert losses["rate 2e-2"]["instance_loss"] > losses["good"]["instance_loss"], losses
print("burnt: worse than the base at dogs, worse than a good training at the toy")

# %% [markdown]
# **Mended**: a lower rate, a still lower one for the text encoder if it is trained at all; or a lower strength when the
# adapter is used (notebook 07).
#
# ## 3. Learned by heart
#
# **Made**: a training on a single photograph, taken in the desert, without class images, at a high rate. **Predict**: `… on the beach`?

# %%
alone = DreamBoothDataset(concept.paths[:1], SUBJECT, size=config.resolution)
_ = cache_latents(alone, base.vae)
models["one photograph"] = learner = load_components(config.base)
add_adapters(learner, config.adapters)
curve = {"the one photograph": {}, "further photographs": {}}
for done in steps(learner, (batch_at(alone, n, 4) for n in range(100)), rate=5e-3):
    if done % 20 == 0:
        for name, data in zip(curve, (alone, further), strict=True):
            curve[name][done] = held_out_loss(learner, data, batches=6)["instance_loss"]
compare(
    "good",
    "one photograph",
    prompt=BEACH,
    title="and it stands where it stood",
    alt="Above the toy on a beach; below the same picture again and again, the toy in the desert",
)

# %% [markdown]
# **Seen**: nearly the same picture, again and again; the place in the prompt is mostly ignored. This is [overfitting](../docs/glossary.md#overfitting). Five photographs trained for too long end
# there as well, later. **The check**: two held-out losses, on what is trained on and on further photographs of the same
# toy.

# %%
plots.show(
    plots.curves(
        {name: (list(values), list(values.values())) for name, values in curve.items()},
        xlabel="step",
        ylabel="held-out loss",
        title="Overfitting is the gap between the lines",
    ),
    alt="The loss on the one photograph falls fast; on further photographs it rises, or falls less",
)

# %%
# NBVAL_CHECK_OUTPUT
fell = {name: values[0] - values[100] for name, values in curve.items()}
assert fell["the one photograph"] > fell["further photographs"], fell
phrases = encoders.text_features([f"{CLASS} {phrase}" for phrase in toybox.SCENES.values()])
beaches = {}
for name in ("good", "one photograph"):
    places = (encoders.clip_features(drawn(name, BEACH)) @ phrases.T).argmax(1)
    beaches[name] = int((places == list(toybox.SCENES).index("beach")).sum())
assert beaches["one photograph"] < beaches["good"], beaches
print("the gap has grown, and CLIP finds fewer beaches")

# %% [markdown]
# **Mended**: more photographs, in more places; fewer steps (stop before the second line rises); class images.
#
# ## 4. Every dog is the subject
#
# **Made**: prior preservation off. (This is the training of notebook 02.) **Predict**: `a photo of a dog`?

# %%
drifted = dataclasses.replace(config, with_prior_preservation=False, max_train_steps=200)
models["no class images"] = workflow.trained(drifted).components
compare(
    "base",
    "no class images",
    "good",
    prompt=CLASS,
    title="without class images a dog is the toy",
    alt="Three rows: varied dogs, teal dogs, varied dogs",
)

# %% [markdown]
# **Seen**: the class word has drifted. **The check**: how varied are pictures of the bare class prompt, and how near are
# they to the subject?

# %%
# NBVAL_CHECK_OUTPUT
near = {name: likeness(name, CLASS) for name in ("no class images", "good")}
spread = {name: metrics.diversity(encoders.identity_features(drawn(name, CLASS))) for name in near}
assert spread["no class images"] < spread["good"], spread
assert near["no class images"] > near["good"], near
print("without class images: dogs less varied, and nearer to the toy")

# %% [markdown]
# **Mended**: `with_prior_preservation` (notebook 02).
#
# ## 5. Good in training, weak after loading: alpha lost
#
# **Made**: a training with `lora_alpha = 4 * rank`, saved as some tools save it: the matrices, without the header that holds
# alpha. **Predict**: what will whoever loads this file see?

# %%
louder = SHORT | dict(max_train_steps=40, rank=4, lora_alpha=16, learning_rate=1e-3)
strong = workflow.trained(dataclasses.replace(config, **louder)).components
whole = export.save_adapters(strong, folder)
bare = folder / "without_header.safetensors"
save_file(load_file(whole), bare)
for name, path in (("with header", whole), ("without", bare)):
    pipeline = export.reload_pipeline(strong, path)
    drawings[name, SUBJECT] = draw(strong, [SUBJECT] * 6, config.sampling, pipeline=pipeline)
compare(
    "with header",
    "without",
    title="the same matrices at another strength",
    alt="With the header dogs near the toy; without it dogs further from it, from the same matrices",
)

# %% [markdown]
# **Seen**: two different rows. Without the header a loader takes alpha = rank: here a quarter of what was trained.
# **The check**: draw with the reloaded file and compare with the model that was trained. `python -m dbnb` does it at the
# end of every run.

# %%
# NBVAL_CHECK_OUTPUT
try:
    export.verify_reload(strong, bare, concept, config.sampling)
except ValueError as error:
    print(str(error).split(" (difference")[0].replace(str(bare), "the file without header"))

# %% [markdown]
# **Mended**: save with the metadata, as `save_adapters` does, or keep alpha equal to the rank.
#
# ## 6. The halves are mixed up
#
# **Made**: batches whose pictures are interleaved (subject, dog, subject, dog …) while their prompts are grouped. No error
# comes up: all shapes are right. **Predict**: what becomes of `a photo of a dog`?


# %%
def interleaved(number: int) -> dict:
    """A batch with the mistake."""
    batch = batch_at(dataset, number, 4)
    return batch | {"latent_parameters": batch["latent_parameters"][[0, 4, 1, 5, 2, 6, 3, 7]]}


models["mixed up"] = mixed = load_components(config.base)
add_adapters(mixed, config.adapters)
for _ in steps(mixed, map(interleaved, range(50)), rate=2e-3):
    pass
compare(
    "good",
    "mixed up",
    prompt=CLASS,
    title="half of the toy was trained as 'a dog'",
    alt="Above varied dogs; below dogs that have much of the teal toy",
)

# %% [markdown]
# **Seen**: the toy's teal and yellow among the dogs, although there were class images. **The check**: look at one batch
# with its prompts (notebook 05), or let the computer look: is each picture of the first half an instance image?


# %%
# NBVAL_CHECK_OUTPUT
def first_half_is_the_subject(batch: dict) -> bool:
    """Whether all pictures of a batch's first half are instance images."""
    known = torch.stack([dataset.latents["instance", i, False] for i in range(len(concept.paths))])
    first = batch["latent_parameters"].chunk(2)[0]
    return all(bool((known == picture).flatten(1).all(1).any()) for picture in first)


assert likeness("mixed up", CLASS) > likeness("good", CLASS), "dogs have not become the toy"
print("as collate_fn makes it:", first_half_is_the_subject(batch_at(dataset, 0, 4)))
print("interleaved:", first_half_is_the_subject(interleaved(0)))

# %% [markdown]
# **Mended**: pictures and prompts are put together in one place, `collate_fn`, and a test compares the loss with that of two
# separate passes (notebook 06).
#
# ## 7. Adapters in half precision
#
# **Made**: the base is loaded in `bfloat16`, and peft adds its adapters in the format that it finds. Beside it, the same
# by `add_adapters`. Six steps each, at 1e-4. **Predict**: one adapter matrix $A$, after minus before, as a picture?

# %%
low_rank = LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=list(ATTENTION))
changes, still, formats = {}, {}, {}
for name in ("as peft adds it", "add_adapters"):
    half = load_components(config.base, weight_dtype=torch.bfloat16)
    if name == "add_adapters":
        add_adapters(half, rank=4)
    else:
        half.unet.add_adapter(low_rank)
    matrices = [p for key, p in trainable_parameters(half.unet) if "lora_A" in key]
    start = [p.detach().clone() for p in matrices]
    for _ in steps(half, (batch_at(dataset, n, 2) for n in range(6)), rate=1e-4):
        pass
    moved = [(p.detach() - before).float() for p, before in zip(matrices, start, strict=True)]
    formats[name] = str(matrices[0].dtype).removeprefix("torch.")
    changes[f"{name}: {formats[name]}"] = max(moved, key=torch.Tensor.numel)[:, :48].numpy()
    still[name] = sum(int((change == 0).sum()) for change in moved) / sum(change.numel() for change in moved)

# %%
plots.show(
    plots.matrices(changes, title="In bfloat16 most numbers of an adapter have not moved at all", inches=3.2),
    alt="Two matrices: in bfloat16 nearly blank with a few entries, in float32 every entry has changed",
)

# %% [markdown]
# **Seen**: nearly blank on one side. A number of `bfloat16` has two to three decimal digits; an update that is smaller than
# half a unit in the last digit is rounded away (notebook 04). **The check**: look at the formats of what is trained, before training.

# %%
# NBVAL_CHECK_OUTPUT
assert still["as peft adds it"] > 0.5 > still["add_adapters"], still
print("formats:", formats)
print("more than half of the numbers stood still:", {name: share > 0.5 for name, share in still.items()})

# %% [markdown]
# **Mended**: `add_adapters` casts what will be trained to `float32`. In `float16` the same mistake often ends in an error,
# `Attempting to unscale FP16 gradients`; be glad of it.
#
# ## 8. Stale class images
#
# **Made**: a folder of class images left over from somebody's cats. Many scripts only count the files, and their number is
# right. **Predict**: `a photo of a dog`?

# %%
stale = folder / "class_images"
stale.mkdir()
for number in range(20):
    cat, scene = toybox.random_toy("cat", number), list(toybox.SCENES)[number % len(toybox.SCENES)]
    toybox.photograph(cat, scene=scene, seed=number).save(stale / f"{number}.png")
cats = workflow.trained(dataclasses.replace(config, **SHORT, class_data_dir=str(stale)))
models["cats as class"] = cats.components
compare(
    "good",
    "cats as class",
    prompt=CLASS,
    title="class images of cats do not hold it",
    alt="Above dogs; below dogs that have changed, towards the toy's colours or towards cats",
)

# %% [markdown]
# **Seen**: the class images of cats do not protect the dogs. Compare with the row above: dogs may have taken on the toy's
# colours or something of a cat. **The check**: do the class images fit their prompt? CLIP reads them.

# %%
# NBVAL_CHECK_OUTPUT
kinds = encoders.text_features([f"a photo of a {kind}" for kind in toybox.KINDS])
share = {}
for name, session in (("left over", cats), ("drawn by the base", good)):
    seen = encoders.clip_features([load_image(path) for path in session.prior.paths[:20]])
    share[name] = float(((seen @ kinds.T).argmax(1) == toybox.KINDS.index("dog")).float().mean())
assert share["left over"] < 0.5 < share["drawn by the base"], share
print("called dogs by CLIP, most of the left over ones:", share["left over"] > 0.5)
print("called dogs by CLIP, most of the drawn ones:", share["drawn by the base"] > 0.5)

# %% [markdown]
# **Mended**: a cache whose manifest says what made each picture (notebook 02), so that this cannot happen by accident.
#
# ## 9. Rotated photographs
#
# **Made**: telephones store pictures lying down and note the turn beside them. These were read without the note.
# **Predict**: will training set the toy upright again, since it knows how dogs stand?

# %%
lying = folder / "lying"
lying.mkdir()
for path in concept.paths:
    load_image(path).rotate(90, expand=True).save(lying / path.name)
turned = SHORT | dict(instance_data_dir=str(lying), with_prior_preservation=False)
fallen = workflow.trained(dataclasses.replace(config, **turned))
models["trained lying"] = fallen.components
compare("good", "trained lying", title="the shape is lost", alt="Above the toy upright; below shapes in its colours")

# %% [markdown]
# **Seen**: the toy's colours, but no dog that stands upright as before. The base has never seen a dog lying on its side, and
# fifty steps distort the dog; they do not set the photographs upright. **The check**: the contact sheet of what
# training sees. It takes one line and catches bad crops, too:

# %%
plots.show(
    plots.show_images(fallen.dataset.images["instance"], title="What training saw lies on its side"),
    alt="Five squares with a teal dog lying on its side",
)

# %%
# NBVAL_CHECK_OUTPUT
note = Image.Exif()
note[0x0112] = 6  # "turn by a quarter"
load_image(concept.paths[0]).rotate(90, expand=True).save(folder / "telephone.jpg", exif=note)
upright = np.asarray(load_image(concept.paths[0]), dtype=int)
errors = {"with the note": load_image(folder / "telephone.jpg"), "without": load_image(lying / concept.paths[0].name)}
errors = {name: np.abs(np.asarray(image, dtype=int) - upright).mean() for name, image in errors.items()}
assert errors["with the note"] < 10 < errors["without"], errors
print("load_image follows the note:", errors["with the note"] < 10)

# %% [markdown]
# **Mended**: `load_image` turns pictures by their note; a picture that has lost it must be turned by hand.
#
# ## 10. Not a number
#
# **Made**: one broken value in the base, as an overflow in `float16` makes it; one step by a loop that does not look; then
# the value is mended. **Predict**: is all well again?

# %%
models["after one nan"] = broken = load_components(config.base)
add_adapters(broken, rank=4)
bias = broken.unet.conv_out.bias
value = bias[0].item()
with torch.no_grad():
    bias[0] = float("nan")
for _ in steps(broken, [batch_at(dataset, 0, 4)], rate=1e-4):
    pass
with torch.no_grad():
    bias[0] = value
with np.errstate(invalid="ignore"):  # a nan has no grey level: that is what we want to see
    compare("good", "after one nan", title="black", alt="Above the teal toy; below six black squares")

# %% [markdown]
# **Seen**: black pictures, and they stay black: the one step has written `nan` into every adapter. **The check** comes
# *before* the step: is the loss finite? `train` asks at every step.

# %%
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
# **Mended**: `bfloat16` instead of `float16`, a lower rate, a VAE in `float32`.
#
# ## A doctor for files
#
# Some of these failures are in the file that somebody hands you. `dbnb.doctor` looks at any LoRA file, whoever wrote it:
# which base it was made for, how strong it is, which of its keys a loader reads. **Made**: the file of failure 5, and three
# that were damaged: without its header, as before the first step, with the names that peft gives. **Predict**: which of
# the four change a picture?

# %%
# NBVAL_CHECK_OUTPUT
from dbnb.doctor import diagnose, norm_alt, norm_figure

tensors, patients = load_file(whole), {"as it was saved": whole, "without header": bare}
damaged = {
    "not trained": {key: value * ("lora_A" in key) for key, value in tensors.items()},
    "peft's names": {key.replace("unet.", "base_model.model."): value for key, value in tensors.items()},
}
for name, changed in damaged.items():
    patients[name] = folder / f"{name}.safetensors"
    save_file(changed, patients[name])
records = {name: diagnose(path) for name, path in patients.items()}
for name, record in records.items():
    print(f"{name}: {', '.join(record.codes()) or 'sound'}; the picture changes: {record.effect > 0}")

# %%
print(*(finding["text"] for finding in records["peft's names"].findings), sep="\n")
plots.show(norm_figure(records["as it was saved"]), alt=norm_alt(records["as it was saved"]))

# %% [markdown]
# **Seen**: each fault by its name, and bars: the adapter's norm by block. Only the first two files change a picture, and the
# second of them at a quarter of the strength that was trained, which nobody can know from the file. In a terminal:
# `python -m dbnb.doctor FILE --base BASE`.
#
# ## Now you
#
# `a photo of a dog` by five of the models above. **Predict**: which row is which? Which is nearest to the base?

# %%
rows = ("no class images", "base", "cats as class", "mixed up", "good")
figure = plots.image_rows([drawn(name, CLASS) for name in rows], labels=list("ABCDE"), title="Five models: who is who?")
plots.show(figure, alt="Five rows of six pictures, labelled A to E, for the reader to tell apart")

# %%
temporary.cleanup()

# %% [markdown]
# ## Exercises
#
# ### Exercise A: six broken runs (20 minutes)
#
# `broken_runs` makes six very small trainings (an adapted linear layer that denoises points), each with another of the faults
# in `FAULTS`. Look at them, for example at `runs["A"].losses`, then write a function that finds the fault of any run from
# what the run left behind. It has to tell a good run from a broken one, too.
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


def diagnose(run: Run) -> str:
    """The fault of a run, one of FAULTS, or ALL_IS_WELL."""
    ...


check_09a(diagnose)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The order of your questions matters. After a `nan` no number means anything, so ask for it first; in `bfloat16` an adapter
# hardly moves either, so ask for the format before you ask for the effect.
# </details>
#
# <details><summary>Hint 2</summary>
#
# Five looks of this notebook are enough: is the loss finite (10)? Which format (7)? The effect, after training (1) and after
# loading (5)? What is in the batch's first half (6)? And the two held-out losses (3).
# </details>
#
# <details><summary>Hint 3</summary>
#
# `all(any(torch.equal(row, photograph) for photograph in run.photographs) for row in half)` says whether all rows are photographs.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# import math
#
#
# def diagnose(run):
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
# An adapter that loads without an error may still change nothing: its keys name layers that this UNet does not have, or have
# another prefix. Write the look that tells. A layer is reached if the file has both of its matrices, as
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
# 1. Which row is which? Which do pictures alone hardly tell apart? (2 minutes)
# 2. Train with photographs that are all taken in the snow (`toybox.photograph` makes them). What does the subject bring
#    along to the beach? (3 minutes)
# 3. Pick a failure you have met yourself. Which of the ten is it, and which check would have caught it? (think)
#
# <details><summary>Answers</summary>
#
# 1. A: no class images. B: the base. C: cats as class images. D: halves mixed up. E: the good training. E should
#    be nearest to B. A and D both have something of the toy in the class. A picture does not say why: a look at a batch
#    does.
# 2. What is common to all photographs becomes part of the subject: look for snow, or at least a pale ground.
#
# ```python
# from dbnb.toybox.sample import SAMPLE_TOY
#
# snowy = tempfile.TemporaryDirectory()
# for seed in range(5):
#     toybox.photograph(SAMPLE_TOY, scene="snow", seed=seed, size=256).save(Path(snowy.name, f"{seed}.png"))
# settings = SHORT | dict(instance_data_dir=snowy.name, with_prior_preservation=False)
# models["all in the snow"] = workflow.trained(dataclasses.replace(config, **settings)).components
# compare("good", "all in the snow", prompt=BEACH, title="what came along?", alt="the toy on a beach, or in the snow")
# snowy.cleanup()
# ```
#
# 3. Write the check down as a cell, and run it before the next long training.
# </details>
#
# ## Quiz
#
# Five questions about *why*. Choose an answer, then open it: each says whether it is right, and why or why not.
#
# **1. Why does a rate of 1e-6, good for fine-tuning, do nothing for adapters?**
#
# <details><summary>A. Adapters are frozen below a rate of 1e-5, which peft does to save time.</summary>
#
# No: nothing is frozen; the adapters move, only hardly at all.
# </details>
#
# <details><summary>B. AdamW moves a number by about the rate a step, and adapters start at zero.</summary>
#
# Right: a fine-tuned weight is good already, while an adapter has its whole way before it.
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
# No: the file is as it should be, and holds what was learned from wrong pairs.
# </details>
#
# **3. Why does one `nan` ruin an adapter for good, even if its cause is mended?**
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
# **4. Held-out losses on the photographs and on further ones part company. What does that tell?**
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
# Right: the gap is overfitting; stop before the second line rises, or take more photographs.
# </details>
#
# **5. Why is an adapter compared again after it has been loaded elsewhere?**
#
# <details><summary>A. What counts is what the file's user gets, and loading can lose some of it.</summary>
#
# Right: a missing alpha or a wrong prefix gives no error, only a weaker adapter or none.
# </details>
#
# <details><summary>B. Loading always changes the weights by rounding, and rounding has to be mended.</summary>
#
# No: the matrices are stored in `float32` as they were trained; nothing is to be mended.
# </details>
#
# <details><summary>C. Diffusers refuses to load an adapter that has not been compared beforehand.</summary>
#
# No: it loads whatever has the right names, and asks nothing.
# </details>
#
# ## In short
#
# | look | catches |
# |---|---|
# | the contact sheet, and one batch with its prompts | 6, 8, 9 |
# | the formats of what is trained | 7 |
# | held-out losses: photographs, further photographs, class | 2, 3 |
# | each step's loss: is it finite? | 10 |
# | the bare class prompt, before and after | 4, 6, 8 |
# | an adapter's effect, after training and after loading | 1, 5 |
#
# Six looks catch all ten.
#
# Next: [10 On a real base](10_on_a_real_base.ipynb).
