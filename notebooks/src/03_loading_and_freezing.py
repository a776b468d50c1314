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
# encoder, and noise through its [UNet](../docs/glossary.md#unet), step by step, until it is a picture.
#
# **What you will learn**: what the parts are and what each of them expects; how the UNet is built inside; how the
# files of a base say what it is; what a smaller number format saves. Afterwards you can write the sampling loop of a
# diffusion model from memory: it is ten lines.
#
# **What you need**: notebook [00](00_start_here.ipynb). About twenty seconds on two CPU cores.
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
# The new module is `dbnb.models`.

# %%
import json

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from dbnb import plots, toybox, workflow
from dbnb.attention import attention_maps, attention_rows
from dbnb.metrics import through_vae
from dbnb.models import ARCHITECTURES, encode_prompts, load_components, text_architecture
from dbnb.planner import BASES
from dbnb.presets import suggested
from dbnb.tables import Table
from dbnb.widgets import browse

workflow.quiet_libraries()
components = load_components("miniature")
components

# %%
plots.you_are_here("03")

# %% [markdown]
# These are three networks, loaded and **[frozen](../docs/glossary.md#frozen)**: look at the column `trainable`. The
# DreamBooth paper fine-tunes all weights of the network that removes noise, which is the UNet here. This course leaves
# them frozen and adds small adapters in notebook 04.

# %%
# NBVAL_CHECK_OUTPUT
trainable = [p for module in components.modules().values() for p in module.parameters() if p.requires_grad]
print("parts:", ", ".join(components.modules()), "| trainable parameters:", len(trainable))

# %% [markdown]
# Stable Diffusion 1.5 has the same three parts, only larger. The sizes of its [text
# encoder](../docs/glossary.md#text-encoder) and its [VAE](../docs/glossary.md#autoencoder) are published. Its UNet is
# built here from its published shapes, without storage (on torch's device `meta`), so that nothing has to be
# downloaded.

# %%
# NBVAL_CHECK_OUTPUT
large = BASES["Stable Diffusion 1.5"]
with torch.device("meta"):
    large_unet = UNet2DConditionModel(**large.denoiser)
sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in components.modules().items()}
large_sizes = dict(text_encoder=large.text_parameters, vae=large.vae_parameters)
large_sizes["unet"] = sum(p.numel() for p in large_unet.parameters())
for name, count in sizes.items():
    print(f"{name:12} {count / 1e6:5.1f} million here, {large_sizes[name] / 1e6:5.0f} million in Stable Diffusion 1.5")

# %%
shares = {"miniature": sizes, "Stable Diffusion 1.5": large_sizes}
shares = {base: {name: n / sum(counts.values()) for name, n in counts.items()} for base, counts in shares.items()}
plots.show(
    plots.bars(shares, ylabel="share of the parameters", title="Small or large, most of the model is its UNet"),
    alt="Two groups of three bars: in both bases the UNet holds by far the most parameters",
)

# %% [markdown]
# ## What a base says about itself
#
# A folder written by diffusers (Hugging Face's library of diffusion models) contains an index of the parts and their
# classes. The workflow reads there whether the base has a VAE (DeepFloyd IF has none). If it tried to download one and
# took every failure to mean that there is none, a network error would look like a model without a VAE. In the table,
# `None . None` marks a part that such a pipeline may have and that this base does without.

# %%
index = json.loads((components.base / "model_index.json").read_text())
Table({"part": name, "class": " . ".join(map(str, value))} for name, value in index.items() if isinstance(value, list))

# %% [markdown]
# The config of the text encoder says which architecture it is. The table of known architectures is short; a new family
# is one more row. (Where the second column is empty, the workflow puts no adapters on that text encoder.)

# %%
# NBVAL_CHECK_OUTPUT
print("this base:", text_architecture(components.base)[0])
Table({"architecture": name, "adapters go to": ", ".join(row.lora_targets)} for name, row in ARCHITECTURES.items())

# %% [markdown]
# ## The autoencoder (VAE): pictures to latents and back
#
# Diffusion on pixels is expensive. The VAE encodes a picture into **[latents](../docs/glossary.md#latents)**, which
# here have an eighth of the width and height and more channels, and decodes latents into pictures. All training
# happens on latents.

# %%
# NBVAL_CHECK_OUTPUT
robot = toybox.Toy("robot", body="red", accent="yellow", pattern="striped")
picture = toybox.photograph(robot, scene="beach", seed=3, size=128)
pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1.0
with torch.no_grad():
    latents = components.vae.encode(pixels).latent_dist.mean
print(f"pixels {tuple(pixels.shape)} -> latents {tuple(latents.shape)}")
print(f"{pixels.numel() / latents.numel():.0f} times fewer numbers")

# %% [markdown]
# **Predict**: the channels of the latents as grey pictures. Will you recognise the robot?


# %%
def gray(channel: torch.Tensor) -> Image.Image:
    low, high = channel.min(), channel.max()
    return Image.fromarray(((channel - low) / (high - low) * 255).byte().numpy()).convert("RGB")


channels = [gray(channel) for channel in latents[0]]
titles = ["the picture", *(f"channel {i}" for i in range(len(channels)))]
plots.show(
    plots.show_images([picture, *channels], titles=titles, title="Latents are small pictures: the outline is in them"),
    alt="A robot striped red and yellow on a beach, and coarse grey pictures in which its outline can be recognised",
)

# %% [markdown]
# **What you should see**: sky, sea and sand as bands in about half of the channels, and something of the robot in
# most. No channel *is* a colour. Training on latents cannot bring back what the VAE loses. So look at pictures that
# were encoded and decoded again:

# %%
toys = [toybox.random_toy(kind, 7) for kind in toybox.KINDS]
scenes = list(toybox.SCENES)
originals = [toybox.photograph(toy, scene=scenes[i], seed=i, size=128) for i, toy in enumerate(toys)]
back = through_vae(components, originals, 128)
errors = [np.asarray(a, dtype=float) - np.asarray(b, dtype=float) for a, b in zip(originals, back, strict=True)]
psnr = [10 * np.log10(255**2 / (error**2).mean()) for error in errors]
plots.show(
    plots.image_rows(
        [originals, back],
        labels=["picture", "through the VAE"],
        titles=[f"{value:.1f} dB" for value in psnr],
        title="Nearly all comes back; the smallest details do not",
    ),
    alt="Six toys, and the same after encoding and decoding: nearly equal, small details softer",
)

# %% [markdown]
# **What you should see**: the same toys, a little softer at eyes and edges. The titles give the PSNR of each pair, a
# logarithm of the mean squared error: six decibels more mean a *quarter* of the mean squared error, or half of the
# typical error of a pixel. In grey levels:

# %%
typical = [255 / 10 ** (value / 20) for value in psnr]
print("typical error of a pixel, in grey levels of 255:", ", ".join(f"{value:.0f}" for value in typical))

# %%
# NBVAL_CHECK_OUTPUT
assert max(typical) < 25, "this VAE loses too much to be trained on"
halved = 10 * np.log10(255**2 / ((errors[0] / 2) ** 2).mean())
print(f"half of every pixel's error: {halved - psnr[0]:+.2f} dB")

# %% [markdown]
# ## The text encoder: prompts to vectors
#
# A prompt becomes tokens, padded to a fixed number, and each token becomes a vector, its *hidden state*, which also
# depends on the tokens before it.

# %%
# NBVAL_CHECK_OUTPUT
prompts = ["a photo of a red dog", "a photo of sks dog", "a photo of a dog on the beach"]
tokens = components.tokenizer(prompts[0], padding="max_length").input_ids
print(components.tokenizer.convert_ids_to_tokens(tokens)[:9], "… in all", len(tokens))
with torch.no_grad():
    hidden = encode_prompts(components, prompts)
print("hidden states:", tuple(hidden.shape))

# %% [markdown]
# How similar are prompts to the text encoder? Take the mean vector of each prompt, subtract the mean of all prompts,
# and compute the cosine between any two: 1 means the same direction. **Predict**: is `sks dog` nearer to `dog` or to
# `red dog`? Will it be the same as `dog`?

# %%
words = ["red dog", "blue dog", "sks dog", "dog", "red car", "blue car", "teapot"]
with torch.no_grad():
    means = encode_prompts(components, [f"a photo of a {word}" for word in words]).mean(1)
means = torch.nn.functional.normalize(means - means.mean(0), dim=1)
similarity = means @ means.T
figure = plots.matrices(
    {"cosine": similarity.numpy()}, inches=3.4, labels=words, title="Seven prompts, as the text encoder sees them"
)
plots.show(
    figure, alt="A matrix of similarities: 'sks dog' and 'dog' are related but not the same; colours group prompts"
)

# %%
nearest = similarity.fill_diagonal_(-1).argmax(1)
print({word: words[int(other)] for word, other in zip(words, nearest, strict=True)})
assert words[nearest[0]] == "red car" and words[nearest[2]] == "dog"

# %% [markdown]
# **What you should see**: `sks dog` is a prompt of its own, nearer to `dog` than to the coloured dogs, and clearly not
# the same as `dog`. The printed line names the nearest prompt of each: `red dog` is nearer to `red car` than to `dog`,
# so a colour counts for more than a kind. (`dog` is even nearest to `teapot`: these two have no word before the noun.
# Notebook 01 looked at the same states one by one.)
#
# ## The UNet: from noise to a picture
#
# The UNet gets noisy latents, a number that says how noisy they are (the timestep), and the prompt's hidden states. Its
# answer says what noise it sees in the latents, and therefore what the clean picture would be. (Some bases answer with
# the noise itself. This one answers with a mix of noise and picture called $v$. The
# *[scheduler](../docs/glossary.md#scheduler)*, the table of how much noise belongs to which step, has a setting,
# `prediction_type`, that says which; notebook 06 explains why.) Remove a little of that noise, ask again, and after
# some tens of steps there is a picture. This is how the UNet is built, as its config tells:

# %%
plots.show(
    plots.unet(components.unet, title="The miniature's UNet: down to small latents, and up again"),
    alt="A U of seven blocks: three down, one in the middle, three up, skip connections between blocks of equal size; "
    "the timestep enters every block, the prompt enters blocks with cross-attention",
)

# %% [markdown]
# **Read it from the left.** The *down* blocks halve the latents and add channels: each number then stands for a
# larger part of the picture. The *up* blocks reverse this, and a **skip connection** hands each of them what the
# block of the same size had found, so that details do not have to pass through the narrow middle. **Convolutions**
# look at neighbouring places. In **self-attention** each place looks at all others, so that a dog's left side knows
# of its right side. In **cross-attention** each place looks at the words of the prompt; here this is the only way
# in for the prompt. (In SDXL a summary of the prompt, the *pooled* vector, is added to that of the timestep as well.)
# The **timestep** is turned into a vector, as in notebook 00b, and added inside every block. Adapters
# will sit beside layers of these blocks. The diamonds show where they *can* sit; on the miniature they sit beside all
# layers of the last two, *up 1* and *up 2* (notebook 04 says why).
#
# How much does one word in the prompt change the answer? Take pure noise at the highest timestep, where drawing begins,
# and a prompt with one word added. The bars show how far the word moves the last hidden state of the prompt, and how
# far it moves the UNet's answer, both as a share of what `red` does. **Predict**: `sks` moves the states at least as
# far as `red` does. How far will it move the answer?

# %%
added = ["red", "spotted", "sks", "zwx"]
with torch.no_grad():
    hidden = encode_prompts(components, ["a photo of a dog", *(f"a photo of a {word} dog" for word in added)])
    noise = torch.randn(1, *latents.shape[1:], generator=torch.Generator().manual_seed(0)).expand(
        len(hidden), -1, -1, -1
    )
    answers = components.unet(noise, 999, encoder_hidden_states=hidden).sample
heard, used = ((values[1:] - values[:1]).flatten(1).norm(dim=1) for values in (hidden[:, -1], answers))
shares = {
    word: {"last hidden state": (heard[i] / heard[0]).item(), "UNet's answer": (used[i] / used[0]).item()}
    for i, word in enumerate(added)
}
plots.show(
    plots.bars(
        shares,
        ylabel="change, as a share of red's",
        title="'sks' moves the text encoder's states, but hardly the UNet's answer",
    ),
    alt="Pairs of bars: for 'sks' and 'zwx' the state moves further than for 'red', the UNet's answer hardly at all",
)

# %%
# NBVAL_CHECK_OUTPUT
assert shares["sks"]["UNet's answer"] < 0.3 < shares["sks"]["last hidden state"], shares
print("'sks' reaches the text encoder's states and hardly changes the UNet's answer")

# %% [markdown]
# **What you should see**: two equal bars for `red`, a lower pair for `spotted`, and for an identifier a high first bar
# and almost no second one. What the
# identifier adds to the states lies in directions to which the UNet's cross-attention hardly responds: the
# miniature's text encoder was trained to put unknown names there, and on another base you would have to measure it.
# So the base draws any dog for `sks dog`, and an adapter on the UNet can learn to respond to exactly these directions
# (notebook 04).
#
# To steer towards the prompt, the UNet is asked twice, with the prompt and with an empty one, and the difference is
# exaggerated: **[classifier-free guidance](../docs/glossary.md#classifier-free-guidance)** (Ho and Salimans, 2022).
#
# $$ \hat v = \hat v_{\text{empty}} + g \, (\hat v_{\text{prompt}} - \hat v_{\text{empty}}) $$
#
# ($g$ is `guidance_scale`.) This is the whole loop, without diffusers' *pipeline*, which wraps it in one call. Its
# line with `schedule.step` removes the noise; notebook 00b wrote it out, and exercise B asks you for it:


# %%
@torch.no_grad()
def paint(prompt: str, guidance_scale: float = 2.5, steps: int = 20, seed: int = 1, empty_prompt: str = ""):
    """The latents, step by step from the noise on, and the clean latents that the UNet believes in at each step."""
    schedule = DDIMScheduler.from_config(components.noise_scheduler.config)
    schedule.set_timesteps(steps)
    words = encode_prompts(components, [empty_prompt, prompt])
    x = torch.randn(1, *latents.shape[1:], generator=torch.Generator().manual_seed(seed))
    trajectory, beliefs = [x], []
    for t in schedule.timesteps:
        empty, told = components.unet(torch.cat([x, x]), t, encoder_hidden_states=words).sample.chunk(2)
        step = schedule.step(empty + guidance_scale * (told - empty), t, x)
        x = step.prev_sample
        trajectory.append(x)
        beliefs.append(step.pred_original_sample)
    return trajectory, beliefs


# %% [markdown]
# Diffusion works on latents with a standard deviation of about 1. They are multiplied by `scaling_factor` to get
# there, and divided by it before decoding (it is 1 here, and 0.18215 in Stable Diffusion 1.5):


# %%
@torch.no_grad()
def decode(x: torch.Tensor) -> Image.Image:
    """Latents -> a picture."""
    latents = x / components.vae.config.scaling_factor
    return VaeImageProcessor().postprocess(components.vae.decode(latents).sample)[0]


# %% [markdown]
# **Predict**: at which of the 20 steps will you recognise the place? And the colour of the cat?

# %%
trajectory, beliefs = paint("a photo of a purple cat in the snow")
believed = [decode(x) for x in beliefs]
shown = [0, 2, 5, 8, 11, 14, 17, 19]
plots.show(
    plots.image_rows(
        [[decode(trajectory[i]) for i in shown], [believed[i] for i in shown]],
        labels=["the latents", "what it believes\nwill come out"],
        titles=[f"step {i}" for i in shown],
        title="The picture is decided long before it can be seen",
    ),
    alt="Upper row: noise that becomes a purple cat in the snow late. Lower row: a pale, blurred guess that is nearly finished by step 8",
)

# %% [markdown]
# **What you should see**: in the upper row there is noise for a long time, and then quickly a cat. The lower row
# shows why: there is a guess from the first step on. Step 0 has seen nothing but noise, so its guess is close to the
# mean of all that the prompt allows (guidance pushes it a little further): a blurred purple shape in front of snow.
# Colour, place and a coarse outline are there within the first steps; tail, shadow and the edges of the trees follow.
# (Not everything turns out well: this cat never gets a clear eye.) Noisy steps decide what is there, late steps how
# it looks. Training draws its timesteps at random and so learns both.
#
# All guesses, one at a time (in a live notebook):

# %%
browse({f"step {i}": picture for i, picture in enumerate(believed)}, "denoising")

# %% [markdown]
# How soon is the picture decided? This is the distance of each guess from the final one, as a share of the distance at
# step 0:

# %%
distances = [float((belief - beliefs[-1]).norm()) for belief in beliefs]
plots.show(
    plots.curves(
        {"distance": (range(len(distances)), [d / distances[0] for d in distances])},
        xlabel="step",
        ylabel="distance of the guess from the result",
        title="The guess settles early, then details change",
    ),
    alt="A falling curve: the guess of the first step is far from the result, later ones ever nearer",
)
half = next(step for step, distance in enumerate(distances) if distance < distances[0] / 2)
print(f"half of the distance is covered at step {half} of {len(distances) - 1}")

# %% [markdown]
# ## Which word paints what?
#
# In **cross-attention**, each token gets a share of the attention at every place of the latents, and the shares of a
# place sum to 1 (Hertz et al., 2022). `attention_maps` draws one picture in six steps and records the shares. The
# picture below is red where a word gets much attention. **Predict**: where do `red`, `cat` and `of` get the most?

# %%
from dbnb.config import Sampling

found = attention_maps(components, "a photo of a red cat on the beach", Sampling(), seed=1)
plots.show(
    plots.image_rows(
        [*attention_rows([found], slice(0, 2)), *attention_rows([found], slice(-2, None))],
        labels=["first two steps", "last two steps"],
        titles=["drawn", *found.words],
        title="The cat's places look at 'cat', the background at most small words",
    ),
    alt="Two rows: a red and yellow cat on a beach, then the same picture in grey with the share of each word of the prompt in red",
)

# %% [markdown]
# **What you should see**: `cat` marks the cat most clearly; `red` marks its body too, more clearly in the first steps
# than in the last. `beach` is spread over the whole picture. (Each map is scaled to its own range, so compare places
# within a map, and not one word with another.) The small words mark the background as well: a share has to go
# somewhere, and tokens that add nothing take what is left. (So do the tokens at the beginning, at the end and in the
# padding, which are not shown: the shares of the words alone sum to less than 1.) A map says where a word gets
# attention, not what it does there.
#
# ## How much guidance?
#
# At a scale of 1 the empty prompt has no influence, and at 16 the difference is multiplied by sixteen. **Predict**:
# does the picture follow the prompt better each time?

# %%
scales = (1.0, 2.0, 4.0, 8.0, 16.0)
rows = [
    [decode(paint("a photo of a purple cat in the snow", scale, seed=s)[0][-1]) for scale in scales] for s in (1, 2)
]
plots.show(
    plots.image_rows(
        rows,
        titles=[f"guidance {scale:g}" for scale in scales],
        inches=1.4,
        title="More guidance gives purer colours; too much distorts the picture",
    ),
    alt="Two rows of purple cats in snow: the purple is purer up to guidance 4; at 16 ears and tail are orange-red and shapes go wrong",
)

# %%
# NBVAL_CHECK_OUTPUT
print({base: suggested(base)["guidance_scale"] for base in ("miniature", "sd15")})

# %% [markdown]
# **What you should see**: this base follows the prompt fairly well even at 1, because its captions were exact. More
# guidance makes the purple purer, up to about 4, and removes what was not asked for, such as the grey spots of the
# upper cat. Ears and tail change their colours on the way, and at 16 shapes begin to go wrong. A large base, whose
# captions came from the web, follows the prompt only loosely at 1, and so a higher value is suggested for it. (FLUX.1
# [dev] does not work like this: it gets `guidance_scale` as an input and is asked once.)
#
# ## Freeze, cast
#
# A frozen part needs no gradients and no optimizer state, and it can also be stored in a smaller number format.
# `bfloat16` halves the memory: compare the last column with the table at the top. Trained weights stay in `float32` in
# any case (notebook 04).

# %%
load_components("miniature", weight_dtype=torch.bfloat16)

# %% [markdown]
# Each part can have its own format. A VAE, for example, is often kept in `float32`, because it can overflow in
# `float16`, and then pictures turn black (notebook 09, entry 20).

# %%
# NBVAL_CHECK_OUTPUT
mixed = load_components("miniature", weight_dtype={"unet": torch.bfloat16, "text_encoder": torch.bfloat16})
for row in mixed.table():
    print(f"{row['part']:12} {row['dtype']:9} {row['memory']}")

# %% [markdown]
# ## Exercises
#
# ### Exercise A: which class is the text encoder? (6 minutes)
#
# A text encoder's `config.json` says under `architectures` from which class it was saved. Write the function that looks
# this class up in the table of known ones. If the architecture is not in the table, raise a `ValueError` that names it
# and lists the known ones, so that the reader knows what to do next.

# %%
from dbnb.exercises import check_03a


def text_encoder_class(config: dict, known: dict[str, type]) -> type:
    """The class of a text encoder, for a config such as {"architectures": ["CLIPTextModel"], …}."""
    ...


check_03a(text_encoder_class)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `model_type` looks like the right entry as well, but SDXL's two text encoders have the same one.
# </details>
#
# <details><summary>Hint 2</summary>
#
# The entry can be missing. `config.get("architectures") or ["(none)"]` gives a list in any case.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def text_encoder_class(config, known):
#     name = (config.get("architectures") or ["(none)"])[0]
#     if name not in known:
#         raise ValueError(f"The text encoder {name} is not known here; known are {', '.join(known)}.")
#     return known[name]
# ```
# </details>
#
# ### Exercise B: the line inside `schedule.step` (10 minutes)
#
# `paint` leaves its most important line to the scheduler. Write it yourself, with guidance. The UNet has answered
# twice, for the empty prompt and for yours. Its answer $v$ and the noisy latents $x$ contain the same picture $x_0$
# and the same noise $\epsilon$, mixed in two ways:
#
# $$ x = \sqrt{a}\; x_0 + \sqrt{1 - a}\; \epsilon, \qquad v = \sqrt{a}\; \epsilon - \sqrt{1 - a}\; x_0 $$
#
# ($a$, the scheduler's `alphas_cumprod` at this step, says how much of the picture is left.) Solve for $x_0$ and
# $\epsilon$, then mix them again for the next step, which is less noisy: that is [DDIM](../docs/glossary.md#ddim)
# (Song et al., 2021).

# %%
from dbnb.exercises import check_03b


def less_noise(x, empty, told, guidance_scale: float, a: float, a_next: float):
    """The latents of the next step. `empty` and `told` are the UNet's answers to the empty prompt and to yours."""
    ...


check_03b(less_noise)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Guidance comes first: one $v$ from the two answers, by the formula above `paint`.
# </details>
#
# <details><summary>Hint 2</summary>
#
# The two mixtures are a rotation, and a rotation is undone by turning back: $x_0 = \sqrt{a}\, x - \sqrt{1 - a}\, v$,
# and $\epsilon = \sqrt{1 - a}\, x + \sqrt{a}\, v$.
# </details>
#
# <details><summary>Hint 3</summary>
#
# The next latents are the first equation again, with `a_next` in place of `a`.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def less_noise(x, empty, told, guidance_scale, a, a_next):
#     v = empty + guidance_scale * (told - empty)
#     picture = a**0.5 * x - (1 - a) ** 0.5 * v
#     noise = (1 - a) ** 0.5 * x + a**0.5 * v
#     return a_next**0.5 * picture + (1 - a_next) ** 0.5 * noise
# ```
# </details>

# %% [markdown]
# ## On your own
#
# 1. Send a picture of pure noise through the VAE and back. Why does it come back as something else? (2 minutes)
# 2. Call `paint` with a prompt of things that exclude each other (`a photo of a red blue dog`). Who wins? (2 minutes)
# 3. Replace the empty prompt: `paint("a photo of a cat", empty_prompt="a photo of a red cat")`. What is that useful
#    for? (2 minutes)
#
# <details><summary>Answers</summary>
#
# 1. The VAE was trained on pictures of toys, and can decode only what looks like them.
#
# ```python
# noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
# pair = [noise, *through_vae(components, [noise], 128)]
# plots.show(plots.show_images(pair, titles=["noise", "through the VAE"]), alt="noise before and after the VAE")
# ```
#
# 2. Often one of the two, sometimes both in one dog: look at several seeds.
#
# ```python
# both = [decode(paint("a photo of a red blue dog", seed=s)[0][-1]) for s in range(6)]
# plots.show(plots.show_images(both), alt="six dogs, asked to be red and blue")
# ```
#
# 3. A **[negative prompt](../docs/glossary.md#negative-prompt)**: the picture is steered away from it. None of these
#    cats should be red.
#
# ```python
# away = [decode(paint("a photo of a cat", empty_prompt="a photo of a red cat", seed=s)[0][-1]) for s in range(6)]
# plots.show(plots.show_images(away), alt="six cats, none of them red")
# ```
# </details>
#
# ## Quiz
#
# Five questions about *why*. Choose an answer, then open it: it says whether it is right, and why.
#
# **1. Why does diffusion work on latents and not on pixels here?**
#
# <details><summary>A. Pixels cannot be noised, because they are whole numbers from 0 to 255.</summary>
#
# No: pixels scaled to -1 to 1 can be noised just as well as latents; DeepFloyd IF does so.
# </details>
#
# <details><summary>B. Latents are far fewer numbers, and they keep nearly all of the picture.</summary>
#
# Right: the UNet is the expensive part, and its cost grows with the number of positions.
# </details>
#
# <details><summary>C. Latents have no colours, so that the UNet needs to learn nothing but shapes.</summary>
#
# No: the latents contain the colours too, spread over channels none of which is a colour.
# </details>
#
# **2. Why does the workflow read `model_index.json` instead of trying to load an autoencoder?**
#
# <details><summary>A. Reading the index is needed to find out whether the machine has a GPU.</summary>
#
# No: the index lists a model's parts; torch finds the devices of a machine.
# </details>
#
# <details><summary>B. The file holds the weights of the autoencoder in a format that loads faster.</summary>
#
# No: it contains only names of classes; the weights are in the folders of the parts.
# </details>
#
# <details><summary>C. A failed attempt may have many causes, and the index says what there is.</summary>
#
# Right: a network error would otherwise look like a model that has no autoencoder.
# </details>
#
# **3. The UNet answers for two prompts at each step. Why is the difference of the two answers exaggerated?**
#
# <details><summary>A. It is what the prompt contributes, so more of it follows the prompt better.</summary>
#
# Right: that is classifier-free guidance; far beyond the suggested scale, colours and shapes go wrong.
# </details>
#
# <details><summary>B. It is noise that the two answers share, and a large factor makes it cancel.</summary>
#
# No: what the two answers share cancels in the difference whatever the factor is.
# </details>
#
# <details><summary>C. It makes up for the latents, which are smaller than the pictures by that factor.</summary>
#
# No: the size of latents is a matter of the autoencoder and its `scaling_factor`.
# </details>
#
# **4. A changed word in the prompt changes the result a lot if it is changed early, and hardly if late. Why?**
#
# <details><summary>A. The text encoder is switched off after the first half of the steps, to save time.</summary>
#
# No: it runs once, before the first step, and its states are used at every step alike.
# </details>
#
# <details><summary>B. Noisy steps decide what is there, and late steps only how it looks in detail.</summary>
#
# Right: after the first few steps the guess of the clean picture has covered most of its way.
# </details>
#
# <details><summary>C. The solver makes its late steps with random noise instead of the prompt.</summary>
#
# No: the UNet gets the prompt's states at every step, down to the last one.
# </details>
#
# **5. Why may frozen parts be kept in `bfloat16`, though trained weights may not?**
#
# <details><summary>A. They only have to be read, and no small update has to be added to them.</summary>
#
# Right: what a step adds to a weight may be smaller than the format's last digit (notebook 04).
# </details>
#
# <details><summary>B. They are fewer than the trained weights, and so they need fewer digits.</summary>
#
# No: most of the parameters are frozen; the trained ones are the small part.
# </details>
#
# <details><summary>C. They are used only in the first step, and after that they are kept on disk.</summary>
#
# No: every step runs forwards through all frozen weights of the UNet, and backwards as far as the first adapter.
# </details>
#
# ## In short
#
# - Text encoder, VAE, UNet: words to vectors, pictures to latents, noise to less noise.
# - The UNet's blocks go down and up again; skip connections carry details, cross-attention carries the prompt.
# - The base's own files say which classes its parts are, and whether there is a VAE.
# - Everything is frozen. What is trained is added.
#
# Next: [04 Dual LoRA](04_dual_lora.ipynb), what is trained.
