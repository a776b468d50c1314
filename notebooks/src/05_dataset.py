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
# **What you will do**: take apart one [batch](../docs/glossary.md#batch), see how it follows from the number of the
# step alone, and measure what is gained by computing things once.
#
# **What you will learn**: how instance and class images are paired; crops and flips; which results can be kept
# between steps, when, and what that saves; how captions and masks keep the background out of the identifier.
# Afterwards you can rebuild any step of any run on its own.
#
# **What you need**: notebooks [01](01_instance_data.ipynb) to [03](03_loading_and_freezing.ipynb). About a minute and a half on
# two CPU cores, most of it for two short trainings; half a minute later, when their results are kept.
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
# The new module is `dbnb.dataset`.

# %%
import collections
import tempfile
import time
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps

from dbnb import plots, workflow
from dbnb.adapters import add_adapters
from dbnb.concept import Concept
from dbnb.config import DreamBoothConfig
from dbnb.dataset import CROP, DreamBoothDataset, cache_latents, seeded
from dbnb.models import load_components
from dbnb.prior import class_images
from dbnb.training import batch_at, precompute_embeds, training_step

workflow.quiet_libraries()
plots.you_are_here("05")

# %% [markdown]
# Steps 1 to 3, as the notebooks before this one did them:

# %%
config = DreamBoothConfig()
concept = Concept.from_folder(None, config.identifier, config.class_word, resolution=config.resolution)
components = load_components(config.base)
prior = class_images(components, concept.class_prompt, config.num_class_images, config.sampling)
print(f"{len(concept.paths)} instance images, {len(prior.paths)} class images: {prior.decision}")

# %% [markdown]
# ## Pairs
#
# A sample is a *pair*: one picture of the subject with its prompt, and one of the class with its own.

# %%
# NBVAL_CHECK_OUTPUT
dataset = DreamBoothDataset(
    concept.paths,
    concept.instance_prompt,
    class_paths=prior.paths,
    class_prompt=concept.class_prompt,
    size=config.resolution,
    seed=config.seed,
)
for key, value in dataset[0].items():
    print(f"{key:16}", tuple(value.shape) if isinstance(value, torch.Tensor) else value)

# %% [markdown]
# Few photographs on one side, many class images on the other. **Predict**: in the first ten samples, how often does each
# photograph occur, and how often the same class image?

# %%
# NBVAL_CHECK_OUTPUT
drawn = {half: [dataset.draw(half, n)[0] for n in range(10)] for half in dataset.halves}
print("photographs, how often each:", sorted(collections.Counter(drawn["instance"]).items()))
print("class images, how many different:", len(set(drawn["class"])))

# %%
rows = [[dataset.images[half][index] for index in indices] for half, indices in drawn.items()]
plots.show(
    plots.image_rows(
        rows,
        labels=list(drawn),
        titles=[f"sample {n}" for n in range(10)],
        inches=0.9,
        title=f"{len(concept.paths)} photographs come round again, each with another class image",
    ),
    alt="Ten pairs: above, the five photographs twice, in two orders; below, ten different class images",
)

# %% [markdown]
# **What you should see**: each photograph twice, once in samples 0 to 4, once in 5 to 9, in another order. Every image is
# seen once before any is seen again, and the order is shuffled again each time.
#
# ## The batch
#
# `batch_at` picks the samples of one step, and `collate_fn` lays them side by side: **all instances first, all class
# images second**. The loss later cuts the batch in the middle. If the pictures are interleaved by mistake while the
# prompts stay grouped, half of the subject's pictures are trained under the class prompt, and half of the class images
# under the subject's, without any error. Notebook 09 does it on purpose.
#
# Why one batch, and not a step for the toy and then a step for the class? Because a step follows one gradient. In a joint
# batch that gradient is a compromise: where the toy and the class pull in opposite directions, a part of both pulls cancels
# out. Steps in turn may first move the class word towards the toy and then back again, and AdamW's averages, which remember
# the last steps, mix the two anyway. One batch of eight is also cheaper than two of four.

# %%
# NBVAL_CHECK_OUTPUT
batch = batch_at(dataset, number=0, batch_size=config.train_batch_size)
print("pixel_values:", tuple(batch["pixel_values"].shape), "| halves:", batch["halves"])
for position, prompt in enumerate(batch["prompts"]):
    print(position, prompt)


# %%
def picture(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> a picture."""
    return VaeImageProcessor().postprocess(pixels[None])[0]


rows = [[picture(pixels) for pixels in half] for half in batch["pixel_values"].chunk(batch["halves"])]
labels = [f"instance half:\n{batch['prompts'][0]}", f"class half:\n{batch['prompts'][-1]}"]
plots.show(
    plots.image_rows(rows, labels=labels, inches=1.4, title="A batch: the toy first, the class second"),
    alt="A batch of eight: four photographs of the teal toy above, four drawn dogs of other colours below",
)

# %% [markdown]
# `train_batch_size` counts pairs: twice as many pictures go through the model. That is how diffusers counts, too.
#
# ## Crops and flips
#
# A photograph is scaled, up or down, until its shorter side has `resolution` pixels. Of the longer side, either the
# middle is kept or, each time, a random section. Mirroring half of the pictures is an option as well. Both make more of
# five pictures, and both can teach the model something wrong.
#
# Our photographs are square. So, to have something to cut, here they are as a wide camera would have taken them:

# %%
folder = tempfile.TemporaryDirectory()
wide_paths = [Path(folder.name, path.name) for path in concept.paths]
for path, photograph in zip(wide_paths, concept.images(), strict=True):
    photograph.crop((0, 40, 256, 232)).save(path)
one = DreamBoothDataset(wide_paths[:1], concept.instance_prompt, size=128, center_crop=False, random_flip=True)
photograph = one.images["instance"][0]
print("made smaller:", photograph.size)


# %% [markdown]
# Where a crop begins and whether it is mirrored are two draws, each from a generator of its own that starts from the run's
# [seed](../docs/glossary.md#seed), the draw's role, and the number of the sample:


# %%
def place(n: int) -> tuple[int, bool]:
    """The pixel where sample n's crop begins, and whether it is mirrored."""
    room = photograph.width - one.size + 1
    return int(torch.randint(room, (), generator=seeded(one.seed, CROP, 0, n))), one.draw("instance", n)[1]


crops = [picture(one[n]["instance_pixels"]) for n in range(6)]
titles = [f"from {left}" + (",\nmirrored" if mirrored else "") for left, mirrored in map(place, range(6))]
plots.show(
    plots.show_images(
        [photograph, *crops], titles=["the photograph", *titles], title="One photograph, six samples, no two alike"
    ),
    alt="One wide photograph, and six square crops of it from different places, some mirrored",
)

# %% [markdown]
# The titles were computed by `place`, the crops by the dataset. Do they agree? And are half of all samples mirrored?
# Counting is better than looking:


# %%
# NBVAL_CHECK_OUTPUT
def by_hand(n: int) -> Image.Image:
    left, mirrored = place(n)
    crop = photograph.crop((left, 0, left + one.size, one.size))
    return ImageOps.mirror(crop) if mirrored else crop


print("the crops are those draws:", all(by_hand(n) == crops[n] for n in range(6)))
print(f"mirrored, of a thousand: {sum(one.draw('instance', n)[1] for n in range(1000)) / 1000:.1f}")

# %% [markdown]
# Look at the crops again: in one the muzzle is cut, and in another it touches the edge. For a rendered toy we know
# exactly which pixels are the toy (`toybox.mask`), so we can count how often that happens. **Predict**: in how many of a
# thousand random crops is more than a hundredth of the dog missing, and in how many more than a tenth? And in a panorama
# twice as wide as high, with the same dog in its middle?

# %%
import numpy as np

from dbnb import toybox
from dbnb.toybox.sample import PICTURES, SAMPLE_TOY

whole_mask = toybox.mask(SAMPLE_TOY, seed=PICTURES["photos"][0][1], size=256).crop((0, 40, 256, 232))
columns = np.asarray(whole_mask.resize(photograph.size, Image.Resampling.BOX), dtype=float).sum(axis=0)


def missing(columns: np.ndarray) -> np.ndarray:
    """The share of the toy's pixels that is missing, for each of a thousand random crops."""
    room = len(columns) - one.size + 1
    starts = [int(torch.randint(room, (), generator=seeded(one.seed, CROP, 0, n))) for n in range(1000)]
    return np.array([1 - columns[start : start + one.size].sum() / columns.sum() for start in starts])


# %%
for name, lost in (
    ("this photograph", missing(columns)),
    ("a panorama", missing(np.pad(columns, photograph.height - photograph.width // 2))),
):
    print(
        f"{name}: over 1 % missing in {(lost > 0.01).mean():.0%} of the crops, over 10 % in {(lost > 0.1).mean():.0%}"
    )

# %% [markdown]
# The wider the picture, the more often the dog is cut, and no message says so. A cut dog is trained under the same prompt
# as a whole one, and so `sks dog` comes to mean half a dog, too. That is why `center_crop` is on by default here. In
# diffusers' script it is off, and crops are random unless you ask for it. The safest way is to crop your photographs
# yourself, around the subject.

# %% [markdown]
# ## A step is a number
#
# Which pictures are drawn, how they are cropped and whether they are mirrored: all of it is computed from the seed and the
# number of the sample, and from nothing else. No generator carries a state from one step to the next. **Predict**: if step 137
# is built twice, the second time by a dataset that has never been used, will the two be equal?

# %%
# NBVAL_CHECK_OUTPUT
options = dict(class_paths=prior.paths, class_prompt=concept.class_prompt, center_crop=False, random_flip=True)
used, fresh = (DreamBoothDataset(wide_paths, concept.instance_prompt, **options) for _ in range(2))
for step in range(137):
    batch_at(used, step, batch_size=1)
print("equal:", torch.equal(batch_at(used, 137, 4)["pixel_values"], batch_at(fresh, 137, 4)["pixel_values"]))

# %% [markdown]
# Therefore a run that was stopped goes on exactly where it was, without any state of a generator having been saved, and you
# can rebuild step 137 on its own and look inside.
#
# ## Computed once: latents
#
# With a fixed crop the VAE gives the same answer for a picture at every step, so it is asked once, before training.

# %%
cached = DreamBoothDataset(
    concept.paths,
    concept.instance_prompt,
    class_paths=prior.paths,
    class_prompt=concept.class_prompt,
    size=config.resolution,
    seed=config.seed,
)
started = time.perf_counter()
count = cache_latents(cached, components.vae)
encoding = time.perf_counter() - started
print(f"{count} pictures encoded in {encoding:.1f} s; each now is {tuple(cached.latents['instance', 0, False].shape)}")

# %% [markdown]
# That is twice as many channels as latents have, because what is kept is the
# *[posterior](../docs/glossary.md#posterior)*, a mean and a (logarithm of the) variance of each number, not one
# sample of it. Each step still draws its own. **Predict**: will you see a difference between the decoded mean of one
# photograph and three decoded samples?

# %%
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

posterior = DiagonalGaussianDistribution(cached.latents["instance", 0, False][None])
samples = [posterior.sample(generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
with torch.no_grad():
    decoded = [picture(components.vae.decode(latents).sample[0]) for latents in (posterior.mean, *samples)]
plots.show(
    plots.show_images(
        [cached.images["instance"][0], *decoded],
        titles=["photograph", "mean", *(f"sample {n}" for n in range(3))],
        inches=1.5,
        title="Samples of one posterior look alike",
    ),
    alt="A photograph, and its decoded mean and three decoded samples, which look alike and a little softer",
)
print(f"deviation of one number between samples {posterior.std.mean():.3f}, ", end="")
print(f"between the numbers of one picture {posterior.mean.std():.3f}")

# %% [markdown]
# **What you should see**: no difference between the mean and the samples. All four are a little softer than the
# photograph, because the VAE loses fine detail. It is sure of what it sees; what it leaves open is a little noise,
# and training should not meet the same noise at every step.
#
# With random crops of pictures that are not square nothing can be kept, since the pixels differ each time.
# `cache_latents` then refuses, instead of quietly training on one crop, and a run encodes its pictures at every step:

# %%
# NBVAL_CHECK_OUTPUT
try:
    cache_latents(one, components.vae)
except ValueError as error:
    print(error)
folder.cleanup()

# %% [markdown]
# ## Computed once: text embeddings
#
# Where the text encoder is frozen, a prompt always gives the same vectors. There are two prompts in the whole training
# (or a few more, if several instance prompts are given), so they are encoded before it starts, and on a GPU the text
# encoder leaves the card's memory until pictures are drawn. Where the text encoder is trained, its answer changes with
# each step: then each *distinct* prompt is encoded once per step, however large the batch.

# %%
# NBVAL_CHECK_OUTPUT
embeddings = precompute_embeds(components, [concept.instance_prompt, concept.class_prompt])
print({prompt: tuple(hidden.shape) for prompt, (hidden, _) in embeddings.items()})

# %% [markdown]
# ## What it saves
#
# The same six steps are taken in four ways, forward and backward; each bar is the median of one step's time. Such times vary
# with what else a machine does: compare them, do not quote them. **Predict**: which saves more, keeping latents or keeping text
# embeddings?

# %%
import statistics

add_adapters(components, config.adapters)
ways = {
    "nothing kept": (dataset, None),
    "latents kept": (cached, None),
    "text embeddings\nkept": (dataset, embeddings),
    "both kept": (cached, embeddings),
}
seconds = {name: [] for name in ways}
for number in range(7):  # the first one warms up
    for name, (data, known) in ways.items():
        started = time.perf_counter()
        record = training_step(components, batch_at(data, number, 4), seed=0, prompt_embeds=known)
        record.loss.backward()
        seconds[name].append(time.perf_counter() - started)
median = {name: statistics.median(values[1:]) for name, values in seconds.items()}

# %%
assert median["both kept"] < median["nothing kept"]
heights = {name: {"ms": 1000 * value} for name, value in median.items()}
plots.show(
    plots.bars(heights, ylabel="milliseconds a step", title="What is kept need not be computed again"),
    alt="Bars of milliseconds a step: kept latents save a good part, kept text embeddings hardly anything",
)

# %% [markdown]
# **What you should see**: encoding the pictures again at each step takes a large part of the time, encoding the two
# prompts hardly any: chance decides which is lower, the first bar or the third, the second or the last. The text
# encoder of the miniature is small; on a large base it costs more. It is frozen here, as in the miniature's default
# training, so that both can be kept. A training that adapts the text encoder as well can keep the latents only, and its
# steps take longer than the second bar, because its gradient has to go back through the whole UNet and the text
# encoder.
#
# Encoding all pictures beforehand is not free either. How soon is it paid back?

# %%
steps = range(0, 51, 5)
lines = {"nothing kept": (0.0, median["nothing kept"]), "latents kept": (encoding, median["latents kept"])}
series = {name: (steps, [start + n * each for n in steps]) for name, (start, each) in lines.items()}
even = encoding / (median["nothing kept"] - median["latents kept"])
plots.show(
    plots.curves(
        series, xlabel="steps", ylabel="seconds, encoding included", title=f"Paid back after {even:.0f} steps"
    ),
    alt="Two rising lines that cross early: encoding first costs a moment, then each step is cheaper",
)
print(f"saved in {config.max_train_steps} steps: {(config.max_train_steps - even) * encoding / even:.0f} s")

# %% [markdown]
# **What you should see**: the lines cross early; from there on every step is a gain.
#
# Speed that changes the result would be worth nothing. **Predict**: is the loss of step 3 the same in all four ways?

# %%
# NBVAL_CHECK_OUTPUT
with torch.no_grad():
    losses = [
        training_step(components, batch_at(data, 3, 4), seed=0, prompt_embeds=known).loss.item()
        for data, known in ways.values()
    ]
print("equal to a millionth:", max(losses) - min(losses) < 1e-6)

# %% [markdown]
# ## Captions of your own
#
# So far all photographs share one prompt. But what a prompt does not mention goes to the identifier: if the dog wears a hat
# in two of five photographs, `a photo of sks dog` has to explain the hat as well. A caption that says `with a hat` takes
# that load off the identifier.
#
# People keep captions in three forms, and `--captions` reads all of them: a text file beside the picture (`01.txt`), a
# `metadata.jsonl` with `file_name` and `text` as Hugging Face's datasets have it, or a folder's name as kohya's trainer
# uses it (`10_sks dog`: ten repeats, under the prompt `sks dog`; repeats count only where several subjects are
# trained). Each caption must contain the identifier.

# %%
# NBVAL_CHECK_OUTPUT
import json
import shutil

forms = {form: Path(tempfile.mkdtemp(), form) for form in ("text files", "one list", "10_sks dog")}
captions = {
    path.name: f"a photo of sks dog {toybox.SCENES[scene]}"
    for path, (scene, _) in zip(concept.paths, PICTURES["photos"], strict=True)
}
for path in forms.values():
    shutil.copytree(concept.paths[0].parent, path)
for name in list(captions)[:4]:  # one is left out
    (forms["text files"] / name).with_suffix(".txt").write_text(captions[name])
lines = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
(forms["one list"] / "metadata.jsonl").write_text("\n".join(lines))
for form, path in forms.items():
    for use in (False, True):
        print(f"{form}:", Concept.from_folder(path, "sks", "dog", captions=use).report().splitlines()[-1].strip())

# %% [markdown]
# A run prints this line with its report on the photographs. Without the option it says that captions are there, and trains
# under the instance prompt. A photograph without a caption keeps the instance prompt in any case:

# %%
# NBVAL_CHECK_OUTPUT
with_captions = Concept.from_folder(forms["text files"], "sks", "dog", captions=True)
own = DreamBoothDataset.of_concept(with_captions, prior.paths, size=config.resolution, seed=config.seed)
for n in range(5):
    print(f"sample {n}: {with_captions.paths[own.draw('instance', n)[0]].name}, {own[n]['instance_prompt']!r}")
for path in forms.values():
    shutil.rmtree(path.parent)

# %% [markdown]
# ## Masks: what counts as the subject
#
# The background of your photographs is trained on as well. With five different backgrounds that matters less: what they
# have in common is the toy. But what if all your photographs were taken on the same carpet? Let us do exactly that, and put
# the toy on the beach in all five.
#
# A *mask* says which pixels are the subject: `dog.mask.png` beside `dog.png`, white on the subject, or the alpha
# channel of a picture that was cut out. With `--masked_loss`, each position of the latents is weighted by how much of
# it the mask shows as subject.

# %%
from dbnb.dataset import loss_weights

beach = Path(tempfile.mkdtemp())
for number, (_, seed) in enumerate(PICTURES["photos"], start=1):
    toybox.photograph(SAMPLE_TOY, scene="beach", seed=seed, size=256).save(beach / f"{number:02d}.png")
    toybox.mask(SAMPLE_TOY, seed=seed, size=256).save(beach / f"{number:02d}.mask.png")
on_beach = Concept.from_folder(beach, "sks", "dog", resolution=config.resolution)

# %% [markdown]
# A mask goes wherever its photograph goes: it is cropped at the same place, mirrored with it, and then averaged over the
# pixels that each place of the latents stands for. To see that, here are the same photographs in a wide format, with random
# crops and flips:

# %%
wide = Path(tempfile.mkdtemp())
for path in beach.iterdir():  # photographs and masks
    Image.open(path).crop((0, 40, 256, 232)).save(wide / path.name)
masked = DreamBoothDataset.of_concept(
    Concept.from_folder(wide, "sks", "dog", resolution=config.resolution),
    prior.paths,
    masked=True,
    size=config.resolution,
    seed=config.seed,
    center_crop=False,
    random_flip=True,
)
batch, side = batch_at(masked, 0, 5), config.resolution // components.downsampling
weights = loss_weights(batch, side, side)
shutil.rmtree(wide)

# %%
rows = {
    "photograph,\ncropped and flipped": [picture(pixels) for pixels in batch["pixel_values"][:5]],
    "its mask": [picture(2 * mask.expand(3, -1, -1) - 1) for mask in batch["masks"]],
    f"weights of the loss,\n{side} x {side} places": [
        Image.fromarray((255 * (w[0] / weights.max())).byte().numpy()).convert("RGB") for w in weights[:5]
    ],
}
plots.show(
    plots.image_rows(
        list(rows.values()),
        labels=list(rows),
        inches=1.2,
        title="What is black in the last row gives no gradient",
    ),
    alt="Three rows of five: the toy on the beach, some mirrored, its white silhouette, and the silhouette on a coarse grid",
)
print(
    f"places that count: {(weights[:5] > 0).float().mean():.0%}; the mean weight of a picture: {weights[:5].mean():.2f}"
)

# %% [markdown]
# **What you should see**: silhouettes that lie on the toy, also where it is cut or mirrored. The weights of one picture have
# a mean of 1, so that a small subject does not count less than a large one. Class images have no masks: everything in them
# counts.
#
# Now two short trainings on these five photographs, without and with masks. The judge of notebook 01 also names the place
# in a picture. **Predict**: you then ask for `a photo of sks dog`, without naming a place. Where will the dog stand?

# %%
import dataclasses

from dbnb.miniature.data import ATTRIBUTES
from dbnb.miniature.evaluate import Judge
from dbnb.validation import draw

models = {"the base": load_components(config.base)}
for label, masked_loss in (("without masks", False), ("with masks", True)):
    settings = dataclasses.replace(config, instance_data_dir=str(beach), masked_loss=masked_loss, train_batch_size=2)
    models[label] = workflow.trained(dataclasses.replace(settings, max_train_steps=80)).components
drawn = {label: draw(model, [on_beach.instance_prompt] * 24, config.sampling) for label, model in models.items()}
judge, column = Judge(components.base), list(ATTRIBUTES).index("scene")
beach_number = list(toybox.SCENES).index("beach")
on_the_beach = {
    label: float((judge(np.stack([np.asarray(image) for image in images]))[:, column] == beach_number).mean())
    for label, images in drawn.items()
}

# %%
assert on_the_beach["with masks"] < on_the_beach["without masks"], on_the_beach
plots.show(
    plots.image_rows(
        [drawn[label][:8] for label in ("without masks", "with masks")],
        labels=["without masks", "with masks"],
        inches=1.1,
        title="'a photo of sks dog': on the beach in {without masks:.0%} of all pictures without masks, in {with masks:.0%} "
        "with them".format_map(on_the_beach),
    ),
    alt="Above, the toy on the beach; below, the toy in several places",
)
for label, share in on_the_beach.items():
    print(f"{label}: {share:.0%} of {len(drawn[label])} pictures show a beach")

# %% [markdown]
# **What you should see**: without masks the beach has become part of what `sks dog` means. With masks it appears
# far less often, though in these 24 pictures still more often than in those of the base. Part of what is left may come
# from the toy's outline: the latents there were computed from pixels around the toy as well, and those show the beach.
# And where the loss does
# not count, nothing corrects the model, so that a background may have small faults. So masks do not replace varied
# photographs, but they are the first thing to try when all your photographs have the same background.

# %% [markdown]
# ## Exercises
#
# ### Exercise A: a batch in two halves (6 minutes)
#
# Write `collate`, a small `collate_fn`: samples in; out come all pictures as one tensor and all prompts as one list.
# Instances come first, class images second, and picture number i belongs to prompt number i.

# %%
from dbnb.exercises import check_05a


def collate(samples: list[dict]) -> tuple[torch.Tensor, list[str]]:
    """B samples with instance_pixels, class_pixels (3, H, W), instance_prompt, class_prompt -> (2B, 3, H, W), 2B texts."""
    ...


check_05a(collate)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Two loops, one in the other: over the halves and over the samples. Which one is the outer loop?
# </details>
#
# <details><summary>Hint 2</summary>
#
# `torch.stack` puts pictures side by side in a new first dimension; `torch.cat` would lengthen their channels.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def collate(samples):
#     halves = ("instance", "class")
#     pixels = torch.stack([sample[f"{half}_pixels"] for half in halves for sample in samples])
#     prompts = [sample[f"{half}_prompt"] for half in halves for sample in samples]
#     return pixels, prompts
# ```
# </details>
#
# ### Exercise B: an order without a memory (10 minutes)
#
# Which image does sample n show? Every image comes once before any comes again; each round (an
# *[epoch](../docs/glossary.md#epoch)*) has a random order of its own; and the answer follows from n and the seed
# alone, so that you get sample 1,000 without going through the 999 before it.

# %%
from dbnb.exercises import check_05b


def image_number(n: int, count: int, seed: int) -> int:
    """Which of `count` images sample n shows: 0 to count - 1."""
    ...


check_05b(image_number)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `divmod(n, count)` gives the epoch that sample n belongs to, and its place in the epoch.
# </details>
#
# <details><summary>Hint 2</summary>
#
# All samples of an epoch have to agree on one order. So the generator that draws it must start from the seed and the epoch, not
# from n.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# import numpy as np
#
#
# def image_number(n, count, seed):
#     epoch, place = divmod(n, count)
#     order = np.random.default_rng((seed, epoch)).permutation(count)
#     return int(order[place])
# ```
# </details>

# %% [markdown]
# ## On your own
#
# 1. Make the batch without class images. What does `collate_fn` give, and what is `halves`? (3 minutes)
# 2. How much memory do the kept posteriors of a thousand class images take at 512 px? (A mean and a variance for each of
#    4 channels at 64 x 64 places, in `float32`.) How many pictures would fill 8 GiB? (2 minutes)
# 3. Why is keeping the posterior better than keeping one sample of the latents? (think)
#
# <details><summary>Answers</summary>
#
# 1. Four pictures, four prompts, `halves` is 1, and the loss has no prior part:
#
# ```python
# from dbnb.dataset import collate_fn
#
# lonely = DreamBoothDataset(concept.paths, concept.instance_prompt)
# lonely_batch = collate_fn([lonely[n] for n in range(4)])
# print(tuple(lonely_batch["pixel_values"].shape), lonely_batch["prompts"], lonely_batch["halves"])
# ```
#
# 2. Easily, and class images are cheap to keep this way: this is the size of a thousand, and how many fill 8 GiB.
#
# ```python
# size = 2 * 4 * 64 * 64 * 4
# print(f"one {size / 2**10:.0f} KiB, a thousand {1000 * size / 2**20:.0f} MiB; 8 GiB hold {8 * 2**30 // size:,}")
# ```
#
# 3. One sample would be the same "noise of the encoder" at every step, and the adapters could learn it by heart.
# </details>
#
# ## Quiz
#
# Five questions about *why*. Choose an answer, then open it: each says whether it is right, and why or why not.
#
# **1. Why do all instances come first in a batch and all class images second?**
#
# <details><summary>A. The UNet handles pictures in order and would mix up neighbours of two kinds.</summary>
#
# No: the pictures of a batch do not influence each other inside the UNet.
# </details>
#
# <details><summary>B. The optimizer makes its step after the first half, and the second one later.</summary>
#
# No: there is one step for the whole batch, after one backward pass.
# </details>
#
# <details><summary>C. The loss cuts the batch in the middle, and prompts need the same order.</summary>
#
# Right: pictures, prompts and loss agree on one order, which is made in one place.
# </details>
#
# **2. Why are the draws of a sample made from the seed and its number, not from a generator that moves on?**
#
# <details><summary>A. So that any step can be rebuilt alone, and a stopped run goes on exactly as it was.</summary>
#
# Right: a moving generator would have to be saved, and step 137 would need the 136 before it.
# </details>
#
# <details><summary>B. So that every sample gets the same crop, and its latents can be kept from the start.</summary>
#
# No: samples get different crops where crops are random; then latents cannot be kept.
# </details>
#
# <details><summary>C. So that the order of the pictures is the same in each epoch of a training.</summary>
#
# No: the epoch's number goes into the generator, and so each epoch has another order.
# </details>
#
# **3. Why can latents not be kept when crops are random?**
#
# <details><summary>A. Cropped pictures have no latents, since the autoencoder wants whole pictures.</summary>
#
# No: the autoencoder takes any square of the right size, whatever it was cut from.
# </details>
#
# <details><summary>B. Each step sees other pixels of the picture, and these have other latents.</summary>
#
# Right: keeping the latents of one crop would quietly train on that crop alone.
# </details>
#
# <details><summary>C. Random crops are made on the GPU, where there is no room to keep anything.</summary>
#
# No: crops are made by the dataset, and posteriors take little memory anyway.
# </details>
#
# **4. Why is the posterior kept, a mean and a variance, instead of one sample of the latents?**
#
# <details><summary>A. Because it takes only half of the memory that a sample would take.</summary>
#
# No: it takes twice as much: a mean *and* a variance for each number.
# </details>
#
# <details><summary>B. Because a sample could not be decoded to look at what was encoded.</summary>
#
# No: samples decode as well as the mean does, and look alike.
# </details>
#
# <details><summary>C. Because one sample, seen at every step, could be learned by heart.</summary>
#
# Right: each step draws its own sample from what is kept, as it would without the cache.
# </details>
#
# **5. With a frozen text encoder, embeddings can be kept for the whole training. What changes when it is trained?**
#
# <details><summary>A. Nothing: its answers to a fixed prompt stay the same, since the words do.</summary>
#
# No: its adapters move at every step, and so its answers move with them.
# </details>
#
# <details><summary>B. Nothing can be saved then: each picture of a batch needs a pass of its own.</summary>
#
# No: a batch has few distinct prompts, and each is encoded once a step.
# </details>
#
# <details><summary>C. Its answers change, so that each prompt has to be encoded at every step.</summary>
#
# Right: that still is once for each prompt, and not once for each picture.
# </details>
#
# ## In short
#
# - A sample is a pair; a batch is instances first, class second.
# - All draws follow from (seed, number).
# - What does not change is computed once: latents with fixed crops, embeddings with a frozen text encoder.
#
# Next: [06 Training](06_training.ipynb), the loop.
