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
# **What you will do**: draw the subject by place, turn the adapters up and down, switch off one half of them, redraw
# photographs; save the adapters, look into the file, load it with plain diffusers, and write its card.
#
# **What you will learn**: how to look at a result fairly; what the UNet's and the text encoder's adapters each
# contribute; what is in an adapter file and what is lost if it is not.
#
# **What you need**: notebook [06](06_training.ipynb). About a minute on two CPU cores, plus two for the training, the
# first time.
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
# The new modules are `dbnb.validation` and `dbnb.export`.

# %%
import json
import tempfile
from pathlib import Path

from safetensors import safe_open

from dbnb import export, plots, workflow
from dbnb.config import DreamBoothConfig
from dbnb.models import load_components
from dbnb.prior import draw_images, image_seed
from dbnb.tables import Table
from dbnb.toybox import SCENES
from dbnb.validation import from_references, validation_images
from dbnb.widgets import browse

workflow.quiet_libraries()
config = DreamBoothConfig()
session = workflow.trained(config)
concept = session.concept

# %% [markdown]
# ## A fair look
#
# A single good picture proves nothing: with enough tries, something good comes up. Fair means: prompts and noise fixed
# beforehand, the same before and after, everything shown. Each column below starts from the same noise.

# %%
base = load_components(config.base)
before = validation_images(base, concept, config, count=8)
after = validation_images(session.components, concept, config, count=8)
rows = [before.subject, after.subject, before.scenes, after.scenes]
labels = ["before", f"after:\n{concept.instance_prompt}", "before", "after:\n… by place"]
plots.show(
    plots.image_rows(rows, labels=labels, titles=[SCENES[name] for name in before.scene_names]),
    alt="Before: dogs of many colours. After: the teal toy, in the lower rows in each of eight places",
)

# %% [markdown]
# ## From a picture instead of from noise
#
# A reference image can be redrawn: it is noised to some level and then denoised under the prompt (*img2img*). At a low
# strength only details change, at a high one only the rough layout is kept. **Predict**: other dogs, redrawn as
# `a photo of a sks dog`: at which strength do they become the toy?

# %%
others = before.classes[:6]
strengths = (0.3, 0.5, 0.7, 0.9)
rows = [from_references(session.components, others, concept.instance_prompt, config, strength=s) for s in strengths]
plots.show(
    plots.image_rows([others, *rows], labels=["other dogs", *(f"strength {s}" for s in strengths)]),
    alt="Dogs of several colours; redrawn with growing strength they turn into the teal toy, the place kept longest",
)

# %% [markdown]
# ## Saved: one file, both adapters
#
# `save_adapters` writes what diffusers' own pipelines write: one safetensors file for the adapters of the UNet and of
# the text encoder.

# %%
folder = Path(tempfile.mkdtemp())
adapter = export.save_adapters(session.components, folder)
weights = sum(path.stat().st_size for path in session.components.base.rglob("*.safetensors"))
print(f"{adapter.name}: {adapter.stat().st_size / 2**20:.2f} MiB; the base it belongs to: {weights / 2**20:.0f} MiB")

# %% [markdown]
# Inside are matrices with telling names, and a header with what the matrices alone do not say.

# %%
with safe_open(adapter, "pt") as file:
    keys, header = list(file.keys()), file.metadata()
Table({"name": key} for key in keys[:2] + keys[-2:])

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
# Nothing of `dbnb` is needed to use the adapter. `reload_pipeline` is `DiffusionPipeline.from_pretrained` and
# `load_lora_weights`, as anyone who downloads the file would write it. **Predict**: the largest difference between the
# model that was trained and the one that was loaded?

# %%
# NBVAL_CHECK_OUTPUT
difference = export.verify_reload(session.components, adapter, concept, config)
print(f"at most 2 of 255 grey levels: {difference <= 2}")

# %% [markdown]
# ## The adapters, turned up and down
#
# A loaded adapter has a strength: 0 is the base, 1 what was trained, more than 1 an exaggeration. **Predict**: at 1.5,
# is it more of the toy?

# %%
pipeline = export.reload_pipeline(session.components, adapter)
(name,) = pipeline.get_list_adapters()["unet"]


def drawn(unet: float, text_encoder: float, prompt: str = concept.instance_prompt, count: int = 4):
    pipeline.set_adapters([name], [{"unet": unet, "text_encoder": text_encoder}])
    seeds = [image_seed(3, index) for index in range(count)]
    options = dict(num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale)
    return draw_images(pipeline, [prompt] * count, seeds, resolution=config.resolution, batch_size=8, **options)


# %%
strengths = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
by_strength = {strength: drawn(strength, strength) for strength in strengths}
rows = [[by_strength[s][i] for s in strengths] for i in range(4)]
plots.show(
    plots.image_rows(rows, titles=[f"{s:g}" for s in strengths]),
    alt="Four dogs at seven strengths: any dog at 0, the toy at 1, colours and shapes overdone at 1.5",
)

# %%
browse({f"{s:g}": by_strength[s][0] for s in strengths}, "strength")

# %% [markdown]
# **What you should see**: a passage from some dog to the toy, often through dogs that are half of each. Beyond 1 the
# colours are overdone and places suffer. Where a result is a little overtrained, 0.8 is a cheap remedy.
#
# ## Which half does what?
#
# There are two sets of adapters. **Predict**: with the text encoder's alone, will it be the right colour? With the
# UNet's alone?

# %%
settings = {"neither": (0, 0), "UNet alone": (1, 0), "text encoder alone": (0, 1), "both": (1, 1)}
prompt = f"{concept.instance_prompt} on the beach"
rows = [drawn(*strengths, prompt=prompt, count=6) for strengths in settings.values()]
plots.show(
    plots.image_rows(rows, labels=list(settings)),
    alt="Four rows of dogs on a beach: any dog, partly the toy with one half of the adapters, the toy with both",
)

# %% [markdown]
# **What you should see**: the text encoder can only ask for what the UNet can already paint: dogs of the nearest known
# colours. The UNet learned what the toy looks like, but without the text encoder's half it is asked for it less clearly.
# Trained together, they need each other.
#
# ## The card
#
# An adapter without a description is a riddle a week later. The card names the prompts, all settings and the measures,
# and how to load the file; and it carries a word on consent.

# %%
card = export.model_card(concept, config, None, has_text_encoder=True)
card.save(folder / "README.md")
print(card.text[:900], "…")

# %% [markdown]
# ## Sharing it
#
# `push_to_hub` uploads the adapter, the card, the pictures and the metrics, and nothing else: no checkpoints, no logs,
# no settings with paths of your machine, no photographs. A dry run shows what would go.

# %%
# NBVAL_CHECK_OUTPUT
(folder / "log.jsonl").write_text("{}\n")
print("would be uploaded:", export.push_to_hub(folder, "you/sks-dog", dry_run=True))

# %% [markdown]
# Without `dry_run` it uses the token that `huggingface-cli login` stored; a token never belongs into a notebook.
#
# ## On your own
#
# 1. Draw `a photo of a sks dog` at strength -1. What is the opposite of the subject? (2 minutes)
# 2. Load the adapter into a fresh `StableDiffusionPipeline` yourself, in three lines, without `dbnb.export`. (3 minutes)
# 3. Which of the pictures above would you show to somebody who doubts that it works, and which to somebody who wants to
#    improve it? (think)
#
# <details><summary>Answers</summary>
#
# 1. `drawn(-1.0, -1.0)`: a dog that has as little of the toy as can be, often in the opposite colour.
# 2. `from diffusers import StableDiffusionPipeline`, `p = StableDiffusionPipeline.from_pretrained(dbnb.miniature.path())`,
#    `p.load_lora_weights(folder)`; then `p("a photo of a sks dog").images[0]`.
# 3. All of them to both. Choosing is how one fools oneself.
# </details>
#
# ## In short
#
# - Same prompts, same noise, before and after, all shown.
# - The UNet holds the look, the text encoder the call for it.
# - One file of a few hundred kilobytes to a few megabytes, with its alphas, loads into plain diffusers.
#
# Next: [08 Measuring](08_measuring.ipynb), numbers that hold.
