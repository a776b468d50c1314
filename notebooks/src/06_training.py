# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 Training: one step by hand, then all of them
#
# **What you will do**: add noise to a picture and look at every level of it; take one training step by hand and look at
# every tensor; write the loop in a cell and watch the subject arrive.
#
# **What you will learn**: the forward process, what the UNet is asked, the two losses, why a single loss value says
# little and what says more.
#
# **What you need**: notebooks [02](02_prior_preservation.ipynb) to [05](05_dataset.ipynb). About two minutes on two CPU
# cores.
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
# The new module is `dbnb.training`.

# %%

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from dbnb import plots, workflow
from dbnb.adapters import add_adapters, trainable_parameters
from dbnb.concept import Concept
from dbnb.config import DreamBoothConfig
from dbnb.dataset import DreamBoothDataset, cache_latents
from dbnb.models import encode_prompts, load_components
from dbnb.prior import class_images
from dbnb.training import batch_at, clean_latents, held_out_loss, training_step
from dbnb.validation import draw
from dbnb.widgets import browse

workflow.quiet_libraries()
config = DreamBoothConfig(max_train_steps=200, train_text_encoder=True)

# %% [markdown]
# Steps 1 to 5, as the notebooks before this one did them:

# %%
concept = Concept.from_folder(None, config.identifier, config.class_word)
components = load_components(config.base)
prior = class_images(components, concept.class_prompt, config.num_class_images, resolution=config.resolution)
add_adapters(components, rank=config.rank, train_text_encoder=True, seed=config.seed)
dataset = DreamBoothDataset(
    concept.paths, concept.instance_prompt, class_paths=prior.paths, class_prompt=concept.class_prompt,
    size=config.resolution, seed=config.seed,
)  # fmt: skip
cache_latents(dataset, components.vae)
batch = batch_at(dataset, number=0, batch_size=config.train_batch_size)
print(f"a batch of {len(batch['prompts'])}: {config.train_batch_size} of the subject, as many of the class")

# %% [markdown]
# ## The forward process: noise, by a formula
#
# Training needs noisy pictures whose noise is known. They are made in one go, for any level $t$ from 0 to 999
# (Ho et al., 2020, equation 4):
#
# $$ x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\; \epsilon $$
#
# **Predict**: at which $t$ is the toy no longer to be recognised?


# %%
@torch.no_grad()
def decode(x: torch.Tensor) -> Image.Image:
    """Latents (1, C, h, w) -> a picture."""
    latents = x / components.vae.config.scaling_factor
    return VaeImageProcessor().postprocess(components.vae.decode(latents).sample)[0]


x0 = clean_latents(components, batch, seed=0)[:1]
noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
alphas = components.noise_scheduler.alphas_cumprod
noisy = {t: alphas[t].sqrt() * x0 + (1 - alphas[t]).sqrt() * noise for t in range(0, 1000, 37)}
shown = [t for i, t in enumerate(noisy) if i % 4 == 0]
plots.show(
    plots.show_images([decode(noisy[t]) for t in shown], titles=[f"t = {t}" for t in shown]),
    alt="The toy under growing noise: clear at t = 0, an outline around 450, coloured noise at the end",
)

# %%
browse({f"t = {t}": decode(x) for t, x in noisy.items()}, "noise level")

# %% [markdown]
# **What you should see**: colours and outline survive longer than you may have thought. The schedule spends much of its
# range where something is left to see, since that is where there is something to learn. In numbers, the share of the
# picture and of the noise:

# %%
levels = np.arange(0, 1000, 20)
shares = {"of the picture": alphas[levels].sqrt().numpy(), "of the noise": (1 - alphas[levels]).sqrt().numpy()}
plots.show(
    plots.curves({name: (levels, y) for name, y in shares.items()}, xlabel="t", ylabel="factor"),
    alt="Two curves that cross: the picture's factor falls from 1 to 0, the noise's rises from 0 to 1",
)

# %% [markdown]
# ## What is the UNet asked for?
#
# From $x_t$ and the noise follows the picture, from $x_t$ and the picture the noise. So one may ask for either, or for a
# mix of both. Stable Diffusion 1 is asked for the noise, $\epsilon$. Stable Diffusion 2 and the miniature are asked for
#
# $$ v = \sqrt{\bar\alpha_t}\, \epsilon - \sqrt{1 - \bar\alpha_t}\; x_0 $$
#
# (Salimans and Ho, 2022). Why? At $t = 999$ nearly all of $x_t$ is noise. "The noise is what you see" is then an answer
# that is nearly right and says nothing about the picture. There $v$ is minus the picture: the model has to commit itself
# to a place and a colour. At $t = 0$ it is the noise. A scheduler says which it is.

# %%
# NBVAL_CHECK_OUTPUT
schedule = components.noise_scheduler
print(schedule.config.prediction_type)

# %% [markdown]
# ## One step, by hand
#
# Six lines: clean latents, noise, a level for each picture, the noisy latents, what is asked, the UNet's answer.

# %%
generator = torch.Generator().manual_seed(1)
latents = clean_latents(components, batch, seed=0)
noise = torch.randn(latents.shape, generator=generator)
timesteps = torch.randint(1000, (len(latents),), generator=generator)
noisy = schedule.add_noise(latents, noise, timesteps)
target = schedule.get_velocity(latents, noise, timesteps)
hidden = encode_prompts(components, batch["prompts"])
prediction = components.unet(noisy, timesteps, encoder_hidden_states=hidden).sample
print("latents", tuple(latents.shape), "| prompts", tuple(hidden.shape), "| prediction", tuple(prediction.shape))

# %%
# NBVAL_CHECK_OUTPUT
a = alphas[timesteps].view(-1, 1, 1, 1)
by_hand = a.sqrt() * noise - (1 - a).sqrt() * latents
print("the scheduler's v is the formula's:", torch.allclose(target, by_hand, atol=1e-5))

# %% [markdown]
# Here is all of it as pictures. The fourth row is worth a thought: from the answer follows what the model believes the
# clean picture to be, $\hat x_0 = \sqrt{\bar\alpha_t}\, x_t - \sqrt{1 - \bar\alpha_t}\; \hat v$.
# **Predict**: for which columns will it be sharp?

# %%
believed = a.sqrt() * noisy - (1 - a).sqrt() * prediction.detach()
rows = [[decode(x[None]) for x in tensors] for tensors in (latents, noise, noisy, believed)]
labels = ["clean", "noise", "noisy: what the UNet sees", "what it believes"]
plots.show(
    plots.image_rows(rows, labels=labels, titles=[f"t = {int(t)}" for t in timesteps]),
    alt="Four rows by eight columns: clean pictures, noise, noisy pictures, and the model's guess at the clean ones",
)

# %% [markdown]
# **What you should see**: sharp for small $t$, where little was hidden; vague or altogether another toy for large $t$,
# where it has to guess. That guess is where a subject is learned: at $t = 900$ with `sks` in the prompt, the best guess
# is the teal dog.
#
# ## The loss, in two halves
#
# The error is the mean squared difference between the answer and what was asked. The batch's first half is the subject,
# the second the class: two means, then a sum.

# %%
errors = F.mse_loss(prediction, target, reduction="none")
instance, prior_part = (half.mean() for half in errors.chunk(2))
loss = instance + config.prior_loss_weight * prior_part
print(f"instance {instance:.4f} + {config.prior_loss_weight:g} x prior {prior_part:.4f} = {loss:.4f}")

# %% [markdown]
# One forward pass for both halves; two separate ones give the same. (Scripts have got this wrong by pairing the halves
# another way.)

# %%
# NBVAL_CHECK_OUTPUT
with torch.no_grad():
    apart = [
        F.mse_loss(components.unet(x, t, encoder_hidden_states=h).sample, y).item()
        for x, t, h, y in zip(*(v.chunk(2) for v in (noisy, timesteps, hidden, target)), strict=True)
    ]
print("two passes, the same loss:", abs(sum(apart) - loss.item()) < 1e-5)

# %% [markdown]
# `training_step` is these lines as a function, with the draws made from the seed and the samples' numbers. It returns
# all tensors on the way, so that you can look at any step of any run like this.

# %%
record = training_step(components, batch, seed=config.seed)
print(
    f"loss {record.loss:.4f} = {record.instance_loss:.4f} + {record.prior_loss:.4f}, levels {record.timesteps.tolist()}"
)

# %% [markdown]
# ## What moves?
#
# Backwards. Gradients arrive at the adapters and nowhere else.

# %%
# NBVAL_CHECK_OUTPUT
record.loss.backward()
touched = [n for m in components.modules().values() for n, p in m.named_parameters() if p.grad is not None]
print("only adapters have gradients:", all("lora" in name for name in touched), "| how many:", len(touched))
for module in components.modules().values():
    module.zero_grad(set_to_none=True)

# %% [markdown]
# ## How to know whether it learns
#
# A step's loss depends mostly on the levels that were drawn: some are much harder than others. So the curve of single
# values is a cloud. A fair comparison asks the **same pictures at the same levels with the same
# noise** each time, noise that training never draws: the *held-out* loss.

# %%
print({name: round(value, 4) for name, value in held_out_loss(components, dataset).items()})

# %% [markdown]
# ## The loop
#
# Everything is there. The text encoder's adapters get their own, lower learning rate: too high a rate there, and the
# words for places stop working (notebook 09). Every fifty steps the loop looks up: the held-out loss, and four pictures
# from the same noise.

# %% tags=["the-loop"]
groups = [
    {"params": [p for _, p in trainable_parameters(components.unet)], "lr": config.learning_rate},
    {"params": [p for _, p in trainable_parameters(components.text_encoder)], "lr": config.text_encoder_learning_rate},
]
optimizer = torch.optim.AdamW(groups)
parameters = [p for group in groups for p in group["params"]]
log, held_out, samples = [], {}, {}
for step in range(config.max_train_steps):
    if step % 50 == 0:
        held_out[step] = held_out_loss(components, dataset)["instance_loss"]
        samples[step] = draw(components, [concept.instance_prompt] * 4, config)
    record = training_step(components, batch_at(dataset, step, config.train_batch_size), seed=config.seed)
    record.loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    log.append({"step": step + 1, "instance_loss": record.instance_loss.item(), "prior_loss": record.prior_loss.item()})

# %% [markdown]
# That is DreamBooth. `train` in `dbnb.training` is the same loop with what a long run needs besides: checkpoints,
# resuming, schedules, mixed precision, accumulation. A test of this project runs the cell above and `train`, and
# compares the adapters bit for bit.

# %%
held_out[len(log)] = held_out_loss(components, dataset)["instance_loss"]
samples[len(log)] = draw(components, [concept.instance_prompt] * 4, config)
plots.show(
    plots.loss_curves(log, held_out=held_out),
    alt="A cloud of instance and prior losses with their means; the held-out instance loss falls in a clean line",
)

# %% [markdown]
# **What you should see**: two clouds, and one line that means something. The held-out loss falls fast, then ever more
# slowly. When it no longer falls, further steps only memorise.
#
# **Predict**: at which step does the dog turn teal? When do the spots come?

# %%
plots.show(
    plots.image_rows(list(samples.values()), labels=[f"step {step}" for step in samples], inches=1.2),
    alt="Five rows of four dogs from the same noise: any colour at step 0, the teal toy with spots at the end",
)

# %% [markdown]
# **What you should see**: colour first, then the shape of the head, the spots last. What is coarse is learned first,
# as it is painted first.
#
# ## Live, while it runs
#
# In a live notebook a figure can be redrawn while a cell runs. `train` calls `on_step` after every step; here it redraws
# the curve every ten steps of a short run into a temporary folder.

# %%
import tempfile

from IPython.display import HTML, display

from dbnb.training import train

short = DreamBoothConfig(max_train_steps=40, output_dir=tempfile.mkdtemp(), checkpointing_steps=0, validation_steps=0)
another = load_components(short.base)
add_adapters(another, rank=short.rank, train_text_encoder=True)
view, seen = display(HTML("waiting for the first steps"), display_id=True), []


def on_step(step, record):
    seen.append(record.loss.item())
    if step % 10 == 9:
        view.update(HTML(f"step {step + 1}: mean loss of the last ten steps {sum(seen[-10:]) / 10:.4f}"))


_ = train(short, another, dataset, on_step=on_step)

# %% [markdown]
# ## On your own
#
# 1. Run the loop with `prior_loss_weight=0` in `training_step`. Which of the curves changes, which pictures? (4 minutes)
# 2. Plot the loss of single samples against their level $t$. Where is it high? (4 minutes)
# 3. Set both learning rates ten times higher. What do you see first, in the curves or in the pictures? (4 minutes)
#
# <details><summary>Answers</summary>
#
# 1. The prior loss rises instead of staying level, and `a photo of a dog` turns teal.
# 2. Collect `(record.timesteps, F.mse_loss(record.prediction, record.target, reduction="none").mean((1, 2, 3)))` in the
#    loop. It is high at both ends: where nearly all is noise the picture has to be guessed, and where there is hardly any
#    noise it is hard to find.
# 3. The pictures: colours and outlines fall apart while the mean of the loss still looks harmless.
# </details>
#
# ## In short
#
# - Noise by a formula, a UNet that guesses what was there, two means of squares, one sum.
# - Only adapters get gradients.
# - Judge by held-out noise and by pictures from fixed noise, not by the last loss value.
#
# Next: [07 Validation and export](07_validation_and_export.ipynb), what to do with the result.
