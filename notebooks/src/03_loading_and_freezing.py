# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 Loading and freezing: a picture through every part
#
# **What you will do**: load a Stable Diffusion, send a picture through its autoencoder, a prompt through its text
# encoder, and noise through its UNet, step by step, until it is a picture.
#
# **What you will learn**: what the parts are and what each expects; which of them DreamBooth trains (none, at first);
# how a base says of itself what it is; what a smaller number format saves.
#
# **What you need**: notebook [00](00_start_here.ipynb). About half a minute on two CPU cores.
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
# The new module is `dbnb.models`.

# %%
import json

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from dbnb import plots, toybox, workflow
from dbnb.metrics import through_vae
from dbnb.models import ARCHITECTURES, encode_prompts, load_components, text_architecture
from dbnb.tables import Table
from dbnb.widgets import browse

workflow.quiet_libraries()
components = load_components("miniature")
components

# %% [markdown]
# Three networks, loaded and **frozen**: not one parameter is trainable. Stable Diffusion 1.5 has the same three, with
# 123 million parameters in the text encoder, 84 million in the VAE and 860 million in the UNet.
#
# ## What a base says of itself
#
# A diffusers folder carries an index: which parts there are, and of which class each is. That is where the workflow
# reads whether there is a VAE (DeepFloyd IF has none). Guessing it from a failed download would take every network
# error for a model without a VAE.

# %%
index = json.loads((components.base / "model_index.json").read_text())
Table({"part": name, "class": " . ".join(map(str, value))} for name, value in index.items() if isinstance(value, list))

# %% [markdown]
# Which text encoder it is stands in that part's own config. The table of known architectures is short; a new family is
# one more row.

# %%
# NBVAL_CHECK_OUTPUT
print("this base:", text_architecture(components.base)[0])
Table({"architecture": name, "adapters go to": ", ".join(row.lora_targets)} for name, row in ARCHITECTURES.items())

# %% [markdown]
# ## The autoencoder (VAE): pictures to latents and back
#
# Diffusion on pixels is expensive. The VAE squeezes a picture into **latents**, here a quarter of the width and height
# with six channels, and paints pictures from them. All training happens on latents.

# %%
toy = toybox.Toy("robot", body="red", accent="yellow", pattern="striped")
picture = toybox.photograph(toy, scene="beach", seed=3, size=64)
pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1.0
with torch.no_grad():
    latents = components.vae.encode(pixels).latent_dist.mean
print(
    f"pixels {tuple(pixels.shape)} -> latents {tuple(latents.shape)}: {pixels.numel() / latents.numel():.0f} times fewer"
)

# %% [markdown]
# **Predict**: the six channels of the latents as grey pictures. Will you recognise the robot?


# %%
def gray(channel: torch.Tensor) -> Image.Image:
    low, high = channel.min(), channel.max()
    return Image.fromarray(((channel - low) / (high - low) * 255).byte().numpy()).convert("RGB")


channels = [gray(channel) for channel in latents[0]]
titles = ["the picture", *(f"channel {i}" for i in range(len(channels)))]
plots.show(
    plots.show_images([picture, *channels], titles=titles),
    alt="A red striped robot on a beach, and six coarse grey pictures in which its outline can be recognised",
)

# %% [markdown]
# **What you should see**: the outline in every channel, the colours spread over several of them. What the VAE cannot
# keep, no training on latents can bring back. So look at the way there and back:

# %%
toys = [toybox.random_toy(kind, 7) for kind in toybox.KINDS]
scenes = list(toybox.SCENES)
originals = [toybox.photograph(toy, scene=scenes[i], seed=i, size=64) for i, toy in enumerate(toys)]
back = through_vae(components, originals, 64)
plots.show(
    plots.image_rows([originals, back], labels=["picture", "through the VAE"]),
    alt="Six toys, and the same after encoding and decoding: nearly equal, small details softer",
)

# %%
errors = [np.asarray(a, dtype=float) - np.asarray(b, dtype=float) for a, b in zip(originals, back, strict=True)]
psnr = [10 * np.log10(255**2 / (error**2).mean()) for error in errors]
print("PSNR of each, in dB:", ", ".join(f"{value:.1f}" for value in psnr))

# %% [markdown]
# PSNR is a logarithm of the mean squared error: six more decibels are half the error. Around thirty, one has to look
# twice to see a difference.
#
# ## The text encoder: prompts to vectors
#
# A prompt becomes tokens, padded to a fixed number, and each token a vector that knows its neighbours.

# %%
# NBVAL_CHECK_OUTPUT
prompts = ["a photo of a red dog", "a photo of a sks dog", "a photo of a dog on the beach"]
tokens = components.tokenizer(prompts[0], padding="max_length").input_ids
print(components.tokenizer.convert_ids_to_tokens(tokens)[:9], "… in all", len(tokens))
with torch.no_grad():
    hidden = encode_prompts(components, prompts)
print("hidden states:", tuple(hidden.shape))

# %% [markdown]
# How alike are prompts for the model? Cosine similarity between the mean vectors of some prompts: 1 is the same.

# %%
words = ["red dog", "blue dog", "sks dog", "dog", "red car", "blue car", "teapot"]
with torch.no_grad():
    means = encode_prompts(components, [f"a photo of a {word}" for word in words]).mean(1)
means = torch.nn.functional.normalize(means - means.mean(0), dim=1)
figure = plots.matrices({"similarity": (means @ means.T).numpy()}, inches=3.4, labels=words)
plots.show(figure, alt="A matrix of similarities: prompts that share a kind or a colour are more alike than others")

# %% [markdown]
# **What you should see**: what shares a kind or a colour is redder. `sks dog` lies near `dog`: the rare word adds
# little, as notebook 01 saw in pictures.
#
# ## The UNet: from noise to a picture
#
# The UNet gets noisy latents, a number that says how noisy they are, and the prompt's vectors; its answer tells the noise
# that it believes to be in there, and so what the clean picture would be. (It may answer with the noise itself, or, as
# this base does, with a mix of noise and picture called $v$; the scheduler knows which. Notebook 06 says why.) Take a
# little of that noise away, ask again, and after some tens of steps there is a picture. To steer towards the prompt, it is
# asked twice, with the prompt and with an empty one, and the difference is exaggerated: **classifier-free guidance**
# (Ho and Salimans, 2022).
#
# $$ \hat v = \hat v_{\text{empty}} + g \, (\hat v_{\text{prompt}} - \hat v_{\text{empty}}) $$
#
# Here is all of it, without a pipeline:


# %%
@torch.no_grad()
def paint(prompt: str, guidance_scale: float = 4.0, steps: int = 24, seed: int = 1):
    """The latents after each step, and what the UNet believes at each step to be the clean ones."""
    schedule = DDIMScheduler.from_config(components.noise_scheduler.config)
    schedule.set_timesteps(steps)
    words = encode_prompts(components, ["", prompt])
    x = torch.randn(1, *latents.shape[1:], generator=torch.Generator().manual_seed(seed))
    trajectory, beliefs = [x], []
    for t in schedule.timesteps:
        empty, told = components.unet(torch.cat([x, x]), t, encoder_hidden_states=words).sample.chunk(2)
        step = schedule.step(empty + guidance_scale * (told - empty), t, x)
        x = step.prev_sample
        trajectory.append(x)
        beliefs.append(step.pred_original_sample)
    return trajectory, beliefs


# %%
@torch.no_grad()
def decode(x: torch.Tensor) -> Image.Image:
    """Latents -> a picture."""
    latents = x / components.vae.config.scaling_factor
    return VaeImageProcessor().postprocess(components.vae.decode(latents).sample)[0]


# %% [markdown]
# **Predict**: at which of 24 steps will you know the place? And at which the colour of the cat?

# %%
trajectory, beliefs = paint("a photo of a purple cat in the snow")
shown = [0, 3, 6, 9, 12, 16, 20, 23]
rows = [[decode(trajectory[i]) for i in shown], [decode(beliefs[i]) for i in shown]]
plots.show(
    plots.image_rows(
        rows, labels=["the latents", "what it believes\nwill come out"], titles=[f"step {i}" for i in shown]
    ),
    alt="Upper row: noise that becomes a purple cat in the snow late. Lower row: a pale guess that sharpens step by step",
)

# %%
browse({f"step {i}": decode(x) for i, x in enumerate(beliefs)}, "denoising")

# %% [markdown]
# **What you should see**: in the upper row noise for a long time, and then quickly a cat. The lower row tells why: from
# the first step on there is a guess, pale at first. Place and broad colours come first, the outline next, eyes and ears
# last. Noisy steps decide what is there, late steps how it looks. Training draws its noise levels at random and so learns all of it.
#
# ## How much guidance?

# %%
scales = (1.0, 2.0, 4.0, 8.0, 16.0)
rows = [
    [decode(paint("a photo of a purple cat in the snow", scale, seed=s)[0][-1]) for scale in scales] for s in (1, 2)
]
plots.show(
    plots.image_rows(rows, titles=[f"guidance {scale:g}" for scale in scales], inches=1.4),
    alt="Two rows of cats: vague at guidance 1, clear at 4, colours too strong at 16",
)

# %% [markdown]
# **What you should see**: at 1 the prompt is a hint; at 4 it is followed; far above that, colours and contrasts are
# overdone. The miniature's default is 4, Stable Diffusion's 7.5.
#
# ## Freeze, cast
#
# A frozen part keeps no gradients and no optimizer state, so it can also be kept in a smaller number format. `bfloat16`
# halves the memory. What will be trained stays in `float32` in any case (notebook 04).

# %%
load_components("miniature", weight_dtype=torch.bfloat16)

# %% [markdown]
# Each part can have its own format. A VAE, for one, is often kept in `float32`, since in `float16` it can overflow, and
# pictures turn black.

# %%
mixed = load_components("miniature", weight_dtype={"unet": torch.bfloat16, "text_encoder": torch.bfloat16})
Table({"part": row["part"], "dtype": row["dtype"], "memory": row["memory"]} for row in mixed.table())

# %% [markdown]
# ## On your own
#
# 1. Send a picture of pure noise through the VAE and back. Why does it come back as something else? (2 minutes)
# 2. Call `paint` with a prompt of things that exclude each other (`a photo of a red blue dog`). Who wins? (2 minutes)
# 3. Swap the roles in `paint`: use `"a photo of a red cat"` in place of the empty prompt. What is that good for?
#    (5 minutes)
#
# <details><summary>Answers</summary>
#
# 1. The VAE learned pictures of toys; it can only paint what looks like them.
# 2. `decode(paint("a photo of a red blue dog")[0][-1])`, with several seeds: often one of the two, sometimes a dog in both
#    colours.
# 3. A **negative prompt**: the picture is steered away from it.
# </details>
#
# ## In short
#
# - Text encoder, VAE, UNet: words to vectors, pictures to latents, noise to less noise.
# - The base's own files say which classes they are, and whether there is a VAE.
# - Everything is frozen. What is trained comes on top.
#
# Next: [04 Dual LoRA](04_dual_lora.ipynb), what is trained.
