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
# [identifier](../docs/glossary.md#identifier), and write the two prompts.
#
# **What you will learn**: what makes a good set of photographs; what a *rare identifier* is and how to check whether a
# word is one; why a folder that looks fine in a file browser can still be bad. Afterwards you can prepare a folder of
# your own and find its faults before any training.
#
# **What you need**: notebook [00](00_start_here.ipynb) for the overview. About twenty seconds on two CPU cores.
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
# The new module is `dbnb.concept`, which makes a `Concept` of photographs and words.

# %%
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw

from dbnb import plots, workflow
from dbnb.concept import SAMPLE_DIR, Concept
from dbnb.config import DreamBoothConfig
from dbnb.dataset import DreamBoothDataset
from dbnb.models import encode_prompts, load_components
from dbnb.pictures import inspect_images, load_image
from dbnb.tables import Table
from dbnb.tokens import token_report
from dbnb.validation import draw

workflow.quiet_libraries()
config = DreamBoothConfig()

# %%
plots.you_are_here("01")

# %% [markdown]
# ## The photographs
#
# Three to ten pictures are enough; the DreamBooth paper used three to five. What matters is what they have in common:
# **everything that is the same in all of them becomes part of the subject**.

# %%
concept = Concept.from_folder(None, config.identifier, config.class_word, resolution=config.resolution)
photographs = concept.images()
plots.show(
    plots.show_images(
        photographs,
        titles=[path.name for path in concept.paths],
        inches=1.6,
        title="One toy, five places",
    ),
    alt="Five photographs of a teal dog with yellow spots, each in another place",
)

# %% [markdown]
# A good set varies in everything except the subject: place, light, viewpoint, distance. This one varies in place and
# light, and a little in viewpoint and distance, because all toys of the miniature's world are seen from nearly the
# same side. Photograph your own subject from all sides. Five pictures on the same sofa teach the sofa as well.
#
# ## A folder from real life
#
# Photographs come from phones, messaging apps and screenshots. Let us make a folder with the problems of such folders:
# a picture that is only *marked* as rotated, a copy under another name, a file that was cut off during transfer, a
# thumbnail, a small picture, and a file that a file browser left behind.

# %%
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
first = load_image(SAMPLE_DIR / "photos" / "01.png")
turned = Image.Exif()
turned[0x0112] = 6  # "turn by a quarter": the pixels are stored lying down
first.rotate(90, expand=True).save(folder / "telephone.jpg", exif=turned)
load_image(SAMPLE_DIR / "photos" / "02.png").save(folder / "good.png")
(folder / "good (1).png").write_bytes((folder / "good.png").read_bytes())
sent = (folder / "telephone.jpg").read_bytes()
(folder / "cut off.jpg").write_bytes(sent[: len(sent) // 2])
first.resize((12, 12)).save(folder / "thumbnail.png")
first.resize((48, 48)).save(folder / "small.png")
_ = (folder / "Thumbs.db").write_bytes(b"left by a file browser")

# %% [markdown]
# One more problem cannot be seen. Somebody cut an oval around the dog, and everything outside it is now *transparent*.
# But a transparent pixel still has a colour in the file; programs just do not show it. Here that hidden colour is a
# loud pink.

# %%
dog = load_image(SAMPLE_DIR / "photos" / "03.png")
opaque = Image.new("L", dog.size, 0)
ImageDraw.Draw(opaque).ellipse((2, 15, 254, 246), fill=255)  # white: keep; black: transparent
cut_out = Image.new("RGB", dog.size, "deeppink")
cut_out.paste(dog, mask=opaque)
cut_out.putalpha(opaque)
cut_out.save(folder / "cut-out.png")
print(len(list(folder.iterdir())), "files")

# %% [markdown]
# **Predict**: how many of them will be used?

# %%
# NBVAL_CHECK_OUTPUT
paths, notes = inspect_images(folder, resolution=128)
for note in notes:
    print(f"{note.name:14} {'used' if note.used else 'not used'}")
print(len(paths), "of", len(notes), "are used")

# %% [markdown]
# Nothing was skipped silently. These are the reasons; some are in the words of Pillow, which reads the pictures.
# (`small.png` and `telephone.jpg` are the same photograph: near copies are used, but they are reported.)

# %%
Table({"file": note.name, "size": note.size, "note": note.note} for note in notes)

# %% [markdown]
# Two of the files that are used had to be corrected while they were loaded. **Predict**: what would a program see that
# takes the stored pixels as they are?

# %%
troubled = [folder / "telephone.jpg", folder / "cut-out.png"]
stored = [Image.open(path).convert("RGB") for path in troubled]
plots.show(
    plots.image_rows(
        [stored, [load_image(path) for path in troubled]],
        labels=["the stored pixels", "as load_image gives them"],
        titles=["marked as rotated", "transparent"],
        inches=1.6,
        title="What is stored is not what you see",
    ),
    alt="Above, as stored: the dog on its side, and a dog on loud pink. Below, as loaded: upright, and on white",
)

# %% [markdown]
# **What you should see**: above, a dog on its side and a dog on pink; training on the upper row would teach both.
# Below, the dogs are upright, and the transparent background is white.
#
# ## Exactly what the model will see
#
# Training does not see your photographs. It sees squares of `resolution` pixels cut out of them, with values between
# -1 and 1. Look at these squares before every training: cut-off heads, rotated pictures and lost details can be seen
# here before they cost you an hour.

# %%
# NBVAL_CHECK_OUTPUT
dataset = DreamBoothDataset(concept.paths, concept.instance_prompt, size=config.resolution)
seen = [dataset.pixels("instance", index, flip=False) for index in range(len(concept.paths))]
assert all(square.abs().max() <= 1.0 for square in seen)
print("photograph:", photographs[0].size, "| what training sees:", tuple(seen[0].shape))

# %%
squares = VaeImageProcessor().postprocess(torch.stack(seen))
plots.show(
    plots.image_rows(
        [photographs, squares],
        labels=["photograph", "what training sees"],
        inches=1.4,
        title="Half as wide, and the whole dog is in every square",
    ),
    alt="Upper row the photographs, lower row the same at the training resolution: the dog is whole in each",
)

# %% [markdown]
# Photographs that are not square are cropped: in the middle, or at a random place if `center_crop` is off. A long
# picture can lose its subject in this way; `inspect_images` warns where one side is more than three times the other.
# Here is a picture at that limit: the first photograph three times, side by side. **Predict**: which of the crops show
# one whole dog?

# %%
Image.fromarray(np.hstack([np.asarray(photographs[0])] * 3)).save(folder / "wide.png")
middle, anywhere = (
    DreamBoothDataset([folder / "wide.png"], "", size=128, center_crop=center_crop) for center_crop in (True, False)
)
pieces = [middle[0]["instance_pixels"], *(anywhere[number]["instance_pixels"] for number in range(5))]
plots.show(
    plots.show_images(
        VaeImageProcessor().postprocess(torch.stack(pieces)),
        inches=1.3,
        titles=["middle", *(f"random {number}" for number in range(5))],
        title="A random crop of a wide picture may cut the subject",
    ),
    alt="Six crops of one wide picture: the middle one shows the dog whole, random ones may cut it in two",
)

# %% [markdown]
# **What you should see**: the crop from the middle shows one whole dog. Some of the random crops cut off a part of the dog, and
# training would not complain. So crop wide photographs yourself, or use `center_crop` if the subject is in the middle.
#
# ## A toy of your own
#
# On the miniature the subject does not have to be the sample toy. Choose with the fields below (they need a live
# notebook), and the picture follows. `designer.photographs(folder)` writes five photographs to train on, in the five
# places of the sample toy.

# %%
from dbnb.widgets import ToyDesigner

designer = ToyDesigner(kind="dog", body="#8a5a2b", accent="white", pattern="spotted")
designer

# %%
own = Concept.from_folder(designer.photographs(folder / "mytoy"), "sks", "dog", resolution=config.resolution)
plots.show(
    plots.show_images(own.images(), inches=1.4, title="Another toy, in the same five places"),
    alt="Five photographs of a toy dog in the colours that were chosen",
)

# %% [markdown]
# ## Is this picture in the base's world?
#
# A base can learn a new toy because it knows toys. A few hundred steps cannot teach it something that is unlike all it
# has seen: five photographs of a real dog end as smears on the miniature. Two measurements tell before training
# whether a picture is in a base's world. How well does the *autoencoder* reproduce it? (PSNR, in decibels: 10 dB more
# means a tenth of the squared error.) And how well does the base *denoise* it when it is told only `a photo of a dog`?
# Both are compared with class images, which the base drew itself (notebook 02). **Predict**: which of these three are
# in its world: the sample's first photograph, one of your toy, a picture of noise?

# %%
from dbnb.fit import base_fit
from dbnb.prior import class_images

components = load_components(config.base)
drawn = class_images(components, concept.class_prompt, 16, config.sampling).paths
rng = np.random.default_rng(0)
Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(folder / "noise.png")
for name, one in (("sample.png", concept), ("mytoy.png", own)):
    load_image(one.paths[0]).save(folder / name)
three = [folder / name for name in ("sample.png", "mytoy.png", "noise.png")]
fit = base_fit(components, three, drawn, concept.class_prompt, resolution=config.resolution)
fit

# %%
# NBVAL_CHECK_OUTPUT
print(fit.remark())

# %% [markdown]
# **What you should see**: the two renders have a higher loss and a lower PSNR than the base's own drawings, which came
# out of this very decoder and so hold nothing that it cannot paint. The noise is far beyond both. The
# distance is given in standard deviations of the class images, and beyond 8 a run prints this sentence. Real
# photographs are far outside as well (try one): they need another base, such as `sd15`.
#
# ## The identifier
#
# A *[tokenizer](../docs/glossary.md#tokenizer)* splits a prompt into *[tokens](../docs/glossary.md#token)*, words or
# pieces of words from a fixed list, and gives the model their numbers in that list.
#
# The subject needs a name that means nothing yet. A word that means something, such as `red`, can be learned just as
# well (notebook 08 measures it), but it brings its old meaning along at first, and after training the base has lost
# its word for red things. A long random string is split into pieces that occur in other words too. So DreamBooth uses
# a **[rare token](../docs/glossary.md#rare-token)**: a short string that the tokenizer keeps whole and that hardly
# occurred in the model's training. In Stable Diffusion even `sks` has a meaning: it is the name of a rifle, and rifles
# do appear in pictures. That is why many people choose another rare token there, such as `ohwx`.
#
# A tokenizer that was learned by merging frequent pairs lists common words first: the higher the number, the rarer the
# token. `token_report` uses this as a rule of thumb: a good identifier is one token, with a number near the end of the
# list.

# %%
# NBVAL_CHECK_OUTPUT
reports = [
    token_report(components.tokenizer, word) for word in ("dog", "red", "sks", "ohwx", "toy", "sparkle", "xqzwy7")
]
Table({"word": r.identifier, "tokens": " | ".join(r.tokens), "verdict": r.verdict} for r in reports)

# %%
# NBVAL_CHECK_OUTPUT
print(len(components.tokenizer), "tokens in all")
print("numbers:", {r.identifier: r.ids[0] for r in reports if len(r.ids) == 1})

# %% [markdown]
# `</w>` marks the end of a word. Two of the words are split into pieces; the others are one token each, and their
# numbers separate the common ones from the rare ones. It is peculiar to this base that so many words are whole: its
# tokenizer was made for the captions of the toy world, which have only a few dozen words, and six identifiers were
# added to it on purpose. None of them occurs in a caption that the UNet was trained on, so they mean nothing to the
# base. Some twenty other words that a learner may try, such as `toy`, were added as well.

# %%
# NBVAL_CHECK_OUTPUT
from dbnb.toybox import COLORS, KINDS, SCENES
from dbnb.toybox.captions import IDENTIFIERS

spoken = sorted({*KINDS, *COLORS, *" ".join(SCENES.values()).split(), "a", "photo", "of"})
whole = [word for word in (*spoken, *IDENTIFIERS) if len(token_report(components.tokenizer, word).ids) == 1]
assert len(whole) == len(spoken) + len(IDENTIFIERS)
print(f"{len(spoken)} of the captions' words and {len(IDENTIFIERS)} identifiers; kept whole: {len(whole)}")
print("identifiers:", ", ".join(IDENTIFIERS))

# %% [markdown]
# Another base splits the same words differently: Stable Diffusion has tens of thousands of tokens, and keeps many
# words whole that are split here. It also splits some that are whole here: of the six identifiers, `sks`, `ohwx` and
# `hta` are single rare tokens in Stable Diffusion 1.5, while `zwx`, `pjf` and `vqz` are split. So ask the tokenizer of
# *your* base, which is a small download of its own:
# `token_report(AutoTokenizer.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", subfolder="tokenizer"),
# "sks")`, with `AutoTokenizer` from `transformers`.
#
# What about `toy`? By its number it is as rare as the identifiers, and on this base that is true: the miniature's
# tokenizer has the word, but no caption of its training contains it. The rule of thumb counts what the model was told,
# not what you know. In Stable Diffusion, `toy` means toys.
#
# Try words of your own. (The field needs a live notebook; on a web page you see the first answer.)

# %%
from dbnb.widgets import identifier_explorer

identifier_explorer(components.tokenizer)

# %% [markdown]
# ## A vector of its own
#
# Every token has a vector, its row in the text encoder's *[embedding table](../docs/glossary.md#embedding-table)*.
# This is all that the text encoder knows about a token before it reads the rest of the prompt. An identifier needs a
# vector that no other token shares. If `sks` had the vector of `a`, no training could tell `a photo of sks dog` from
# `a photo of a dog`. The *[cosine](../docs/glossary.md#cosine)* between two vectors is 1 if they point in the same
# direction, and near 0 if they have nothing in common. **Predict**: which of these tokens are alike?

# %%
vectors = torch.nn.functional.normalize(components.text_encoder.get_input_embeddings().weight.detach(), dim=1)
number = {word: components.tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in (*IDENTIFIERS, *spoken)}
some = ["sks", "zwx", "ohwx", "dog", "cat", "red", "blue", "a"]
similarity = vectors[[number[word] for word in some]] @ vectors[[number[word] for word in some]].T
plots.show(
    plots.matrices(
        {"cosine": similarity.numpy()}, labels=some, inches=3.4, title="Each identifier has a direction of its own"
    ),
    alt="A matrix of cosines between three identifiers and five words: 1 on the diagonal, small values elsewhere",
)

# %%
# NBVAL_CHECK_OUTPUT
cosines = (vectors[[number[word] for word in IDENTIFIERS]] @ vectors.T).abs()
cosines[range(len(IDENTIFIERS)), [number[word] for word in IDENTIFIERS]] = 0.0  # each with itself
assert cosines.max() < 0.5, cosines.max()
print(f"largest cosine between an identifier and any other of the {len(vectors)} tokens: {cosines.max():.1f}")

# %% [markdown]
# **What you should see**: strong colour on the diagonal only. The identifiers are as far from each other as they are
# from the words.
#
# Does such a vector also have an effect? The UNet never sees the embedding table. It sees the text encoder's *[hidden
# states](../docs/glossary.md#hidden-state)*, one vector for each token of the prompt, after three layers in which each
# token can take up information from the tokens before it. The bars show how far two of these states move when one word
# is put before `dog`: the state of `dog`, and that of the last position. The distance is from the states of `a photo
# of a dog`. **Predict**: will an identifier move them as far as a colour?

# %%
added = ["sks", "zwx", "red", "blue", "spotted"]
sentences = ["a photo of a dog", *(f"a photo of a {word} dog" for word in added)]
with torch.no_grad():
    states = encode_prompts(components, sentences)
places = [components.tokenizer(sentence).input_ids.index(number["dog"]) for sentence in sentences]
noun, end = states[range(len(sentences)), places], states[:, -1]
moved = {
    word: {"state of 'dog'": (noun[i] - noun[0]).norm().item(), "last state": (end[i] - end[0]).norm().item()}
    for i, word in enumerate(added, start=1)
}
plots.show(
    plots.bars(moved, ylabel="distance", title="An unknown name moves the states even further than a colour does"),
    alt="Pairs of bars for two identifiers, two colours and a pattern: the identifiers move the hidden states furthest",
)
print(f"for comparison, a hidden state is about {states.norm(dim=-1).mean():.1f} long")

# %%
# NBVAL_CHECK_OUTPUT
assert min(moved["sks"].values()) > 0.5 * min(moved["red"].values()), moved
print("'sks' moves both states at least half as far as 'red' does")

# %% [markdown]
# **What you should see**: the identifiers' bars are the highest. The state of `dog` moves at least half as far again as
# for a known word, and the last state about twice as far or more. The second bar matters as much as the first: the UNet
# looks at all positions, and most positions of a short prompt come after its last word. A text encoder that ignores an
# unknown word gives the subject and the class the same states, and then the adapters on the UNet cannot tell them
# apart. Stable Diffusion's text encoder, a CLIP, has met nearly all of its tokens in captions from the web. The
# miniature's text encoder learned to pass on unknown names in a short training stage of its own, with a new random
# vector for the identifier at every step.
#
# ## Is the word really empty?
#
# So the text encoder passes the word on. Does the base also draw something particular for it? Here are three prompts,
# each column from the same noise. **Predict**: what will the pictures of each row have in common?

# %%
prompts = ["a photo of a dog", "a photo of sks dog", "a photo of a red dog"]
rows = [draw(components, [prompt] * 8, config.sampling) for prompt in prompts]
plots.show(
    plots.image_rows(rows, labels=prompts, title="'sks' has no colour of its own, 'red' has"),
    alt="The first two rows show dogs of many colours; the third shows red dogs only",
)

# %% [markdown]
# **What you should see**: `red` changes every dog in the same way. `sks` does not: some pictures differ from those
# above them, since the prompt is not quite the same, but the dogs of the second row have nothing in common that those
# of the first row lack. That is what *empty* means: the word is passed on, and has no meaning yet. Training gives it
# one. (Notebook 03 measures how little of the word reaches the UNet's answer before training.)
#
# Counting is better than looking. The miniature comes with a *judge*, a small network that names the colour of a toy.
# How many dogs of each colour does it see in each row?

# %%
from dbnb.miniature.data import ATTRIBUTES, COLOR_NAMES
from dbnb.miniature.evaluate import Judge

judge, column = Judge(components.base), list(ATTRIBUTES).index("body")
found = [judge(np.stack([np.asarray(picture) for picture in row]))[:, column] for row in rows]
counts = [{name: int((numbers == i).sum()) for i, name in enumerate(COLOR_NAMES)} for numbers in found]
Table(
    {"prompt": p} | {name: str(n or "") for name, n in count.items()} for p, count in zip(prompts, counts, strict=True)
)

# %% [markdown]
# If `sks` had a colour, all dogs of its row would be counted in one column. As a check that can fail: `sks` dogs have
# at least three colours, and most `red` dogs are red. This is why `red` would be a poor identifier: a training that
# gives it a new meaning takes the old one away, and afterwards the base has no word for red dogs (notebook 09, entry
# 14).

# %%
# NBVAL_CHECK_OUTPUT
_, of_sks, of_red = counts
assert sum(n > 0 for n in of_sks.values()) >= 3, of_sks
assert of_red["red"] >= 5, of_red
print("'sks' is empty, 'red' is not")

# %% [markdown]
# ## The two prompts
#
# | prompt | is for |
# |---|---|
# | `a photo of [identifier] [class]` | the [instance images](../docs/glossary.md#instance-image): the subject's name, and what kind of thing it is |
# | `a photo of a [class]` | the class images: the kind of thing alone (notebook 02) |
#
# As in the paper, the identifier has no article: it is used like a name. (`instance_prompt` takes any other sentence
# that contains the identifier. Notebook 07 asks for the subject in twelve sentences that training never used.)
#
# The [class word](../docs/glossary.md#class-word) matters. It lets the subject inherit everything that the model knows
# about dogs: how they stand, how they look from behind, that they go to the beach. In the paper, subject fidelity
# falls from 0.74 to 0.30 without a class word, and to 0.45 with a wrong one (table 4; the pictures are compared by the
# image encoder DINO).

# %%
# NBVAL_CHECK_OUTPUT
for identifier, class_word in (("sks", "dog"), ("ohwx", "teapot")):
    made = Concept.from_folder(None, identifier, class_word)
    print(made.instance_prompt, "|", made.class_prompt)

# %% [markdown]
# An [instance prompt](../docs/glossary.md#instance-prompt) without the identifier would attach the subject to the
# class word, and every dog would become the subject. So this is an error, raised before anything is loaded:

# %%
# NBVAL_CHECK_OUTPUT
try:
    Concept.from_folder(None, "sks", "dog", instance_prompt="a photo of a dog")
except ValueError as error:
    print(error)

# %% [markdown]
# The folder with the problems is no longer needed:

# %%
temporary.cleanup()

# %% [markdown]
# ## Exercises
#
# ### Exercise A: the two prompts (5 minutes)
#
# Write the function that makes the instance prompt and the [class prompt](../docs/glossary.md#class-prompt) from an
# identifier and a class word. Other people train on elephants and umbrellas.

# %%
from dbnb.exercises import check_01a


def prompts(identifier: str, class_word: str) -> tuple[str, str]:
    """The instance prompt and the class prompt, in this order."""
    ...


check_01a(prompts)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The identifier is used like a name: nobody says *a Bella*.
# </details>
#
# <details><summary>Hint 2</summary>
#
# The class prompt has an article, and before a vowel it is *an*. Looking at the first letter is good enough here.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def prompts(identifier, class_word):
#     article = "an" if class_word[0] in "aeiou" else "a"
#     return f"a photo of {identifier} {class_word}", f"a photo of {article} {class_word}"
# ```
# </details>
#
# ### Exercise B: your own token report (8 minutes)
#
# Write the rule of thumb that `token_report` uses. A word is `"split"` when the tokenizer cuts it into several tokens,
# `"rare"` when it is one token in the last tenth of the ordinary tokens' numbers, and `"common"` otherwise.
# `tokenizer(word).input_ids` are the numbers of its tokens, `tokenizer.all_special_ids` those of the special tokens
# (start, end, padding), and `tokenizer.get_vocab()` is the whole list, token to number.

# %%
from dbnb.exercises import check_01b


def verdict(tokenizer, word: str) -> str:
    """Whether a word would be a good identifier: "rare", or else "common" or "split"."""
    ...


check_01b(verdict)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Print `components.tokenizer("dog").input_ids`. One word, three numbers: which of them stand for the word?
# </details>
#
# <details><summary>Hint 2</summary>
#
# The last tenth begins at nine tenths of the highest number. Which tokens must you leave out when you look for that
# number?
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def verdict(tokenizer, word):
#     special = set(tokenizer.all_special_ids)
#     ids = [number for number in tokenizer(word).input_ids if number not in special]
#     if len(ids) > 1:
#         return "split"
#     highest = max(number for number in tokenizer.get_vocab().values() if number not in special)
#     return "rare" if ids[0] > 0.9 * highest else "common"
# ```
# </details>

# %% [markdown]
# ## On your own
#
# 1. Put three to ten pictures of something of yours into a folder and look at the report and the squares. Which
#    pictures would you take again? (5 minutes)
# 2. Which of `hta`, `pjf`, `kvj` and `toy` are good identifiers on the miniature? (2 minutes)
# 3. Why is a mirrored copy not a new photograph, and when does it do harm? (2 minutes)
#
# <details><summary>Answers</summary>
#
# 1. With the folder's name in place of `None`, which takes the sample:
#
# ```python
# mine = Concept.from_folder(None, "sks", "cup", resolution=config.resolution)
# print(mine.report())
# data = DreamBoothDataset(mine.paths, mine.instance_prompt, size=config.resolution)
# mine_seen = torch.stack([data.pixels("instance", i, flip=False) for i in range(len(mine.paths))])
# plots.show(plots.show_images(VaeImageProcessor().postprocess(mine_seen)), alt="the squares that training would see")
# ```
#
# 2. `hta` and `pjf` are two of the six identifiers: whole and rare. `kvj` is split into pieces. `toy` is whole and, on
#    this base, rare as well: it would work here, but not on Stable Diffusion, where it means toys.
#
# ```python
# for word in ("hta", "pjf", "kvj", "toy"):
#     print(f"{word:4} {token_report(components.tokenizer, word).verdict}")
# ```
#
# 3. It shows nothing that the original does not show. If the subject is asymmetric or has writing on it, the copy
#    teaches something false. That is why `random_flip` is off by default.
# </details>
#
# ## Quiz
#
# Five questions about *why*. Choose an answer, then open it: it says whether it is right, and why.
#
# **1. Why should the photographs show the subject in different places?**
#
# <details><summary>A. What all photographs have in common is learned as a part of the subject.</summary>
#
# Right: five pictures on one sofa teach the sofa too; in different places only the subject is in common.
# </details>
#
# <details><summary>B. The model needs one photograph for each place that it is to draw later.</summary>
#
# No: places come from the words of the prompt; on the moon no photograph was ever taken.
# </details>
#
# <details><summary>C. Different places give the pictures different sizes, which training needs.</summary>
#
# No: all pictures are cut to squares of the same size before training sees them.
# </details>
#
# **2. Why does an article stand before the class word but not before the identifier?**
#
# <details><summary>A. An article is a token of its own, and the tokenizer would drop it before <code>sks</code>.</summary>
#
# No: the tokenizer keeps it; a prompt with the article would be another prompt and work too.
# </details>
#
# <details><summary>B. The identifier is used like a name, and nobody puts an article before a name.</summary>
#
# Right: `a photo of sks dog` is the pattern of the paper; the class prompt is an ordinary caption.
# </details>
#
# <details><summary>C. The two prompts need the same number of tokens so that they can share a batch.</summary>
#
# No: prompts are padded to one fixed length, whatever number of words they have.
# </details>
#
# **3. Why would an identifier with the embedding vector of `a` be a bad one?**
#
# <details><summary>A. The UNet reads the embedding table and finds the same row there twice.</summary>
#
# No: the UNet never sees the table, only the hidden states that the text encoder makes of it.
# </details>
#
# <details><summary>B. The tokenizer would cut such a word into several pieces and lose some of them.</summary>
#
# No: how a word is cut depends on its letters, not on the vector that its token has.
# </details>
#
# <details><summary>C. The text encoder could not tell the instance prompt from the class prompt.</summary>
#
# Right: equal vectors make equal hidden states, and then no adapter can tell the two prompts apart.
# </details>
#
# **4. `sks` moves the hidden states further than `red`. Why does the base still draw no particular dog for it?**
#
# <details><summary>A. Its vector is too short to have any influence on the pictures that are drawn.</summary>
#
# No: it moves the states further than a colour does, so it is not too short to have an effect.
# </details>
#
# <details><summary>B. The tokenizer replaces it by <code>dog</code> before the text encoder gets to see it.</summary>
#
# No: it is one of the tokenizer's own tokens, with its own number, and is passed on.
# </details>
#
# <details><summary>C. The text encoder passes it on, but the UNet has not learned what to draw for it.</summary>
#
# Right: passed on and empty is what an identifier should be; training gives it its meaning.
# </details>
#
# **5. Why does the word `toy` count as rare on this base, although everybody knows it?**
#
# <details><summary>A. Its number in the list is high, and no caption of this base has ever used it.</summary>
#
# Right: what matters is what the model was told; Stable Diffusion was told about toys.
# </details>
#
# <details><summary>B. The word is shorter than the others, and short words have the highest numbers.</summary>
#
# No: `dog` and `red` are as short, and their numbers are those of common words.
# </details>
#
# <details><summary>C. Every caption of this base shows toys, and words in every caption count as rare.</summary>
#
# No: a word in every caption would be the most common one; the captions say `dog` or `car`.
# </details>
#
# ## In short
#
# - The pixels that training sees are squares of `resolution` pixels: look at them.
# - Vary everything but the subject.
# - The identifier is one rare token with a vector of its own; the prompt carries it together with the class word.
# - A good identifier reaches the text encoder's states and means nothing to the base.
#
# Next: [02 Prior preservation](02_prior_preservation.ipynb), which shows what the class images are for.
