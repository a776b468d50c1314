# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 08 Measuring: which setting does what
#
# **What you will do**: measure a training on four counts, with a [floor](../docs/glossary.md#floor), a
# [ceiling](../docs/glossary.md#ceiling) and an error bar; then compare trainings that differ in one setting each,
# some of them with several seeds.
#
# **What you will learn**: [subject fidelity](../docs/glossary.md#subject-fidelity), prompt fidelity, prior
# preservation and [diversity](../docs/glossary.md#diversity), after the DreamBooth paper; what prior preservation,
# the adapted layers, the identifier's vector, the text encoder, the rank and the steps are worth on this base.
# Afterwards you can say of two of your own results which is better, at what, and how sure you are.
#
# **What you need**: notebooks [02](02_prior_preservation.ipynb) and [07](07_validation_and_export.ipynb). No GPU. On two
# CPU cores about three minutes, plus a minute and a half for the training of notebook [00](00_start_here.ipynb) where it is
# not in the cache yet. The trainings of the comparison take most of an hour; their numbers come from a file. One of them is
# trained, drawn and measured again here, so that you can compare.
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
# The new module is `dbnb.metrics`.

# %%
import dataclasses
import json
import statistics
from pathlib import Path

import torch

from dbnb import metrics, plots, toybox, workflow
from dbnb.adapters import adapted_modules, trainable_parameters
from dbnb.checkpoints import versions
from dbnb.config import DreamBoothConfig
from dbnb.metrics import diversity, paired_differences, perceptual_diversity, subject_fidelity
from dbnb.models import fingerprint, load_components
from dbnb.tables import Table
from dbnb.toybox import SCENES
from dbnb.validation import validation_images

workflow.quiet_libraries()
plots.you_are_here("08")

# %% [markdown]
# The training of notebook 00, and what is drawn before and after it: `COUNT` pictures of the subject, as many by place (all
# eight places in turn), as many of the bare class, and as many in the sentences of notebook 07 (in turn).

# %%
COUNT = 16
SETS = ("subject", "scenes", "classes", "sentences")
config = DreamBoothConfig()
session = workflow.trained(config)
base = load_components(config.base)
encoders = metrics.load_encoders(base.base)
concept, photographs, further = session.concept, session.concept.images(), workflow.references(config)
before, after = (
    validation_images(one, concept, config.sampling, count=COUNT, sets=SETS) for one in (base, session.components)
)

# %% [markdown]
# ## Is it the same toy?
#
# Comparing pixels does not help: the same toy in another place shares hardly a pixel. An **image encoder** turns a
# picture into a vector; its training decides what makes vectors alike. The paper found that
# [CLIP](../docs/glossary.md#clip)'s image half is a weak judge of identity (two dogs that one caption fits look alike
# to it) and took **[DINO](../docs/glossary.md#dino)**, which learned to tell pictures apart without labels. Here DINO's
# part is played by a small encoder that was trained for this alone: photographs of one toy get similar vectors, those
# of another toy of the same kind do not, and the less two toys look alike, the further apart they are. Beside it stands
# **CLIP**: two encoders, one for pictures and one for texts, trained so that a picture and its caption get similar
# vectors (the miniature brings a small one of its own).
#
# **Predict**: the photographs that were trained on, further ones of the same toy (half of them in other places), and
# six other dogs: which blocks of the matrix will be dark?

# %%
groups = {"photographs": photographs, "further ones": further, "other dogs": before.classes[:6]}
pictures = [picture for group in groups.values() for picture in group]
spaces = {"identity encoder": encoders.identity_features, "CLIP's image half": encoders.clip_features}
features = {name: encode(pictures) for name, encode in spaces.items()}
plots.show(
    plots.matrices(
        {name: (v @ v.T).numpy() for name, v in features.items()},
        groups={name: len(g) for name, g in groups.items()},
        inches=3.4,
        unit="cosine",
        title="One toy is one block for the identity encoder, wherever it stands",
    ),
    alt="Two matrices of similarities: for the identity encoder all photographs of the toy are alike, other dogs are not",
)

# %% [markdown]
# **What you should see**: on the left one dark red block for all photographs of the toy, trained on or not, and pale
# rows for other dogs. On the right is CLIP, which sees the place as well as the dog, so that its blocks are blurred.
# A measure needs the gap between *same* and *other*:

# %%
ends = {}
for name, v in features.items():
    mine, same, other = v.split([len(group) for group in groups.values()])
    alike, unlike = ends[name] = (subject_fidelity(same, mine), subject_fidelity(other, mine))
    print(f"{name:18} same toy {alike:.2f}, other dogs {unlike:.2f}, gap {alike - unlike:.2f}")

# %% [markdown]
# ## How strict is the encoder?
#
# Any other dog is an easy case. A measure of identity has to notice the differences that an eye notices: a wrong hue,
# spots that have run together. So here are toys that differ from ours in one thing only, each in all eight places.
# `likeness` gives the values that the encoder was trained to reproduce: 1 for the same toy, less for each difference.
# (In notebooks 06 and 07 that word stood for the measured similarity.) **Predict**: which difference will the encoder
# find smallest? Will it keep to the scale?

# %%
import numpy as np

from dbnb.miniature.alike import DIFFERENCES, likeness, look_alike, turned
from dbnb.toybox.sample import SAMPLE_TOY

rng, toys = np.random.default_rng(0), {"the same toy": SAMPLE_TOY}
toys |= {f"hue {n} degrees": dataclasses.replace(SAMPLE_TOY, body=turned(SAMPLE_TOY.body, n)) for n in (15, 30)}
toys |= {name: look_alike(SAMPLE_TOY, name, rng) for name in DIFFERENCES if name != "hue"}
toys["another dog"] = toybox.random_toy("dog", 5)
taken = {
    name: [toybox.photograph(toy, scene=scene, seed=100 + i, size=128) for i, scene in enumerate(SCENES)]
    for name, toy in toys.items()
}

# %%
real = encoders.identity_features(photographs)
found = {name: subject_fidelity(encoders.identity_features(pictures), real) for name, pictures in taken.items()}
titles = [f"{name}\n{found[name]:.2f}" for name in toys]
plots.show(
    plots.show_images(
        [pictures[1] for pictures in taken.values()],
        titles=titles,
        columns=9,
        inches=1.35,
        title="Look-alikes, and their similarity to the photographs",
    ),
    alt="Nine toys: ours, seven that differ from it in hue, pattern, accent, accessory or proportions, and another dog",
)

# %%
scales = {
    name.replace(" ", "\n", 1): {"measured": found[name], "the scale it was trained to": likeness(SAMPLE_TOY, toy)}
    for name, toy in toys.items()
}
plots.show(
    plots.bars(scales, ylabel="similarity", title="Each difference lowers the similarity to the photographs"),
    alt="Pairs of bars, measured similarity and the scale of training: highest for the same toy, lowest for another dog",
)

# %%
# NBVAL_CHECK_OUTPUT
same, other = ends["identity encoder"]
assert same > other + 0.2, ends
assert max(found, key=found.get) == "the same toy", found
print("the identity encoder tells the toy from other dogs, and from every look-alike")

# %% [markdown]
# **What you should see**: the same toy first, then the one whose hue is slightly off, and every other look-alike far
# below. The two bars of a pair would be equal in a perfect encoder. Ours keeps to its scale for the accessory and the
# larger turn of the hue; it forgives the smaller turn, and is stricter than the scale about the pattern and the
# accent. So a fidelity near the first bar says that pattern, accessory and proportions are right. It does not prove
# that the hue is: look at the pictures as well.
#
# ## Two functions
#
# All numbers come from two functions: the mean cosine between two groups, and the mean distance (1 - cosine) within one.
# **Predict** their values for three equal vectors, and for four that have nothing in common:

# %%
# NBVAL_CHECK_OUTPUT
equal, apart = torch.full((3, 4), 0.5), torch.eye(4)
print(f"equal: fidelity {subject_fidelity(equal, equal):.2f}, diversity {diversity(equal):.2f}")
print(f"apart: fidelity {subject_fidelity(apart[:2], apart[2:]):.2f}, diversity {diversity(apart):.2f}")

# %% [markdown]
# ## Floor and ceiling
#
# A similarity of 0.6 says nothing by itself. Two references do: what the **base** reaches without training (floor), and
# what **other real photographs** of the toy reach (ceiling). Between them lies what can be learned:
#
# $$ \text{normalised fidelity} = \frac{\text{after} - \text{floor}}{\text{ceiling} - \text{floor}} $$
#
# The ceiling's photographs go through the VAE first, so that what it loses is not counted against the training.

# %%
numbers = workflow.measured(session, before, after, encoders, further)
scale = {"identity encoder": "subject_fidelity", "CLIP's image half": "clip_i"}
states = {"floor": "the base", "after": "after training", "ceiling": "other photographs"}
plots.show(
    plots.bars(
        {name: {label: numbers[state][key] for state, label in states.items()} for name, key in scale.items()},
        ylabel="similarity to the photographs",
        title="Training lifts similarity from the floor towards the ceiling",
    ),
    alt="Two groups of three bars, the base, after training, other photographs: rising for the identity encoder; for CLIP the second is slightly the highest",
)

# %% [markdown]
# **What you should see**: for the identity encoder the similarity rises from bar to bar. For CLIP the trained toy comes
# out slightly above the real photographs. CLIP sees the place as well: most of the drawn pictures stand in places of the
# five photographs, and only half of the other photographs do.
#
# Now all numbers, line by line: four questions, some asked twice. The subject (`subject_fidelity`, `clip_i`,
# `normalized_…`, and asked for in the sentences of notebook 07: `sentence_…` and `worst_sentence_…`), the prompt
# (`clip_t`, `scene_recognised`), the preserved class (`class_subject_similarity`), its variety (`class_diversity`,
# and `…_ratio`):

# %%
QUESTIONS = {
    "subject_fidelity": "Is it the toy? Similarity of its pictures to the photographs.",
    "clip_i": "The same question, asked of CLIP's image half.",
    "clip_t": "Does a picture fit its prompt? Similarity in CLIP's space.",
    "scene_recognised": "In which share of the pictures does CLIP name the right place of eight?",
    "class_diversity": "How varied is the bare class? Mean distance between its pictures.",
    "class_subject_similarity": "Has every dog become the toy? Lower is better.",
    "sentence_fidelity": "Is it the toy when asked for in other sentences?",
    "worst_sentence_fidelity": "And in the sentence that does worst?",
    "worst_sentence_fidelity_ratio": "And in the sentence that does worst? (Few pictures each: much of it is chance.)",
    "normalized_subject_fidelity": "How far from floor (0) to ceiling (1)?",
    "sentence_fidelity_ratio": "Which share of the gain over the base is left in other sentences?",
    "class_diversity_ratio": "Which share of the class's variety is left?",
}
columns = ("before", "after", "ceiling")
Table(
    {"number": name, "question": QUESTIONS.get(name, "")}
    | {column: f"{numbers[column][name]:.2f}" if name in numbers[column] else "" for column in columns}
    for name in numbers["after"]
)

# %% [markdown]
# The paper's names: *DINO* is `subject_fidelity` with another encoder, *CLIP-I* and *CLIP-T* are `clip_i` and `clip_t`, *PRES*
# is `class_subject_similarity`. `class_diversity` asks how varied the **class** is, in the space of the
# [identity encoder](../docs/glossary.md#identity-encoder), since a class that has lost its variety is what we fear here.
#
# The paper's *DIV* is another question: is the **subject** always drawn in the same pose? It is the mean distance between
# pictures of one prompt by LPIPS (Zhang et al., 2018), which compares what a network sees at each place of two pictures, stage
# by stage. `perceptual_diversity` computes that from the stages of the identity encoder, without the weights by which LPIPS is
# fitted to human judgement, so its numbers can be compared with each other only. It sees the background too. So here is one
# place: eight real photographs of the toy on the beach, and what is drawn for a prompt that asks for it there. Pictures that
# are all alike have a diversity of 0. **Predict**: will the drawn toy be as varied as the photographed one?

# %%
from dbnb.validation import draw

there = f"{concept.instance_prompt} {SCENES['beach']}"
sets = {"photographs": [toybox.photograph(SAMPLE_TOY, scene="beach", seed=100 + i, size=128) for i in range(8)]}
sets |= {
    name: draw(one, [there] * 8, config.sampling)
    for name, one in (("drawn", session.components), ("drawn by the base", base))
}
varied = {name: perceptual_diversity(encoders.stages(pictures)) for name, pictures in sets.items()}
plots.show(
    plots.image_rows(
        list(sets.values()),
        labels=[f"{name}:\n{value:.2f}" for name, value in varied.items()],
        title=f"In one place, the drawn toy has {varied['drawn'] / varied['photographs']:.0%} of the photographs' variety",
    ),
    alt="Three rows of eight on the beach: photographs of the toy, the toy as it is drawn, and dogs that the base draws",
)

# %% [markdown]
# **What you should see**: the number beside each row agrees with what you see in it. The base's dogs also differ in
# colour and pattern, which counts as variety. The drawn toy is less varied than the photographed one: it stands in
# profile nearly every time, while the photographs show it from several sides. The base draws its dogs in profile as
# well, so this is not the training's doing alone.
#
# ## How sure is a number?
#
# The pictures are a sample. Draw as many from them with replacement, again and again, and see how the mean moves: the
# *[bootstrap](../docs/glossary.md#bootstrap)* (Efron, 1979) gives an error bar without any formula. **Predict**: how wide
# will it be?

# %%
subject_pictures = [*after.subject, *after.scenes]
real = encoders.identity_features(photographs)
values = (encoders.identity_features(subject_pictures) @ real.T).mean(1)
generator = torch.Generator().manual_seed(0)
picks = torch.randint(len(values), (2000, len(values)), generator=generator)
means = values[picks].mean(1)
low, high = means.quantile(0.025).item(), means.quantile(0.975).item()
title = f"{len(values)} pictures: {values.mean():.2f}, and 95 of 100 such means between {low:.2f} and {high:.2f}"
plots.show(
    plots.histogram(
        means.tolist(),
        xlabel="mean similarity to the photographs",
        title=title,
        marks={"measured": values.mean().item(), "2.5 %": low, "97.5 %": high},
    ),
    alt="A bell of two thousand means around the measured one, with its two ends marked",
)

# %% [markdown]
# **What you should see**: a bell around the measured value. That is the error of the *pictures*. Another seed in training, or
# other photographs, change the number as well, which is why the table below repeats its most important rows with other seeds.
# The distance from the base's similarity is larger than this error:

# %%
# NBVAL_CHECK_OUTPUT
floor = numbers["floor"]["subject_fidelity"]
assert low > floor, f"the error bar {low:.2f} to {high:.2f} reaches down to the floor {floor:.2f}"
print("the base's similarity lies below the error bar")

# %% [markdown]
# ## One difference each
#
# An **[ablation](../docs/glossary.md#ablation)**: take the default, change one thing, measure. **Predict** before you
# look: which change costs most fidelity? Which costs the class?
#
# Two of the rows need a word. *Identifier 'red'* is an identifier that has a meaning. *Identifier unheard* is the opposite:
# in a copy of the base, the vector of `sks` is replaced by that of `a`. To this text encoder `a photo of sks dog` is the very
# same prompt as `a photo of a dog`. The rows in `REPEATED` are trained with several seeds. Another seed changes everything
# that is drawn by chance in a training: the class images, the adapters' initial values, the order of the pictures, the noise.
# All trainings are of one subject, and each is measured by `COUNT` pictures a set; the paper has thirty subjects and three
# thousand pictures. So what follows is true of this toy on this base.

# %%
# NBVAL_CHECK_OUTPUT
ROWS = {"default": {}, "attention only": {"lora_layers": "attention"}, "identifier unheard": {"vector_of": "a"}}
ROWS |= {"identifier 'red'": {"identifier": "red"}, "text encoder trained": {"train_text_encoder": True}}
ROWS["no prior preservation"] = {"with_prior_preservation": False}
ROWS["all layers"] = {"lora_layers": "all"}
ROWS |= {f"rank {rank}": {"rank": rank} for rank in (2, 8, 64)}
ROWS |= {f"{n} steps": {"max_train_steps": n} for n in (100, 300, 600)}
REPEATED = {"default": 5, "attention only": 5, "identifier unheard": 3, "text encoder trained": 3}  # how many seeds
RUNS = [(name, seed) for name in ROWS for seed in range(REPEATED.get(name, 1))]
print(f"default: adapters on {config.lora_layers}, rank {config.rank}, {config.max_train_steps} steps,", end=" ")
print(f"identifier {config.identifier!r}, text encoder {'trained' if config.train_text_encoder else 'frozen'}")
print("and in its place:", "; ".join(name for name in ROWS if name != "default"))
print(len(RUNS), "trainings")


# %% [markdown]
# A copy of the base whose identifier cannot be told from a word takes a few lines. Everything else in the folder stays as it
# is.

# %%
import shutil
import tempfile

copies = tempfile.TemporaryDirectory()


def base_with_vector_of(word: str) -> str:
    """The folder of a copy of the base in which the identifier has the vector of a word."""
    target = Path(copies.name) / word
    if not target.is_dir():
        shutil.copytree(base.base, target)
        parts = load_components(config.base)
        vectors = parts.text_encoder.get_input_embeddings().weight.data
        identifier, other = parts.tokenizer.convert_tokens_to_ids([f"{config.identifier}</w>", f"{word}</w>"])
        vectors[identifier] = vectors[other]
        parts.text_encoder.save_pretrained(target / "text_encoder")
    return str(target)


# %% [markdown]
# What follows trains one row (or takes its training from the cache), draws, and measures. Pictures are drawn from the same
# noise whatever the training's seed. For an identifier with another meaning, or none, the floor has to be drawn again: it is
# what the base draws for *that* prompt.


# %%
def row(name: str, one: workflow.Session, found: dict[str, float]) -> dict:
    """One training of the table: its settings, its size, its numbers."""
    modules = adapted_modules(one.components).values()
    return {
        "settings": ROWS[name],
        "parameters": sum(p.numel() for module in modules for _, p in trainable_parameters(module)),
        "numbers": {key: round(value, 4) for key, value in found.items()},
    }


# %%
def measure(name: str, seed: int = 0) -> dict:
    """Train a row with a seed, draw, and measure; what was drawn is kept."""
    settings, start = {"seed": seed} | ROWS[name], before
    if word := settings.pop("vector_of", None):
        settings["base"] = base_with_vector_of(word)
    one = workflow.trained(dataclasses.replace(config, **settings))
    if {"base", "identifier"} & settings.keys():
        start = validation_images(load_components(one.config.base), one.concept, config.sampling, count=COUNT)
    kept[name] = validation_images(one.components, one.concept, config.sampling, count=COUNT, sets=SETS)
    return row(name, one, workflow.measured(one, start, kept[name], encoders, further)["after"])


# %% [markdown]
# All trainings were run once, with this function, and their numbers stored in `ablation.json` beside this notebook, by row
# and seed, together with the machine and with what they depend on: a fingerprint of the base, the number of pictures, the
# default settings. If any of these has changed since, the stored numbers are ignored.

# %%
path = next((p for p in (Path("ablation.json"), Path("notebooks/ablation.json")) if p.is_file()), Path("ablation.json"))
file = json.loads(path.read_text()) if path.is_file() else {}
names = (
    "max_train_steps learning_rate text_encoder_learning_rate lr_scheduler lora_layers rank train_text_encoder "
    "num_class_images num_inference_steps guidance_scale"
).split()
made_by = {"base": fingerprint(base.base), "pictures": COUNT} | {name: getattr(config, name) for name in names}
stored = file["rows"] if file.get("made_by") == made_by else {}
there = [run for run in RUNS if str(run[1]) in stored.get(run[0], {})]
print(f"{len(there)} trainings of {len(RUNS)} are stored; computed on: {file['machine'] if stored else 'none'}")

# %% [markdown]
# Do not believe a table that you cannot recompute. The default with seed 0 has just been measured. Each training in
# `recompute`, a row and a seed, is repeated now, on your machine: trained (or taken from your cache, where you have trained it
# before), drawn and measured. `recompute = RUNS` repeats all (most of an hour on two cores). With `store = True` the file is
# written again.

# %%
import os
import platform

recompute = [("100 steps", 0)]
store = False
kept, fresh = {"default": after}, {"default": {"0": row("default", session, numbers["after"])}}
for name, seed in recompute:
    if (name, seed) != ("default", 0):
        fresh.setdefault(name, {})[str(seed)] = measure(name, seed)
if store:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, " + ", ".join(f"{n} {v}" for n, v in versions().items())
    merged = {name: stored.get(name, {}) | fresh.get(name, {}) for name in ROWS if name in stored | fresh}
    file = {"machine": machine, "made_by": made_by, "rows": merged}
    path.write_text(json.dumps(file, indent=1) + "\n")
    stored = file["rows"]

# %%
columns = ("normalized_subject_fidelity", "scene_recognised", "class_diversity_ratio", "class_subject_similarity")
columns += ("sentence_fidelity_ratio",)
twice = [(name, seed) for name, runs in fresh.items() for seed in runs]
Table(
    {"row": name, "seed": seed, "computed": when}
    | {column.replace("_", " "): f"{table[name][seed]['numbers'].get(column, float('nan')):.2f}" for column in columns}
    for name, seed in twice[:4]
    for when, table in (("stored", stored), ("now", fresh))
    if seed in table.get(name, {})
)

# %% [markdown]
# **What you should see**: the stored and the new numbers are nearly the same. Another processor rounds differently,
# and hundreds of steps enlarge the difference a little. It should be no larger than the error bar of the pictures;
# the check below is coarse and allows 0.2.

# %%
# NBVAL_CHECK_OUTPUT
for name, seed in twice:
    if seed in stored.get(name, {}):
        was, now = (table[name][seed]["numbers"]["normalized_subject_fidelity"] for table in (stored, fresh))
        assert abs(was - now) < 0.2, f"{name}, seed {seed}: stored {was}, now {now}"
print("what was stored can be computed again" if stored else "nothing is stored")

# %% [markdown]
# The whole table. Where no rows are stored, it holds what was computed here. After ± stands the standard deviation
# over seeds. A row with a single seed has none of its own: in brackets it borrows that of the repeated rows together.
# For fidelity and for the class that is a cautious estimate, since *identifier unheard* is among them, whose result
# depends on the seed far more than the others' do. For places it is not: most of the repeated rows got every place
# right, so the borrowed spread is too small. A single seed is seed 0, and with it the default reaches the number printed
# below the table: compare such a row with that, and not with the default's mean.


# %%
def values_of(name: str, column: str) -> list[float]:
    """A row's numbers, one a seed."""
    return [run["numbers"].get(column, float("nan")) for run in rows[name].values()]


def over_seeds(name: str, column: str) -> tuple[float, float]:
    """Mean and standard deviation of a number over a row's seeds; with one seed, that of all repeated rows together."""
    several = [values for values in (values_of(other, column) for other in rows) if len(values) > 1]
    own = [values_of(name, column)] if len(rows[name]) > 1 else several
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in own)
    spread = (squares / sum(len(values) - 1 for values in own)) ** 0.5 if own else 0.0
    return statistics.mean(values_of(name, column)), spread


def as_text(name: str, column: str) -> str:
    """The number as the table shows it."""
    mean, spread = over_seeds(name, column)
    return f"{mean:.2f} " + (f"± {spread:.2f}" if len(rows[name]) > 1 else f"(± {spread:.2f})")


# %%
rows = {name: fresh.get(name, {}) | stored.get(name, {}) for name in ROWS if name in fresh | stored}
Table(
    {"training": name, "seeds": str(len(runs))}
    | {column.replace("_", " "): as_text(name, column) for column in columns}
    | {"adapter parameters": f"{next(iter(runs.values()))['parameters']:,}"}
    for name, runs in rows.items()
)

# %%
of_default = {seed: round(run["numbers"][columns[0]], 2) for seed, run in rows["default"].items()}
print(f"the default's {columns[0].replace('_', ' ')} by seed: {of_default}")

# %% [markdown]
# Which of these rows differ from the default by more than chance? Every row shares its seeds with the default, and so
# its class images and its noise: compare them seed by seed, and take the mean of the differences.
# `paired_differences` does so, with a 95 % interval from Student's t-distribution (few seeds make it wide; a single
# seed, drawn hollow, borrows the spread of the others). An interval that reaches over 0 leaves open whether there is
# any difference. **Predict** which do not.

# %%
asked = {"subject fidelity": columns[0], "right place": columns[1], "class diversity": columns[2]}
runs = {
    c: {name: {seed: run["numbers"][c] for seed, run in rows[name].items()} for name in rows} for c in asked.values()
}
apart = {label: paired_differences(runs[column], "default") for label, column in asked.items()}
plots.show(
    plots.intervals(
        {f"{label}, minus the default's": differences for label, differences in apart.items()},
        faint=[name for name in rows if len(rows[name]) == 1],
        title="Orange: the interval does not include 0",
    ),
    alt="Rows with intervals around their difference from the default, in fidelity, in right places and in class diversity",
)
for label, differences in apart.items():
    clear = {name: abs(mean) > half for name, (mean, half) in differences.items()}
    print(f"{label} differs for {', '.join(f'{name} ({differences[name][0]:+.2f})' for name in clear if clear[name])}")
    print(f"  and is not clear for {', '.join(name for name in clear if not clear[name])}")

# %% [markdown]
# **What you should see**: *attention only* has the same steps and the same rank as the default, and less fidelity. Its
# adapters sit on the attention of all blocks, the default's on all layers of the last two, and it has half of the
# parameters; notebook 04 shows what attention alone paints less well. *All layers* has adapters in the other blocks as
# well, and each of its steps takes longer. *Rank 2* and *100 steps* come less near to the toy, and *600 steps* shows no
# clear gain. It got 14 of 16 places right, the default all 16: two pictures of sixteen are too few to claim a
# difference, although the interval is orange. *Identifier unheard*: the same prompt stands for the toy in one half of
# each batch and for all dogs in the other, so the model answers with a mixture, and neither `sks dog` nor `dog` can be
# right. *Text encoder trained* has a second set of adapters, and they change next to nothing here, where the identifier
# is heard anyway: its interval lies so close to 0 that nobody would see the difference. And *no prior preservation*
# draws the toy, but hardly any other dog. Of the rows that are "not clear" nothing is claimed: to settle them takes
# more seeds. And of so many intervals of 95 %, one or two miss 0 by chance alone.
#
# Do fidelity and variety pull against each other, or does one setting give both? Both in one figure: the best place is at
# the upper right.

# %%
points = {name: (over_seeds(name, columns[0])[0], over_seeds(name, columns[2])[0]) for name in rows}
poorest = min(points, key=lambda name: points[name][1])
for corner, title in (
    ({}, f"Best is the upper right; '{poorest}' keeps the least of the class"),
    (dict(xlim=(0.75, 1.02), ylim=(0.88, 1.1)), "The upper right corner, enlarged"),
):
    figure = plots.scatter(points, xlabel="normalised subject fidelity", ylabel="class diversity ratio", title=title)
    for name, (x, y) in points.items():
        spreads = [over_seeds(name, column)[1] for column in (columns[0], columns[2])]
        own = len(rows[name]) > 1
        cross = dict(fmt="none", ecolor="0.5" if own else "0.8", lw=1 if own else 0.7, zorder=0)
        figure.axes[0].errorbar(x, y, xerr=spreads[0], yerr=spreads[1], **cross)
    figure.axes[0].set(**corner)
    plots.show(
        figure,
        alt="Trainings as points: fidelity to the right, preserved class diversity upwards; crosses show the seeds' spread",
    )

# %% [markdown]
# **What you should see**: the crosses are standard deviations over seeds, pale where they are borrowed. The default
# stands at the mean of its seeds, and the pale points at seed 0 alone, with which the default would lie further right
# (the number below the table): do not read a gain from them. The intervals above say which rows differ. The points that
# lie clearly away from the upper right corner are the ones to remember: each of them names something that a good
# training needs.
#
# Steps and ranks by themselves, all with seed 0:

# %%
lines = {}
for what, setting, default in (("steps", "max_train_steps", config.max_train_steps), ("rank", "rank", config.rank)):
    at = {ROWS[name].get(setting, default): name for name in rows if name == "default" or setting in ROWS[name]}
    x = sorted(at)
    for measured, column in (("fidelity", columns[0]), ("diversity", columns[2])):
        found = [rows[at[value]]["0"]["numbers"][column] for value in x]
        spreads = [over_seeds(at[value], column)[1] for value in x]
        lines[f"{measured} by {what}"] = ([value / default for value in x], found, spreads)
figure = plots.curves(
    {name: line[:2] for name, line in lines.items()},
    xlabel="setting, as a multiple of the default",
    ylabel="share",
    title=f"1 is the default: {config.max_train_steps} steps, rank {config.rank}",
)
for x, found, spreads in lines.values():
    figure.axes[0].errorbar(x, found, yerr=spreads, fmt="none", ecolor="0.6", lw=0.8, capsize=2, zorder=0)
plots.show(
    figure,
    alt="Fidelity and diversity against the number of steps and against the rank, as multiples of the defaults",
)

# %% [markdown]
# **What you should see**: fidelity rises up to the default's 200 steps and its rank of 32; beyond them no difference is
# clear. Whatever is smaller than the bars, which are standard deviations over seeds, is not a result.
#
# *The identifier `red`* looks as good as any other in this table. But `a photo of red dog` is now the prompt of the toy, and so
# a red dog cannot be asked for in these words any more. No column measures that. A table answers only what it was asked.
#
# Three answers are clear enough to be checked:

# %%
# NBVAL_CHECK_OUTPUT
mean_of = {name: {column: over_seeds(name, column)[0] for column in columns} for name in rows}
if {"no prior preservation", "attention only", "identifier unheard"} <= rows.keys():
    default, without = mean_of["default"], mean_of["no prior preservation"]
    assert without["class_diversity_ratio"] < default["class_diversity_ratio"], "no drift to be seen"
    assert without["class_subject_similarity"] > default["class_subject_similarity"], "no drift to be seen"
    print("prior preservation keeps the class varied and unlike the toy")
    for name in ("attention only", "identifier unheard"):
        assert mean_of[name][columns[0]] < default[columns[0]], name
    print("adapters on all layers of two blocks draw the toy better than adapters on attention only")
    print("an identifier without a vector of its own costs fidelity")

# %% [markdown]
# These are the pictures behind two of the rows, the default and the one that was repeated just now. **Predict**: what
# will still be wrong after a hundred steps: the place, the colour, the spots or the outlines?

# %%
other = next((run for run in recompute if run[0] != "default"), ("default", 0))
shown = {name: kept[name] for name in dict.fromkeys(("default", other[0]))}
reached = [f"{name}: {next(reversed(fresh[name].values()))['numbers'][columns[0]]:.2f}" for name in shown]
plots.show(
    plots.image_rows(
        [images.scenes[:8] for images in shown.values()],
        labels=list(shown),
        titles=[SCENES[name] for name in after.scene_names[:8]],
        title=f"Normalised fidelity: {', '.join(reached)}",
    ),
    alt="Two rows of dogs in eight places: the default training above, the shorter one below",
)

# %% [markdown]
# **What you should see**: after a hundred steps the places are right and the spots are there, though softer, and the
# colour nearly so: some bodies are too green, others too blue. By the intervals above, the two fidelities differ by
# more than chance explains, though with one seed.
#
# ## Which checkpoint is best?
#
# Fidelity alone would always ask for more steps, and the class alone for none. Three shares say what a state of the model has
# gained and kept, each 1 at best: how far the subject has come from floor to ceiling, how much of the class is kept (its
# variety, or its distance from the toy, whichever is less), and how well pictures still fit their prompts. The trade-off is
# their harmonic mean, which is high only where all three are:
#
# $$ \text{trade-off} = \frac{3}{1/\text{gained} + 1/\text{class kept} + 1/\text{prompt kept}} $$
#
# `python -m dbnb --select best` draws a few pictures at each validation step, measures them by this rule (`Progress`), and
# exports the `best_step` instead of the last one. Here it is applied afterwards, to the checkpoints that two trainings have
# kept after each quarter of their steps: the default, and the one without prior preservation. **Predict**: which checkpoint
# wins in each?

# %%
from dbnb.checkpoints import checkpoints, load_weights
from dbnb.progress import Progress
from dbnb.progress import figure as trade_off_figure
from dbnb.selection import best_step


def measured_checkpoints(one: workflow.Session) -> list[dict[str, float]]:
    """What a run with `--select best` logs, for each of a training's checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        there = dataclasses.replace(one.config, output_dir=folder)  # for the pictures that it saves
        known = dict(before=[before], references=[further], encoders=encoders)
        progress = Progress(there, one.components, [concept], one.dataset, **known)
        steps = (load_weights(path, one.components) for path in checkpoints(Path(one.config.output_dir)))
        return [{"step": step} | progress(step) for step in steps]


without_class = workflow.trained(dataclasses.replace(config, with_prior_preservation=False))
logs = {"default": measured_checkpoints(session), "no prior preservation": measured_checkpoints(without_class)}

# %%
plots.show(
    trade_off_figure(logs["default"], best_step(logs["default"])),
    alt="The default. Left: upwards from the base, with a detour where a little of the class is lost. Right: the trade-off, which rises to the last step",
)
for name, log in logs.items():
    value = {line["step"]: line["trade_off"] for line in log}
    print(f"{name}: best is step {best_step(log)} with {value[best_step(log)]:.2f}, worst {min(value.values()):.2f}")
Table(
    {"training": name, "step": str(line["step"])}
    | {
        key.replace("_", " "): f"{line[key]:.2f}"
        for key in ("subject_gained", "prior_kept", "prompt_kept", "trade_off")
    }
    for name, log in logs.items()
    for line in log
)

# %% [markdown]
# **What you should see**: with prior preservation the curve leads up, and at its end practically nothing of the class
# is missing. A checkpoint from before the end can lack some of it (the column `prior kept`): as long as the learning
# rate is at its full height, each step shifts the weights a good deal, and while the rate falls to zero they settle.
# With eight pictures a set it is also partly chance which checkpoint is best. Without prior preservation the class is
# lost within the first quarter. The rule takes the best of what there is, and cannot make a good training out of a bad
# one. `--patience 3` stops a run when three measured steps in a row were no better than the best. By default the last
# step is exported.
#
# ## Does it copy?
#
# A training can also reach a high fidelity by giving back its photographs. For each picture of the subject by place, look
# for the nearest of the five photographs, in CLIP's space, which sees the place as well. **Predict**: will you find twins?

# %%
clip_real, clip_drawn, clip_further = (encoders.clip_features(p) for p in (photographs, after.scenes[:8], further))
nearest = (clip_drawn @ clip_real.T).argmax(1)
plots.show(
    plots.image_rows(
        [after.scenes[:8], [photographs[int(i)].resize(after.scenes[0].size) for i in nearest]],
        labels=["drawn", "nearest photograph"],
        titles=[SCENES[name] for name in after.scene_names[:8]],
        title="The nearest photograph shows the same place, if that place was photographed",
    ),
    alt="Upper row: the toy drawn in eight places. Lower row: the nearest photograph of each, in the same place if there is one",
)

# %%
for name, found in (("drawn", clip_drawn), ("further photographs", clip_further)):
    closest = (found @ clip_real.T).max(1).values
    print(f"{name:20} to the nearest photograph: {closest.mean():.2f} on average, {closest.max():.2f} at most")
print(f"distance among the drawn {diversity(clip_drawn):.2f}, among the photographs {diversity(clip_real):.2f}")

# %% [markdown]
# **What you should see**: where a place was photographed, the nearest photograph shares it; on the beach, at night
# and on the moon none does, so these cannot be copies of a whole photograph. The numbers say what is normal: further
# real photographs of the toy, which cannot be copies, are nearly as close to the nearest one. The drawn pictures are
# somewhat closer; part of that is that more of them stand in photographed places. But look at the grass and the city:
# there the drawing is very near its photograph in pose and framing, too, and *at most* the cosine is nearly 1.

# %% [markdown]
# ## Exercises
#
# ### Exercise A: the four measures (15 minutes)
#
# Write four measures of this notebook from features alone. The rows of each argument are the vectors of pictures or
# texts, and they are not of length 1 yet. `drawn`, `photographs` and `classes` come from the identity encoder;
# `drawn_clip` and `texts` from CLIP, where row number i of `texts` is the prompt of drawn picture number i.

# %%
from dbnb.exercises import check_08a


def four_measures(drawn, photographs, classes, drawn_clip, texts) -> dict[str, float]:
    """subject_fidelity, prompt_fidelity, class_subject_similarity and class_diversity, from features (N, D)."""
    ...


check_08a(four_measures)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A cosine is a product of vectors of length 1: `torch.nn.functional.normalize(x, dim=1)` for all five. Then `a @ b.T` holds the
# cosines of all pairs.
# </details>
#
# <details><summary>Hint 2</summary>
#
# Three of the four are means over pairs. Prompt fidelity is different: a picture has one prompt, so compare row by row.
# </details>
#
# <details><summary>Hint 3</summary>
#
# For diversity, a picture is at a distance of 0 from itself. These N pairs add nothing to the sum; do not count them either.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def four_measures(drawn, photographs, classes, drawn_clip, texts):
#     drawn, photographs, classes, drawn_clip, texts = (
#         torch.nn.functional.normalize(x, dim=1) for x in (drawn, photographs, classes, drawn_clip, texts)
#     )
#     n = len(classes)
#     return {
#         "subject_fidelity": (drawn @ photographs.T).mean().item(),
#         "prompt_fidelity": (drawn_clip * texts).sum(1).mean().item(),
#         "class_subject_similarity": (classes @ photographs.T).mean().item(),
#         "class_diversity": (1 - classes @ classes.T).sum().item() / (n * (n - 1)),
#     }
# ```
# </details>
#
# ### Exercise B: a difference over seeds (10 minutes)
#
# Two rows of the table have been trained with several seeds each. The same seed draws the same class images and the
# same noise in both, so compare them *seed by seed*: return the mean of the differences, first minus second, and the
# standard error of this mean, which is the standard deviation of the differences over the root of their number. Seeds
# that only one row has do not count.

# %%
from dbnb.exercises import check_08b


def difference(first: dict[int, float], second: dict[int, float]) -> tuple[float, float]:
    """Mean and standard error of first minus second, seed by seed; each argument: seed -> value."""
    ...


check_08b(difference)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `first.keys() & second.keys()` are the seeds that both have.
# </details>
#
# <details><summary>Hint 2</summary>
#
# `statistics.stdev` is the standard deviation of a sample, with n - 1 in the denominator.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def difference(first, second):
#     paired = [first[seed] - second[seed] for seed in first.keys() & second.keys()]
#     return statistics.mean(paired), statistics.stdev(paired) / len(paired) ** 0.5
# ```
# </details>

# %% [markdown]
# ## On your own
#
# 1. Add `prior_loss_weight` 0.3 and 3.0 at 100 steps to the rows. Where would they be in the figure? (2 minutes)
# 2. Run *100 steps* with the seeds 1 and 2 as well. Is its spread larger than the default's? (2 minutes)
# 3. The paper compares *all* drawn pictures with *all* real ones. What would the maximum instead of the mean measure?
#    (think)
#
# <details><summary>Answers</summary>
#
# 1. Compare them with the row of 100 steps: does less weight leave the class less of its variety, by more than the
#    spread of the seeds?
#
# ```python
# for weight in (0.3, 3.0):
#     ROWS[f"weight {weight}"] = {"prior_loss_weight": weight, "max_train_steps": 100}
#     found = measure(f"weight {weight}")["numbers"]
#     print(weight, {column: found[column] for column in columns})
# ```
#
# 2. A short training sees fewer batches, which is a smaller sample. Compare its spread with the default's before you
#    conclude anything.
#
# ```python
# for seed in (1, 2):
#     rows["100 steps"][str(seed)] = measure("100 steps", seed)
# for name in ("100 steps", "default"):
#     print(name, {column: as_text(name, column) for column in columns})
# ```
#
# 3. How close the best copy comes: a measure of memorising rather than of fidelity.
# </details>
#
# ## Quiz
#
# Five questions about *why*. Choose an answer, then open it: each says whether it is right, and why or why not.
#
# **1. Why is fidelity not measured by comparing pixels?**
#
# <details><summary>A. Pixels are whole numbers, and a mean of whole numbers would be too coarse.</summary>
#
# No: means of whole numbers can be as fine as one likes.
# </details>
#
# <details><summary>B. The same toy in another place shares hardly a pixel with its photograph.</summary>
#
# Right: an image encoder is trained to give one toy similar vectors, wherever it stands.
# </details>
#
# <details><summary>C. Comparing all pixels of 16 pictures takes far longer than a training does.</summary>
#
# No: it would take milliseconds; it would only not answer the question.
# </details>
#
# **2. Why is CLIP's image half a weak judge of identity?**
#
# <details><summary>A. It was trained on larger pictures and cannot see the miniature's at all.</summary>
#
# No: the miniature brings a small CLIP of its own, trained on pictures of this size.
# </details>
#
# <details><summary>B. It has no vectors of its own for pictures but borrows those of the captions.</summary>
#
# No: both halves make vectors; they were trained to be alike for a picture and its caption.
# </details>
#
# <details><summary>C. It was trained to match pictures with captions, and two different dogs can have the same caption.</summary>
#
# Right: the gap between the same toy and other dogs is small, and a measure lives on that gap.
# </details>
#
# **3. The ceiling's photographs go through the autoencoder first. Why?**
#
# <details><summary>A. So that the detail which it loses is not counted as a fault of the training.</summary>
#
# Right: no drawn picture can be sharper than what the autoencoder paints.
# </details>
#
# <details><summary>B. So that they have the same number of channels as the pictures that were drawn.</summary>
#
# No: both are ordinary pictures with three channels, before and after.
# </details>
#
# <details><summary>C. So that the identity encoder, which works on latents, can read them.</summary>
#
# No: it works on pixels; the pictures are decoded before they are compared.
# </details>
#
# **4. Two rows differ by 0.03, and the seeds of each row spread by 0.06. What follows?**
#
# <details><summary>A. The first row is better, since a mean is a mean, however its values are spread.</summary>
#
# No: with other seeds the order could be the other way round.
# </details>
#
# <details><summary>B. The measure is broken, since it should give the same number for each seed.</summary>
#
# No: another seed is another training, and different trainings differ.
# </details>
#
# <details><summary>C. Nothing reliable: the seeds alone can make a difference of this size.</summary>
#
# Right: more seeds, or differences seed by seed, might settle it.
# </details>
#
# **5. A training without class images has a high subject fidelity. Why is it still bad?**
#
# <details><summary>A. Its fidelity was measured with the floor of another base and is not valid.</summary>
#
# No: the base is the same for both rows, and so is the floor.
# </details>
#
# <details><summary>B. Fidelity does not ask about the class, and that has become the toy.</summary>
#
# Right: look at class diversity too; a table answers only what it was asked.
# </details>
#
# <details><summary>C. A high fidelity always means that the photographs have been copied.</summary>
#
# No: copies are one way to a high fidelity, and comparing with the nearest photograph tells.
# </details>
#
# ## In short
#
# - Four questions, four measures; floor and ceiling give them a scale, repetition gives them an error.
# - Change one thing at a time, keep the numbers with what made them, and recompute a row before you believe the table.
# - Repeat with other seeds: a difference that is smaller than its error settles nothing.
# - Look at fidelity and variety together: prior preservation keeps the second.
#
# Next: [09 When it goes wrong](09_when_it_goes_wrong.ipynb).
