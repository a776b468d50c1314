# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 02 Prior preservation: teaching one dog without forgetting dogs
#
# **What you will do**: train the same subject twice, with and without [class images](../docs/glossary.md#class-image),
# and look at what `a photo of a dog` has become. Then look into the cache that keeps class images.
#
# **What you will learn**: what *[language drift](../docs/glossary.md#language-drift)* is, why pictures drawn by the
# model itself reduce it, and what a cache has to know before it can say "I have these already". Afterwards you can
# recognise drift and measure it.
#
# **What you need**: notebook [01](01_instance_data.ipynb). About three quarters of a minute on two CPU cores if
# notebook 00 has run, whose training is used again; two minutes more if not; 20 seconds when you come back.
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
# The new module is `dbnb.prior`.

# %%
import dataclasses
import io
import json
import os
import tempfile

import numpy as np
from PIL import Image

from dbnb import metrics, plots, workflow
from dbnb.config import DreamBoothConfig, Sampling
from dbnb.models import load_components
from dbnb.prior import class_images
from dbnb.tables import Table
from dbnb.validation import draw
from dbnb.widgets import browse

workflow.quiet_libraries()
config = DreamBoothConfig()

# %%
plots.you_are_here("02")

# %% [markdown]
# ## The problem
#
# Training shows the model five pictures, again and again, each time with the prompt `a photo of sks dog`. The loss
# asks only that these five pictures become likely. Nothing asks that `sks` should carry their meaning: the word `dog`
# is in the prompt as well, and changing *its* meaning lowers the loss just as much. So the class word drifts towards
# the subject. The paper calls this **language drift**. Here is the training of notebook 00 without its class images,
# with the same number of steps:

# %%
alone = workflow.trained(dataclasses.replace(config, with_prior_preservation=False))

# %% [markdown]
# **Predict**: after training on five pictures of the teal dog and nothing else, what is `a photo of a dog`? And what
# is `a photo of a cat`, a word that training never used?

# %%
prompts, base = ["a photo of sks dog", "a photo of a dog", "a photo of a cat"], load_components(config.base)
before = {prompt: draw(base, [prompt] * 10, config.sampling) for prompt in prompts}
without = {prompt: draw(alone.components, [prompt] * 10, config.sampling) for prompt in prompts}
rows = {f"before:\n{prompt}": before[prompt] for prompt in prompts[1:]} | {f"after:\n{p}": without[p] for p in prompts}
plots.show(
    plots.image_rows(
        [pictures[:5] for pictures in rows.values()],
        labels=list(rows),
        title="Without class images 'dog' drifts to the toy",
    ),
    alt="Before: dogs and cats of many colours. After: with or without the identifier the toy, and cats in its colours",
)

# %% [markdown]
# **What you should see**: the toy is there, and the other dogs are gone. `a photo of a dog` draws the toy, and even
# the cats have its colours. The text encoder passes `sks` on (notebook 01), so the model could have learned the toy as
# the meaning of that word alone. But nothing in the loss asks for this, and so the model has learned that dogs look
# like this.
#
# ## The remedy
#
# Draw what the model thinks a dog is **before** training, and mix these pictures in, with the class prompt. This is
# **[prior preservation](../docs/glossary.md#prior-preservation)**:
#
# $$ L = \underbrace{\|\hat y(x^{sks}_t, \text{a photo of sks dog}) - y\|^2}_{\text{instance}}
#     + \lambda\, \underbrace{\|\hat y(x^{dog}_t, \text{a photo of a dog}) - y'\|^2}_{\text{prior}} $$
#
# (Ruiz et al., 2023, equation 2. $x_t$ is a picture with noise added up to the timestep $t$; $\hat y$ is the answer of
# the *UNet*, the network that removes noise, see notebook [00b](00b_how_diffusion_works.ipynb); $y$ and $y'$ are the
# right answers, which are known because we added the noise; $\lambda$ is `prior_loss_weight`.) The second term stays
# low only if the model still draws all sorts of dogs for `a photo of a dog`. Half of each batch is the subject, and
# half is the class.
#
# This is the training of notebook 00, from its cache:

# %%
kept = workflow.trained(config)
print(f"{config.max_train_steps} steps with {len(kept.prior.paths)} class images")

# %% [markdown]
# This model has seen the five photographs exactly as often as the one that was trained without class images.
# **Predict**: what will the same three prompts give, from the same noise?

# %%
with_prior = {prompt: draw(kept.components, [prompt] * 10, config.sampling) for prompt in prompts}
plots.show(
    plots.image_rows(
        [pictures[:5] for pictures in with_prior.values()],
        labels=prompts,
        title="With class images 'dog' is not the toy",
    ),
    alt="With the identifier the toy; without it dogs and cats that differ from it and from each other",
)

# %% [markdown]
# **What you should see**: the subject in the first row; in the second row dogs that are not the toy and that differ
# from each other. Compare the cats with those of the base above, column by column: most have changed their colour,
# but they are still cats of many colours and not the toy, although no class image shows a cat. Look at the places as
# well: nights and the moon have given way to grass, snow and a room, and the city and some of the snow to the beach.
# Class images keep the animals varied and unlike the toy; they do not keep each picture as it was, and the measure
# below does not see places. How much of the drift the [prior loss](../docs/glossary.md#prior-loss) prevents, for dogs
# and for cats, is measured below.
#
# ## The class images
#
# These are the pictures that were mixed in, drawn from the class prompt alone, at the training resolution. They do not
# have to be beautiful. They show what *this model* means by the word, including its faults, and exactly this is to be
# preserved.

# %%
class_pictures = [Image.open(path) for path in kept.prior.paths]
plots.show(
    plots.show_images(
        class_pictures[:24], columns=8, title=f"24 of {len(class_pictures)} class images: what the base means by 'dog'"
    ),
    alt="Twenty-four class images: dogs of many colours, patterns and places",
)

# %% [markdown]
# All of them, one at a time (in a live notebook):

# %%
browse({f"{number:04d}": picture for number, picture in enumerate(class_pictures)}, "class image")

# %% [markdown]
# ## Drift in numbers
#
# Two questions, both asked in the space of the identity encoder (notebook 08 explains it). How varied are the pictures
# of one prompt: how far apart are any two of them, on average? And how similar are they to the photographs of the toy?
# The same is asked of the cats, which no class image shows. **Predict** the heights
# of the bars, in four groups of three.

# %%
encoders = metrics.load_encoders(base.base)
toy = encoders.identity_features(kept.concept.images())
drift = {}
for animal in ("dog", "cat"):
    for name, drawn in (("base", before), ("with class images of dogs", with_prior), ("without class images", without)):
        features = encoders.identity_features(drawn[f"a photo of a {animal}"])
        drift.setdefault(f"{animal}s:\ndistance", {})[name] = metrics.diversity(features)
        drift.setdefault(f"{animal}s:\nlike the toy", {})[name] = metrics.subject_fidelity(features, toy)

# %%
plots.show(
    plots.bars(
        drift,
        ylabel="cosine distance or similarity",
        title="Without class images dogs become the toy, and cats become more alike",
    ),
    alt="Four groups of three bars: with class images dogs stay as in the base; without, they come together at the toy",
)

# %% [markdown]
# **What you should see**: with class images, the dogs' bars are nearly those of the base; without them, dogs are
# nearly all alike, and as like the toy as pictures of the toy itself (notebook 00). The cats, too, become more like
# each other, and more like the toy, though far less than the dogs do. Ten pictures give rough numbers, but the order
# is not in doubt:

# %%
# NBVAL_CHECK_OUTPUT
of_base, held, drifted = ({group: bars[name] for group, bars in drift.items()} for name in drift["dogs:\ndistance"])
assert drifted["dogs:\nlike the toy"] > held["dogs:\nlike the toy"], drift
assert drifted["dogs:\ndistance"] < held["dogs:\ndistance"], drift
assert drifted["cats:\nlike the toy"] > held["cats:\nlike the toy"], drift
print("without class images: dogs are nearer to the toy, and less varied; cats are nearer to it, too")

# %% [markdown]
# And how much of the drift do class images *of dogs* prevent?

# %%
for animals in ("dogs", "cats"):
    start, with_dogs, without_any = (bars[f"{animals}:\nlike the toy"] for bars in (of_base, held, drifted))
    print(f"{animals} became more like the toy by {without_any - start:+.2f} without class images,", end=" ")
    print(f"by {with_dogs - start:+.2f} with those of dogs")

# %% [markdown]
# Class images of dogs have protected the cats too: they became a little more like the toy, but far less than without
# class images. The prior loss asks the model to keep its answers to `a photo of a dog`; presumably the adapters
# therefore tie the toy to the identifier. This was measured for one other class on one base, so measure it for a class
# that matters to you. (Do not put cats among the class images of dogs for this: every class image is trained with the
# one class prompt, and cats that are called `a photo of a dog` turn dogs into cats, as notebook 09 shows in entry 12.)

# %% [markdown]
# ## A cache that knows what it holds
#
# Drawing class images takes time, on a real base many minutes, so they are drawn only once. But a folder with a
# hundred pictures of dogs does not say which model drew them, with which prompt and at which size. Most scripts only
# count the files. Here a **[manifest](../docs/glossary.md#manifest)** records what made them, and decides.
#
# To show every decision, this part uses a cache of its own, which is empty at first.

# %%
usual_cache, own_cache = os.environ.get("DBNB_CACHE"), tempfile.TemporaryDirectory()
os.environ["DBNB_CACHE"] = own_cache.name


def ask(prompt: str, count: int, **changed):
    sampling = dataclasses.replace(Sampling(num_inference_steps=10, guidance_scale=4.0, resolution=128), **changed)
    made = class_images(base, prompt, count, sampling)
    print(f"{prompt!r}, {count}: {made.decision} ({made.reason})")
    return made


# %% [markdown]
# **Predict** for each of the next four calls: are all pictures drawn, some of them, or none?

# %%
# NBVAL_CHECK_OUTPUT
five = ask("a photo of a dog", 5)
drawn = [path.read_bytes() for path in five.paths]
again = ask("a photo of a dog", 5)

# %%
# NBVAL_CHECK_OUTPUT
eight = ask("a photo of a dog", 8)
cats = ask("a photo of a cat", 2)

# %% [markdown]
# The third call drew only what was missing and left the files of the first five as they were:

# %%
# NBVAL_CHECK_OUTPUT
print("the first five unchanged:", [path.read_bytes() for path in eight.paths[:5]] == drawn)

# %% [markdown]
# This is the recipe that the manifest holds, together with the seed and hash of each picture. The
# *[fingerprint](../docs/glossary.md#fingerprint)* of the base is a hash over its files: if the base is trained
# further, the class images no longer match it.

# %%
manifest = json.loads((eight.paths[0].parent / "manifest.json").read_text())
Table({"field": name, "value": str(value)} for name, value in manifest["recipe"].items())

# %% [markdown]
# What if somebody edits a picture? Its hash no longer matches, so this one is drawn again, and only this one. It comes
# back because every picture has its own seed, made from the run's seed and the picture's number: up to rounding,
# picture 3 is the same whether you ask for five or two hundred, and whatever the batch size is.

# %%
# NBVAL_CHECK_OUTPUT
Image.new("RGB", (64, 64), "red").save(eight.paths[3])
mended = ask("a photo of a dog", 8)
was, now = (np.asarray(Image.open(file), dtype=int) for file in (io.BytesIO(drawn[3]), mended.paths[3]))
print("the same picture as before, up to rounding:", np.abs(was - now).max() <= 2)

# %% [markdown]
# Back to the usual cache:

# %%
del os.environ["DBNB_CACHE"]
if usual_cache is not None:
    os.environ["DBNB_CACHE"] = usual_cache
own_cache.cleanup()

# %% [markdown]
# ## Exercises
#
# ### Exercise A: the cache's key (8 minutes)
#
# Each recipe has a folder of its own, whose name is computed from the recipe. Write that function. Equal recipes must
# get equal names, in every process and at any time; two recipes that differ in any field must get different names; and
# every file system must accept the name: at most 64 letters, digits, dots, hyphens and underscores.

# %%
from dbnb.exercises import check_02a


def cache_key(recipe: dict) -> str:
    """The name of the folder for what this recipe made, such as {"prompt": "a photo of a dog", "seed": 1, …}."""
    ...


check_02a(cache_key)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# First turn the whole recipe into one text in which every field has its name. What if the fields come in another order?
# </details>
#
# <details><summary>Hint 2</summary>
#
# `json.dumps` has an option that sorts the fields.
# </details>
#
# <details><summary>Hint 3</summary>
#
# `hashlib.sha256(text.encode()).hexdigest()` turns any text into 64 hexadecimal digits. The first sixteen are enough.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# import hashlib
#
#
# def cache_key(recipe):
#     text = json.dumps(recipe, sort_keys=True)
#     return hashlib.sha256(text.encode()).hexdigest()[:16]
# ```
# </details>
#
# ### Exercise B: what is left to draw (8 minutes)
#
# The manifest has recorded a hash for each picture, and the folder holds files whose hashes can be computed. Which of
# the pictures 0 to `count - 1` have to be drawn? A picture stays only if it was recorded and its file still has the
# recorded hash.

# %%
from dbnb.exercises import check_02b


def to_draw(recorded: dict[int, str], found: dict[int, str], count: int) -> list[int]:
    """The numbers of the pictures to draw. Both dictionaries: number of a picture -> hash of its file."""
    ...


check_02b(to_draw)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# There are four cases for each number: as recorded, edited, missing, and present without a record.
# </details>
#
# <details><summary>Hint 2</summary>
#
# `found.get(number)` is `None` for a missing file. What does `None == None` say of a picture that is in neither
# dictionary?
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def to_draw(recorded, found, count):
#     return [n for n in range(count) if n not in recorded or found.get(n) != recorded[n]]
# ```
# </details>

# %% [markdown]
# ## On your own
#
# 1. What happens with `prior_loss_weight=0.1`, or 10? Predict both, then train. (2 minutes each)
# 2. You have two hundred photographs of real dogs. Would you use them as class images instead of drawn ones? (think)
# 3. Why would class images of 256 px be wrong for a training at 512 px? (think)
#
# <details><summary>Answers</summary>
#
# 1. A small weight lets dogs drift; a large one keeps them, but slows down learning the subject.
#
# ```python
# rows = {}
# for weight in (0.1, 10.0):
#     one = workflow.trained(dataclasses.replace(config, prior_loss_weight=weight))
#     rows[f"{weight:g}: sks dog"] = draw(one.components, ["a photo of sks dog"] * 6, config.sampling)
#     rows[f"{weight:g}: dog"] = draw(one.components, ["a photo of a dog"] * 6, config.sampling)
# plots.show(plots.image_rows(list(rows.values()), labels=list(rows)), alt="subject and class at two weights")
# ```
#
# 2. You can (`class_data_dir`), and many people do. But they also *teach* what real dogs look like, which is more than
#    preserving. Drawn pictures preserve exactly what the model knows.
# 3. They would be enlarged, and the model would learn that `a photo of a dog` is blurred.
# </details>
#
# ## Quiz
#
# Five questions about *why*. Choose an answer, then open it: it says whether it is right, and why.
#
# **1. Training only ever uses the prompt `a photo of sks dog`. Why does `a photo of a dog` change as well?**
#
# <details><summary>A. The prompts are shuffled in training, so that some pictures lose the identifier.</summary>
#
# No: every instance picture keeps the instance prompt, in every step.
# </details>
#
# <details><summary>B. The autoencoder is trained as well and paints every dog in the toy's colours.</summary>
#
# No: the autoencoder is frozen, and so are all other weights of the base.
# </details>
#
# <details><summary>C. The two prompts share their words, and nothing in the loss holds <code>dog</code> in place.</summary>
#
# Right: moving the meaning of `dog` lowers the instance loss just as well as moving that of `sks`.
# </details>
#
# **2. Why are the class images drawn by the model itself and not taken from a collection?**
#
# <details><summary>A. They show what this model means by the word, and this is to be preserved.</summary>
#
# Right: real photographs of dogs would also teach something new, which is more than preserving.
# </details>
#
# <details><summary>B. Real photographs cannot be used, because their latents have another size.</summary>
#
# No: they can (`class_data_dir`), and are cut to the same resolution as any other picture.
# </details>
#
# <details><summary>C. Drawn pictures are sharper than photographs, and the loss is lower on sharp ones.</summary>
#
# No: they are as good or as bad as the base draws; faults are welcome, since they are the base's own.
# </details>
#
# **3. Why does the manifest hold a fingerprint of the base?**
#
# <details><summary>A. So that two users can see whether they have paid for the same licence.</summary>
#
# No: the fingerprint is a hash over files and knows nothing of licences.
# </details>
#
# <details><summary>B. So that pictures drawn by another model are not taken for this model's.</summary>
#
# Right: a base that was trained further means something else by `dog`, and the old pictures no longer fit.
# </details>
#
# <details><summary>C. So that the base can be downloaded again if its folder has been deleted.</summary>
#
# No: a hash cannot be turned back into files; it can only tell whether files are the same.
# </details>
#
# **4. Why does every class image have a seed of its own, made of the run's seed and its number?**
#
# <details><summary>A. So that all pictures of a class are drawn at once, in a single large batch.</summary>
#
# No: they are drawn in batches of any size, and the result does not depend on that size.
# </details>
#
# <details><summary>B. So that the pictures differ in their places as well as in their colours.</summary>
#
# No: different noise is enough for that; it could also come from one generator for all pictures.
# </details>
#
# <details><summary>C. So that picture 3 is the same one, whether five or two hundred are asked for.</summary>
#
# Right: therefore more can be drawn later, or a single one again, without touching the others.
# </details>
#
# **5. A cache that only counts its files has a hundred pictures and needs a hundred. What is wrong with reusing them?**
#
# <details><summary>A. Nothing: the prompt is in the name of the folder, and that is enough.</summary>
#
# No: the name does not give the model, the size or the steps, nor whether a file was edited.
# </details>
#
# <details><summary>B. Their number does not tell which model drew them, of what, and at which size.</summary>
#
# Right: notebook 09 trains with a full folder of cats instead of dogs and shows the result.
# </details>
#
# <details><summary>C. Pictures wear out: after some trainings on them they have to be drawn again.</summary>
#
# No: a picture does not change; the question is whether it is the picture that is needed.
# </details>
#
# ## In short
#
# - Five pictures and one prompt move the class word as well: language drift.
# - The prior loss, on the model's own pictures of the class, keeps the class varied and apart from the toy, and here
#   another class as well.
# - A cache is only as good as what it knows about its content.
#
# Next: [03 Loading and freezing](03_loading_and_freezing.ipynb), the parts of the model.
