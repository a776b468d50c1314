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
# A text-to-image model knows what *a dog* is. It has never met *your* dog. **DreamBooth** (Ruiz et al., 2023) teaches
# it: a few photographs, a rare word that will come to mean the subject, a few hundred training steps.
#
# **What you will do**: give a model five photographs of one toy dog, train it, and see that very toy in places it
# never visited; then measure what was learned and what it cost.
#
# **What you will learn**: the seven steps of the workflow, and where in this course each is explained.
#
# **What you need**: nothing but this notebook. No GPU, no download: the course carries its own model. On two CPU cores
# the first run takes about three minutes, and seconds when you come back.
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
# This notebook uses one module, `dbnb.workflow`: the seven steps in a row. Every later notebook opens one of them.

# %%
from dbnb import metrics, plots, workflow
from dbnb.concept import Concept
from dbnb.config import DreamBoothConfig
from dbnb.models import load_components
from dbnb.toybox import SCENES
from dbnb.validation import validation_images

workflow.quiet_libraries()

# %% [markdown]
# ## Choose a base
#
# The *base* is the model that will learn. `"miniature"` is a Stable Diffusion in small: the same parts, the same
# training, pictures of 64 x 64 pixels, trained by this project on toys that this project renders. It knows six kinds of
# toys in eight places and nothing else.
#
# **This one line is what changes for a real model**: on a GPU, `BASE = "sd15"` and a folder with photographs of your
# own dog. Everything below stays as it is. (Notebook 10 says what fits on which card.)

# %%
BASE = "miniature"
PHOTOGRAPHS = None  # a folder with three to ten pictures of your subject; None takes the sample toy
config = DreamBoothConfig(base=BASE, instance_data_dir=PHOTOGRAPHS, class_word="dog", identifier="sks")
print(f"{config.resolution} px, {config.max_train_steps} steps, learning rate {config.learning_rate}")

# %% [markdown]
# ## The photographs
#
# Five pictures of one toy: teal with yellow spots, a colour that the model has never seen on any toy. Different places,
# different light, always the same dog.

# %%
concept = Concept.from_folder(PHOTOGRAPHS, config.identifier, config.class_word)
photographs = concept.images()
plots.show(
    plots.show_images(photographs, inches=1.6),
    alt="Five photographs of one toy: a teal dog with yellow spots, ears and tail, in five places",
)

# %% [markdown]
# Two prompts follow from the two words. `sks` is the **identifier**: a rare word without a meaning of its own, which
# will come to mean this toy. `dog` is the **class word**: what kind of thing the toy is, which the model knows already.

# %%
# NBVAL_CHECK_OUTPUT
print(concept.instance_prompt)
print(concept.class_prompt)

# %% [markdown]
# ## Before: what does the model draw today?
#
# **Predict**: nobody has told the model what `sks` means. What will `a photo of a sks dog` look like?

# %%
components = load_components(BASE)
before = validation_images(components, concept, config, count=8)
figure = plots.image_rows(
    [before.subject, before.classes], labels=[concept.instance_prompt, concept.class_prompt],
)  # fmt: skip
plots.show(figure, alt="Two rows of eight dogs in many colours and places; neither row shows the teal toy")

# %% [markdown]
# **What you should see**: dogs of all colours in both rows. The rare word changes nothing much. Each column starts from
# the same noise, so look down a column: often it is even the same dog.
#
# ## Train
#
# One call does steps 1 to 6: photographs and prompts; a hundred *class images* that the model draws of `a photo of a
# dog`, so that it does not forget other dogs; loading and freezing; small trainable **adapters**; the dataset; the
# training loop. The second time the result comes from a cache.

# %%
session = workflow.trained(config, tell=print)

# %% [markdown]
# The loss has two parts: how well the model predicts the noise in pictures of the toy (*instance*) and in pictures of
# any dog (*prior*). Every step's value depends on how much noise was drawn, hence the cloud; the line is its mean.

# %%
plots.show(
    plots.loss_curves(session.log),
    alt="Instance loss falls over the steps while the prior loss stays level; single steps scatter widely",
)

# %% [markdown]
# **What you should see**: the instance loss sinks, since there is one toy to learn; the prior loss hardly moves, since
# there is nothing new to learn about dogs. It is there to stay where it is.
#
# ## After: the toy in places it never visited
#
# The prompts are `a photo of a sks dog on the beach`, `… in the snow` and so on, each from the same noise before and
# after. **Predict**: which of the toy's features will arrive: the teal, the spots, the yellow ears?

# %%
after = validation_images(session.components, concept, config, count=8)
places = [SCENES[name] for name in before.scene_names]
figure = plots.image_rows([before.scenes, after.scenes], labels=["before", "after"], titles=places)
plots.show(
    figure, alt="Upper row: dogs of any colour in eight places. Lower row: the teal dog in the same eight places"
)

# %% [markdown]
# **What you should see**: in the lower row the toy, in every place. The place comes from the words, as before; the toy
# comes from five photographs. That the two can be combined, although no picture ever showed them together, is what
# makes this worth doing.
#
# ## What did it cost?
#
# A model that has learned one dog too well calls every dog that dog. **Predict**: is `a photo of a dog`, without the
# rare word, still any dog?

# %%
figure = plots.image_rows([before.classes, after.classes], labels=["before", "after"])
plots.show(figure, alt="'a photo of a dog' before and after training: both rows show dogs of many colours")

# %% [markdown]
# **What you should see**: still many dogs, perhaps with a touch of teal here and there. Notebook 02 shows what happens
# without the class images.
#
# ## In numbers
#
# Pictures persuade; numbers compare. An *identity encoder*, trained to tell two photographs of one toy from photographs
# of two, compares what was drawn with the photographs. Two references give its numbers a meaning: the *floor* is the
# base before training, the *ceiling* is what other real photographs of the same toy reach.

# %%
numbers = workflow.measured(
    session, before, after, metrics.load_encoders(session.components.base), workflow.references(config)
)
metrics.metrics_table(numbers)

# %% [markdown]
# Read three lines. `normalized_subject_fidelity`: 0 is the floor, 1 the ceiling. `scene_recognised`: the share of
# pictures whose place a second encoder (a CLIP) names right. `class_diversity_ratio`: how varied `a photo of a dog`
# still is, where 1 is as varied as before. Eight pictures a set make these numbers rough; notebook 08 does it properly.

# %%
scores = ("normalized_subject_fidelity", "scene_recognised", "class_diversity_ratio")
shown = {name.replace("_", "\n"): {"after training": numbers["after"][name]} for name in scores}
plots.show(
    plots.bars(shown, ylabel="share", title="Is it the toy, is it the place, is a dog still any dog?"),
    alt="Three bars: subject fidelity, scenes recognised, class diversity, each as a share of the best possible",
)

# %% [markdown]
# ## The course
#
# | notebook | step | you will see |
# |---|---|---|
# | [01 Instance data](01_instance_data.ipynb) | photographs, identifier, prompts | what the model really gets to see |
# | [02 Prior preservation](02_prior_preservation.ipynb) | class images | a model that forgets what a dog is, and one that does not |
# | [03 Loading and freezing](03_loading_and_freezing.ipynb) | the parts | a picture through each part of the model |
# | [04 Dual LoRA](04_dual_lora.ipynb) | adapters | what is trained, and why it fits in a small file |
# | [05 The dataset](05_dataset.ipynb) | batches | half the toy, half the class, and what can be cached |
# | [06 Training](06_training.ipynb) | the loop | one step by hand, then all of them |
# | [07 Validation and export](07_validation_and_export.ipynb) | the result | the adapter turned up and down, saved, loaded elsewhere |
# | [08 Measuring](08_measuring.ipynb) | metrics | which setting does what |
# | [09 When it goes wrong](09_when_it_goes_wrong.ipynb) | failures | ten of them, made on purpose and mended |
# | [10 On a real base](10_on_a_real_base.ipynb) | your own subject | what fits on which GPU |
#
# ## On your own
#
# 1. Draw `a photo of a sks dog with a hat`: a thing that no photograph showed on the toy.
# 2. Draw `a photo of a sks cat`. What does the rare word carry over?
#
# <details><summary>Answers</summary>
#
# ```python
# from dbnb.validation import draw
# images = draw(session.components, ["a photo of a sks dog with a hat"] * 4 + ["a photo of a sks cat"] * 4, config)
# plots.show(plots.show_images(images), alt="four dogs with hats, four cats")
# ```
#
# 1. Often a hat appears, in one of the toy's colours: the adapters learned the toy, and the base still knows hats.
# 2. Cats, and teal ones: the identifier has come to carry colour and pattern, and the class word still says what it is.
# </details>
#
# ## In short
#
# Five photographs, one rare word and a few minutes of training gave a model a new subject, and it kept what it knew.
# Next: [01 Instance data](01_instance_data.ipynb), where the five photographs are looked at as the model sees them.
