# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 07 Validation and export: did it learn, and how do I hand it on?
#
# **What you will do**: look at the subject by place, before and after; ask for it in twelve sentences that training
# never used; turn the adapters up and down, and switch off one half of them; save them, look into the file, load it
# with plain diffusers and nothing else, write its [card](../docs/glossary.md#card), and rehearse the upload.
#
# **What you will learn**: how to look at a result fairly; what the UNet's and the text encoder's adapters each
# contribute; what is in an adapter file, and what is lost where its header is missing. Afterwards you can hand a
# result to somebody who has never heard of `dbnb`.
#
# **What you need**: notebook [06](06_training.ipynb). No GPU. On two CPU cores about two minutes, plus a minute and a half
# for the training of notebook [00](00_start_here.ipynb) where it is not in the cache yet; about a minute when you come back.
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
importlib.import_module("dbnb")  # before torch, whose threads it keeps from spinning

# %% [markdown]
# The new modules are `dbnb.validation` and `dbnb.export`.

# %%
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from dbnb import export, metrics, miniature, plots, widgets, workflow
from dbnb.attention import attention_maps, attention_rows
from dbnb.config import DreamBoothConfig
from dbnb.drawing import draw_images, image_seed
from dbnb.models import load_components
from dbnb.tables import Table
from dbnb.toybox import SCENES
from dbnb.validation import SENTENCES, draw, from_references, validation_images

workflow.quiet_libraries()
plots.you_are_here("07")

# %% [markdown]
# The training is that of notebook 00: the same settings, so it comes from the cache if you have been there.

# %%
config = DreamBoothConfig()
sampling = dict(num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale)
session = workflow.trained(config)
concept, further = session.concept, workflow.references(config)

# %% [markdown]
# ## A fair look
#
# A single good picture proves nothing: with enough tries, something good comes up. Fair means: prompts and noise fixed
# beforehand, the same before and after, everything shown. `validation_images` draws three sets, the subject, the subject
# by place and the bare class, and redraws given pictures (further down). Image number 3 of a set starts from the same noise
# each time.
#
# **Predict**: in how many of the eight will the subject be the toy?

# %%
base = load_components(config.base)
before = validation_images(base, concept, config.sampling, count=8, references=further)
after = validation_images(session.components, concept, config.sampling, count=8, references=further)
plots.show(
    plots.image_rows(
        [before.subject, after.subject],
        labels=["before", "after"],
        title=f"'{concept.instance_prompt}' has come to mean the toy",
    ),
    alt="Before: dogs of many colours. After: the teal toy with yellow spots in each picture",
)

# %% [markdown]
# **What you should see**: dogs of all colours above, the toy below. Look again at the places: this prompt names none,
# and yet the toy stands only in places that were photographed. These were learned as well.
#
# What all of this is for is harder: the toy in places that the prompt names, beach, night and moon among them, where no
# photograph shows it.

# %%
places = [SCENES[name] for name in before.scene_names]
plots.show(
    plots.image_rows(
        [before.scenes, after.scenes],
        labels=["before", "after"],
        titles=places,
        title="The toy, in the place that was asked for",
    ),
    alt="Two rows in eight places, beach to moon: above dogs of many colours, below the teal toy",
)

# %% [markdown]
# **What you should see**: the place that was asked for, also where there is no photograph of it, and in it the toy.
# Look at the night and the moon most closely: no photograph was dark, and here the outlines are the first to blur
# (where pictures look overdone, the section on strength has a remedy). What has changed is seen best one pair at a
# time, in one place. Choose a pair, then `before` and `after` in turn:

# %%
widgets.before_after(before.scenes, after.scenes, places)

# %% [markdown]
# Now the price: does the bare class prompt still draw any dog?

# %%
plots.show(
    plots.image_rows(
        [before.classes, after.classes],
        labels=["before", "after"],
        title=f"'{concept.class_prompt}' still gives many dogs",
    ),
    alt="Two rows of dogs of many colours: the bare class prompt before and after training",
)

# %% [markdown]
# **What you should see**: still many dogs. A little teal here and there is normal; eight teal dogs would be drift (notebook
# 02).
#
# The same in numbers, which notebook 08 explains, and two claims that can fail: nearer to the photographs than the base is,
# and the bare class still varied.

# %%
encoders = metrics.load_encoders(base.base)
numbers = workflow.measured(session, before, after, encoders, further)
metrics.metrics_table(numbers)

# %%
# NBVAL_CHECK_OUTPUT
assert numbers["after"]["subject_fidelity"] > numbers["before"]["subject_fidelity"]
assert numbers["after"]["class_diversity_ratio"] > 0.5
print("nearer to the toy than the base is; dogs are still varied")

# %% [markdown]
# ## In other words
#
# Training used a single prompt, and nobody writes the same sentence every time. Has the model learned the toy as the meaning
# of `sks dog`, or as the meaning of one sentence? `SENTENCES` holds twelve others, with other openings, other articles or
# none, the place in front; training has seen none of them. Each is drawn four times. **Predict**: which of them will reach
# the training prompt's fidelity, and which will be the worst?

# %%
said = validation_images(session.components, concept, config.sampling, count=4 * len(SENTENCES), sets=("sentences",))
real = encoders.identity_features(concept.images())
cosines = (encoders.identity_features(said.sentences) @ real.T).mean(1)
numbers_of = {
    prompt: [i for i, p in enumerate(said.sentence_prompts) if p == prompt] for prompt in said.sentence_prompts
}
fidelity = {prompt: cosines[indices].mean().item() for prompt, indices in numbers_of.items()}
ranked = sorted(fidelity, key=fidelity.get, reverse=True)
of_training = metrics.subject_fidelity(encoders.identity_features(after.subject), real)
mean, floor = sum(fidelity.values()) / len(fidelity), numbers["floor"]["subject_fidelity"]
print(f"training prompt {of_training:.2f}, mean of the sentences {mean:.2f}, the base without adapters {floor:.2f}")

# %%
from matplotlib.figure import Figure

figure = Figure(figsize=(7.2, 4.0), dpi=110, layout="constrained")
axis = figure.add_subplot()
heights = {concept.instance_prompt: of_training} | {prompt: fidelity[prompt] for prompt in ranked}
colors = [plots.PALETTE[1]] + [plots.PALETTE[5]] * len(ranked)
axis.bar_label(axis.barh(list(heights), list(heights.values()), color=colors), fmt="%.2f", fontsize=plots.SMALL)
axis.axvline(floor, color="0.3", lw=1, ls="--")
axis.invert_yaxis()
axis.margins(x=0.1)
axis.set_xlabel("similarity to the photographs; dashed: the base")
axis.set_title(f"Training prompt {of_training:.2f}, other sentences {mean:.2f} on average", fontsize=plots.TITLE)
plots.show(
    figure, alt="Horizontal bars: the training prompt's fidelity, and below it that of each of the twelve sentences"
)

# %%
plots.show(
    plots.image_rows(
        [[said.sentences[i] for i in numbers_of[prompt][:2]] for prompt in (*ranked[:2], *ranked[-2:])],
        labels=[f"{prompt}: {fidelity[prompt]:.2f}" for prompt in (*ranked[:2], *ranked[-2:])],
        title=f"Nearest to the toy: '{ranked[0]}'; furthest from it: '{ranked[-1]}'",
    ),
    alt="Four rows of two pictures: the two sentences with the highest fidelity, and the two with the lowest",
)

# %%
# NBVAL_CHECK_OUTPUT
assert mean - floor > 0.7 * (of_training - floor), (mean, of_training, floor)
print("on average, other sentences reach more than 70 % of what the training prompt gains over the base")

# %% [markdown]
# **What you should see**: how much of the toy is in each row. Look at the lowest ones first. (The dashed line is the
# base's mean over pictures with and without a place; the training prompt stands here without one, and so its bar is not
# the table's number.) Each blue bar is the mean of four pictures (the orange one of eight), so differences of a few
# hundredths are chance. The sentences also name different places, and a place that no photograph shows may cost a
# little likeness, too.
#
# None of the twelve asks for another look. A prompt such as `a photo of sks dog with a blue hat` does: in the toy world a hat
# has the colour of the toy's ears and spots, so the base turns these blue as well.
#
# That other sentences work at all is not due to the adapters, which have seen one sentence. It is due to the text encoder,
# which gives the words `sks dog` nearly the same states in any of these sentences: the base's training taught it, in a stage
# of its own, that the same content means the same however it is said. A text encoder that has not learned this leaves the
# adapters with the meaning of one sentence.
#
# ## Which word paints the toy?
#
# Notebook 03 showed where each word of a prompt is heard. **Predict**: where is `sks` heard before training, and where after?

# %%
watched = [
    attention_maps(components, "a photo of sks dog at night", config.sampling, seed=1)
    for components in (base, session.components)
]
plots.show(
    plots.image_rows(
        attention_rows(watched),
        labels=["before", "after"],
        titles=["drawn", *watched[0].words],
        title="'dog' marks the animal, before and after training; 'sks' marks the background",
    ),
    alt="Two rows of maps, nearly alike: 'dog' is heard on the animal, 'sks' and the small words around it",
)

# %% [markdown]
# **What you should see**: in both rows `dog` marks the animal, and `sks` marks what is left, as the small words do.
# So the training has hardly changed *where* the identifier is heard, as far as maps that are averaged over all layers
# and steps can tell. What it has changed is what the UNet paints where it hears `dog`, once `sks` stands before it:
# the text encoder passes the identifier on to the noun that follows.
#
# ## From a picture instead of from noise
#
# A picture can be *redrawn*: it is noised to some level and then denoised under the prompt
# ([img2img](../docs/glossary.md#img2img)). At a low strength only details change, at a high one only the rough layout
# is kept. (The strength is rounded down to whole solver steps: of the six here, 0.3 leaves one and 0.9 leaves five.)
# **Predict**: other dogs, redrawn as `a photo of sks dog`: at which strength do they become the toy?

# %%
others, levels = before.classes[:4], (0.3, 0.5, 0.7, 0.9)
redrawn = [
    from_references(session.components, others, concept.instance_prompt, config.sampling, strength=s) for s in levels
]
plots.show(
    plots.image_rows(
        [others, *redrawn],
        labels=["other dogs", *(f"strength {s}" for s in levels)],
        title="The more noise, the more of the toy, and the less of the picture",
    ),
    alt="Dogs of several colours; redrawn with growing strength they turn into the teal toy, the place kept longest",
)

# %% [markdown]
# **What you should see**: at 0.3 the old dog, with some colours changed; from 0.7 on the toy, without a hat and still
# in the old place and nearly the old pose.
#
# ## Saved: one file, all adapters
#
# `save_adapters` writes what diffusers' own pipelines write: one safetensors file for the adapters of the UNet and, if it was
# trained, of the text encoder. **Predict**: how large is it, next to the base?

# %%
folder = tempfile.TemporaryDirectory()
output = Path(folder.name)
adapter = export.save_adapters(session.components, output)
with safe_open(adapter, "pt") as file:
    header = file.metadata()
    tensors = {key: file.get_tensor(key) for key in file.keys()}
sizes = Table()
for part in ("text_encoder", "vae", "unet"):
    of_base = sum(path.stat().st_size for path in (base.base / part).glob("*.safetensors"))
    of_adapter = sum(t.numel() * t.element_size() for key, t in tensors.items() if key.startswith(f"{part}."))
    sizes.append({"part": part, "base, MiB": f"{of_base / 2**20:.2f}", "adapter, MiB": f"{of_adapter / 2**20:.2f}"})
sums = {column: f"{sum(float(row[column]) for row in sizes):.2f}" for column in ("base, MiB", "adapter, MiB")}
Table([*sizes, {"part": "all parts", **sums}])

# %% [markdown]
# **What you should see**: nothing for the VAE and nothing for the text encoder, which have no adapters, and a file well below
# the base's size. The miniature's adapters are large for their base, and they are stored in `float32`. On Stable
# Diffusion 1.5, rank 16 on attention is a file of some twelve megabytes beside a base of gigabytes.
#
# Inside are matrices with telling names (here the first and the last two), and a header with what the matrices alone do
# not say.

# %%
names = sorted(tensors)
Table({"name": name, "shape": " x ".join(map(str, tensors[name].shape))} for name in names[:2] + names[-2:])

# %%
# NBVAL_CHECK_OUTPUT
stored = json.loads(header["lora_adapter_metadata"])
print("ranks and alphas:", {key: stored[key] for key in sorted(stored) if key.endswith((".r", ".lora_alpha"))})

# %% [markdown]
# Why alpha matters: the change is $\frac{\alpha}{r} BA$. The file holds $A$ and $B$; a program that does not read the
# header takes $\alpha = r$. With `alpha = 2 * rank` half of the strength is then gone, without an error. (`--export
# kohya` writes $\alpha$ as tensors, which A1111 and ComfyUI read.) Notebook 09 shows the pictures.
#
# ## Loaded elsewhere: plain diffusers
#
# Nothing of `dbnb` is needed to use the adapter. This is what anyone who downloads it writes; only the base's folder
# would be another one. Loading is two lines. The two with `solver` exchange the base's scheduler for the fast one that
# `draw` uses: DPM-Solver++ (Lu et al., 2022) in its stochastic form, which adds fresh noise, from the same generators,
# at each step. Only the same [solver](../docs/glossary.md#solver) in the same form draws the same pictures.

# %%
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained(miniature.path()).to(session.components.device)
pipeline.load_lora_weights(output, weight_name="pytorch_lora_weights.safetensors", adapter_name="toy")
solver = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, algorithm_type="sde-dpmsolver++")
pipeline.scheduler = solver
pipeline.set_progress_bar_config(disable=True)
elsewhere = pipeline(
    ["a photo of sks dog on the beach"] * 4,
    generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
    **sampling,  # solver steps and guidance
).images

# %% [markdown]
# **Predict**: if the model in memory draws the same prompts from the same noise, what is the largest difference of any pixel?

# %%
here = draw(session.components, ["a photo of sks dog on the beach"] * 4, config.sampling, seeds=[0, 1, 2, 3])
difference = max(
    int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) for a, b in zip(here, elsewhere, strict=True)
)
plots.show(
    plots.image_rows(
        [here, elsewhere],
        labels=["as trained", "reloaded"],
        inches=1.3,
        title=f"At most {difference} of 255 grey levels apart",
    ),
    alt="Two rows of four teal dogs with yellow spots on a beach, equal column by column",
)

# %%
# NBVAL_CHECK_OUTPUT
assert difference <= 2, f"another picture: {difference}"
print("reloads to the same picture, except for rounding")

# %% [markdown]
# `export.verify_reload` is this comparison as a function, and `python -m dbnb` makes it at the end of every run.
#
# ## The adapters, turned up and down
#
# A loaded adapter has a strength for each part: 0 is the base, 1 what was trained, more than 1 an exaggeration. **Predict**:
# at 1.5, is it more of the toy?


# %%
def drawn(strengths: dict[str, float], prompt: str = concept.instance_prompt, count: int = 3, pipe=pipeline) -> list:
    """Pictures by plain diffusers with each part's adapters at this strength, always from the same noise."""
    pipe.set_adapters("toy", dict(strengths))
    seeds = [image_seed(3, index) for index in range(count)]
    return draw_images(pipe, [prompt] * count, seeds, config.sampling)


def likeness(pictures: list) -> float:
    """Mean cosine to the five photographs, for the identity encoder."""
    real = encoders.identity_features(concept.images())
    return metrics.subject_fidelity(encoders.identity_features(pictures), real)


# %%
strengths = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
by_strength = {s: drawn({"unet": s}) for s in strengths}
curve = {s: likeness(pictures) for s, pictures in by_strength.items()}
plots.show(
    plots.image_rows(
        [[by_strength[s][i] for s in strengths] for i in range(3)],
        titles=[f"{s:g}\nlikeness {value:.2f}" for s, value in curve.items()],
        title=f"From any dog to the toy: likeness {curve[0.0]:.2f} without adapters, {curve[1.0]:.2f} at strength 1",
    ),
    alt="Three dogs at seven strengths: any dog at 0, the toy from 0.5 on, with frayed outlines beyond 1",
)
widgets.browse({f"{s:g}": by_strength[s][0] for s in strengths}, "strength")

# %% [markdown]
# **What you should see**: a passage from some dog to the toy, often through dogs that are half of each, and with it
# the place may change. Most of the way is done by strength 0.5, and beyond 1 nothing is won: outlines and spots begin
# to fray. Three pictures a strength are too few to choose one by: their likeness differs by some hundredths from one
# set to the next. Where pictures look overdone at 1, a lower strength is a cheap remedy. Two claims that can fail:

# %%
# NBVAL_CHECK_OUTPUT
assert curve[1.0] > curve[0.0], curve
assert curve[1.5] - curve[1.0] < curve[1.0] - curve[0.0], curve
print("1 is nearer to the toy than 0; beyond 1 there is less to win")

# %% [markdown]
# ## Strength and checkpoint together
#
# A result that is a little overtrained can be mended in two ways: by a lower strength, or by an earlier checkpoint. The
# training above has kept a checkpoint after each quarter of its steps, and `validation.grid` draws one prompt from one noise
# for each of them at several strengths. **Predict**: does the last checkpoint at half strength look like one from halfway?

# %%
from dbnb.validation import grid

by_step = grid(session.components, session.config.output_dir, concept.instance_prompt, config.sampling, seed=3)
plots.show(
    plots.grid(by_step, title="One noise: later checkpoints downwards, more strength to the right"),
    alt="A grid of dogs: after 50 steps blue with yellow spots and a hat, after 200 the teal toy at every strength",
)
near = {key: likeness([image]) for key, image in by_step.items()}
(step, factor), last = max(near, key=near.get), max(step for step, _ in near)
halfway = min((step for step, _ in near), key=lambda step: abs(step - last / 2))
print(f"step {halfway} at strength 1: likeness {near[halfway, 1.0]:.2f}; ", end="")
print(f"step {last} at strength 0.5: likeness {near[last, 0.5]:.2f}")
print(f"nearest to the photographs: step {step} at strength {factor:g}, likeness {near[step, factor]:.2f}")

# %% [markdown]
# **What you should see**: the two ways differ. The checkpoint from halfway, at full strength, has a rougher pattern,
# and its body is still too blue. The last one at half strength is smoother, with fewer spots, since its adapters
# change half of what they should, and yet it is the toy already; the printed likeness says which of the two is nearer
# to the photographs here. This prompt names no place, and so the place changes freely from cell to cell. One
# picture for each cell cannot tell which checkpoint is best: notebook 08 measures that, the class included.
#
# ## Which half does what?
#
# The default of the miniature leaves the text encoder frozen. To see what its adapters do, this is a second training with
# `train_text_encoder=True` and half as many steps. Its file holds two sets of adapters, and each has a strength of its own.

# %%
dual = workflow.trained(dataclasses.replace(config, train_text_encoder=True, max_train_steps=100))
second = tempfile.TemporaryDirectory()
export.save_adapters(dual.components, Path(second.name))
both_parts = StableDiffusionPipeline.from_pretrained(miniature.path()).to(dual.components.device)
both_parts.load_lora_weights(second.name, weight_name="pytorch_lora_weights.safetensors", adapter_name="toy")
both_parts.scheduler = solver
both_parts.set_progress_bar_config(disable=True)
second.cleanup()

# %% [markdown]
# **Predict**: with the text encoder's adapters alone, will it be the right colour? With the UNet's alone?

# %%
halves = {"neither": (0, 0), "UNet alone": (1, 0), "text encoder alone": (0, 1), "both": (1, 1)}
halves = {name: {"unet": unet, "text_encoder": text} for name, (unet, text) in halves.items()}
prompt = f"{concept.instance_prompt} {SCENES['beach']}"
by_half = {name: drawn(strengths, prompt, count=5, pipe=both_parts) for name, strengths in halves.items()}
scores = {name: likeness(pictures) for name, pictures in by_half.items()}
gain = {name: (score - scores["neither"]) / (scores["both"] - scores["neither"]) for name, score in scores.items()}
plots.show(
    plots.image_rows(
        list(by_half.values()),
        labels=[f"{name}:\nlikeness {scores[name]:.2f}" for name in by_half],
        title=f"The UNet's adapters alone reach {gain['UNet alone']:.0%} of the gain, "
        f"the text encoder's alone {gain['text encoder alone']:z.0%}",
    ),
    alt="Four rows of dogs on a beach: with neither half, or the text encoder's alone, any dogs; with the UNet's alone nearly the toy; with both, the toy",
)

# %% [markdown]
# **What you should see**: the text encoder's adapters alone leave the pictures near the base's: they cannot teach the UNet
# to paint anything new. And both halves were trained *together*. What one has learned, the other need not
# learn any more, so these rows tell how the two have shared the work in this training, not what a text encoder can do alone.
# How far have its adapters moved the states of the prompt?

# %%
from dbnb.adapters import strength
from dbnb.checkpoints import checkpoints, load_weights
from dbnb.models import encode_prompts
from dbnb.toybox import COLORS

states = {}
for on in (0, 1):
    both_parts.set_adapters("toy", {"unet": 1, "text_encoder": on})
    states[on], _ = both_parts.encode_prompt(concept.instance_prompt, both_parts.device, 1, False)
share = (states[1] - states[0]).norm() / states[0].norm()
print(f"the hidden states of '{concept.instance_prompt}' have moved by {share:.1%} of their length")


@torch.no_grad()
def last_words(prompts: list[str]) -> torch.Tensor:
    """(N, D): the hidden state of each prompt's last word."""
    ends = [len(dual.components.tokenizer(prompt).input_ids) - 2 for prompt in prompts]
    return encode_prompts(dual.components, prompts)[range(len(prompts)), ends]


# %% [markdown]
# Where do they move it? Each point below is the state of a prompt's last word, `dog`: after a colour or a pattern, as
# the frozen text encoder gives it, and in the two prompts of the training, at each checkpoint that was kept. They are
# drawn in the plane in which these states differ most. **Predict**: does `sks dog` move towards the toy's colours?

# %%
words, pair = [*COLORS, "spotted", "striped"], [concept.instance_prompt, concept.class_prompt]
with strength(dual.components, 0.0):
    fixed, path = last_words([f"a photo of a {word} {concept.class_word}" for word in words]), [last_words(pair)]
for checkpoint in checkpoints(Path(dual.config.output_dir)):
    load_weights(checkpoint, dual.components)  # the last of them is the end of the training
    path.append(last_words(pair))
every = torch.cat([fixed, *path])
plane = torch.linalg.svd(every - every.mean(0), full_matrices=False).Vh[:2].T
places = [((states - every.mean(0)) @ plane).tolist() for states in (fixed, *torch.stack(path, dim=1))]
plots.show(
    plots.plane(
        dict(zip(words, places[0], strict=True)),
        {"sks dog": places[1], "dog": places[2]},
        xlabel="direction of the largest differences",
        ylabel="of the second largest",
        title="'sks dog' moves away from all words; 'dog' hardly moves",
    ),
    alt="Eight colours in one group, two patterns in another, between them dog, which hardly moves; far from all of them sks dog, which moves further away",
)

# %%
# NBVAL_CHECK_OUTPUT
moved = (path[-1] - path[0]).norm(dim=1)
apart = [torch.cdist(states[:1], fixed).min() for states in (path[0], path[-1])]
assert moved[0] > 2 * moved[1] and apart[1] > apart[0], (moved, apart)
print("'sks dog' has moved far more than 'dog', and is further from every word than it was")

# %% [markdown]
# **What you should see**: even before training, where the rings are, `dog` after `sks` is far from `dog` after any
# colour or pattern. This is what "the text encoder tells the identifier apart" means. Training moves it further away,
# and not towards `blue`, `green` or `spotted`: the toy becomes a new word, not a combination of known ones. With a
# frozen text encoder nothing would move. The UNet would have to learn what to paint for the state at the ring.

# %% [markdown]
# **Predict**: the same four rows for `a photo of a dog`, which is not to mean the toy:

# %%
of_class = {name: drawn(s, concept.class_prompt, count=5, pipe=both_parts) for name, s in halves.items()}
leaked = {name: likeness(pictures) for name, pictures in of_class.items()}
plots.show(
    plots.image_rows(
        list(of_class.values()),
        labels=[f"{name}:\nlikeness {leaked[name]:.2f}" for name in of_class],
        title=f"'{concept.class_prompt}': nobody has named the toy",
    ),
    alt="Four rows of dogs for the bare class prompt, with neither half of the adapters, with each alone, and with both",
)

# %%
# NBVAL_CHECK_OUTPUT
assert scores["both"] > scores["neither"], scores
assert scores["UNet alone"] > scores["text encoder alone"], scores
assert leaked["both"] < scores["both"], (leaked, scores)
print("the UNet's half paints the toy; with both halves 'sks dog' is the toy, and 'dog' is not")

# %% [markdown]
# **What you should see**: the number beside each row says how much of the toy appears although nobody has named it.
# With both halves it is low, and with the UNet's adapters alone as well: the UNet tells the two prompts apart by
# itself, since the text encoder hears `sks` already without adapters (notebooks 01 and 03). That is why the default
# leaves it frozen, on the miniature as on large bases. On a base whose text encoder ignores the identifier, both
# prompts have nearly the same states, and training the text encoder pays, because it can learn to hear the identifier.
# (Notebook 08 shows the extreme case, an identifier with the vector of `a`.)

# %% [markdown]
# ## The card
#
# An adapter without a description is a riddle a week later. The card names the prompts, the settings and the measures,
# shows the figures, says how to load the file, and has a word on consent. It refers to files beside it, so let us make
# them: the figures, the measures, and what else a run leaves in its folder.

# %%
run = dataclasses.replace(config, output_dir=str(output))
workflow.before_after(before, after, concept, further).savefig(output / "before_after.png")
losses = plots.loss_curves(session.log, title="The instance loss falls slowly within its cloud: the measures tell more")
losses.savefig(output / "loss.png")
(output / "metrics.json").write_text(json.dumps(numbers, indent=2))
(output / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in session.log))
run.save(output / "config.json")
card = export.model_card(concept, run, numbers, has_text_encoder=False)
card.save(output / "README.md")
plots.show(
    losses,
    alt="Two clouds of losses: the running mean for the photographs falls, that for the class images stays level",
)
print(card.text[: card.text.index("## Settings")].strip())

# %% [markdown]
# (After this follow all settings and the word on consent.)
#
# ## Sharing it
#
# `push_to_hub` uploads the adapter, the card, the figures and the measures, and nothing else: no checkpoints, no logs, no
# settings with paths of your machine. **Predict**: which of these files stay here? A dry run tells.

# %%
# NBVAL_CHECK_OUTPUT
files = sorted(path.name for path in output.iterdir())
would_go = export.push_to_hub(output, "you/sks-dog", dry_run=True)
print("would be uploaded:", ", ".join(name for name in files if name in would_go))
print("stays here:", ", ".join(name for name in files if name not in would_go))

# %% [markdown]
# Without `dry_run` it uses the token that `hf auth login` stored; a token never belongs in a notebook. And look at
# `before_after.png` before you share it: its first row, and a later one that is called "other photographs", show your
# photographs.

# %%
folder.cleanup()

# %% [markdown]
# ## Exercises
#
# ### Exercise A: the strength, by hand (8 minutes)
#
# `set_adapters` walks through a model and gives every adapted layer a new scale. Write that. A layer that peft has
# adapted has an attribute `lora_A`; for the adapter named `"default"` its `scaling["default"]` is the factor before
# $BA$, and `lora_alpha["default"]` and `r["default"]` are what it was trained with. At strength 1 the adapter is as
# it was trained, whatever strength it had before.

# %%
from dbnb.exercises import check_07a


def set_strength(model: torch.nn.Module, strength: float) -> int:
    """Turn all adapters of a model up or down, in place; returns how many layers have one."""
    ...


check_07a(set_strength)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Adapted layers sit deep inside: `model.modules()` gives every layer at any depth, `model.children()` only the outermost.
# </details>
#
# <details><summary>Hint 2</summary>
#
# If you multiply the scale that is there, two calls with 0.5 leave a quarter. Compute it again from alpha and rank.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def set_strength(model, strength):
#     count = 0
#     for layer in model.modules():
#         if hasattr(layer, "lora_A"):
#             layer.scaling["default"] = strength * layer.lora_alpha["default"] / layer.r["default"]
#             count += 1
#     return count
# ```
# </details>
#
# ### Exercise B: are these the same pictures? (6 minutes)
#
# The reload above was judged by one number. Write the function that computes it. If the two lists have different lengths, raise a
# `ValueError`: eight pictures against none must not pass as equal.

# %%
from dbnb.exercises import check_07b


def largest_difference(first: list, second: list) -> int:
    """The largest difference of any pixel of any pair of pictures, in grey levels from 0 to 255."""
    ...


check_07b(largest_difference)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `np.asarray(picture)` holds numbers of the type `uint8`, which know nothing below zero. What is 100 - 107 for them?
# </details>
#
# <details><summary>Hint 2</summary>
#
# `zip` stops at the shorter of two lists without a word. It has an option that makes it raise.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def largest_difference(first, second):
#     largest = 0
#     for a, b in zip(first, second, strict=True):
#         difference = np.asarray(a, dtype=int) - np.asarray(b, dtype=int)
#         largest = max(largest, int(np.abs(difference).max()))
#     return largest
# ```
# </details>

# %% [markdown]
# ## On your own
#
# 1. Draw `a photo of sks dog` at strength -1. What is the opposite of the subject? (2 minutes)
# 2. Save the adapter again and load it in three lines of your own. Draw `a photo of sks cat` with it. (3 minutes)
# 3. Which of the pictures above would you show to somebody who doubts that it works, and which to somebody who wants to
#    improve it? (think)
#
# <details><summary>Answers</summary>
#
# 1. A dog that has as little of the toy as can be, often in another colour:
#
# ```python
# rows = [drawn({"unet": strength}, count=6) for strength in (-1.0, 0.0, 1.0)]
# plots.show(plots.image_rows(rows, labels=["-1", "0", "1"]), alt="six dogs at the strengths -1, 0 and 1")
# ```
#
# 2. Look at how much of the toy the cats have: what was learned for `sks dog` may or may not carry over to another class word.
#
# ```python
# mine = tempfile.TemporaryDirectory()
# export.save_adapters(session.components, Path(mine.name))
# p = StableDiffusionPipeline.from_pretrained(miniature.path())
# p.load_lora_weights(mine.name, weight_name="pytorch_lora_weights.safetensors")
# p.scheduler = solver
# p.set_progress_bar_config(disable=True)
# plots.show(plots.show_images(p(["a photo of sks cat"] * 4, **sampling).images), alt="four cats, asked for with the identifier")
# mine.cleanup()
# ```
#
# 3. All of them to both. Choosing is how one fools oneself.
# </details>
#
# ## Quiz
#
# Five questions about *why*. Choose an answer, then open it: each says whether it is right, and why or why not.
#
# **1. Why should all pictures be shown, and not the best ones?**
#
# <details><summary>A. The best ones have a lower resolution and would have to be enlarged.</summary>
#
# No: all pictures have the same size; the point is what choosing does to the reader.
# </details>
#
# <details><summary>B. The order of the pictures matters, and leaving some out would shift it.</summary>
#
# No: the order hardly matters; each picture stands for itself, from its own noise.
# </details>
#
# <details><summary>C. Something good comes up by chance, so a single picture proves nothing.</summary>
#
# Right: prompts and noise are fixed before, and then everything is shown.
# </details>
#
# **2. An adapter with `alpha = 2 * rank` is loaded from a file without its header. What is lost?**
#
# <details><summary>A. Nothing: alpha was needed only in training, where it scaled the learning rate.</summary>
#
# No: it scales the change in every forward pass, in training and afterwards.
# </details>
#
# <details><summary>B. Half of its strength, since a loader without alpha takes alpha to be the rank.</summary>
#
# Right: no error says so; only a comparison of pictures does, such as `verify_reload`.
# </details>
#
# <details><summary>C. All of it: a file without a header is refused by diffusers with an error.</summary>
#
# No: it loads without any error, and that is what makes this fault so unpleasant.
# </details>
#
# **3. Why do other sentences reach nearly the fidelity of the training prompt?**
#
# <details><summary>A. The text encoder gives <code>sks dog</code> nearly the same states in all of them.</summary>
#
# Right: the base's own training taught it that; the adapters have seen one sentence only.
# </details>
#
# <details><summary>B. The adapters were trained on all twelve sentences, one after the other.</summary>
#
# No: training used a single prompt, and the twelve were held back for this test.
# </details>
#
# <details><summary>C. The UNet does not look at the prompt any more once the adapters are loaded.</summary>
#
# No: then the places in the prompts would be ignored, and they are not.
# </details>
#
# **4. Why does the reloaded pipeline get another scheduler before the comparison?**
#
# <details><summary>A. The base's own scheduler cannot be used together with a loaded adapter.</summary>
#
# No: it can, and it draws the toy as well, only in other pictures.
# </details>
#
# <details><summary>B. The scheduler is part of the adapter file and has to be loaded from there.</summary>
#
# No: the file holds A, B and a header; a scheduler belongs to the base.
# </details>
#
# <details><summary>C. Only the same solver, from the same noise, draws the same pictures.</summary>
#
# Right: the test asks for the largest difference of any pixel, so nothing else may differ.
# </details>
#
# **5. Why did the text encoder's half alone, without the UNet's, not draw the toy here?**
#
# <details><summary>A. It is not loaded as long as the strength of the UNet's adapters is zero.</summary>
#
# No: each part has a strength of its own, and one can be 1 while the other is 0.
# </details>
#
# <details><summary>B. In this training the UNet's half learned what the toy looks like.</summary>
#
# Right: the text encoder's half cannot teach the UNet to paint, and it did not have to learn more.
# </details>
#
# <details><summary>C. It has a learning rate of zero and thus never moved away from its start.</summary>
#
# No: it was trained in this section, at its own rate, along with the UNet.
# </details>
#
# ## In short
#
# - Same prompts, same noise, before and after, all shown; then numbers.
# - Ask in other sentences than the training prompt: the mean and the worst of them belong to the result.
# - UNet and text encoder each have a strength of their own: the UNet's adapters paint the toy, and where the text encoder hears
#   the identifier, they suffice.
# - One file with its ranks and alphas loads into plain diffusers and draws the same pictures; a card says what it is.
#
# Next: [08 Measuring](08_measuring.ipynb), numbers that hold.
