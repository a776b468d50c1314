# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00 Start here: five photographs of one toy, and that toy anywhere
#
# A text-to-image model knows what *a dog* is, but it has never met *your* dog.
# **[DreamBooth](../docs/glossary.md#dreambooth)** (Ruiz et al., 2023) teaches it that dog with a few photographs, a
# rare word that comes to mean the subject, and a few hundred training steps.
#
# **What you will do**: give a model five photographs of one toy dog, train it, and see that same toy in places where it
# was never photographed; then measure what was learned and what it cost.
#
# **What you will learn**: the seven steps of the workflow, and where in this course each is explained. Afterwards you
# can personalise a model yourself: choose a [base](../docs/glossary.md#base) and a device, give it photographs, and
# judge the result.
#
# **What you need**: nothing but this project. You need no GPU and no download, because the course brings its own
# model. On two CPU cores it takes about two minutes the first time and a quarter of a minute after that, since
# trainings are cached.
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
# The module of this notebook is `dbnb.workflow`, which runs the seven steps in a row. Notebooks 01 to 07 explain one
# step each, and the other imports below come from there. The map shows the whole course; it returns in every notebook,
# with the place of that notebook marked.

# %%
import statistics

import torch

from dbnb import metrics, plots, widgets, workflow
from dbnb.concept import Concept
from dbnb.config import DreamBoothConfig
from dbnb.models import dtype_of, load_components
from dbnb.presets import suggested
from dbnb.tables import Table
from dbnb.toybox import KINDS, SCENES
from dbnb.toybox.sample import PICTURES
from dbnb.validation import validation_images

workflow.quiet_libraries()

# %%
plots.you_are_here("00")

# %% [markdown]
# ## Choose a base
#
# The *base* is the model that will learn. `"miniature"` is a small Stable Diffusion: it has the same parts and was
# trained in the same way, but it draws small pictures. This project trained it on photographs of toys that it renders
# itself, with captions that say what they show.
#
# A *[diffusion model](../docs/glossary.md#diffusion-model)* like this one has learned to remove noise from pictures,
# guided by their captions. To draw, it starts from pure noise and removes a little of it at each step, guided by your
# prompt. All random numbers come from a seed, so the same seed and the same prompt always give the same picture. The
# model works on pictures made smaller by an *autoencoder*, which also turns the result back into pixels. (Notebook 03
# takes all of this apart.)
#
# These are the things and the places that this base knows. It also knows eight colours, spots, stripes, hats and
# scarves.

# %%
# NBVAL_CHECK_OUTPUT
print(len(KINDS), "kinds of toys:", ", ".join(KINDS))
print(len(SCENES), "places:", ", ".join(SCENES.values()))

# %% [markdown]
# To use a larger base, give another name: a preset (`"sd15"`, `"sdxl"` …), an id on the Hugging Face hub, or a folder.
# Each base needs different settings, so it **suggests** its own, and everything that you do not set yourself is taken
# from there. (You need not know them yet: notebooks 04, 06 and 10 explain them. `half` means numbers of 16 bits.)

# %%
# NBVAL_CHECK_OUTPUT
names = (
    "resolution max_train_steps learning_rate lr_scheduler lora_layers train_text_encoder train_batch_size "
    "mixed_precision"
).split()
Table(
    {"setting": name} | {base: str(suggested(base)[name]) for base in ("miniature", "sd15", "sdxl")} for name in names
)

# %% [markdown]
# **Choose here.** Set `BASE = "sd15"` and give a folder with photographs of your own dog, and the cells below run on
# Stable Diffusion 1.5. One setting depends on the memory of your GPU: gradient checkpointing, which recomputes
# activations and so saves memory at the cost of time. The next cell switches it on for every base but the miniature;
# set it to `False` if your GPU has room, and each step takes about half of the time. A real base is a download of
# several gigabytes, needs a GPU, and takes minutes even there. (Notebook 10 computes what fits on which GPU.)

# %%
BASE = "miniature"
PHOTOGRAPHS = None  # a folder with three to ten pictures of your subject; None takes the sample toy
CARD = {} if BASE == "miniature" else dict(gradient_checkpointing=True)
config = DreamBoothConfig(base=BASE, instance_data_dir=PHOTOGRAPHS, class_word="dog", identifier="sks", **CARD)
print(f"{config.resolution} px, {config.max_train_steps} steps, learning rate {config.learning_rate}")

# %% [markdown]
# ## Choose a device
#
# You do not have to: the workflow uses the accelerator that torch finds (a CUDA GPU, or the GPU of an Apple chip), and
# otherwise the CPU, which is fast enough for the miniature. This line asks torch the same question:

# %%
device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
print("the model will run on:", device)

# %% [markdown]
# ## The photographs
#
# There are five pictures of one toy, which is teal with yellow spots. You cannot *ask* the base for it: the captions
# that it learned from name only eight colours, and teal is not one of them.

# %%
concept = Concept.from_folder(PHOTOGRAPHS, config.identifier, config.class_word, resolution=config.resolution)
plots.show(
    plots.show_images(concept.images(), inches=1.6, title="One toy, five places"),
    alt="Five photographs of one toy: a teal dog with yellow spots, ears and tail, in five places",
)

# %%
# NBVAL_CHECK_OUTPUT
photographed = [scene for scene, _ in PICTURES["photos"]]
print("the sample toy was photographed:", ", ".join(SCENES[scene] for scene in photographed))
print("it was never photographed:", ", ".join(SCENES[scene] for scene in SCENES if scene not in photographed))

# %% [markdown]
# **A toy of your own.** In a class, everybody can train on a toy that nobody else has. Design one with the fields
# below (they need a live notebook); the picture follows what you choose. Then run `designer.photographs("mytoy")` in a
# new cell: it writes five photographs to `mytoy/photos`, and six others to compare with. Set
# `PHOTOGRAPHS = "mytoy/photos"` and the toy's kind as `class_word` in the cells below *Choose a base*, and run the
# cells from there on again. (In a terminal: `python -m dbnb.toybox --help`.)

# %%
designer = widgets.ToyDesigner(kind="cat", body="#1fa2a0", accent="pink", pattern="striped", accessory="hat")
designer

# %% [markdown]
# This notebook goes on with the sample toy. Two words make the two prompts. `sks` is the **identifier**: a rare word
# without a meaning of its own, which will come to mean this toy. It is used like a name, so it has no article. `dog`
# is the **class word**: it says what kind of thing the toy is, which the model knows already.

# %%
# NBVAL_CHECK_OUTPUT
print(concept.instance_prompt)
print(concept.class_prompt)

# %% [markdown]
# ## Before: what does the model draw today?
#
# **Predict**: nobody has told the model what `sks` means. What will `a photo of sks dog` look like?

# %%
base = load_components(BASE, weight_dtype=dtype_of(config.mixed_precision)).to(device)
before = validation_images(base, concept, config.sampling, count=8)
del base  # its memory is for the one that will be trained
labels = [concept.instance_prompt, concept.class_prompt]
plots.show(
    plots.image_rows(
        [before.subject, before.classes], labels=labels, title="Before training, 'sks' means no toy in particular"
    ),
    alt="Two rows of eight dogs in many colours and places; neither row shows one and the same toy",
)

# %% [markdown]
# **What you should see**: dogs of several colours in both rows. The dogs of the upper row have nothing in common that
# those of the lower row lack. Each column starts from the same noise, so compare the two pictures of a column as
# well: the text encoder reads the rare word, but what it passes on means nothing to the model yet, so the two
# pictures of most columns are nearly the same. (Notebooks 01 and 03 measure both.)
#
# ## Train
#
# One call does steps 1 to 6: it reads the photographs and makes the prompts; it lets the model draw *class images* of
# `a photo of a dog`, so that the model does not forget other dogs; it loads and freezes the base, adds small trainable
# **adapters**, builds the dataset and runs the training loop. It prints what it finds and decides. The second time,
# the result comes from a cache. (Step 7, looking at the result and saving it, is the rest of this notebook, and
# notebook 07.)

# %%
session = workflow.trained(config, tell=print)

# %% [markdown]
# The loss has two parts: the error in denoising pictures of the toy (*instance*) and the error in denoising pictures
# of any dog (*prior*). The value of a single step depends on how much noise was drawn, hence the cloud; the line is a
# running mean.

# %%
figure = plots.loss_curves(session.log)
figure.axes[0].set_title("A step's loss mostly shows how noisy its pictures were")
plots.show(figure, alt="Two clouds of single steps with their means: the instance loss falls, the prior loss stays")

# %% [markdown]
# **What you should see**: the mean of the instance loss falls, because there is one toy to learn; the prior loss is
# meant to stay where it is. The dots scatter more widely than either mean moves, because the noise level matters more
# than what was learned. So compare the mean of the first quarter of the steps with that of the last, and then judge by
# pictures:

# %%
# NBVAL_CHECK_OUTPUT
quarter = len(session.log) // 4
losses = [line["instance_loss"] for line in session.log]
first, last = statistics.mean(losses[:quarter]), statistics.mean(losses[-quarter:])
print("the instance loss fell:", last < first)
prior = [line["prior_loss"] for line in session.log]
moved = statistics.mean(prior[-quarter:]) - statistics.mean(prior[:quarter])
print("the prior loss moved less than half as far:", abs(moved) < (first - last) / 2)

# %% [markdown]
# ## After: the toy in places where it never was
#
# The prompts are `a photo of sks dog on the beach`, `… in the snow` and so on, each from the same noise before and
# after. **Predict**: which of the toy's features will you find: the teal, the spots, the yellow ears?

# %%
after = validation_images(session.components, concept, config.sampling, count=8)
places = [SCENES[name] for name in before.scene_names]
plots.show(
    plots.image_rows(
        [before.scenes, after.scenes],
        labels=["before", "after"],
        titles=places,
        title="Five photographs later: the same toy, wherever the words put it",
    ),
    alt="Upper row: dogs of any colour in eight places. Lower row: the teal dog in the same eight places",
)

# %% [markdown]
# **What you should see**: the lower row shows the toy in every place. The place comes from the words, as before; the
# toy comes from the five photographs. No photograph shows it on the beach, at night or on the moon. That the model can
# still combine toy and place is what makes this useful. Coarse features are learned first: the two colours are more
# reliable than the number and the position of the spots.
#
# The same pairs, one at a time (in a live notebook):

# %%
widgets.before_after(before.scenes, after.scenes, places)

# %% [markdown]
# ## What did it cost?
#
# A model that has learned one dog too well draws that dog for every dog. **Predict**: does `a photo of a dog`, without
# the rare word, still give all sorts of dogs?

# %%
plots.show(
    plots.image_rows(
        [before.classes, after.classes],
        labels=["before", "after"],
        title=f"'{concept.class_prompt}' still gives many different dogs",
    ),
    alt="'a photo of a dog' before and after training: both rows show dogs of many colours",
)

# %% [markdown]
# **What you should see**: many different dogs, as before. Compare them column by column: nearly all have changed
# their colours, and half now stand in another place; both nights, for example, have become grass. Notebook 02 shows
# what happens without the class images.
#
# ## In numbers
#
# Pictures persuade, and numbers compare. An *identity encoder* compares what was drawn with the photographs; it was
# trained to tell photographs of one toy from photographs of others, including look-alikes. Two references give its
# numbers a meaning: the *floor* is the base before training, and the *ceiling* is what other photographs of the same
# toy reach.

# %%
numbers = workflow.measured(
    session, before, after, metrics.load_encoders(session.components.base), workflow.references(config)
)
metrics.metrics_table(numbers)

# %% [markdown]
# Read three lines. `normalized_subject_fidelity`: 0 is the floor, 1 the ceiling. `scene_recognised`: the share of
# pictures whose place a second encoder names correctly (a CLIP, trained to match pictures and captions). It asks only
# which of the eight places comes nearest: a night without its moon still counts as a night, so look at the backgrounds
# yourself. `class_diversity_ratio`: how varied `a photo of a dog` still is, where 1 is as varied as before. With eight
# pictures in each set, these numbers are rough; notebook 08 measures properly. (`clip_i` lies above its ceiling because
# CLIP compares the places as well; notebook 08 says more.)

# %%
scores = ("normalized_subject_fidelity", "scene_recognised", "class_diversity_ratio")
shown = {name.replace("_", "\n"): {"after training": numbers["after"][name]} for name in scores}
plots.show(
    plots.bars(shown, ylabel="value", title="The toy is learned, the places are right, dogs are still varied"),
    alt="Three bars near 1: normalised subject fidelity, scenes recognised, and class diversity beside the base's",
)

# %% [markdown]
# Three claims were made above. Here they are again, in a form that can fail: the pictures have come more than half of
# the way from the base to other photographs of the toy; at least half of the places are right; at least half of the
# dogs' variety is left.

# %%
# NBVAL_CHECK_OUTPUT
fidelity, scenes, diversity = (numbers["after"][name] for name in scores)
assert fidelity > 0.5, f"the toy was not learned: {fidelity:.2f}"
assert scenes >= 0.5, f"places were forgotten: {scenes:.2f}"
assert diversity > 0.5, f"dogs have become the toy: {diversity:.2f}"
print("learned the toy, kept the places, kept the class")

# %% [markdown]
# ## The course
#
# | notebook | step | you will see |
# |---|---|---|
# | [00b How diffusion works](00b_how_diffusion_works.ipynb) | noise, denoiser, sampling | a picture made from noise by a loop of your own |
# | [01 Instance data](01_instance_data.ipynb) | photographs, identifier, prompts | what the model really gets to see |
# | [02 Prior preservation](02_prior_preservation.ipynb) | class images | a model that forgets what a dog is, and one that does not |
# | [03 Loading and freezing](03_loading_and_freezing.ipynb) | the parts | a picture through each part of the model |
# | [04 Dual LoRA](04_dual_lora.ipynb) | adapters | what is trained, and why it fits in a small file |
# | [05 The dataset](05_dataset.ipynb) | batches | half the toy, half the class, and what can be cached |
# | [06 Training](06_training.ipynb) | the loop | one step by hand, then all of them |
# | [07 Validation and export](07_validation_and_export.ipynb) | the result | the toy asked for in other sentences; the adapter turned up and down, saved, loaded elsewhere |
# | [08 Measuring](08_measuring.ipynb) | metrics | which setting does what |
# | [09 When it goes wrong](09_when_it_goes_wrong.ipynb) | failures | a broken run's fault, found by its symptom |
# | [10 On a real base](10_on_a_real_base.ipynb) | your own subject | what fits on which GPU |
# | [11 From diffusion to flow matching](11_from_diffusion_to_flow.ipynb) | the path | one network that draws the same dog on two paths |

# %% [markdown]
# ## Exercises
#
# Every notebook except 00b has exercises that you solve in code. Replace the `...` with your own lines, run the cell, and read
# what the check prints: it runs your function on small inputs and says in words what is wrong. The hints below the
# cell open one by one, and the solution comes last.
#
# ### Exercise A: noise with a number (5 minutes)
#
# Before and after could be compared above because picture number 3 of a set always starts from the same noise, no
# matter how many pictures are drawn before it. Write the function that makes this noise: standard normal numbers that
# depend on the seed of the run and on the number of the picture, and on nothing else.

# %%
from dbnb.exercises import check_00a


def noise_of(seed: int, number: int, shape: tuple[int, ...]):
    """The noise that picture `number` of a set starts from: an array or a tensor of this shape."""
    ...


check_00a(noise_of)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `numpy.random.seed` and `torch.manual_seed` set a *global* generator, from which everything else in the program draws
# too. Make a generator of your own inside the function: `numpy.random.default_rng(…)`.
# </details>
#
# <details><summary>Hint 2</summary>
#
# The seed 0 with picture 1 and the seed 1 with picture 0 must not share their noise, so `seed + number` is not enough.
# `default_rng` takes several numbers as a tuple.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# import numpy as np
#
#
# def noise_of(seed, number, shape):
#     generator = np.random.default_rng((seed, number))
#     return generator.standard_normal(shape)
# ```
# </details>
#
# ### Exercise B: a number with a scale (3 minutes)
#
# Write `normalized_subject_fidelity`: 0 where the base was before training, 1 where other photographs of the toy are.

# %%
from dbnb.exercises import check_00b


def normalized(after: float, floor: float, ceiling: float) -> float:
    """How far a similarity has come on the way from the floor (0) to the ceiling (1)."""
    ...


check_00b(normalized)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# How far is it from the floor to the ceiling? How much of that distance has been covered?
# </details>
#
# <details><summary>Hint 2</summary>
#
# Both are differences, and both start at the floor.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def normalized(after, floor, ceiling):
#     return (after - floor) / (ceiling - floor)
# ```
# </details>

# %% [markdown]
# ## On your own
#
# 1. Draw `a photo of sks dog with a hat`: a thing that no photograph showed on the toy. (2 minutes)
# 2. Draw `a photo of sks cat`. What does the rare word carry over? (2 minutes)
# 3. No caption has a word for the toy's colour. How near do known words come: `a photo of a green dog with yellow
#    spots`? (2 minutes)
#
# <details><summary>Answers</summary>
#
# ```python
# from dbnb.validation import draw
#
# prompts = ["a photo of sks dog with a hat", "a photo of sks cat", "a photo of a green dog with yellow spots"]
# rows = [draw(session.components, [prompt] * 6, config.sampling) for prompt in prompts]
# plots.show(plots.image_rows(rows, labels=prompts), alt="dogs with hats, cats, green dogs with yellow spots")
# ```
#
# 1. Count the hats. Under each hat you should still find the toy: the adapters learned the toy, and the base still
#    knows hats.
# 2. Compare colour and pattern with the toy's. The more of them you find on the cats, the more of what was learned
#    belongs to the rare word alone rather than to the pair of words `sks dog`.
# 3. The words give *some* green dog with yellow spots, a different one each time, and not this toy. That is why the
#    five photographs are needed.
# </details>
#
# ## Quiz
#
# Five questions about *why*. Choose an answer, then open it: it says whether it is right, and why.
#
# **1. Why do the pictures before and after training start from the same noise?**
#
# <details><summary>A. Because the model was trained on that noise and would draw worse from any other.</summary>
#
# No: training draws new noise at every step, and a picture can start from any noise at all.
# </details>
#
# <details><summary>B. So that what differs between two pictures of a column is due to the training alone.</summary>
#
# Right: with the prompt and the noise fixed, the adapters are the only thing that has changed.
# </details>
#
# <details><summary>C. Because the pictures of one row would otherwise all show the same place and pose.</summary>
#
# No: the noise is the same within a *column*; within a row each picture has noise of its own.
# </details>
#
# **2. Why is the loss curve a poor judge of how much was learned?**
#
# <details><summary>A. It is computed in half precision, which hides changes as small as these.</summary>
#
# No: the miniature trains in full precision, and the cloud would look the same in any format.
# </details>
#
# <details><summary>B. It is measured on the class images, which have little to do with the toy.</summary>
#
# No: there are two curves, and the instance loss is measured on pictures of the toy.
# </details>
#
# <details><summary>C. Its values depend more on how much noise was drawn than on what was learned.</summary>
#
# Right: hence the cloud; only means over many steps, or pictures and measures, say something.
# </details>
#
# **3. The toy is drawn on the moon, although no photograph was taken there. Why can the model do that?**
#
# <details><summary>A. The base knows the moon from its own training, and those words still work.</summary>
#
# Right: the toy comes from the photographs and the place from the words; both can be put together.
# </details>
#
# <details><summary>B. The adapters store a background for every place that the base has a caption for.</summary>
#
# No: the base draws the places; no photograph of the toy on the moon was ever trained on.
# </details>
#
# <details><summary>C. The class images were all taken on the moon, and they are half of each batch.</summary>
#
# No: the base drew them from `a photo of a dog`, in whatever place it liked.
# </details>
#
# **4. Why does the sample toy have a colour that the base has no word for?**
#
# <details><summary>A. Teal is easier to learn than the eight colours that the captions name.</summary>
#
# No: nothing about it is easier; the base has to learn a colour that it has never been told about.
# </details>
#
# <details><summary>B. So that no prompt leads there, and the toy must come from the photographs.</summary>
#
# Right: if the toy were red, `a red dog` would draw something near it without any training.
# </details>
#
# <details><summary>C. So that the identity encoder can more easily tell it from other toys.</summary>
#
# No: the encoder was trained on many toys and has to tell much smaller differences apart.
# </details>
#
# **5. Why are two references, a floor and a ceiling, measured along with subject fidelity?**
#
# <details><summary>A. Because a cosine can be negative, and the floor makes all numbers positive.</summary>
#
# No: the normalised number may still be negative, if a training made things worse.
# </details>
#
# <details><summary>B. Because the two encoders disagree, and the references are their mean values.</summary>
#
# No: each encoder has references of its own; nothing is averaged over the two.
# </details>
#
# <details><summary>C. Because 0.6 alone does not tell what would be bad and what would be good.</summary>
#
# Right: the base without training is the floor, other photographs of the toy are the ceiling.
# </details>
#
# ## In short
#
# - Five photographs, one rare word and a few hundred steps teach a model a new subject, and it keeps what it knew.
# - The base suggests its settings, and the device is found automatically; what fits depends on your GPU.
# - Judge by the same prompts from the same noise, before and after, in pictures and in numbers.
#
# Next: [00b How diffusion works](00b_how_diffusion_works.ipynb), from noise to a picture by hand; or straight on to
# [01 Instance data](01_instance_data.ipynb), which shows the five photographs as the model sees them.
