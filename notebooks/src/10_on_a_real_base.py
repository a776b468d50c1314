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
# **What you will do**: plan memory and time for larger bases before you download anything; go from photographs to an adapter
# with the cells that a GPU runs too; put two subjects into one adapter; see what changes for a command line and for several
# GPUs.
#
# **What you will learn**: what fills a GPU's memory and which switch empties it; which settings a real base wants.
# Afterwards you can say of a base and a card whether they go together, and start a training of your own subject.
#
# **What you need**: notebook [07](07_validation_and_export.ipynb). No GPU. On two CPU cores about a minute and a half, plus
# two minutes for each of two trainings that are not in the cache yet, that of notebook [00](00_start_here.ipynb) and that of
# two subjects. How long a training takes on your card is a section below.
#
# ---

# %% [markdown]
# Run this first. It makes `dbnb` importable and changes nothing that is already installed. On Colab it asks for a file: give
# it the project's zip or wheel, or set `DBNB_SOURCE`. (`python -m pip wheel --no-deps -w dist .` makes a wheel.)

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
# The new module is `dbnb.planner`.

# %%
import pathlib
import time

import torch

from dbnb import plots, workflow
from dbnb.adapters import adapted_modules, add_adapters, train_mode, trainable_parameters
from dbnb.config import DreamBoothConfig
from dbnb.dataset import DreamBoothDataset, cache_latents
from dbnb.models import load_components
from dbnb.planner import BASES, CARDS, peak_memory, training_memory, weight_memory
from dbnb.presets import PRESETS
from dbnb.tables import Table
from dbnb.training import batch_at, training_step
from dbnb.validation import validation_images

workflow.quiet_libraries()
plots.you_are_here("10")

# %% [markdown]
# ## What fills the memory?
#
# Four things: the frozen **weights**; the **adapters** with their gradients and two moments of AdamW each, in
# `float32`; the **[activations](../docs/glossary.md#activations)** that the backward pass will need; and what the
# libraries take. The first three follow from shapes. `training_memory` builds the UNet, or the transformer that newer
# bases have in its place, without storage from its published config, runs one step of it, and counts what would be
# alive at its highest moment. Each base is asked once; the answer is kept.

# %%
# NBVAL_CHECK_OUTPUT
import functools

GIB = 2**30


@functools.cache
def memory(name: str, checkpointing: bool = False, pictures: int = 2, rank: int = 16) -> dict[str, float]:
    """GiB by purpose for one step in half precision; half of the `pictures` are class images."""
    plan = training_memory(BASES[name], rank=rank, batch=pictures, gradient_checkpointing=checkpointing)
    return {purpose: size / GIB for purpose, size in plan.items()}


print("known:", ", ".join(f"{name} ({base.resolution} px)" for name, base in BASES.items()))

# %% [markdown]
# **Predict** for one photograph and one class image a step: which of the three is the largest? Is it the same for every
# base?


# %%
def short(name: str) -> str:
    """A base's name and size, for a figure."""
    return f"{name.replace('Stable Diffusion', 'SD').replace(' medium', '')}\n{BASES[name].resolution} px"


plans = {name: memory(name) for name in BASES}
plots.show(
    plots.bars(
        {short(name): plan for name, plan in plans.items()},
        ylabel="GiB",
        title="Adapters hardly count: weights and activations fill the card",
    ),
    alt="For each base three bars: weights, adapters, activations; the adapters' bar can hardly be seen",
)

# %% [markdown]
# **What you should see**: it is not the same for every base. Activations are the largest for the four Stable Diffusions,
# though hardly for 1.5. Weights are for DeepFloyd IF and FLUX.1, which have billions of parameters and draw smaller
# pictures here. Adapters are nearly nothing everywhere. What is frozen needs no gradients and no moments, and that is
# why LoRA fits where fine-tuning does not. How much would fine-tuning take for the UNet's weights, gradients and moments
# in `float32`?

# %%
SD = "Stable Diffusion 1.5"
unet = plans[SD]["weights"] * GIB / 2 - BASES[SD].text_parameters - BASES[SD].vae_parameters
print(f"{unet / 1e6:.0f} million parameters, {16 * unet / GIB:.1f} GiB; the adapters {plans[SD]['adapters']:.2f} GiB")

# %%
# NBVAL_CHECK_OUTPUT
assert all(plan["adapters"] < plan["weights"] / 10 for plan in plans.values()), plans
print("for every base adapters take less than a tenth of what the weights take")

# %% [markdown]
# ## Which switch empties it?
#
# - Fewer pictures a step: activations are in proportion to them.
# - **[Gradient checkpointing](../docs/glossary.md#gradient-checkpointing)** keeps only a few activations and computes
#   the others again in the backward pass: it trades time for memory.
# - A lower rank, or an optimizer with 8-bit moments: they touch the adapters, and so next to nothing.
#
# The dashed lines are cards; two gigabytes are set aside for the CUDA context, libraries and fragments. **Predict** the
# order of the bars.

# %%
LIBRARIES = 2.0
switches = {
    "8 pictures": memory(SD, pictures=8),
    "2 pictures": memory(SD),
    "rank 4": memory(SD, rank=4),
    "checkpointing": memory(SD, True),
    "8, with\ncheckpointing": memory(SD, True, pictures=8),
}
cards = {f"{size} GB": size for size in CARDS}
plots.show(
    plots.bars(
        {name: {"in all": sum(plan.values()) + LIBRARIES} for name, plan in switches.items()},
        ylabel="GiB",
        marks=cards,
        title=f"{SD}: pictures and checkpointing count, the rank does not",
    ),
    alt="Five bars against the lines of four cards: fewer pictures and gradient checkpointing lower them, the rank does not",
)

# %%
# NBVAL_CHECK_OUTPUT
few, many, kept = (switches[name]["activations"] for name in ("2 pictures", "8 pictures", "checkpointing"))
print(f"8 pictures keep {many / few:.1f} times what 2 keep; checkpointing leaves less than half: {kept < few / 2}")

# %% [markdown]
# **What you should see**: only eight pictures without checkpointing go past the smallest card; with it, eight take
# as much as two without. What checkpointing costs in time can be measured here, on the miniature: six steps
# each way, the median of the last five.

# %%
import statistics

config = DreamBoothConfig()
session = workflow.trained(config)
dataset = DreamBoothDataset(session.concept.paths, session.concept.instance_prompt, size=config.resolution)
seconds = {}
for checkpointing in (False, True):
    parts = load_components("miniature")
    add_adapters(parts, config.adapters)
    if checkpointing:
        parts.unet.enable_gradient_checkpointing()
    _ = cache_latents(dataset, parts.vae)
    times = [time.perf_counter()]
    for number in range(6):
        training_step(parts, batch_at(dataset, number, 2), seed=0).loss.backward()
        times.append(time.perf_counter())
    seconds[checkpointing] = statistics.median(b - a for a, b in zip(times[1:], times[2:], strict=False))
without, with_it = seconds.values()
print(f"{without:.3f} s a step, with checkpointing {with_it:.3f} s: {with_it / without:.2f} times")

# %% [markdown]
# By the count of passes it should be about one and a half times: two forward passes and a backward one instead of one of
# each. A few steps on a busy processor may show more or less.

# %% [markdown]
# ## What fits where
#
# Each cell is the largest number of pictures a step that fits, half of them class images. Since activations are in
# proportion to the pictures, one plan for each base and switch is enough. **Predict**: which base fits on which card?


# %%
@functools.cache
def weights(name: str, quantization: str) -> float:
    """GiB of all frozen parts in fewer bits."""
    return weight_memory(BASES[name], quantization=quantization) / GIB


def largest_batch(name: str, gib: float, checkpointing: bool = False, quantization: str | None = None) -> int:
    """The largest even number of pictures a step that fits."""
    plan = memory(name, checkpointing)
    frozen = plan["weights"] if quantization is None else weights(name, quantization)
    return max(0, int((gib - LIBRARIES - plan["adapters"] - frozen) / plan["activations"]) * 2)


# %%
rows = Table()
ways = {
    "half precision": (False,),
    "and checkpointing": (True,),
    "and 4 bits": (True, "nf4"),
}
for name in BASES:
    for label, way in ways.items():
        cells = {card: str(largest_batch(name, size, *way) or "does not fit") for card, size in cards.items()}
        rows.append({"base": short(name).replace("\n", ", "), "how": label} | cells)
rows

# %%
# NBVAL_CHECK_OUTPUT
assert largest_batch(SD, 8, True) >= 2, "not even one photograph and one class image"
print(f"{SD} and 8 GB: fits in half precision with checkpointing")

# %% [markdown]
# The third row of each base has linear layers in 4 bits (`quantization="nf4"`, after QLoRA of Dettmers et al., 2023):
# weights that are frozen can be rounded once, and the adapters are trained on top of the rounded weights. It needs
# bitsandbytes and a CUDA device. **What you should see**: a transformer consists of linear layers, and so even FLUX.1
# fits on a card of 16 GB. Most of Stable Diffusion 1.5 consists of convolutions, which stay as they are.
#
# These plans are for adapters on attention. A text encoder that is trained too adds little. Where prompts are encoded once
# and latents are kept from the start (notebook 05), no step needs text encoders and VAE: they leave the card, and return for
# every picture that is drawn. So all weights must fit in any case; moving them away makes room for a larger batch.
#
# As a recipe: for each card the fastest way that has room for one pair of pictures, and how many pairs then fit.

# %%
PRECISION = {"half precision": "", "and checkpointing": ", checkpointing", "and 4 bits": ", checkpointing, nf4"}


def recipe(name: str, card: float) -> str:
    """The first of the ways in which a base fits on a card, fewest switches first."""
    for label, switches in PRECISION.items():
        if pairs := largest_batch(name, card, *ways[label]) // 2:
            return f"{pairs} pair{'s' * (pairs > 1)}{switches}"
    return "does not fit"


Table(
    {"base": short(name).replace("\n", ", ")} | {card: recipe(name, size) for card, size in cards.items()}
    for name in BASES
)

# %% [markdown]
# The next cell plans for the card of this machine, or, where there is none, for one with 16 GiB. (Colab's T4 is sold
# with 16 GB and reports less than 15 GiB: run the cell there for its own plan.) A step is not the only thing that
# needs room: pictures are drawn before and after, and the VAE decodes them. `peak_memory` gives the highest moment of
# each phase, for one pair of pictures a step, and four pictures drawn at once.

# %%
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    card_name, card_gib = card.name, card.total_memory / GIB
else:
    card_name, card_gib = "a card", 16.0
print(f"{card_name}, {card_gib:.0f} GiB")
for name in BASES:
    print(f"  {short(name).replace(chr(10), ', '):16} {recipe(name, card_gib)}")
peaks = peak_memory(BASES[SD], batch=2, gradient_checkpointing=True)
phases = ", ".join(f"{phase} {size / GIB + LIBRARIES:.1f} GiB" for phase, size in peaks.items())
print(f"{SD} with checkpointing, libraries included: {phases}")

# %% [markdown]
# This is arithmetic: leave a margin. It has been held against one card, with random weights of the published sizes
# (`tests/benchmarks/gpu.py`). **Predict**: where would the plan be wrong?

# %%
import json
from pathlib import Path

here = Path.cwd()
found = [folder / "tests/benchmarks/results.json" for folder in (here, *here.parents)]
found = [path for path in found if path.is_file()]
measured = json.loads(found[0].read_text())["gpu"] if found else {"note": "The table is in the README.", "rows": []}
print(measured["note"])
Table(measured["rows"])

# %% [markdown]
# **What you should see**: without checkpointing the plan and the card's peak differ by 0.3 GiB at most. A plan that
# counted every activation in two bytes would be a seventh to a third too low: in mixed precision norms are
# computed in `float32`, and each adapter keeps a copy of what it reads. With checkpointing the table shows more than
# the plan. Judging by the shapes of the networks, that peak comes before the first step, when the VAE encodes the
# photographs beside all other parts. Neither column counts the drawing of pictures; Stable Diffusion 3.5 was measured
# without its T5 encoder, which the table of what fits above counts in full. Read the steps a second with caution: each
# is from one short run, some of them on a busy machine.
#
# **No cell of this notebook has been run on a published checkpoint yet**, and what the note under the table calls never
# seen has not been run on any card; it has been tested with small random checkpoints on a processor.
#
# ## What changes for a real base
#
# The settings that a base suggests come with its preset. Everything that you set yourself wins.

# %%
names = [name for name in PRESETS["sd15"] if name != "base"]
Table({"setting": name} | {base: str(preset.get(name, "")) for base, preset in PRESETS.items()} for name in names)

# %%
# NBVAL_CHECK_OUTPUT
rates = {base: preset["learning_rate"] for base, preset in PRESETS.items()}
print(
    {base: f"{rates['miniature'] / rate:.0f} times lower" for base, rate in rates.items() if rate < rates["miniature"]}
)

# %% [markdown]
# So learning rates are lower: a large model needs smaller steps. Guidance is stronger. On most bases adapters sit on
# attention only, as in most training scripts: that is enough for a large base, and the file stays small (the
# miniature needs them on its convolutions too, notebook 04). On FLUX.1 they sit on feed-forward layers as well, which
# the plans above leave out. The text encoder stays frozen on all bases; training it needs more memory and a careful
# rate.
#
# ## From photographs to an adapter
#
# **Install.** On Colab, choose a runtime with a GPU, and run the first cell of this notebook: torch for CUDA is there already.
# On a machine of your own, from the project's folder:
#
# ```bash
# pip install -e ".[jupyter]"               # without the constraints of linux-cpu.txt, which would bring a torch for CPUs
# pip install -e ".[jupyter,quantization]"  # and this for a base in 4 bits
# ```
#
# On Windows pip installs a torch without CUDA: install torch first, with the command that
# [pytorch.org](https://pytorch.org/get-started/locally/) gives for your card. Either way `python -c "import torch;
# print(torch.cuda.is_available())"` should print `True`.
#
# **Keep what must not be lost.** Trainings keep a checkpoint after each quarter of their steps in the folder `DBNB_CACHE`. With
# that folder on your Drive, a dropped connection costs little: run the notebook again, and the training goes on from the last
# checkpoint. Do this before all other cells (not run on Colab by this project yet):
#
# ```python
# import os
# from google.colab import drive, files
#
# drive.mount("/content/drive")
# os.environ["DBNB_CACHE"] = "/content/drive/MyDrive/dbnb"
# ```
#
# **Photographs**, three to ten of them, from your computer to the Drive:
#
# ```python
# from dbnb.pictures import save_uploads
#
# save_uploads(files.upload(), "/content/drive/MyDrive/my photographs")
# ```
#
# **The cell to change.** On a GPU, remove the `#` and put in your folder, your class word and what the plan above says of your
# card. (These settings have not been run on a published checkpoint yet.)

# %%
import tempfile

settings = dict(base="miniature", class_word="dog", identifier="sks")
results = tempfile.mkdtemp()
# settings = dict(base="sd15", instance_data_dir="/content/drive/MyDrive/my photographs", class_word="dog", identifier="ohwx")
# settings |= dict(gradient_checkpointing=True, num_validation_images=8)
# results = "/content/drive/MyDrive/my dog"
config = DreamBoothConfig(**settings)
print(f"{config.base}: {config.max_train_steps} steps, {config.resolution} px, precision {config.mixed_precision!r}")

# %% [markdown]
# And from here on nothing changes, whatever the base. **The training** is the call of notebook 00. It shows four pictures after
# each quarter, always from the same noise. If they do not come nearer to your subject, interrupt it and change a setting. Here,
# the training of notebook 00 comes from the cache, and so the way is drawn from its checkpoints afterwards.

# %%
from dbnb.validation import draw, grid


def look(session: workflow.Session, step: int) -> None:
    """Pictures on the way, as the training goes on."""
    pictures = draw(session.components, [session.concept.instance_prompt] * 4, config.sampling)
    plots.show(plots.show_images(pictures, title=f"step {step}"), alt=f"Four pictures after {step} steps")


session = workflow.trained(config, on_checkpoint=look)
way = grid(
    session.components, session.config.output_dir, session.concept.instance_prompt, config.sampling, strengths=(1.0,)
)
plots.show(
    plots.show_images(list(way.values()), titles=[f"step {step}" for step, _ in way], title="The way to the subject"),
    alt="One picture at each checkpoint, from the same noise: a dog that becomes the toy step by step",
)

# %% [markdown]
# **Before and after**, from the same noise. At strength 0 the adapters change nothing, so that one model draws both.

# %%
from dbnb.adapters import strength

COUNT = min(8, config.num_validation_images)
further = workflow.references(config)
with strength(session.components, 0.0):
    before = validation_images(session.components, session.concept, config.sampling, count=COUNT)
after = validation_images(session.components, session.concept, config.sampling, count=COUNT)
plots.show(
    plots.image_rows(
        [before.subject, after.subject, before.scenes, after.scenes, before.classes, after.classes],
        labels=[f"{when}:\n{what}" for what in ("subject", "in places", "the class") for when in ("before", "after")],
        inches=1.1,
        title=f"'{session.concept.instance_prompt}' on {config.base}: the subject is learned, the class stays varied",
    ),
    alt="Pairs of rows before and after: any dogs become the subject, alone and in places, and the class stays as varied",
)

# %% [markdown]
# **What you should see**: here, the toy alone and in eight places; with your settings, your subject. The places are those of
# the toy world, and a real base knows them too. The last two rows should be equally varied.
#
# **In numbers**, as in notebook 08. A real base is measured by DINO and CLIP, which are fetched once; where they are not
# available the pictures have to do.

# %%
from dbnb import metrics

try:
    encoders = metrics.load_encoders(session.components.base)
except OSError as error:
    numbers, table = None, f"no numbers: {error}"
else:
    numbers = workflow.measured(session, before, after, encoders, further)
    table = metrics.metrics_table(numbers)
table

# %% [markdown]
# **The file, and the proof that it loads.** Two forms of the same adapter: diffusers' own, and kohya's, which A1111 and ComfyUI
# read. `verify_reload` loads the first into the plain base and compares what both draw.

# %%
from dbnb import export

adapter = export.save_adapters(session.components, pathlib.Path(results))
export.save_kohya(session.components, pathlib.Path(results))
export.model_card(session.concept, config, numbers, has_text_encoder=False).save(f"{results}/README.md")
difference = export.verify_reload(session.components, adapter, session.concept, config.sampling)
print(f"reloads: no pixel differs by more than {difference}/255")
for path in sorted(pathlib.Path(results).iterdir()):
    print(f"{path.name:40} {path.stat().st_size / 2**20:6.2f} MiB")

# %% [markdown]
# With `results` on your Drive you are done: the folder holds what others need. To load it anywhere with diffusers alone:
#
# ```python
# import torch
# from diffusers import DiffusionPipeline
#
# name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# pipeline = DiffusionPipeline.from_pretrained(name, torch_dtype=torch.float16).to("cuda")
# pipeline.load_lora_weights("my dog", weight_name="pytorch_lora_weights.safetensors")
# pipeline("a photo of ohwx dog on the beach").images[0]
# ```
#
# ## When the result is not good
#
# Look at the pictures first, then change one thing. The links lead into notebook [09](09_when_it_goes_wrong.ipynb), which shows
# each of these faults and how to check for it.
#
# | what you see | what to change first |
# |---|---|
# | any dog, the subject only now and then | twice as many steps; then twice the [learning rate](09_when_it_goes_wrong.ipynb#1-the-learning-rate-is-too-low) |
# | the base's picture, as if nothing had been trained | the identifier in the [prompt](09_when_it_goes_wrong.ipynb#3-the-adapter-is-off-or-nobody-asks-for-it); whether the [file fits](09_when_it_goes_wrong.ipynb#2-the-file-does-not-fit) the base |
# | burnt colours, hard contrasts | half the [learning rate](09_when_it_goes_wrong.ipynb#5-the-learning-rate-is-too-high), or strength 0.7; a lower [guidance scale](09_when_it_goes_wrong.ipynb#6-the-guidance-is-too-high) |
# | always the pose or the background of a photograph | [fewer steps](09_when_it_goes_wrong.ipynb#8-learned-by-heart), more varied photographs, [masks](09_when_it_goes_wrong.ipynb#9-the-background-was-learned-too) |
# | every dog is the subject | [class images](09_when_it_goes_wrong.ipynb#10-there-are-no-class-images), and `prior_loss_weight` 1 |
# | black pictures | `mixed_precision="bf16"`, the [safety checker](09_when_it_goes_wrong.ipynb#20-black-pictures-from-a-sound-adapter) |
# | `CUDA out of memory` | the recipe above, and its [three phases](09_when_it_goes_wrong.ipynb#21-out-of-memory) |
#
# ## Two subjects in one adapter
#
# `--concepts` names a file that says for each subject what the command's own options say for one: photographs, identifier and
# class word. The subjects take turns within each batch, each with class images of its own. **Predict**: will a dog and a cat
# mix?

# %%
import json

from dbnb import toybox
from dbnb.toybox.sample import SAMPLE_TOY, write_toy

both = pathlib.Path(tempfile.mkdtemp())
entries = []
for toy, identifier in ((SAMPLE_TOY, "sks"), (toybox.random_toy("cat", 31), "zwx")):
    photographs = write_toy(toy, both / toy.kind)
    entries.append(dict(instance_data_dir=str(photographs), identifier=identifier, class_word=toy.kind))
(both / "concepts.json").write_text(json.dumps(entries))
two = workflow.trained(DreamBoothConfig(concepts=str(both / "concepts.json")))

# %%
sampling = DreamBoothConfig().sampling
drawn = {
    subject.concept.name: validation_images(
        two.components, subject.concept, sampling, count=8, sets=("subject",)
    ).subject
    for subject in two.subjects
}
photographs = {subject.concept.name: subject.concept.images() for subject in two.subjects}
likeness = metrics.who_looks_like_whom(metrics.load_encoders(two.components.base), drawn, photographs)
assert all(max(row, key=row.get) == name for name, row in likeness.items()), likeness
rows = {}
for name in drawn:
    rows |= {f"{name}:\nphotographs": photographs[name], f"{name}:\ndrawn": drawn[name]}
plots.show(
    plots.image_rows(list(rows.values()), labels=list(rows), inches=1.1, title="Two names, two toys, one adapter"),
    alt="Photographs and drawn pictures of two toys: a teal dog with yellow spots, and a cat of other colours",
)
metrics.likeness_table(likeness)

# %% [markdown]
# **What you should see**: under the photographs of each toy, drawings of that toy; in the table each row is highest
# under its own name. In the same number of steps each subject has had half of the pictures, so the dog comes less near
# to its photographs than it did alone. (Two subjects of one class share their class word; how well they are kept apart
# is not measured here.)
#
# A batch holds all subjects only if it has a pair for each. What does that cost in memory? The adapters stay the same; a step
# has more pictures, and drawing takes what it took for one subject:

# %%
for pairs in (1, 4):
    step = sum(memory(SD, True, pictures=2 * pairs).values()) + LIBRARIES
    print(f"{SD}, {pairs} pair{'s' * (pairs > 1)} a step: training {step:.1f} GiB, ", end="")
    print(", ".join(f"{phase} {peaks[phase] / GIB + LIBRARIES:.1f} GiB" for phase in ("drawing", "decoding")))

# %% [markdown]
# (Two subjects have been trained on the miniature only, not on a published checkpoint.)
#
# ## How long will it take?
#
# That depends on your card, and ten steps on it are enough to tell. The log of every run has each step's seconds (those of
# a run from the cache were measured when it was made, perhaps on another day).

# %%
log = session.log[:60]
middle = statistics.median(line["seconds"] for line in session.log[5:])
plots.show(
    plots.curves(
        {"a step": ([line["step"] for line in log], [line["seconds"] for line in log])},
        xlabel="step",
        ylabel="seconds",
        marks={"median of the whole run": middle},
        title="A few steps tell roughly about all of them",
    ),
    alt="Seconds a step: they scatter around their median, and a few are slower",
)
print(f"{middle:.2f} s a step; {config.max_train_steps} steps: {middle * config.max_train_steps / 60:.1f} minutes")

# %% [markdown]
# What fills those seconds? The next cell takes ten steps with a stopwatch at each part. **Predict**: which part is the
# longest, and how much does the optimizer take, which touches only the adapters?


# %%
wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None


# %%
def stopwatch(components, dataset, number: int, optimizer) -> dict[str, float]:
    """Milliseconds of one step, by what they were spent on."""
    start, ended = time.perf_counter(), {"": 0.0}

    def mark(name: str, *_) -> None:
        wait()  # a GPU works on while Python goes ahead
        ended[name] = 1000 * (time.perf_counter() - start)

    hooks = [
        components.text_encoder.register_forward_pre_hook(functools.partial(mark, "batch, noise")),
        components.text_encoder.register_forward_hook(functools.partial(mark, "text encoder")),
        components.denoiser.register_forward_hook(functools.partial(mark, "denoiser, forward")),
    ]
    training_step(components, batch_at(dataset, number, config.train_batch_size), seed=0).loss.backward()
    mark("loss, backward")
    optimizer.step()
    mark("optimizer")
    for hook in hooks:
        hook.remove()
    return {name: ended[name] - before for before, name in zip(ended.values(), list(ended)[1:], strict=False)}


# %%
subject = session.components
cache_latents(session.dataset, subject.vae)  # as `train` does before its first step
modules = adapted_modules(subject).values()
for module in modules:
    train_mode(module)
still = torch.optim.AdamW([p for m in modules for _, p in trainable_parameters(m)], lr=0.0, fused=True)  # moves nothing
rounds = [stopwatch(subject, session.dataset, number, still) for number in range(10)]
spent = {name: statistics.median(times[name] for times in rounds) for name in rounds[0]}
for module in modules:
    module.eval()
plots.show(
    plots.bars(
        {name: {"a step": value} for name, value in spent.items()},
        ylabel="milliseconds",
        title="The UNet, forward and back, is nearly all of a step",
    ),
    alt="Bars: the UNet's forward and the backward pass are long; batch, text encoder and optimizer are short",
)
assert spent["denoiser, forward"] + spent["loss, backward"] > 0.7 * sum(spent.values())

# %% [markdown]
# **What you should see**: the two passes through the UNet. That the rest is so small is the work of two caches
# (notebook 05): pictures are encoded once, and each distinct prompt once a step. (`train` encodes prompts only once
# in all, where the text encoder is frozen.) Without the first cache, the autoencoder would add a good part of a pass.
# On a large base the backward pass is usually the longer one: there it goes back through all blocks, while here it
# stops at `up_blocks.1`, the first block that has adapters.
#
# A run is more than its training, though. Count what the UNet does, in *passes* of one picture: a training step takes
# about two for each picture (the backward pass costs one, since frozen weights need no gradients of their own), three
# with checkpointing; drawing takes two for each solver step because of guidance, and one on FLUX.1 [dev], whose
# guidance is built in. **Predict**: on which does a run with the presets spend most?


# %%
def passes(config: DreamBoothConfig) -> dict[str, float]:
    """Thousands of the denoiser's passes of one picture, by purpose."""
    drawing = (1 if config.base == PRESETS["flux"]["base"] else 2) * config.num_inference_steps / 1000
    of_step = 2 * config.train_batch_size * (3 if config.gradient_checkpointing else 2) / 1000
    return {
        "class images": config.num_class_images * drawing,
        "training": config.max_train_steps * of_step,
        "before and after": 2 * 3 * config.num_validation_images * drawing,
    }


work = {base: passes(DreamBoothConfig(base=base)) for base in PRESETS}
plots.show(
    plots.bars(work, ylabel="thousand passes", title="A run is more than its training"),
    alt="For each preset three bars: class images, training, pictures before and after",
)

# %%
each = middle / (2 * config.train_batch_size * (3 if config.gradient_checkpointing else 2))
for purpose, thousands in passes(config).items():
    print(f"{purpose:17} {thousands:5.1f} thousand passes, at this speed {thousands * 1000 * each / 60:.1f} minutes")

# %% [markdown]
# **What you should see**: training costs most here. On all large bases, which want more solver steps for a
# picture, the pictures cost more than the training, class images most of all; but these are drawn once and kept. The
# presets of large bases draw 4 validation images of each set, which shows how a training goes and is too few for
# reliable measures; 8 make them steadier and take twice as long. (These minutes are a plan from one number; drawing in
# batches is faster than that.)
#
# ## The same from a terminal
#
# The command runs the same function with the same names for its options:
#
# ```bash
# python -m dbnb --base sd15 --instance_data_dir photos/ --class_word dog --identifier ohwx --gradient_checkpointing
# ```
#
# It writes the adapter, a figure of before and after, the metrics and a card to `runs/dog`. After an interruption,
# `--resume_from_checkpoint latest` goes on where it stopped: on a CPU bit for bit, and on a GPU, where this was not tested,
# perhaps with other rounding.
#
# ## Number formats
#
# The large presets say `mixed_precision="half"`, which is settled when the run starts:
#
# | card | becomes | why |
# |---|---|---|
# | T4, RTX 20xx | `fp16` | fast; gradients are scaled so that they do not vanish |
# | RTX 30xx and later, A100 | `bf16` | as fast, and it does not overflow |
# | none | `no` | [half precision](../docs/glossary.md#half-precision) is slow on most processors |
#
# In all cases the adapters stay in `float32` (notebook 09, number 7).
#
# ## More than fits at once
#
# Gradients of several batches can be added up before the optimizer's step (`gradient_accumulation_steps`). **Predict**: is a
# batch of four the same as two batches of two?

# %%
# NBVAL_CHECK_OUTPUT
with torch.no_grad():
    four = training_step(parts, batch_at(dataset, 0, 4), seed=0).loss.item()
    twos = [training_step(parts, batch_at(dataset, number, 2), seed=0).loss.item() for number in (0, 1)]
print("one batch of four, and two of two, the same loss:", abs(four - sum(twos) / 2) < 1e-5)

# %% [markdown]
# The same pictures with the same noise: since a step is a function of its number (notebook 05), `batch_at` cuts one sequence
# of samples into batches of any size.
#
# ## Several GPUs
#
# That is also how several cards work on one training: each takes its own samples out of the sequence, and the gradients are
# averaged before the optimizer's step. Class images are divided in the same way. From a terminal, accelerate starts the
# processes:
#
# ```bash
# accelerate launch --multi_gpu --num_processes 2 -m dbnb --base sd15 --instance_data_dir photos/ --class_word dog --identifier ohwx
# ```
#
# `train_batch_size` counts for each process: two with 4 make what one with 8 makes, except for rounding. The first process
# alone writes. A checkpoint goes on in another number of processes too, if processes times `train_batch_size` stays the same.
#
# With several machines, run the command on each, with `--num_machines`, `--machine_rank` and the first one's
# `--main_process_ip` and `--main_process_port` besides; `--num_processes` is the total over all machines.
# (Tested by this project: two processes on one processor, against one. Not tested: several cards, several machines.)
#
# In a notebook, accelerate's `notebook_launcher` starts the same function, in as many processes as there are cards.
# Once a notebook has used CUDA, it cannot start processes that use it: with several cards, restart the kernel first,
# and run only the cell of the imports, the line `settings = …` and this cell. Here it is one process, and ten steps:

# %%
import tempfile

from accelerate import notebook_launcher

output_dir = f"{tempfile.mkdtemp()}/few"


def ten_steps() -> None:
    """The settings are made here, in each process: they too ask what the card can do."""
    workflow.run(DreamBoothConfig(**settings, max_train_steps=10, num_validation_images=0, output_dir=output_dir))


notebook_launcher(ten_steps, num_processes=max(1, torch.accelerator.device_count()))

# %% [markdown]
# **What you should see**: what `python -m dbnb` tells, down to the adapter that reloads. For adapters of some megabytes and a
# few photographs one card is nearly always enough. Often several cards are better used for several trainings, one each, say
# with several seeds (notebook 08 asks for them):
#
# ```bash
# CUDA_VISIBLE_DEVICES=0 python -m dbnb --base sd15 --instance_data_dir photos/ --identifier ohwx --seed 0 --output_dir runs/seed-0 &
# CUDA_VISIBLE_DEVICES=1 python -m dbnb --base sd15 --instance_data_dir photos/ --identifier ohwx --seed 1 --output_dir runs/seed-1 &
# ```
#
# ## Before you share it
#
# Photographs of people, and of what belongs to them, need their consent: an adapter can draw them in any place and any
# clothes. The licence of the base applies to what you make of it.

# %% [markdown]
# ## Exercises
#
# ### Exercise A: a memory estimate (8 minutes)
#
# Write the estimate for a training in half precision, in GiB ($2^{30}$ bytes). To keep it simple, frozen weights and
# activations take 2 bytes a number. (The plan above is higher, since mixed precision keeps some activations in
# `float32`.) A number of an adapter is `float32` and takes 4 bytes for itself, and as many for its gradient and for
# each of AdamW's two moments. Activations are given for one picture, and `train_batch_size` counts pairs.

# %%
from dbnb.exercises import check_10a


def memory_gib(frozen: int, adapters: int, activations: int, train_batch_size: int) -> float:
    """GiB of a training, from the numbers that are frozen, that are trained, and that a picture's backward pass keeps."""
    ...


check_10a(memory_gib)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# How many bytes does a trained number take in all? How many pictures is a batch of 3?
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def memory_gib(frozen, adapters, activations, train_batch_size):
#     pictures = 2 * train_batch_size
#     return (2 * frozen + 16 * adapters + 2 * activations * pictures) / 2**30
# ```
# </details>
#
# ### Exercise B: the batch that fits (6 minutes)
#
# And the other way round: the card is given, and 2 GiB of it belong to the CUDA context and the libraries. What is the largest
# `train_batch_size`? Where not even the weights fit, it is 0.

# %%
from dbnb.exercises import check_10b


def largest_train_batch_size(card: float, weights: float, adapters: float, activations: float) -> int:
    """The largest number of pairs a step; all arguments in GiB, the activations those of one picture."""
    ...


check_10b(largest_train_batch_size)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# What is left for activations when everything else has its place? How many *pairs* is that?
# </details>
#
# <details><summary>Hint 2</summary>
#
# `int` rounds down for positive numbers only. `max(0, …)` takes care of the rest.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def largest_train_batch_size(card, weights, adapters, activations):
#     free = card - 2 - weights - adapters
#     return max(0, int(free / (2 * activations)))
# ```
# </details>

# %% [markdown]
# ## On your own
#
# 1. Which is the largest batch for Stable Diffusion 1.5 at rank 64 on 8 GB, with checkpointing? What did the rank cost?
#    (3 minutes)
# 2. Stable Diffusion 1.5 at 768 pixels is `sample_size=96` with its other sizes unchanged. **Predict** what happens to the
#    activations, then ask. (3 minutes)
# 3. How many passes does your own plan take, with 200 class images and no validation images? (2 minutes)
#
# <details><summary>Answers</summary>
#
# 1. Nearly the same as at rank 16: the adapters grow fourfold, and that costs few of many pictures.
#
# ```python
# for rank in (16, 64):
#     plan = memory(SD, True, 2, rank)
#     fitting = int((8 - LIBRARIES - plan["adapters"] - plan["weights"]) / plan["activations"]) * 2
#     print(rank, f"adapters {plan['adapters']:.2f} GiB, pictures a step: {fitting}")
# ```
#
# 2. Two and a quarter times as many positions, and as many activations: attention's own squares are never kept.
#
# ```python
# import dataclasses
#
# larger = dataclasses.replace(BASES[SD], denoiser=BASES[SD].denoiser | {"sample_size": 96}, resolution=768)
# print(training_memory(larger)["activations"] / GIB / memory(SD)["activations"])
# ```
#
# 3. Count, before you wait:
#
# ```python
# print(passes(DreamBoothConfig(base="sd15", num_class_images=200, num_validation_images=0)))
# ```
# </details>
#
# ## Quiz
#
# Five questions about *why*. Choose an answer, then open it: each says whether it is right, and why or why not.
#
# **1. Why does LoRA fit on a card where fine-tuning of the same UNet does not?**
#
# <details><summary>A. It leaves out the forward pass of the layers that have no adapter.</summary>
#
# No: every layer runs in the forward pass, adapted or not.
# </details>
#
# <details><summary>B. Its activations are smaller, because the adapters have a low rank.</summary>
#
# No: activations are in proportion to the pictures, and hardly depend on the rank.
# </details>
#
# <details><summary>C. What is frozen needs no gradients and no moments, the larger part.</summary>
#
# Right: fine-tuning keeps 16 bytes a parameter in `float32`, a frozen half-precision weight takes 2.
# </details>
#
# **2. Why does a lower rank save next to nothing?**
#
# <details><summary>A. The rank is rounded up to 16 on a GPU, so that lower ones cost the same.</summary>
#
# No: it is not rounded; the adapters do get smaller.
# </details>
#
# <details><summary>B. Adapters are a small part of the memory, and the others do not depend on it.</summary>
#
# Right: weights and activations fill the card, and pictures and checkpointing move the latter.
# </details>
#
# <details><summary>C. A lower rank needs more steps, and each step takes memory of its own.</summary>
#
# No: a step's memory is free again after it, however many steps there are.
# </details>
#
# **3. What does gradient checkpointing pay with for the memory that it saves?**
#
# <details><summary>A. With time: what is thrown away is computed again in the backward pass.</summary>
#
# Right: a training step then takes about three passes for each picture instead of two.
# </details>
#
# <details><summary>B. With precision: activations are kept in eight bits until they are needed.</summary>
#
# No: they are computed again in full, and the result is the same.
# </details>
#
# <details><summary>C. With disk space: activations are written to a file and read back later.</summary>
#
# No: nothing is written; checkpoints on disk are another thing with a similar name.
# </details>
#
# **4. Why do real bases get a much lower learning rate than the miniature?**
#
# <details><summary>A. Their photographs are larger, and the rate is divided by the number of pixels.</summary>
#
# No: the loss is a mean, so that the number of pixels does not enter.
# </details>
#
# <details><summary>B. Their training runs in half precision, where only low rates can be stored.</summary>
#
# No: the adapters are in `float32`, whatever the base is kept in.
# </details>
#
# <details><summary>C. A large model needs smaller steps, or what it knows is overwritten.</summary>
#
# Right: the presets hold rates that suit each base; your own setting wins.
# </details>
#
# **5. Why does batch 4 on two cards make what batch 8 makes on one?**
#
# <details><summary>A. The second card repeats the first one's work, so that errors can be found.</summary>
#
# No: each card takes samples of its own out of the sequence.
# </details>
#
# <details><summary>B. A step's samples follow from its number, and the gradients of both are averaged.</summary>
#
# Right: two processes on one processor were tested against one; several cards were not.
# </details>
#
# <details><summary>C. The learning rate is doubled on two cards, which makes up for the smaller batch.</summary>
#
# No: the rate stays the same, because the whole batch does.
# </details>
#
# ## In short
#
# - Weights, adapters, activations: plan before you download. Pictures a step and checkpointing are the switches.
# - One line changes the base; its preset brings the rest, and the workflow stays the same.
# - Ten steps on your card tell the time of all; class images and validation count too.
#
# Next: [11 From diffusion to flow matching](11_from_diffusion_to_flow.ipynb), what is different in Stable Diffusion 3 and
# FLUX.1. With your own photographs, the way leads back to the beginning: [00 Start here](00_start_here.ipynb).
