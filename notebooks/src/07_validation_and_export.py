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
# **What you will do**: look at the subject by place, before and after; turn the adapters up and down, and switch off one
# half of them; save them, look into the file, load it with plain diffusers and nothing else, write its card, and rehearse
# the upload.
#
# **What you will learn**: how to look at a result fairly; what the UNet's and the text encoder's adapters each
# contribute; what is in an adapter file, and what is lost where its header is missing. Afterwards you can hand a result to somebody who
# has never heard of `dbnb`.
#
# **What you need**: notebook [06](06_training.ipynb). No GPU. On two CPU cores less than a minute, plus about two minutes
# for the training of notebook [00](00_start_here.ipynb) where it is not in the cache yet.
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
from dbnb.config import DreamBoothConfig
from dbnb.models import load_components
from dbnb.prior import draw_images, image_seed
from dbnb.tables import Table
from dbnb.toybox import SCENES
from dbnb.validation import draw, from_references, validation_images

workflow.quiet_libraries()

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
before = validation_images(base, concept, config, count=8, references=further)
after = validation_images(session.components, concept, config, count=8, references=further)
plots.show(
    plots.image_rows(
        [before.subject, after.subject], labels=["before", "after"],
        title=f"'{concept.instance_prompt}' has come to mean the toy",
    ),
    alt="Before: dogs of many colours. After: the teal toy with yellow spots in each picture",
)  # fmt: skip

# %% [markdown]
# **What you should see**: any dogs above, the toy below. One or two that are not quite it are normal: they are the ones to
# look at.
#
# Harder, and what all of this is for: the toy in places that the prompt names, beach, night and moon among them, where no
# photograph shows it.

# %%
places = [SCENES[name] for name in before.scene_names]
plots.show(
    plots.image_rows(
        [before.scenes, after.scenes], labels=["before", "after"], titles=places,
        title="The toy, in the place that was asked for",
    ),
    alt="Two rows in eight places, beach to moon: above dogs of many colours, below the teal toy",
)  # fmt: skip

# %% [markdown]
# **What you should see**: places stay what they were before training, also those without a photograph, and the dog in them
# is the toy. The night suffers most: no photograph was dark, and dark pictures are the first to look burnt (the section on
# strength has a remedy). One pair at a time, changed in place, shows best what moved (in a live notebook):

# %%
widgets.before_after(before.scenes, after.scenes, places)

# %% [markdown]
# And the price: is a dog still any dog?

# %%
plots.show(
    plots.image_rows(
        [before.classes, after.classes], labels=["before", "after"], title=f"'{concept.class_prompt}' is still any dog"
    ),
    alt="Two rows of dogs of many colours: the bare class prompt before and after training",
)  # fmt: skip

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
# ## From a picture instead of from noise
#
# A picture can be *redrawn*: it is noised to some level and then denoised under the prompt (img2img). At a low strength
# only details change, at a high one only the rough layout is kept. **Predict**: other dogs, redrawn as
# `a photo of a sks dog`: at which strength do they become the toy?

# %%
others, levels = before.classes[:6], (0.3, 0.5, 0.7, 0.9)
redrawn = [from_references(session.components, others, concept.instance_prompt, config, strength=s) for s in levels]
plots.show(
    plots.image_rows(
        [others, *redrawn], labels=["other dogs", *(f"strength {s}" for s in levels)],
        title="The more noise, the more of the toy, and the less of the picture",
    ),
    alt="Dogs of several colours; redrawn with growing strength they turn into the teal toy, the place kept longest",
)  # fmt: skip

# %% [markdown]
# **What you should see**: at 0.3 the old dog, touched up; at 0.9 the toy, mostly still in the old place and pose, now and then
# a new picture.
#
# ## Saved: one file, both adapters
#
# `save_adapters` writes what diffusers' own pipelines write: one safetensors file for the adapters of the UNet and of
# the text encoder. **Predict**: how large is it, next to the base?

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
# **What you should see**: nothing for the VAE, which has no adapters, and a file well below the base's size. On a miniature,
# rank 16 is a lot; on Stable Diffusion 1.5 the same file has some twelve megabytes beside gigabytes.
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
# Why alpha matters: the change is $\frac{\alpha}{r} BA$. The file holds $A$ and $B$; whoever does not know $\alpha$ takes
# $\alpha = r$, and with `alpha = 2 * rank` half of the training is gone, without an error. Notebook 09 shows the
# pictures.
#
# ## Loaded elsewhere: plain diffusers
#
# Nothing of `dbnb` is needed to use the adapter. This is what anyone who downloads it writes; only the base's folder would
# be another one. Loading is two lines. The two with `solver` exchange the base's scheduler for the fast one that `draw` uses
# (DPM-Solver++, Lu et al., 2022): only the same solver draws the same pictures.

# %%
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained(miniature.path()).to(session.components.device)
pipeline.load_lora_weights(output, weight_name="pytorch_lora_weights.safetensors", adapter_name="toy")
solver = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, algorithm_type="sde-dpmsolver++")
pipeline.scheduler = solver
pipeline.set_progress_bar_config(disable=True)
elsewhere = pipeline(
    ["a photo of a sks dog on the beach"] * 4,
    generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
    **sampling,  # solver steps and guidance
).images

# %% [markdown]
# **Predict**: the same prompts from the same noise, drawn by the model as it stands after training: what is the largest
# difference of any pixel?

# %%
here = draw(session.components, ["a photo of a sks dog on the beach"] * 4, config, seeds=[0, 1, 2, 3])
difference = max(
    int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) for a, b in zip(here, elsewhere, strict=True)
)
plots.show(
    plots.image_rows(
        [here, elsewhere], labels=["as trained", "reloaded"], inches=1.3,
        title=f"At most {difference} of 255 grey levels apart",
    ),
    alt="Two rows of four teal dogs on the beach, equal column by column",
)  # fmt: skip

# %%
# NBVAL_CHECK_OUTPUT
assert difference <= 2, f"another picture: {difference}"
print("reloads to the same picture, but for rounding")

# %% [markdown]
# `export.verify_reload` is this comparison as a function, and `python -m dbnb` makes it at the end of every run.
#
# ## The adapters, turned up and down
#
# A loaded adapter has a strength for each part: 0 is the base, 1 what was trained, more than 1 an exaggeration. **Predict**:
# at 1.5, is it more of the toy?


# %%
def drawn(unet: float, text_encoder: float, prompt: str = concept.instance_prompt, count: int = 3) -> list:
    """Pictures by plain diffusers with the adapters at these strengths, always from the same noise."""
    pipeline.set_adapters("toy", {"unet": unet, "text_encoder": text_encoder})
    seeds = [image_seed(3, index) for index in range(count)]
    return draw_images(pipeline, [prompt] * count, seeds, resolution=config.resolution, batch_size=8, **sampling)


def likeness(pictures: list) -> float:
    """Mean cosine to the five photographs, for the identity encoder."""
    real = encoders.identity_features(concept.images())
    return metrics.subject_fidelity(encoders.identity_features(pictures), real)


# %%
strengths = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
by_strength = {s: drawn(s, s) for s in strengths}
plots.show(
    plots.image_rows(
        [[by_strength[s][i] for s in strengths] for i in range(3)],
        titles=[f"{s:g}\nlikeness {likeness(by_strength[s]):.2f}" for s in strengths],
        title="From any dog to the toy, and past it",
    ),
    alt="Three dogs at seven strengths: any dog at 0, the toy at 1, and overdone beyond",
)  # fmt: skip

# %%
widgets.browse({f"{s:g}": by_strength[s][0] for s in strengths}, "strength")

# %% [markdown]
# **What you should see**: a passage from some dog to the toy, often through dogs that are half of each. Beyond 1, contrasts
# are overdone, and likeness gains little or falls. Where a result is a little overtrained, 0.8 is a cheap
# remedy. Two claims that can fail:

# %%
# NBVAL_CHECK_OUTPUT
curve = {s: likeness(pictures) for s, pictures in by_strength.items()}
assert curve[1.0] > curve[0.0], curve
assert curve[1.5] - curve[1.0] < curve[1.0] - curve[0.0], curve
print("1 is nearer to the toy than 0; beyond 1 there is less to win")

# %% [markdown]
# ## Which half does what?
#
# There are two sets of adapters. **Predict**: with the text encoder's alone, will it be the right colour? With the
# UNet's alone?

# %%
halves = {"neither": (0, 0), "UNet alone": (1, 0), "text encoder alone": (0, 1), "both": (1, 1)}
prompt = f"{concept.instance_prompt} {SCENES['beach']}"
by_half = {name: drawn(*strengths, prompt=prompt, count=6) for name, strengths in halves.items()}
scores = {name: likeness(pictures) for name, pictures in by_half.items()}
plots.show(
    plots.image_rows(
        list(by_half.values()), labels=[f"{name}:\nlikeness {scores[name]:.2f}" for name in by_half],
        title=f"Nearest to the toy: {max(scores, key=scores.get)}",
    ),
    alt="Four rows of dogs on a beach: with neither half any dogs, with one alone more or less of the toy, with both the toy",
)  # fmt: skip

# %% [markdown]
# **What you should see**: the text encoder can only ask for what the frozen UNet can already paint, so its row stays near the
# base's. The UNet learned what the toy looks like; alone it does as well as both. Is the other half idle, then?
# **Predict**: the same for `a photo of a dog`, which is not to mean the toy:

# %%
of_class = {name: drawn(*strengths, prompt=concept.class_prompt, count=6) for name, strengths in halves.items()}
leaked = {name: likeness(pictures) for name, pictures in of_class.items()}
plots.show(
    plots.image_rows(
        list(of_class.values()), labels=[f"{name}:\nlikeness {leaked[name]:.2f}" for name in of_class],
        title=f"'{concept.class_prompt}': with the UNet's half alone every dog is the toy",
    ),
    alt="Four rows of dogs for the bare class prompt: the toy with the UNet's half alone, any dogs in the other three",
)  # fmt: skip

# %%
# NBVAL_CHECK_OUTPUT
assert scores["both"] > scores["neither"], scores
assert leaked["UNet alone"] > leaked["both"] + 0.2, leaked
print("with both halves 'sks dog' is the toy, and 'dog' is not; with the UNet's half alone both are")

# %% [markdown]
# **What you should see**: nobody named the toy, and with the UNet's half alone it stands in every picture. `sks` hardly
# changes an embedding of the base (notebook 03), so the UNet cannot tell the two prompts apart. That one is the toy and the
# other is not is the text encoder's doing: it does not paint, it tells apart. Hence its worth on this base (notebook 08). A
# large base has embeddings that differ more, and its text encoder often stays frozen.

# %% [markdown]
# ## The card
#
# An adapter without a description is a riddle a week later. The card names the prompts, the settings and the measures,
# shows the figures, says how to load the file, and has a word on consent. It refers to files beside it, so let us make
# them: the figures, the measures, and what else a run leaves in its folder.

# %%
run = dataclasses.replace(config, output_dir=str(output))
workflow.before_after(before, after, concept, further).savefig(output / "before_after.png")
losses = plots.loss_curves(session.log, title="Two clouds and their means: the measures tell more")
losses.savefig(output / "loss.png")
(output / "metrics.json").write_text(json.dumps(numbers, indent=2))
(output / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in session.log))
run.save(output / "config.json")
card = export.model_card(concept, run, numbers, has_text_encoder=True)
card.save(output / "README.md")
plots.show(losses, alt="Two clouds of losses, of photographs and of class images; their running means wander")

# %%
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
# `before_after.png` before you share it: its first row shows your photographs.

# %%
folder.cleanup()

# %% [markdown]
# ## On your own
#
# 1. Draw `a photo of a sks dog` at strength -1. What is the opposite of the subject? (2 minutes)
# 2. Save the adapter again and load it in three lines of your own. Draw `a photo of a sks cat` with it. (3 minutes)
# 3. Which of the pictures above would you show to somebody who doubts that it works, and which to somebody who wants to
#    improve it? (think)
#
# <details><summary>Answers</summary>
#
# 1. A dog that has as little of the toy as can be, often in another colour:
#
# ```python
# rows = [drawn(strength, strength, count=6) for strength in (-1.0, 0.0, 1.0)]
# plots.show(plots.image_rows(rows, labels=["-1", "0", "1"]), alt="six dogs at the strengths -1, 0 and 1")
# ```
#
# 2. What `sks` came to mean goes along with another class word, more or less:
#
# ```python
# mine = tempfile.TemporaryDirectory()
# export.save_adapters(session.components, Path(mine.name))
# p = StableDiffusionPipeline.from_pretrained(miniature.path())
# p.load_lora_weights(mine.name, weight_name="pytorch_lora_weights.safetensors")
# p.scheduler = solver
# p.set_progress_bar_config(disable=True)
# plots.show(plots.show_images(p(["a photo of a sks cat"] * 4, **sampling).images), alt="four cats with something of the toy")
# mine.cleanup()
# ```
#
# 3. All of them to both. Choosing is how one fools oneself.
# </details>
#
# ## In short
#
# - Same prompts, same noise, before and after, all shown; then numbers.
# - UNet and text encoder each have a strength of their own: here the one paints the toy, the other tells when it is meant.
# - One file with its ranks and alphas loads into plain diffusers and draws the same pictures; a card says what it is.
#
# Next: [08 Measuring](08_measuring.ipynb), numbers that hold.
