# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 The dataset: half the toy, half the class
#
# **What you will do**: take apart one batch, see how it follows from the number of the step alone, and measure what is
# gained by computing things once.
#
# **What you will learn**: how instance and class images are paired; crops and flips; which results can be kept between
# steps, when, and what that saves.
#
# **What you need**: notebooks [01](01_instance_data.ipynb) to [03](03_loading_and_freezing.ipynb). About half a minute
# on two CPU cores once class images exist.
#
# ---

# %% [markdown]
# Run this first. It makes `dbnb` importable, here and on Colab, and changes nothing that is already installed.

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
# The new module is `dbnb.dataset`.

# %%
import collections
import statistics
import time

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from dbnb import plots, workflow
from dbnb.adapters import add_adapters
from dbnb.concept import Concept
from dbnb.config import DreamBoothConfig
from dbnb.dataset import DreamBoothDataset, cache_latents
from dbnb.models import load_components
from dbnb.prior import class_images
from dbnb.tables import Table
from dbnb.training import batch_at, precompute_embeds, training_step

workflow.quiet_libraries()

# %% [markdown]
# Steps 1 to 3, as the notebooks before this one did them:

# %%
config = DreamBoothConfig()
concept = Concept.from_folder(None, config.identifier, config.class_word)
components = load_components(config.base)
prior = class_images(components, concept.class_prompt, config.num_class_images, resolution=config.resolution)
print(f"{len(concept.paths)} instance images, {len(prior.paths)} class images")

# %% [markdown]
# ## Pairs
#
# A sample is a *pair*: one picture of the subject with its prompt, and one of the class with its own.

# %%
dataset = DreamBoothDataset(
    concept.paths, concept.instance_prompt, class_paths=prior.paths, class_prompt=concept.class_prompt,
    size=config.resolution,
)  # fmt: skip
sample = dataset[0]
Table({"key": key, "value": str(tuple(v.shape) if isinstance(v, torch.Tensor) else v)} for key, v in sample.items())

# %% [markdown]
# Five pictures here, a hundred there. **Predict**: in the first ten samples, how often does each instance picture occur,
# and how often the same class picture?

# %%
# NBVAL_CHECK_OUTPUT
drawn = {half: [dataset.draw(half, n)[0] for n in range(10)] for half in dataset.halves}
print("instance:", drawn["instance"])
print("class, how many different:", len(set(drawn["class"])))

# %% [markdown]
# Each instance picture twice: once in samples 0 to 4, once in 5 to 9, in another order. Every image is seen once before
# any is seen again, and the order is shuffled anew each time.
#
# ## The batch
#
# `collate_fn` lays samples side by side: **all instances first, all class images second**. The loss later cuts the batch
# in the middle. Interleave the two by mistake and the subject is trained under the class prompt, without any error: it
# has happened to well-known scripts more than once (notebook 09 does it on purpose).


# %%
def picture(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> a picture."""
    return VaeImageProcessor().postprocess(pixels[None])[0]


batch = batch_at(dataset, number=0, batch_size=4)
first, second = batch["pixel_values"].chunk(2)
plots.show(
    plots.image_rows(
        [[picture(p) for p in first], [picture(p) for p in second]],
        labels=[f"instance half:\n{batch['prompts'][0]}", f"class half:\n{batch['prompts'][-1]}"], inches=1.4,
    ),
    alt="A batch of eight: four photographs of the teal toy above, four drawn dogs of other colours below",
)  # fmt: skip

# %% [markdown]
# A batch size of 4 means four pairs: eight pictures. That is how diffusers counts, too.
#
# ## A step is a number
#
# Which pictures come, how they are cropped, whether they are mirrored: all of it is computed from the seed and the
# number of the sample, and from nothing else. There is no generator that moves on. **Predict**: step 137, built twice,
# the second time by a dataset that has never been used?

# %%
# NBVAL_CHECK_OUTPUT
options = dict(class_paths=prior.paths, class_prompt=concept.class_prompt, size=48, center_crop=False, random_flip=True)
used, fresh = (DreamBoothDataset(concept.paths, concept.instance_prompt, **options) for _ in range(2))
for step in range(137):
    batch_at(used, step, batch_size=1)
print("equal:", torch.equal(batch_at(used, 137, 4)["pixel_values"], batch_at(fresh, 137, 4)["pixel_values"]))

# %% [markdown]
# So a run that is stopped goes on exactly where it was, two processes can share a run, and you can rebuild step 137 on
# its own and look inside.
#
# ## Crops and flips
#
# Where photographs are not square, or larger than needed, a crop is taken: the middle, or a place drawn anew each time.
# Mirroring half of the pictures is an option as well. Both make five pictures go further; both can also show the model
# what is not so.

# %%
augmented = DreamBoothDataset(
    concept.paths[:1], concept.instance_prompt, size=64, center_crop=False, random_flip=True,
)  # fmt: skip
large = augmented.images["instance"][0].resize((80, 80))
augmented.images["instance"][0] = large
pictures = [picture(augmented[n]["instance_pixels"]) for n in range(6)]
plots.show(
    plots.show_images([large, *pictures], titles=["the picture", *(f"sample {n}" for n in range(6))]),
    alt="One photograph, and six random crops of it, some mirrored",
)

# %% [markdown]
# Are half of them mirrored? Counting is better than looking:

# %%
# NBVAL_CHECK_OUTPUT
print(collections.Counter(augmented.draw("instance", n)[1] for n in range(1000)))

# %% [markdown]
# ## Computed once: latents
#
# With a fixed crop a picture's latents are the same at every step. So they are computed once. What is kept is the
# posterior's mean and variance, not one sample of it: each step still draws its own.

# %%
cached = DreamBoothDataset(
    concept.paths, concept.instance_prompt, class_paths=prior.paths, class_prompt=concept.class_prompt,
    size=config.resolution,
)  # fmt: skip
started = time.perf_counter()
count = cache_latents(cached, components.vae)
print(f"{count} pictures encoded in {time.perf_counter() - started:.1f} s")

# %% [markdown]
# ## Computed once: text embeddings
#
# Where the text encoder is frozen, a prompt always gives the same vectors. There are two prompts in the whole training,
# so they are encoded before it starts, and the text encoder could even leave the memory. Where the text encoder is
# trained, its answer changes with each step: then each *distinct* prompt is encoded once per step, twice for a batch of
# eight.

# %%
prompts = [concept.instance_prompt, concept.class_prompt]
embeddings = precompute_embeds(components, prompts)
print({prompt: tuple(hidden.shape) for prompt, (hidden, _) in embeddings.items()})

# %% [markdown]
# ## What it saves
#
# The same eight steps in four ways; each line is the median of one step's time, forward and backward. These machines
# are noisy: compare, do not quote.

# %%
add_adapters(components, rank=config.rank)
ways = {"nothing kept": (dataset, None), "latents kept": (cached, None),
        "text embeddings kept": (dataset, embeddings), "both kept": (cached, embeddings)}  # fmt: skip
seconds = {name: [] for name in ways}
for number in range(9):
    for name, (data, known) in ways.items():
        started = time.perf_counter()
        record = training_step(components, batch_at(data, number, 4), seed=0, prompt_embeds=known)
        record.loss.backward()
        seconds[name].append(time.perf_counter() - started)
median = {name: {"ms": 1000 * statistics.median(values[1:])} for name, values in seconds.items()}
plots.show(
    plots.bars(median, ylabel="milliseconds a step", title="Keeping both makes a step cheaper"),
    alt="Bars of milliseconds a step: most with nothing kept, least with both kept",
)

# %% [markdown]
# Speed that changes the result would not count. **Predict**: the loss of step 3 in each of the four ways?

# %%
losses = {
    name: training_step(components, batch_at(data, 3, 4), seed=0, prompt_embeds=known).loss.item()
    for name, (data, known) in ways.items()
}
Table({"way": name, "loss": f"{value:.7f}"} for name, value in losses.items())

# %%
# NBVAL_CHECK_OUTPUT
print("equal to a millionth:", max(losses.values()) - min(losses.values()) < 1e-6)

# %% [markdown]
# With random crops, latents cannot be kept, since the pixels differ each time. The dataset says so and refuses, instead
# of quietly training on one crop:

# %%
# NBVAL_CHECK_OUTPUT
try:
    cache_latents(augmented, components.vae)
except ValueError as error:
    print(error)

# %% [markdown]
# ## On your own
#
# 1. Make the batch without class images. What does `collate_fn` give, and what is `halves`? (3 minutes)
# 2. At which size do latents of a thousand class images at 512 px (64 x 64 x 8 numbers, `float32`) stop fitting into
#    memory? (think)
# 3. Why is keeping the posterior better than keeping one sample of the latents? (think)
#
# <details><summary>Answers</summary>
#
# 1. `collate_fn([DreamBoothDataset(concept.paths, concept.instance_prompt)[n] for n in range(4)])`: four pictures, four
#    prompts, `halves` is 1, and the loss has no prior part.
# 2. One is 128 KiB, a thousand are 128 MiB: they fit. Class images are cheap to keep this way.
# 3. One sample would be the same "noise of the encoder" at every step, and the adapters could learn it by heart.
# </details>
#
# ## In short
#
# - A sample is a pair; a batch is instances first, class second.
# - All draws follow from (seed, number).
# - What does not change is computed once: latents with fixed crops, embeddings with a frozen text encoder.
#
# Next: [06 Training](06_training.ipynb), the loop.
