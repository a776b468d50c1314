# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00b How diffusion works: from noise to a picture, by hand
#
# **What you will do**: build a diffusion model of thirty lines that draws points in the plane, from the noise to the
# sampling loop. Then run the same loop on the miniature and get the picture that diffusers draws.
#
# **What you will learn**: what the network is asked in training, why its answer is blurred when the noise hides much,
# how a picture emerges from noise step by step, and what *classifier-free guidance* does. All later notebooks build on
# this.
#
# **What you need**: no earlier notebook. About half a minute on two CPU cores.
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
# This notebook introduces no module. It uses only torch, and at the end the miniature.

# %%
import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from dbnb import plots, workflow
from dbnb.drawing import build_pipeline
from dbnb.models import encode_prompts, load_components
from dbnb.widgets import browse

workflow.quiet_libraries()
base = load_components("miniature")

# %%
plots.you_are_here("00b")

# %% [markdown]
# ## A world of two words
#
# A picture is a point in a space of many dimensions, one for each number in it. Pictures of dogs are a small, curved
# part of that space. Here is a space that fits on the page instead: it has two dimensions and two words, a *ring* and
# a *cross*. A model that has learned them can be asked for a point of one or of the other.


# %%
def points_of(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, 2) points, and for each its word: 0 for the ring, 1 for the cross."""
    words = torch.randint(2, (count,), generator=generator)
    u, other = torch.rand(count, generator=generator), torch.rand(count, generator=generator) < 0.5
    ring = 1.2 * torch.stack([torch.cos(2 * math.pi * u), torch.sin(2 * math.pi * u)], 1)
    along = 2.4 * u - 1.2
    cross = torch.stack([along, torch.where(other, along, -along)], 1)
    points = torch.where(words[:, None] == 0, ring, cross)
    return points + 0.04 * torch.randn(count, 2, generator=generator), words


WORDS = ("ring", "cross", "no word")
clean, words = points_of(1500, torch.Generator().manual_seed(0))
plots.show(
    plots.clouds([[clean[words == 0].numpy(), clean[words == 1].numpy()]], titles=WORDS[:2], title="All there is"),
    alt="Two panels: points on a ring, and points on a diagonal cross",
)

# %% [markdown]
# ## Noise, by a formula
#
# A diffusion model learns to undo damage, and the damage is known exactly. To a clean point $x_0$, noise $\epsilon$
# from a normal distribution is added:
#
# $$x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon$$
#
# (Ho et al., 2020, equation 4). The number $\bar\alpha_t$ falls from nearly 1 at $t = 0$ to nearly 0 at $t = 999$: the
# larger $t$ is, the less of the point is left. The thousand values are the **noise schedule**. Here it is the
# miniature's, which is the same as that of Stable Diffusion 1.5, 2.1 and XL.

# %%
alpha_bar = base.noise_scheduler.alphas_cumprod


def add_noise(x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """(N, 2) clean points, (N, 2) noise, (N,) timesteps -> (N, 2) noisy points."""
    a = alpha_bar[t][:, None]
    return a.sqrt() * x + (1 - a).sqrt() * noise


# %%
noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
times = (0, 100, 300, 500, 999)
plots.show(
    plots.clouds(
        [[add_noise(clean, noise, torch.full((len(clean),), t)).numpy() for t in times]],
        groups=words.numpy(),
        titles=[f"t = {t}: {alpha_bar[t].sqrt():.2f} of the point" for t in times],
        title="The forward process: from the world to noise",
        inches=2.0,
    ),
    alt="Five panels: ring and cross in two colours, more and more blurred, at last one round cloud",
)

# %% [markdown]
# **What you should see**: ring and cross dissolve, and at $t = 999$ the two colours lie in the same round cloud. So
# nobody can tell from the last panel where a point came from. This is what makes drawing possible: a random number
# generator can produce a point of *that* cloud without any picture.
#
# ## A denoiser
#
# The network sees a noisy point, the timestep and the word, and answers with the noise that it believes to be in the
# point. The timestep is given as sines and cosines of several frequencies, as in Stable Diffusion's denoiser. The
# point is given in the same way here, since this helps a small network to draw sharp lines. The word is given as a
# vector, an *embedding*. A third "word" stands for no word at all; it will be needed below.


# %%
class Denoiser(torch.nn.Module):
    """(N, 2) noisy points, (N,) timesteps, (N,) words -> (N, 2) the noise in them."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(len(WORDS), 16)
        sizes = (2 + 24 + 16 + 16, width, width, width)
        layers = [
            part for a, b in zip(sizes, sizes[1:], strict=False) for part in (torch.nn.Linear(a, b), torch.nn.SiLU())
        ]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(width, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
        angles = t[:, None] / 1000 * (math.pi / 2) * 2.0 ** torch.arange(8)
        waves = (x[:, None] * 2.0 ** torch.arange(6)[:, None]).flatten(1)
        seen = [x, waves.sin(), waves.cos(), angles.sin(), angles.cos(), self.embedding(word)]
        return self.layers(torch.cat(seen, 1))


# %%
with torch.random.fork_rng():
    torch.manual_seed(0)
    model = Denoiser()
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# ## The loss
#
# Training is quickly described. Draw clean points, draw timesteps, draw noise, mix, ask, and compare the answer with
# the noise that was put in: the mean of the squared differences. The UNet of Stable Diffusion 1.5 is trained in the
# same way. One point in four is shown without its word. **Predict**: can the loss reach zero?

# %%
generator, steps, log = torch.Generator().manual_seed(2), 3000, []
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
for _ in range(steps):
    x, word = points_of(512, generator)
    word = torch.where(torch.rand(512, generator=generator) < 0.25, 2, word)
    t, noise = torch.randint(1000, (512,), generator=generator), torch.randn(512, 2, generator=generator)
    loss = F.mse_loss(model(add_noise(x, noise, t), t, word), noise)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    log.append(loss.item())

# %%
means = [float(np.mean(log[start : start + 50])) for start in range(0, steps, 50)]
plots.show(
    plots.curves(
        {"mean of 50 steps": (list(range(50, steps + 1, 50)), means)},
        xlabel="step",
        ylabel="mean squared error",
        title=f"The loss ends at {means[-1]:.2f}, far above zero",
    ),
    alt="A curve that falls fast at first and then slowly to about a quarter",
)

# %% [markdown]
# **What you should see**: a fast fall, then a slow one that ends far above zero (the axis does not begin at 0). The
# noise cannot be known exactly. At a small $t$, a point of the ring that was moved a little *along* the ring is again a
# point of the ring: this part of the noise leaves no trace, and no network can find it. At a large $t$ the noise is
# easy to name, since it is nearly all there is; but there the *clean point* cannot be known: it may have been anywhere
# on the ring. Which answer, then, has the smallest error?
#
# ## Why the answer is blurred
#
# The answer also says what the model *believes* the clean point to be: solve the formula for $x_0$. A squared error is
# smallest for the **mean** of everything that is possible. **Predict**: where do the beliefs lie when the noise hides
# nearly everything?


# %%
@torch.no_grad()
def belief(x: torch.Tensor, answer: torch.Tensor, t: int) -> torch.Tensor:
    """The clean points that an answer stands for."""
    return (x - (1 - alpha_bar[t]).sqrt() * answer) / alpha_bar[t].sqrt()


noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
beliefs, levels = [], (50, 200, 400, 700)
for t in levels:
    at = torch.full((len(clean),), t)
    x = add_noise(clean, noise, at)
    beliefs.append(belief(x, model(x, at, words).detach(), t).numpy())
plots.show(
    plots.clouds(
        [beliefs], groups=words.numpy(), titles=[f"t = {t}" for t in levels], title="What it believes", inches=2.0
    ),
    alt="Four panels: ring and cross, whose middle is blurred, then shrinking towards the middle, at last a small cloud in the centre",
)

# %%
# NBVAL_CHECK_OUTPUT
spread = [float(np.linalg.norm(points, axis=1).mean()) for points in beliefs]
assert spread == sorted(spread, reverse=True), spread
print("the more noise, the nearer the belief is to the mean:", spread[-1] < 0.5 * spread[0])

# %% [markdown]
# **What you should see**: with little noise, the beliefs lie on ring and cross, except near the middle of the cross,
# where either arm is possible. With much noise, they shrink towards the centre, the mean of the shape. No point of
# the ring lies there. With pictures, the mean of many possible dogs is a blurred dog. That is why a diffusion model
# does not draw in one step.
#
# ## Drawing, step by step
#
# So trust the answer only a little. Take the belief, and add back the noise that the model found, but somewhat less of
# it:
#
# $$x_{t'} = \sqrt{\bar\alpha_{t'}}\, \hat x_0 + \sqrt{1 - \bar\alpha_{t'}}\, \hat\epsilon$$
#
# This is one step of **[DDIM](../docs/glossary.md#ddim)** (Song et al., 2021, equation 12, without fresh noise). At
# the next, smaller $t'$ less is hidden, and the next belief is better.


# %%
def ddim_step(x: torch.Tensor, answer: torch.Tensor, t: int, to: int) -> torch.Tensor:
    """Noisy points at `t` and the noise that was found in them -> points at the smaller timestep `to`."""
    a = alpha_bar[to]
    return a.sqrt() * belief(x, answer, t) + (1 - a).sqrt() * answer


@torch.no_grad()
def sample(word: int, guidance: float = 1.0, count: int = 1500, steps: int = 40) -> list[torch.Tensor]:
    """The points after each step, from noise on."""
    way = torch.linspace(999, 0, steps + 1).long().tolist()
    states = [torch.randn(count, 2, generator=torch.Generator().manual_seed(4))]
    for t, to in zip(way, way[1:], strict=False):
        at, x = torch.full((count,), t), states[-1]
        with_word, without = (model(x, at, torch.full((count,), w)) for w in (word, 2))
        states.append(ddim_step(x, without + guidance * (with_word - without), t, to))
    return states


# %%
shown = (0, 16, 28, 34, 40)
rows = [[sample(word)[k].numpy() for k in shown] for word in range(3)]
plots.show(
    plots.clouds(
        rows, labels=WORDS, titles=[f"step {k} of 40" for k in shown], title="From noise to what was asked for"
    ),
    alt="Three rows of five panels: a round cloud becomes a ring, a cross, or a mixture where no word was given",
)

# %% [markdown]
# **What you should see**: all rows start from the same noise. The word alone decides what becomes of it; without a
# word, a mixture of both appears, with many points that belong to neither. Even the ring and the cross have a few
# stray points, since this network is small. Every point had a belief of its own, and the steps have carried it to
# *one* of the possibilities instead of to their mean.
#
# ## Guidance
#
# `sample` has a second parameter. At every step the network is asked twice, with the word and without. The difference
# between the two answers is what the word changes, and **[classifier-free
# guidance](../docs/glossary.md#classifier-free-guidance)** (Ho and Salimans, 2022) multiplies that difference:
#
# $$\hat\epsilon = \hat\epsilon_{\varnothing} + w\,(\hat\epsilon_{word} - \hat\epsilon_{\varnothing})$$
#
# **Predict**: what will be drawn at $w = 0$, at 1 and at 8?

# %%
scales = (0.0, 1.0, 3.0, 8.0)
plots.show(
    plots.clouds(
        [[sample(0, guidance=w)[-1].numpy() for w in scales]],
        titles=[f"guidance {w:g}" for w in scales],
        title="Asked for a ring, more and more strongly",
        inches=2.0,
    ),
    alt="Four panels: a mixture of both shapes, a ring, a ring bent to a rhombus, and at guidance 8 clumps far away",
)

# %% [markdown]
# **What you should see**: at 0 the word has no effect; at 1 the model draws as it was trained. A larger value removes
# nearly all stray points but already bends the ring, which is pulled in on the diagonals, where the cross has its arms.
# At a much larger value little is left except clumps far from the cross. Pictures drawn with too much guidance have the
# same fault: garish colours and little variety.
#
# ## The same loop, on the miniature
#
# Pictures need nothing new. An autoencoder (VAE) first makes a picture smaller, so the point becomes a
# *[latent](../docs/glossary.md#latents)* of 12 x 16 x 16 numbers. The network becomes a *[UNet](../docs/glossary.md#unet)*,
# the denoiser of Stable Diffusion, and the word becomes the prompt's *[hidden states](../docs/glossary.md#hidden-state)*,
# one vector for each token. Notebook 03 takes these parts one by one. There is one difference: this UNet answers with $v =
# \sqrt{\bar\alpha_t}\,\epsilon - \sqrt{1 - \bar\alpha_t}\,x_0$ (Salimans and Ho, 2022), a mixture from which both
# noise and picture can be computed. This is its version of `belief` and of the noise:


# %%
def noise_and_belief(x: torch.Tensor, v: torch.Tensor, t: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What an answer v says of a noisy latent: the noise in it, and the clean latent."""
    a = alpha_bar[t]
    return a.sqrt() * v + (1 - a).sqrt() * x, a.sqrt() * x - (1 - a).sqrt() * v


@torch.no_grad()
def decoded(latents: torch.Tensor) -> list:
    """Latents -> pictures."""
    pipeline = build_pipeline(base)
    return pipeline.image_processor.postprocess(base.vae.decode(latents / base.vae.config.scaling_factor).sample)


# %%
prompt, guidance, steps = "a photo of a red dog on the beach", 2.5, 20
scheduler = DDIMScheduler.from_config(base.noise_scheduler.config)
scheduler.set_timesteps(steps)
latent = torch.randn(1, base.unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(8))
hidden = encode_prompts(base, [prompt, ""])
way, x, film = [*scheduler.timesteps.tolist(), 0], latent, []
for t, to in zip(way, way[1:], strict=False):
    with torch.no_grad():
        with_prompt, without = base.unet(x.repeat(2, 1, 1, 1), t, encoder_hidden_states=hidden).sample.chunk(2)
    found, clean_latent = noise_and_belief(x, without + guidance * (with_prompt - without), t)
    film.append((t, x, clean_latent))
    x = alpha_bar[to].sqrt() * clean_latent + (1 - alpha_bar[to]).sqrt() * found
mine = decoded(x)[0]

# %% [markdown]
# **Predict**: what does it believe after the first step, and at which step is the dog red?

# %%
at = [0, 2, 5, 9, 13, 16, 19]
noisy, believed = ([decoded(film[k][part])[0] for k in at] for part in (1, 2))
plots.show(
    plots.image_rows(
        [noisy, believed],
        labels=["what it sees", "what it believes"],
        titles=[f"t = {film[k][0]}" for k in at],
        title="Twenty steps from noise to a red dog",
    ),
    alt="Two rows of seven pictures: above, noise that clears up; below, a blurred guess that becomes a red dog on a beach",
)

# %% [markdown]
# **What you should see**: the first belief, from pure noise, is a blurred red dog on a beach. It is close to
# the mean of all pictures that the prompt allows, in the pose that most of them share (guidance pushes it a little
# further, which makes the red redder). The steps turn it into one of them: place,
# colour and the coarse outline are there from the first step, and details come last. A slider shows every step:

# %%
frames = {f"step {k + 1}, t = {t}": decoded(clean_latent)[0] for k, (t, _, clean_latent) in enumerate(film)}
browse(frames, "belief at")

# %% [markdown]
# Does diffusers draw the same picture? Its pipeline gets the same noise, and a *scheduler*, which holds the timesteps
# and makes the DDIM step. (With `set_alpha_to_one=False` its last step ends at $t = 0$, as ours does, and not at a
# picture that is entirely free of noise.)

# %%
# NBVAL_CHECK_OUTPUT
pipeline = build_pipeline(base)
pipeline.scheduler = DDIMScheduler.from_config(base.noise_scheduler.config, set_alpha_to_one=False)
theirs = pipeline([prompt], latents=latent, num_inference_steps=steps, guidance_scale=guidance).images[0]
difference = np.abs(np.asarray(mine, dtype=int) - np.asarray(theirs, dtype=int))
print("the same picture, up to rounding:", difference.max() <= 2)

# %% [markdown]
# ## What DreamBooth adds
#
# All of this stays as it is. DreamBooth trains a little further with the same loss, on five photographs and a word of
# their own. The paper fine-tunes *all* weights of the UNet. This course freezes them and trains small *adapters*
# beside them (LoRA, notebook 04), which need far less memory; notebook 06 trains both ways and compares them. The rest
# of the course is about doing that without breaking what you have just seen.
#
# ## On your own
#
# 1. Draw with 5 steps instead of 40. Where do the points end, and why? (2 minutes)
# 2. Train a second model whose answer is the clean point itself instead of the noise. What changes in `belief`? (10
#    minutes)
# 3. Why must the last panel of the forward process look the same for both words? (think)
# 4. What does a *negative prompt* do in the formula of guidance? (think)
#
# <details><summary>Answers</summary>
#
# 1. Between the ring and the centre: with few steps each belief is trusted for too long, and the beliefs at high noise
#    lie near the mean.
# 2. The answer is the belief, and the noise is computed from it. Such a model has little to do near $t = 0$, and a
#    model that predicts noise has little to do near $t = 999$. That is why $v$, a mixture of the two, is easier for a
#    small model.
# 3. Drawing starts from pure noise, whatever the word. If something of the shape were left at $t = 999$, the model
#    would expect it there, and noise without it would be unlike anything that it has seen in training.
# 4. It takes the place of the empty prompt: the answer is pushed away from what the negative prompt would give.
# </details>
#
# ## Quiz
#
# Five questions about *why*. Choose an answer, then open it: it says whether it is right, and why.
#
# **1. Why can drawing begin from random numbers that were not made from any picture?**
#
# <details><summary>A. Because the network was shown pure noise, each time with its picture.</summary>
#
# No: in training, noise at the last timestep is paired with any picture at all; no noise belongs to a picture.
# </details>
#
# <details><summary>B. Because at the last timestep noisy pictures and noise look the same.</summary>
#
# Right: almost nothing of the picture is left there, so a sample of noise is as good as a noisy picture.
# </details>
#
# <details><summary>C. Because the prompt holds all that is needed, and noise is ignored.</summary>
#
# No: with the same prompt, other noise gives another picture: the noise decides all that the prompt leaves open.
# </details>
#
# **2. Why does the training loss stop falling well above zero?**
#
# <details><summary>A. Because the noise cannot be known exactly from the noisy point.</summary>
#
# Right: several pairs of point and noise give the same noisy point; the best answer is wrong for each of them.
# </details>
#
# <details><summary>B. Because the learning rate is too high near the end of training.</summary>
#
# No: the learning rate falls to zero here and the loss stays. More training would not lower it by much.
# </details>
#
# <details><summary>C. Because a network of this size cannot hold all training points.</summary>
#
# No: there are no training points to hold: new ones are drawn at every step.
# </details>
#
# **3. Why does the belief shrink towards the centre when there is much noise?**
#
# <details><summary>A. Because the noise schedule makes all the coordinates smaller.</summary>
#
# No: the formula for the belief divides by just that factor, so the shrinking has another cause.
# </details>
#
# <details><summary>B. Because the network has seen fewer examples at late timesteps.</summary>
#
# No: timesteps are drawn evenly, so all of them were seen equally often.
# </details>
#
# <details><summary>C. Because the mean of all possible points has the least error.</summary>
#
# Right: a squared error is smallest for the mean, and the mean of a ring is its centre.
# </details>
#
# **4. Why does DDIM add noise back after each belief?**
#
# <details><summary>A. So that the next point looks to the network like one of its timestep.</summary>
#
# Right: at the next timestep the network expects as much noise as the schedule says.
# </details>
#
# <details><summary>B. So that two runs from the same noise end in different pictures.</summary>
#
# No: the noise that is added back is the noise that was found, so the same start gives the same end.
# </details>
#
# <details><summary>C. So that the picture gets a grain, as photographs have it as well.</summary>
#
# No: no noise is left after the last step; a grain would be a fault of the model.
# </details>
#
# **5. Why is one point in four shown without its word during training?**
#
# <details><summary>A. So that training is shorter, because an empty word costs no time.</summary>
#
# No: each sample costs the same, with a word or without.
# </details>
#
# <details><summary>B. So that the words do not become too strong, as a regularisation.</summary>
#
# No: that is a side effect at most; the answer without a word is needed for something.
# </details>
#
# <details><summary>C. So that guidance has an answer without the word to compare with.</summary>
#
# Right: classifier-free guidance needs both answers from the same network.
# </details>
#
# ## In short
#
# - The forward process is a formula; training asks a network for the noise in a noisy picture, by a squared error.
# - The best answer is a mean, so one step gives a blur; many steps, each of which trusts the answer a little, give one
#   sharp picture.
# - Guidance asks twice and exaggerates the difference that the prompt makes.
#
# Next: [01 Instance data](01_instance_data.ipynb), the photographs and their prompts.
