# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 Instance data: what the model really gets to see
#
# **What you will do**: check a folder of photographs, look at exactly the pixels that training will use, choose an
# identifier, and write the two prompts.
#
# **What you will learn**: what makes a good set of photographs; what a *rare identifier* is and how to see whether a
# word is one; why a folder that looks fine in a file browser may not be.
#
# **What you need**: notebook [00](00_start_here.ipynb) for the story. About half a minute on two CPU cores.
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
# The new module is `dbnb.concept`: photographs and words become a `Concept`.

# %%
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from dbnb import plots, workflow
from dbnb.concept import SAMPLE_DIR, Concept, inspect_images, load_image, token_report
from dbnb.config import DreamBoothConfig
from dbnb.dataset import DreamBoothDataset
from dbnb.models import load_components
from dbnb.tables import Table
from dbnb.validation import draw

workflow.quiet_libraries()
config = DreamBoothConfig()

# %% [markdown]
# ## The photographs
#
# Three to ten pictures are enough. The DreamBooth paper found four of a dog to be as good as any more. What counts is
# what they have in common and what they do not: **whatever is the same in all of them becomes part of the subject**.

# %%
concept = Concept.from_folder(None, config.identifier, config.class_word)
photographs = concept.images()
plots.show(
    plots.show_images(photographs, titles=[path.name for path in concept.paths], inches=1.6),
    alt="Five photographs of a teal dog with yellow spots, each in another place",
)

# %% [markdown]
# A good set, such as this one, varies in everything but the subject: place, light, side, distance. Five pictures from
# one sofa teach the sofa too.
#
# ## A folder from real life
#
# Photographs come from telephones, messengers and screenshots. Let us make a folder with the troubles that such folders
# have: a picture that is only *marked* as rotated, a copy under another name, a file that was cut off while it was sent,
# a thumbnail, a cut-out with transparency, and what a file browser leaves behind.

# %%
folder = Path(tempfile.mkdtemp())
first = load_image(SAMPLE_DIR / "photos" / "01.png")
turned = Image.Exif()
turned[0x0112] = 6  # "turn by a quarter": the pixels are stored lying down
first.rotate(90, expand=True).save(folder / "telephone.jpg", exif=turned)
load_image(SAMPLE_DIR / "photos" / "02.png").save(folder / "good.png")
(folder / "good (1).png").write_bytes((folder / "good.png").read_bytes())
(folder / "cut off.jpg").write_bytes((folder / "telephone.jpg").read_bytes()[:4000])
first.resize((12, 12)).save(folder / "thumbnail.png")
first.convert("RGBA").resize((48, 48)).save(folder / "small.png")
_ = (folder / "Thumbs.db").write_bytes(b"left by a file browser")

# %% [markdown]
# **Predict**: seven files. How many of them will be used?

# %%
# NBVAL_CHECK_OUTPUT
paths, notes = inspect_images(folder, resolution=64)
Table({"file": note.name, "used": "yes" if note.used else "no", "note": note.note} for note in notes)

# %% [markdown]
# Three. Nothing was skipped without a word, and the picture from the telephone stands upright, as your eyes see it and
# as many training scripts do not.

# %%
figure = plots.image_rows(
    [[Image.open(folder / "telephone.jpg").convert("RGB"), load_image(folder / "telephone.jpg")]],
    titles=["the stored pixels", "as it is loaded"], inches=1.8,
)  # fmt: skip
plots.show(figure, alt="Left the dog lying on its back, as stored; right the same picture upright")

# %% [markdown]
# ## Exactly what the model will see
#
# Training does not see your photographs. It sees squares of `resolution` pixels cut out of them, with values between
# -1 and 1. On the miniature that is 64 x 64, on Stable Diffusion 1.5 it is 512 x 512. Look at these squares once before every
# training: cut-off heads, wrong sides and unreadable details show here, before they cost an hour.

# %%
dataset = DreamBoothDataset(concept.paths, concept.instance_prompt, size=config.resolution)
seen = [dataset.pixels("instance", index, flip=False) for index in range(len(concept.paths))]
print(tuple(seen[0].shape), f"from {seen[0].min():.2f} to {seen[0].max():.2f}")

# %%
squares = VaeImageProcessor().postprocess(torch.stack(seen))
plots.show(
    plots.image_rows([photographs, squares], labels=["photograph", "what training sees"], inches=1.4),
    alt="Upper row the photographs, lower row the same at 64 by 64 pixels: coarse, but the dog is whole in each",
)

# %% [markdown]
# **What you should see**: coarse squares, the dog whole in each of them. Photographs that are not square are cut: in the
# middle, or anywhere if `center_crop` is off. A long picture may lose its subject, and the report above would say so.

# %%
wide = Image.fromarray(np.hstack([np.asarray(photographs[0])] * 3))
wide.save(folder / "wide.png")
cropped = {
    "center_crop": DreamBoothDataset([folder / "wide.png"], "", size=64),
    "random, step 0": DreamBoothDataset([folder / "wide.png"], "", size=64, center_crop=False),
    "random, step 1": DreamBoothDataset([folder / "wide.png"], "", size=64, center_crop=False),
}
pieces = [data[index]["instance_pixels"] for data, index in zip(cropped.values(), (0, 0, 1), strict=True)]
pictures = VaeImageProcessor().postprocess(torch.stack(pieces))
plots.show(
    plots.show_images(pictures, titles=list(cropped), inches=1.6),
    alt="Three crops of one wide picture: the middle one shows the dog whole, random ones may cut it",
)

# %% [markdown]
# ## The identifier
#
# The subject needs a name that means nothing yet. A name that means something (`red`, `Bella`) brings its meaning along,
# and training has to fight it. A random string (`xqzwy7`) falls apart into letters, each of which means something too.
# So DreamBooth takes a **rare token**: a short string that the tokenizer keeps whole and that hardly occurred in the
# model's training.
#
# A tokenizer that was learned by merging frequent pairs lists common words first: the higher the number, the rarer the
# token.

# %%
# NBVAL_CHECK_OUTPUT
components = load_components(config.base)
words = ("dog", "red", "sks", "ohwx", "xqzwy7", "sparkle")
reports = [token_report(components.tokenizer, word) for word in words]
Table(
    {"word": r.identifier, "tokens": " | ".join(r.tokens), "ids": str(list(r.ids)), "verdict": r.verdict}
    for r in reports
)

# %% [markdown]
# `</w>` marks the end of a word. `sks` is one token with a high number: rare. `dog` is one token with a meaning. The
# others fall into pieces. On another base the same words may split otherwise, so ask its own tokenizer:
# `token_report(load_components("sd15").tokenizer, "sks")`.
#
# Try words of your own. (The field needs a live notebook; on a web page you see the first answer.)

# %%
from dbnb.widgets import identifier_explorer

identifier_explorer(components.tokenizer)

# %% [markdown]
# ## Is the word really empty?
#
# Numbers tell that a word is rare; the model tells whether it is empty. **Predict**: three prompts, the same noise in
# every column: `a photo of a dog`, `a photo of a sks dog`, `a photo of a red dog`. Which rows will look alike?

# %%
prompts = ["a photo of a dog", "a photo of a sks dog", "a photo of a red dog"]
rows = [draw(components, [prompt] * 6, config) for prompt in prompts]
plots.show(
    plots.image_rows(rows, labels=prompts),
    alt="The first two rows show dogs of many colours; the third shows red dogs only",
)

# %% [markdown]
# **What you should see**: `sks` changes little, `red` changes the colour of every dog. `red` would make a poor
# identifier: after training, red dogs would be gone.
#
# How little is little? Here is the mean difference of the pictures to those of the plain prompt, in grey levels of 255.

# %%
plain, *others = [np.stack([np.asarray(image, dtype=float) for image in row]) for row in rows]
for prompt, row in zip(prompts[1:], others, strict=True):
    print(f"{prompt:24} {np.abs(row - plain).mean():5.1f}")

# %% [markdown]
# ## The two prompts
#
# | prompt | is for |
# |---|---|
# | `a photo of a [identifier] [class]` | the instance images: the subject's name, and what kind of thing it is |
# | `a photo of a [class]` | the class images: the kind of thing alone (notebook 02) |
#
# The class word is no decoration. It lets the subject inherit all that the model knows of dogs: how they stand, how
# they look from behind, that they go to the beach. In the paper, subject fidelity falls from 0.74 to 0.30 without a class
# word, and to 0.45 with a wrong one (table 4, DINO).

# %%
# NBVAL_CHECK_OUTPUT
for identifier, class_word in (("sks", "dog"), ("ohwx", "teapot")):
    made = Concept.from_folder(None, identifier, class_word)
    print(made.instance_prompt, "|", made.class_prompt)

# %% [markdown]
# An instance prompt without the identifier would teach the subject to the class word, and every dog would become it. So
# that is an error, before anything is loaded:

# %%
# NBVAL_CHECK_OUTPUT
try:
    Concept.from_folder(None, "sks", "dog", instance_prompt="a photo of a dog")
except ValueError as error:
    print(error)

# %% [markdown]
# ## On your own
#
# 1. Put three to ten pictures of something of yours into a folder and look at the report and the squares. What would
#    you take again? (5 minutes)
# 2. Which of `hta`, `pjf`, `kvj` and `toy` are good identifiers on the miniature? (2 minutes)
# 3. Why is a mirrored copy of a photograph no new photograph, and when does it do harm? (2 minutes)
#
# <details><summary>Answers</summary>
#
# 1. `print(Concept.from_folder("my folder", "sks", "cup").report())`, then the two cells under *Exactly what the model
#    will see* with that concept.
# 2. `for word in ("hta", "pjf", "kvj", "toy"): print(word, token_report(components.tokenizer, word).verdict)`. The first
#    two are rare and whole; `kvj` splits; `toy` is a word that people use in prompts.
# 3. It shows nothing that the first does not. With writing on the subject, or an asymmetric one, it teaches what is
#    false: that is why `random_flip` is off by default.
# </details>
#
# ## In short
#
# - The pixels that training sees are squares of `resolution` pixels: look at them.
# - Vary everything but the subject.
# - The identifier is one rare token; the prompt carries it together with the class word.
#
# Next: [02 Prior preservation](02_prior_preservation.ipynb), or what the class images are for.
