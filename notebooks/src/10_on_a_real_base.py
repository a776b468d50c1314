# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10 On a real base: your own subject on a GPU
#
# **What you will do**: plan memory and time for Stable Diffusion before you download anything; see which lines of the
# course change for a real base, for several GPUs, for the command line; run the very same cells here.
#
# **What you will learn**: what fills a GPU's memory and which switch empties it; which settings a real base wants; how to
# go on after an interruption.
#
# **What you need**: notebook [07](07_validation_and_export.ipynb). Here, on the miniature, about a minute. With Stable
# Diffusion 1.5 on a T4, a training of 800 steps is a matter of half an hour.
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
# The new module is `dbnb.planner`.

# %%

import torch

from dbnb import plots, workflow
from dbnb.config import PRESETS, DreamBoothConfig
from dbnb.planner import BASES, training_memory
from dbnb.tables import Table
from dbnb.validation import validation_images

workflow.quiet_libraries()
print("this machine:", "a CUDA GPU" if torch.cuda.is_available() else "no GPU")

# %% [markdown]
# ## What fills the memory?
#
# Four things: the frozen **weights**; the **adapters** with their gradients and two moments of AdamW each, in `float32`;
# the **activations** that the backward pass will need; and what the libraries take. The first three follow from shapes.
# `training_memory` builds the UNet without storage from its published config, runs one forward pass of it, and counts
# what would be kept. **Predict** for Stable Diffusion 1.5 at 512 px, one photograph and one class image a step, in
# half precision: which of the three is the largest?

# %%
GIB = 2**30
memory = training_memory(BASES["Stable Diffusion 1.5"], batch=2)
print({part: f"{size / GIB:.2f} GiB" for part, size in memory.items()})

# %%
# NBVAL_CHECK_OUTPUT
print(f"adapters are less than a twentieth of the weights: {memory['adapters'] < memory['weights'] / 20}")

# %% [markdown]
# The adapters are nearly nothing: that is why LoRA fits where fine-tuning does not. Fine-tuning all of the UNet would
# hold sixteen bytes for each of its 860 million parameters.
#
# Activations grow with the batch. **Gradient checkpointing** keeps only a few of them and computes the others again in
# the backward pass: about a third more time for a fraction of the memory.

# %%
batches = (2, 4, 8, 16)
series = {}
for checkpointing in (False, True):
    totals = [
        sum(training_memory(BASES["Stable Diffusion 1.5"], batch=b, gradient_checkpointing=checkpointing).values())
        / GIB
        for b in batches
    ]
    series["with gradient checkpointing" if checkpointing else "without"] = (batches, totals)
plots.show(
    plots.curves(series, xlabel="pictures a step (half instance, half class)", ylabel="GiB, without libraries",
                 title="Stable Diffusion 1.5 at 512 px, half precision"),
    alt="Memory against pictures a step: steep without gradient checkpointing, nearly flat with it",
)  # fmt: skip

# %% [markdown]
# ## What fits where
#
# Two gigabytes are set aside for the CUDA context, libraries and fragments. Each cell is the largest batch that fits,
# counted in pictures; half of them are class images.


# %%
def largest_batch(base, gib: float, **options) -> int:
    """The largest even number of pictures a step, up to 32, whose training fits into `gib` GiB."""
    fitting = [
        batch for batch in (2, 4, 8, 16, 32)
        if sum(training_memory(base, batch=batch, **options).values()) / GIB + 2 <= gib
    ]  # fmt: skip
    return max(fitting, default=0)


rows = Table()
for name, base in BASES.items():
    for label, options in (
        ("float16", {}),
        ("float16, gradient checkpointing", {"gradient_checkpointing": True}),
        ("float32, gradient checkpointing", {"gradient_checkpointing": True, "bytes_per_weight": 4}),
    ):
        cells = {f"{gib} GB": str(largest_batch(base, gib, **options) or "-") for gib in (8, 16, 24)}
        rows.append({"base": f"{name}, {base.resolution} px", "how": label} | cells)
rows

# %% [markdown]
# So a card with 8 GB trains Stable Diffusion 1.5, if weights are kept in half precision. Text encoder adapters add
# little; latents kept from the start (notebook 05) let the VAE rest.
#
# This is arithmetic, checked on the miniature and by a drill at full size on a CPU, and not a measurement on each card:
# leave a margin.
#
# ## What changes for a real base
#
# The settings that a base suggests come with its preset. Everything that you set yourself wins.

# %%
names = [name for name in PRESETS["sd15"] if name != "base"]
Table({"setting": name} | {base: str(PRESETS[base][name]) for base in PRESETS} for name in names)

# %% [markdown]
# The learning rates are ten times lower: a large model needs smaller nudges. Guidance is stronger. And the text encoder
# stays frozen at first; with faces, training it helps, at a rate of 1e-5 or less.
#
# **The cell to change.** On a GPU, take out the `#` and put in your folder:

# %%
settings = dict(base="miniature", class_word="dog", identifier="sks")
# settings = dict(base="sd15", instance_data_dir="my photographs", class_word="dog", mixed_precision="fp16",
#                 gradient_checkpointing=True, train_batch_size=1)
config = DreamBoothConfig(**settings)

# %% [markdown]
# And from here on nothing changes. That is the same call as in notebook 00, whatever the base:

# %%
session = workflow.trained(config)
after = validation_images(session.components, session.concept, config, count=8, sets=("subject", "scenes"))
plots.show(
    plots.image_rows([after.subject, after.scenes], labels=[session.concept.instance_prompt, "… by place"]),
    alt="The subject, and the subject in eight places",
)

# %% [markdown]
# ## How long will it take?
#
# Measure twenty steps, then multiply. The first steps warm up and are left out.

# %%
seconds = sorted(line["seconds"] for line in session.log[5:])
middle = seconds[len(seconds) // 2]
print(
    f"median step {middle:.2f} s; {config.max_train_steps} steps about {middle * config.max_train_steps / 60:.1f} minutes"
)

# %% [markdown]
# ## The same from a terminal
#
# The command runs the same function with the same names for its options:
#
# ```bash
# python -m dbnb --base sd15 --instance_data_dir photos/ --class_word dog \
#     --mixed_precision fp16 --gradient_checkpointing --train_batch_size 1
# ```
#
# It writes the adapter, a figure of before and after, the metrics and a card to `runs/dog`. After an interruption,
# `--resume_from_checkpoint latest` goes on where it was, bit for bit.
#
# ## Number formats
#
# | card | use | why |
# |---|---|---|
# | T4, RTX 20xx | `fp16` | fast; gradients are scaled so that they do not vanish |
# | RTX 30xx and later, A100 | `bf16` | as fast, and no overflow |
# | CPU | `no` | half precision is emulated and slower |
#
# In all cases the adapters stay in `float32`.
#
# ## Several GPUs
#
# A step is a function of its number (notebook 05). For adapters of a few megabytes one card is nearly always enough, and
# one process is what this version trains in; several would be told so in one sentence. What several cards are good for
# today: one training on each.
#
# ```bash
# CUDA_VISIBLE_DEVICES=0 python -m dbnb --seed 0 --output_dir runs/seed-0 &
# CUDA_VISIBLE_DEVICES=1 python -m dbnb --seed 1 --output_dir runs/seed-1 &
# ```
#
# ## Before you share it
#
# Photographs of people, and of what belongs to them, need their consent: an adapter can draw them in any place and any
# clothes. The licence of the base applies to what you make of it.
#
# ## On your own
#
# 1. Which is the largest batch for Stable Diffusion 1.5 at rank 64 on 8 GB? How much did the rank cost? (3 minutes)
# 2. Add Stable Diffusion at 768 px (`sample_size=96` with 1.5's other sizes) to `BASES`. What happens to the
#    activations? (5 minutes)
#
# <details><summary>Answers</summary>
#
# 1. `largest_batch(BASES["Stable Diffusion 1.5"], 8, rank=64, gradient_checkpointing=True)`: the same as at rank 16; the
#    adapters grow fourfold and are still small.
# 2. `dataclasses.replace(BASES["Stable Diffusion 1.5"], unet=BASES["Stable Diffusion 1.5"].unet | {"sample_size": 96},
#    resolution=768)`: two and a quarter times as many positions, and as many activations.
# </details>
#
# ## In short
#
# Weights, adapters, activations: plan before you download. One line changes the base; the steps stay the same. You have
# seen all of them.
