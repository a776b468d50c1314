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
# **What you will do**: add noise to a picture at every timestep; take one training step by hand and draw each of its
# tensors; write the loop in a cell and watch its curves while the subject appears; train all weights of the UNet once,
# as the DreamBooth paper does, and compare.
#
# **What you will learn**: the [forward process](../docs/glossary.md#forward-process), what the UNet is asked, and the
# two losses. Afterwards you can write a training loop for adapters yourself, and tell from its curves whether it
# learns, memorises or forgets.
#
# **What you need**: notebooks [02](02_prior_preservation.ipynb) to [05](05_dataset.ipynb). No GPU. On two CPU cores
# about a minute and a half, and half a minute more if no notebook has drawn the class images yet. The training itself
# is the lesson here, so it does not come from a cache.
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
# The new module is `dbnb.training`.

# %%
import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from dbnb import metrics, plots, widgets, workflow
from dbnb.adapters import add_adapters, trainable_parameters
from dbnb.concept import SAMPLE_DIR, Concept
from dbnb.config import DreamBoothConfig
from dbnb.dataset import DreamBoothDataset, cache_latents
from dbnb.models import encode_prompts, load_components
from dbnb.pictures import inspect_images
from dbnb.prior import class_images
from dbnb.training import batch_at, clean_latents, held_out_loss, training_step
from dbnb.validation import draw

workflow.quiet_libraries()

# %%
plots.you_are_here("06")

# %% [markdown]
# First come steps 1 to 5, as in the notebooks before this one. The training has fewer steps than the default, so that
# you do not have to wait, and one [learning rate](../docs/glossary.md#learning-rate) from beginning to end, so that
# the loop stays short. It is lower than the default, which falls to zero in the last steps. The text encoder gets
# adapters too. The miniature does not need them, and its default leaves the text encoder frozen; here they are
# trained so that the loop shows both parts, each with its own learning rate. Eight extra class images are drawn. They
# are not trained on, but kept for a test.

# %%
config = DreamBoothConfig(max_train_steps=120, train_text_encoder=True, learning_rate=1.2e-3, lr_scheduler="constant")
print(f"adapters on {config.lora_layers} of the UNet and on the text encoder, rank {config.rank}")
concept = Concept.from_folder(None, config.identifier, config.class_word, resolution=config.resolution)
components = load_components(config.base)
drawn = class_images(components, concept.class_prompt, config.num_class_images + 8, config.sampling).paths
trained_on, kept_back = drawn[: config.num_class_images], drawn[config.num_class_images :]
add_adapters(components, config.adapters)

# %% [markdown]
# There are two datasets: one to train on, and a second one of the same form for the test, with six *further*
# photographs of the toy and those eight class images.

# %%
# NBVAL_CHECK_OUTPUT
photographs = {"trained on": concept.paths, "kept back": inspect_images(SAMPLE_DIR / "references")[0]}
dataset, further = (
    DreamBoothDataset(
        paths,
        concept.instance_prompt,
        class_paths=class_paths,
        class_prompt=concept.class_prompt,
        size=config.resolution,
        seed=config.seed,
    )
    for paths, class_paths in zip(photographs.values(), (trained_on, kept_back), strict=True)
)
for name, data in zip(photographs, (dataset, further), strict=True):
    cache_latents(data, components.vae)
    print(f"{name}: {len(data.images['instance'])} photographs, {len(data.images['class'])} class images")

# %% [markdown]
# ## The forward process: noise, by a formula
#
# Training needs noisy pictures whose noise is known. They are made in one step, for any timestep $t$ from 0 to 999 (Ho
# et al., 2020, equation 4):
#
# $$ x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\; \epsilon $$
#
# ($x_0$ are the clean latents, $\epsilon$ is noise, and $\bar\alpha_t$, which has nothing to do with LoRA's $\alpha$,
# says how much of the picture is left at $t$. The scheduler knows it.)
#
# **Predict**: from which $t$ on can you no longer recognise the toy?


# %%
@torch.no_grad()
def decode(x: torch.Tensor) -> list[Image.Image]:
    """Latents (B, C, h, w) -> B pictures."""
    latents = x / components.vae.config.scaling_factor
    return VaeImageProcessor().postprocess(components.vae.decode(latents).sample)


batch = batch_at(dataset, number=0, batch_size=config.train_batch_size)
x0 = clean_latents(components, batch, seed=0)[:1]
noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
alphas = components.noise_scheduler.alphas_cumprod
x = {t: alphas[t].sqrt() * x0 + (1 - alphas[t]).sqrt() * noise for t in range(0, 1000, 37)}
noised = dict(zip(x, decode(torch.cat(list(x.values()))), strict=True))
few = list(noised)[::4]
plots.show(
    plots.show_images(
        [noised[t] for t in few], titles=[f"t = {t}" for t in few], title="Recognisable up to about t = 300"
    ),
    alt="The toy under growing noise: clear at t = 0, an outline at about t = 300, coloured noise at the end",
)

# %%
widgets.browse({f"t = {t}": picture for t, picture in noised.items()}, "noise level")

# %% [markdown]
# **What you should see**: at about $t = 300$ the dog can still be recognised, although its outline is breaking up. In
# the middle of the range, where the noise has the larger share, only patches of colour are left of it. Above that the
# eye finds nothing, and the model still finds more than you may think (the figure with six rows below). These are the
# factors of the picture and of the noise:

# %%
levels = np.arange(0, 1000, 20)
shares = {"of the picture": alphas[levels].sqrt().numpy(), "of the noise": (1 - alphas[levels]).sqrt().numpy()}
even = int((alphas < 0.5).nonzero()[0])
plots.show(
    plots.curves(
        {name: (levels, y) for name, y in shares.items()},
        xlabel="t",
        ylabel="factor",
        title=f"Below t = {even} the picture has the larger share, above it the noise",
    ),
    alt="Two curves that cross: the picture's factor falls from 1 to nearly 0, the noise's rises from nearly 0 to 1",
)
print(f"at t = 999 the picture still counts {alphas[999].sqrt():.3f}, the noise {(1 - alphas[999]).sqrt():.3f}")

# %% [markdown]
# ## What is the UNet asked for?
#
# If you know $x_t$ and the noise, you can compute the picture; if you know $x_t$ and the picture, you can compute the
# noise. So you can ask the network for either, or for a mix of both. Stable Diffusion 1 and SDXL are asked for the
# noise, $\epsilon$, and so is Stable Diffusion 2 at 512 pixels. Stable Diffusion 2 at 768 pixels (the preset `sd21`)
# and the miniature are asked for
#
# $$ v = \sqrt{\bar\alpha_t}\, \epsilon - \sqrt{1 - \bar\alpha_t}\; x_0 $$
#
# which is called *[v-prediction](../docs/glossary.md#v-prediction)* (Salimans and Ho, 2022). Why? At $t = 999$ nearly
# all of $x_t$ is noise. "The noise is what you see" is then nearly right, and says nothing about the picture. There
# $v$ is nearly minus the picture, so the model has to decide on a place and a colour. At $t = 0$, $v$ is nearly the
# noise. The scheduler's config says what a base was trained for.

# %%
# NBVAL_CHECK_OUTPUT
schedule = components.noise_scheduler
print(schedule.config.prediction_type)

# %% [markdown]
# ## One step, by hand
#
# Each line makes one tensor: the clean latents, the noise, a timestep for each picture, the noisy latents, the target,
# and the UNet's answer. The target has two cases, so that the cell is right for Stable Diffusion 1.5 as well. (SDXL's
# UNet also needs the pooled prompt and the picture's sizes, as `added_cond_kwargs`; `training_step` passes them.)
# The timesteps are spread evenly here, from low to high, once for the four pictures of the subject and once for the
# four of the class; in training they are drawn at random.

# %%
latents = clean_latents(components, batch, seed=0)
noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
timesteps = torch.tensor([50, 350, 650, 950] * 2)
noisy = schedule.add_noise(latents, noise, timesteps)
predicts_noise = schedule.config.prediction_type == "epsilon"
target = noise if predicts_noise else schedule.get_velocity(latents, noise, timesteps)
hidden = encode_prompts(components, batch["prompts"])
prediction = components.unet(noisy, timesteps, encoder_hidden_states=hidden).sample
print("latents", tuple(latents.shape), "| prompts", tuple(hidden.shape), "| prediction", tuple(prediction.shape))

# %%
# NBVAL_CHECK_OUTPUT
a = alphas[timesteps].view(-1, 1, 1, 1)
by_hand = noise if predicts_noise else a.sqrt() * noise - (1 - a).sqrt() * latents
print("the scheduler's target is the formula's:", torch.allclose(target, by_hand, atol=1e-5))

# %% [markdown]
# Now look at every tensor of this step. Three of them become pictures when they are decoded: the clean latents, the
# noisy latents, and what the model *believes* the clean latents to be. The belief is computed from the answer: for $v$
# it is $\hat x_0 = \sqrt{\bar\alpha_t}\, x_t - \sqrt{1 - \bar\alpha_t}\; \hat v$, and for $\epsilon$ it is $\hat x_0 =
# (x_t - \sqrt{1 - \bar\alpha_t}\; \hat\epsilon) / \sqrt{\bar\alpha_t}$. The noise, the target and the prediction are
# not pictures; three of their channels are drawn as red, green and blue, one square for each place of the latents.
# **Predict**: in which columns will the prediction look like the target?


# %%
def tint(x: torch.Tensor) -> list[Image.Image]:
    """The first three channels of each tensor of (B, C, h, w) as red, green and blue; gray is 0."""
    colors = ((x[:, :3] / 6 + 0.5).clamp(0, 1) * 255).byte()
    return [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in colors]


answer = prediction.detach()
if predicts_noise:
    believed = (noisy - (1 - a).sqrt() * answer) / a.sqrt()
else:
    believed = a.sqrt() * noisy - (1 - a).sqrt() * answer
errors = F.mse_loss(answer, target, reduction="none").mean((1, 2, 3))
rows = {
    "clean": decode(latents),
    "noise": tint(noise),
    "noisy: what\nthe UNet sees": decode(noisy),
    "target: what\nit is asked": tint(target),
    "prediction:\nits answer": tint(answer),
    "what it believes\nis the picture": decode(believed),
}

# %%
titles = [f"t = {int(t)}\nerror {error:.2f}" for t, error in zip(timesteps, errors, strict=True)]
plots.show(
    plots.image_rows(
        list(rows.values()),
        labels=list(rows),
        titles=titles,
        inches=0.95,
        title="With little noise the belief is sharp; with much noise it is a guess",
    ),
    alt="Six rows by eight columns: clean pictures, noise, noisy pictures, target, prediction, the model's belief",
)

# %% [markdown]
# **What you should see**: at $t = 50$ the target is nearly the noise in the second row; at $t = 950$ it is nearly
# minus the clean *latents*, so it shows the dog's outline, but not its colours. In the last row, the belief is sharp
# where little was hidden, and where much was hidden it is blurred, in fragments (the last column), or even another
# toy. **Why is it blurred?** Many toys fit a picture that is nearly all noise. The loss is a squared error, and the
# answer with the smallest expected squared error is the *mean* of all toys that fit. It is the mean of their latents:
# decoded, it is mostly blurred, and sometimes in fragments, since the decoder was never trained on such means. After
# training, the best guess for `sks dog` at $t = 950$ should be the teal dog. At which timestep is the prediction
# nearest to its target?

# %%
for half, values in zip(("subject", "class"), errors.chunk(2), strict=True):
    smallest, largest = (int(timesteps[position]) for position in (values.argmin(), values.argmax()))
    print(f"{half}: smallest error at t = {smallest}, largest at t = {largest}")

# %% [markdown]
# At a small $t$ there is hardly any noise to find, and at a large $t$ hardly any picture. In between, enough of both is
# visible. So it is for $v$: a base that is asked for the noise, such as Stable Diffusion 1.5 or SDXL, has its largest
# errors at small $t$ and almost none at large $t$, where the noise is nearly all that it sees. (Each timestep has two
# pictures here; the first exercise under *On your own* plots many.)
#
# ## The loss, in two halves
#
# The number above each column is the mean squared difference between answer and target. The first half of the batch is
# the subject, and the second half is the class: take two means, then add them.

# %%
instance, prior = (half.mean() for half in errors.chunk(2))
loss = instance + config.prior_loss_weight * prior
print(f"instance {instance:.4f} + {config.prior_loss_weight:g} x prior {prior:.4f} = {loss:.4f}")

# %% [markdown]
# One forward pass serves both halves. **Predict**: would two passes, one for each half, give the same loss? (Scripts
# have put pictures and prompts in different orders, so that class prompts met the subject; see notebook 09.)

# %%
# NBVAL_CHECK_OUTPUT
with torch.no_grad():
    apart = [
        F.mse_loss(components.unet(x, t, encoder_hidden_states=h).sample, y).item()
        for x, t, h, y in zip(*(v.chunk(2) for v in (noisy, timesteps, hidden, target)), strict=True)
    ]
print("two passes, the same loss:", abs(sum(apart) - loss.item()) < 1e-4)

# %% [markdown]
# `training_step` contains these lines as a function. It draws noise and timesteps from the seed and the samples'
# numbers, and returns all intermediate tensors, so that you can look at any step of any run in this way.

# %%
record = training_step(components, batch, seed=config.seed, prior_loss_weight=config.prior_loss_weight)
print(f"loss {record.loss:.4f} = {record.instance_loss:.4f} + {record.prior_loss:.4f}, t = {record.timesteps.tolist()}")

# %% [markdown]
# ## What moves?
#
# Now the backward pass. **Predict**: which parameters get gradients?

# %%
# NBVAL_CHECK_OUTPUT
record.loss.backward()
touched = [n for m in components.modules().values() for n, p in m.named_parameters() if p.grad is not None]
print("only adapters have gradients:", all("lora" in name for name in touched), "| how many:", len(touched))
for module in components.modules().values():
    module.zero_grad(set_to_none=True)

# %% [markdown]
# The adapters get gradients, and nothing else does. All other weights only pass them on.
#
# ## How to know whether it learns
#
# The loss of a step depends mostly on the timesteps that were drawn: look at the errors above, column by column. So
# the curve of single values is a cloud. A fair comparison uses the **same pictures at the same timesteps with the same
# noise** each time: a *[held-out](../docs/glossary.md#held-out-loss)* loss. Three of them answer three questions.
#
# | held-out loss on | at noise never drawn in training | asks |
# |---|---|---|
# | the photographs | yes | does it learn these pictures? |
# | further photographs of the toy | yes | does it learn the *toy*, or just these pictures? |
# | class images that are not trained on | yes | does it keep what it knew of dogs? |
#
# `measure` computes all three and draws four pictures, always from the same noise. An identity encoder (notebook 08)
# says how near these are to the photographs. First, before any training:

# %%
held_out = {"photographs, new noise": {}, "further photographs": {}, "class images not trained on": {}}
samples, likeness = {}, {}
encoders = metrics.load_encoders(components.base)
real = encoders.identity_features(concept.images())


def measure(step: int) -> None:
    """The three held-out losses, four pictures, and how near these are to the photographs."""
    same, new = (held_out_loss(components, data, batches=6) for data in (dataset, further))
    losses = (same["instance_loss"], new["instance_loss"], new["prior_loss"])
    for values, value in zip(held_out.values(), losses, strict=True):
        values[step] = value
    samples[step] = draw(components, [concept.instance_prompt] * 4, config.sampling)
    likeness[step] = metrics.subject_fidelity(encoders.identity_features(samples[step]), real)


measure(0)
print({name: round(values[0], 4) for name, values in held_out.items()})

# %% [markdown]
# ## Live
#
# In a live notebook a figure can be redrawn while a cell runs: it is displayed once, with a handle, and the handle
# replaces it by another figure. The loop below calls `look` every ten steps; every forty steps it measures as well.

# %%
from IPython.display import display

views = []


def look(step: int) -> None:
    """Redraw the curves of the running loop; every forty steps, measure."""
    if step % 40 == 0:
        measure(step)
    figure = plots.loss_curves(log, held_out=held_out, title=f"Step {step} of {config.max_train_steps}")
    shown = plots.html(figure, alt=f"After {step} steps: two clouds of losses with their means, three held-out losses")
    if views:
        views[0].update(shown)
    else:
        views.append(display(shown, display_id=True))


# %% [markdown]
# ## The loop
#
# Everything is ready. The text encoder's adapters get a lower learning rate of their own, because otherwise the model
# may stop following the words for scenes. `clip_grad_norm_` scales all gradients down together where their common
# length (norm) exceeds `max_grad_norm`, so that no single batch moves the weights too far. Five curves will be drawn:
# the means of the two losses, and the three held-out losses. **Predict**: which will fall, and which will stay?

# %% tags=["the-loop"]
groups = [
    {"params": [p for _, p in trainable_parameters(components.unet)], "lr": config.learning_rate},
    {"params": [p for _, p in trainable_parameters(components.text_encoder)], "lr": config.text_encoder_learning_rate},
]
optimizer = torch.optim.AdamW(groups, fused=True)
parameters = [p for group in groups for p in group["params"]]
log = []
for step in range(config.max_train_steps):
    batch = batch_at(dataset, step, config.train_batch_size)
    record = training_step(components, batch, seed=config.seed, prior_loss_weight=config.prior_loss_weight)
    record.loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    log.append({"step": step + 1, "instance_loss": record.instance_loss.item(), "prior_loss": record.prior_loss.item()})
    if (step + 1) % 10 == 0:
        look(step + 1)

# %% [markdown]
# **What you should see**: the mean of the instance loss falls, and that of the prior loss stays about where it was.
# Both are rough, because every step draws other timesteps. The three held-out lines can be compared point by point.
# Here they are alone:

# %%
changes = [values[config.max_train_steps] - values[0] for values in held_out.values()]
plots.show(
    plots.curves(
        {name: (list(values), list(values.values())) for name, values in held_out.items()},
        xlabel="step",
        ylabel="held-out mean squared error",
        colors=plots.HELD_OUT,
        title="Change: photographs {:+.2f}, further {:+.2f}, class {:+.2f}".format(*changes),
    ),
    alt="Three lines: the loss falls far on the photographs, falls and rises on further ones, rises on the class",
)

# %% [markdown]
# **What you should see**: the line of the photographs falls furthest. The line of the further photographs falls at
# first, since they show the same toy from other sides, and after step 40 no longer. From there on the two lines part: a
# part of what the first one gains is knowledge of these five photographs only, a sign of memorising (notebook 09). But
# not all of it: the pictures below show that the toy's yellow and its pattern come only after step 40. Look at pictures
# as well as at this line. The line of the class images rises in the first 40 steps and ends higher still. Prior
# preservation did not prevent this; notebook 02 shows what happens without it. The title gives all three changes, so
# compare the rise of the class with the fall on *further* photographs, and not only with the fall on those that were
# trained on. (The axis does not begin at 0.) Here are claims that can fail:

# %%
# NBVAL_CHECK_OUTPUT
fell = {name: values[0] - values[config.max_train_steps] for name, values in held_out.items()}
mine, others, dogs = fell.values()
assert mine > 0, f"the photographs were not learned: {fell}"
assert others > 0, f"nothing was learned but the photographs: {fell}"
assert -dogs < mine, f"the class lost as much as the subject won: {fell}"
print("the loss fell on the photographs, fell on further ones, and rose less on the class than it fell on the first")

# %%
comparison = "about as much as" if abs(-dogs - others) < 0.005 else "more than" if -dogs > others else "less than"
print(f"lost on the class: {-dogs:.3f}, {comparison} was won on further photographs: {others:.3f}")

# %% [markdown]
# **Predict**: at which step does the dog take on the toy's colour? When do the spots come?

# %%
plots.show(
    plots.image_rows(
        list(samples.values()),
        labels=[f"step {step}:\nlikeness {likeness[step]:.2f}" for step in samples],
        inches=1.2,
        title="The same noise: from four different dogs to the toy",
    ),
    alt="Rows of four dogs from the same noise: four different dogs at step 0, dogs in the toy's colours further down",
)

# %% [markdown]
# **What you should see**: at step 40 the bodies have turned green, blue or teal, and spots appear, mostly in the
# wrong colour; at step 80 the yellow and the pattern are there. The default training of notebook 00 has more steps
# and a higher learning rate, and goes further. Look at the backgrounds, too: the more is learned, the more of them
# are those of the five photographs, although the prompt names none. This is another sign of overfitting. `likeness`
# is the mean cosine between these four pictures and the five photographs, in the space of a strict encoder that takes
# a wrong pattern or a wrong hue for another toy. Most of its rise comes between steps 40 and 80.

# %%
# NBVAL_CHECK_OUTPUT
first, *_, last = likeness.values()
assert last > first, likeness
print("nearer to the photographs than at first:", last > first)

# %% [markdown]
# ## The loop, and `train`
#
# `train` in `dbnb.training` is this loop with everything that a long run needs in addition:
# [checkpoints](../docs/glossary.md#checkpoint), resuming, schedules, mixed precision and accumulation. A test of this
# project runs the cell under *The loop* and `train`, and compares the adapters bit for bit. Here are its first five
# steps, on a fresh copy of the base:

# %%
import tempfile

from dbnb.training import train

folder = tempfile.TemporaryDirectory()
short = dataclasses.replace(
    config, max_train_steps=5, output_dir=folder.name, checkpointing_steps=0, validation_steps=0
)
another = load_components(short.base)
add_adapters(another, short.adapters)
theirs = train(short, another, dataset)
folder.cleanup()

# %%
# NBVAL_CHECK_OUTPUT
pairs = [(a[name], b[name]) for a, b in zip(log, theirs, strict=False) for name in ("instance_loss", "prior_loss")]
print(len(pairs), "losses; train and the cell agree:", all(abs(a - b) < 1e-3 * b for a, b in pairs))

# %% [markdown]
# ## As in the paper: all weights
#
# DreamBooth was published as fine-tuning of the whole network. The loop does not mind: give the optimizer all weights
# of the UNet instead of the adapters, and a somewhat lower learning rate, because each step now moves every weight of
# the UNet itself. (On Stable Diffusion the gap is far wider: diffusers' examples use 5e-6 or less for all weights, and
# 1e-4 for LoRA.) The batches and the number of steps are the same. **Predict**: which of the two has the larger file,
# which learns the toy better, and which keeps the class?

# %%
full = load_components(config.base)
everything = list(full.unet.requires_grad_(True).parameters())
optimizer = torch.optim.AdamW(everything, lr=1e-3)
for step in range(config.max_train_steps):
    batch = batch_at(dataset, step, config.train_batch_size)
    training_step(full, batch, seed=config.seed, prior_loss_weight=config.prior_loss_weight).loss.backward()
    torch.nn.utils.clip_grad_norm_(everything, config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

# %%
prompts = [concept.instance_prompt] * 4 + [concept.class_prompt] * 4
models = {"the base": load_components(config.base), "adapters": components, "all weights": full}
drawn_by = {name: draw(model, prompts, config.sampling) for name, model in models.items()}
plots.show(
    plots.image_rows(
        list(drawn_by.values()),
        labels=list(drawn_by),
        titles=["sks dog"] * 4 + ["a dog"] * 4,
        title="The same steps: adapters, and all weights of the UNet",
    ),
    alt="Three rows, by the base, by adapters and by all weights: four pictures for the identifier, then four for the bare class",
)

# %% [markdown]
# In training, each trained number takes four places in memory: itself, its gradient, and AdamW's running means of the
# gradient and of its square. The
# frozen weights of the base come on top for the adapters.

# %%
from dbnb.tables import Table

trained = {"adapters": (components, parameters), "all weights": (full, everything)}
comparison = Table()
for name, (model, numbers) in trained.items():
    count = sum(p.numel() for p in numbers)
    like = metrics.subject_fidelity(encoders.identity_features(drawn_by[name][:4]), real)
    new = held_out_loss(model, further, batches=6)
    comparison.append(
        {"trained": name, "numbers": f"{count:,}", "memory for them": f"{16 * count / 2**20:.0f} MiB"}
        | {"file": f"{4 * count / 2**20:.1f} MiB", "likeness": f"{like:.2f}"}
        | {"further photographs": f"{new['instance_loss']:.3f}", "class images": f"{new['prior_loss']:.3f}"}
    )
comparison

# %% [markdown]
# **What you should see**: after the same number of steps both draw the toy. With all weights one of the four dogs is
# nearly all green; `likeness` is lower here, and it varies more from one run to the next. The bare class is still
# varied in both, though not drawn as the base draws it. With all weights the losses on what was kept back are larger,
# probably because these weights also moved where nothing had to be learned. (One run each; the adapters' run also
# trained the text encoder, which stays frozen in the other. The learning rate is the one of 5e-4, 1e-3 and 2e-3 that
# came nearest to the toy in these steps. At 5e-4 it was not learned yet.) The sizes are far apart even though the
# miniature's adapters, on all layers of two blocks, are large for their base. On Stable Diffusion 1.5 all weights of
# the UNet are 860 million numbers, and adapters of rank 16 on attention are 3 million (notebook 10). An adapter can
# also be turned up and down, switched off and combined with others without a second copy of the base; for fine-tuned
# weights this takes both copies. That is what LoRA replaces, and why this course uses it.

# %% [markdown]
# ## Exercises
#
# ### Exercise A: the forward process, for a batch (6 minutes)
#
# Write equation 4 for a batch in which every picture has its own timestep. `alphas` is the scheduler's table
# $\bar\alpha$.

# %%
from dbnb.exercises import check_06a


def noisy_latents(x0, noise, alphas, timesteps):
    """x_t for clean latents and noise (B, C, h, w), a table of one number for each timestep, and B timesteps."""
    ...


check_06a(noisy_latents)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `alphas[timesteps]` has the shape (B,). Multiplied by (B, C, h, w), torch would broadcast it along the *last*
# dimension.
# </details>
#
# <details><summary>Hint 2</summary>
#
# `.view(-1, 1, 1, 1)` broadcasts it along the first.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def noisy_latents(x0, noise, alphas, timesteps):
#     a = alphas[timesteps].view(-1, 1, 1, 1)
#     return a.sqrt() * x0 + (1 - a).sqrt() * noise
# ```
# </details>
#
# ### Exercise B: the loss with prior preservation (6 minutes)
#
# You have one prediction for the whole batch, instance images first and class images second. Compute the loss.

# %%
from dbnb.exercises import check_06b


def dreambooth_loss(prediction, target, prior_loss_weight: float):
    """Instance loss plus weighted prior loss, from (2B, C, h, w) each: a tensor that gradients flow back from."""
    ...


check_06b(dreambooth_loss)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `errors.chunk(2)` splits a batch into its halves. Before the mean or after it?
# </details>
#
# <details><summary>Hint 2</summary>
#
# Each half gets its own mean, and only the second is weighted.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def dreambooth_loss(prediction, target, prior_loss_weight):
#     errors = (prediction - target) ** 2
#     instance, prior = errors.chunk(2)
#     return instance.mean() + prior_loss_weight * prior.mean()
# ```
# </details>
#
# ### Exercise C: one step of the optimizer (6 minutes)
#
# The loss is computed. Write what has to happen until the weights have changed and the next step can begin, and return
# the loss as a plain number for the log.

# %%
from dbnb.exercises import check_06c


def optimizer_step(optimizer, parameters, loss, max_grad_norm: float) -> float:
    """Change the parameters by one step, with gradients of at most this norm, and leave no gradient behind."""
    ...


check_06c(optimizer_step)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# There are four calls, and their order matters: `loss.backward()`, `torch.nn.utils.clip_grad_norm_(…)`,
# `optimizer.step()`, `optimizer.zero_grad()`.
# </details>
#
# <details><summary>Hint 2</summary>
#
# A logged tensor would keep the graph of its whole step in memory. `loss.item()` is a number.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def optimizer_step(optimizer, parameters, loss, max_grad_norm):
#     loss.backward()
#     torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
#     optimizer.step()
#     optimizer.zero_grad(set_to_none=True)
#     return loss.item()
# ```
# </details>

# %% [markdown]
# ## On your own
#
# 1. Which timesteps are hard? Plot the error of single samples against $t$. (4 minutes)
# 2. Run twenty steps with a learning rate of 0.02. What do the held-out losses say afterwards, and what do the
#    pictures say? (3 minutes)
# 3. The line of the further photographs does not start where the line of the photographs starts. Does that say
#    anything about the training? (think)
#
# <details><summary>Answers</summary>
#
# 1. The error of this base, which is asked for $v$, is high at both ends: where nearly everything is noise, the picture
#    has to be guessed, and where there is hardly any noise, it is hard to find.
#
# ```python
# points = []
# with torch.no_grad():
#     for number in range(20):
#         record = training_step(components, batch_at(dataset, number, 4), seed=1)
#         each = F.mse_loss(record.prediction, record.target, reduction="none").mean((1, 2, 3))
#         points += list(zip(record.timesteps.tolist(), each.tolist(), strict=True))
# t, error = zip(*sorted(points), strict=True)
# plots.show(plots.curves({"samples": (t, error)}, xlabel="t", ylabel="error"), alt="the error of samples against t")
# ```
#
# 2. Both losses are far above where they started, and the pictures have fallen apart.
#
# ```python
# burnt = load_components(config.base)
# add_adapters(burnt, config.adapters)
# weights = [p for m in (burnt.unet, burnt.text_encoder) for _, p in trainable_parameters(m)]
# optimizer = torch.optim.AdamW(weights, lr=0.02)
# for number in range(20):
#     training_step(burnt, batch_at(dataset, number, 4), seed=0).loss.backward()
#     optimizer.step()
#     optimizer.zero_grad()
# print(held_out_loss(burnt, further, batches=6))
# plots.show(plots.show_images(draw(burnt, [concept.instance_prompt] * 6, config.sampling)), alt="six pictures, fallen apart")
# ```
#
# 3. No: they are other pictures, and some pictures are harder to denoise than others. Compare each line with its own
#    beginning.
# </details>
#
# ## Quiz
#
# Five questions about *why*. Choose an answer, then open it: it says whether it is right, and why.
#
# **1. Why are the shares of picture and noise square roots?**
#
# <details><summary>A. The variances then add up to 1, so that the noisy latents keep their size.</summary>
#
# Right: a factor changes a variance by its square, the squares are alpha and 1 - alpha, and variances add.
# </details>
#
# <details><summary>B. The roots make the noise grow evenly, by the same amount from step to step.</summary>
#
# No: how it grows is decided by the table of alphas, which is far from even.
# </details>
#
# <details><summary>C. The UNet answers with roots, and its input has to have the same unit.</summary>
#
# No: its answer is noise or v, mixed with the same shares; it gives no roots of anything.
# </details>
#
# **2. Why is a single step's loss such an unreliable sign?**
#
# <details><summary>A. The optimizer's momentum adds random numbers to it, more and more of them.</summary>
#
# No: the loss is computed before the optimizer acts, and AdamW is not random.
# </details>
#
# <details><summary>B. Timesteps are drawn at random, and some are much harder than others.</summary>
#
# Right: a held-out loss uses the same pictures at the same timesteps with the same noise.
# </details>
#
# <details><summary>C. It is the loss of the class half alone, which has nothing to do with the toy.</summary>
#
# No: it is the sum of both halves, and both parts are in the log.
# </details>
#
# **3. Why is the held-out loss measured on *further* photographs of the toy, too?**
#
# <details><summary>A. The five photographs are used up by training and cannot be measured again.</summary>
#
# No: they can be measured, at noise never drawn in training, and they are.
# </details>
#
# <details><summary>B. Further photographs are sharper, which makes the loss more precise.</summary>
#
# No: they are photographs like the others, only of other sides and places.
# </details>
#
# <details><summary>C. They tell whether the toy was learned, or only the five pictures of it.</summary>
#
# Right: where the first loss falls and this one rises, training has probably begun to memorise.
# </details>
#
# **4. The class half is weighted and added, in the same forward pass. Why would two passes give the same loss?**
#
# <details><summary>A. The weight is 1, and only with this weight would both ways be the same.</summary>
#
# No: each half's loss is computed for itself and then weighted, in either way.
# </details>
#
# <details><summary>B. The pictures of a batch do not influence each other in these networks.</summary>
#
# Right: the prediction for a picture is the same, whatever else is in the batch.
# </details>
#
# <details><summary>C. The second pass would start from the gradients that the first one has left.</summary>
#
# No: gradients have no influence on a loss, only on the weights after the step.
# </details>
#
# **5. At t = 950 the model's guess of the clean picture is another toy. Why is this no mistake?**
#
# <details><summary>A. The scheduler has swapped two pictures of the batch, as it does at high noise.</summary>
#
# No: nothing is swapped; the noisy picture in the column belongs to the clean one above.
# </details>
#
# <details><summary>B. The text encoder is frozen, and so the guess cannot depend on the prompt.</summary>
#
# No: it has adapters in this notebook, and a frozen one would pass the prompt on as well.
# </details>
#
# <details><summary>C. Hardly anything is left of the picture, and many toys fit the prompt.</summary>
#
# Right: a sharp and certain guess is impossible there.
# </details>
#
# ## In short
#
# - Noise by a formula, a UNet that is asked for noise or for $v$, two mean squared errors, one sum.
# - A belief is a mean of everything that fits, and therefore blurred where much is hidden.
# - With LoRA only adapters get gradients; the paper fine-tuned all weights, with a larger optimizer and file.
# - Judge by held-out losses (these pictures, further pictures, the class) and by pictures from fixed noise, never by
#   the last loss value.
#
# Next: [07 Validation and export](07_validation_and_export.ipynb), what to do with the result.
