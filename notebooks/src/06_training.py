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
# **What you will do**: add noise to a picture and look at every level of it; take one training step by hand and draw
# every tensor of it; write the loop in a cell and watch its curves while the subject arrives.
#
# **What you will learn**: the [forward process](../docs/glossary.md#forward-process), what the UNet is asked, the two losses. Afterwards you can write a training
# loop for adapters yourself, and tell from its curves whether it learns, memorises or forgets.
#
# **What you need**: notebooks [02](02_prior_preservation.ipynb) to [05](05_dataset.ipynb). No GPU. On two CPU cores about a
# minute, and half a minute more where no notebook has drawn the class images yet: here the training itself is the lesson, so it does not come from a cache.
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

# %% [markdown]
# Steps 1 to 5, as the notebooks before this one did them, with fewer steps than the default, so that you need not wait, and
# at one [learning rate](../docs/glossary.md#learning-rate) from beginning to end, so that the loop stays short (the default lets it decrease along a cosine). The
# text encoder gets adapters too. The miniature does not need them, and its default leaves the text encoder frozen; here they
# are trained so that the loop shows both parts, each with its own learning rate. Eight class images more than usual are
# drawn: they will not be trained on, but are kept for a test.

# %%
config = DreamBoothConfig(max_train_steps=160, train_text_encoder=True, learning_rate=1.2e-3, lr_scheduler="constant")
print(f"adapters on {config.lora_layers} layers of the UNet and on the text encoder, rank {config.rank}")
concept = Concept.from_folder(None, config.identifier, config.class_word, resolution=config.resolution)
components = load_components(config.base)
drawn = class_images(components, concept.class_prompt, config.num_class_images + 8, config.sampling).paths
trained_on, kept_back = drawn[: config.num_class_images], drawn[config.num_class_images :]
add_adapters(components, config.adapters)

# %% [markdown]
# Two datasets: what is trained on, and a second one of the same form for the test, six *further* photographs of the toy
# and those eight class images.

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
# Training needs noisy pictures whose noise is known. They are made in one go, for any level $t$ from 0 to 999
# (Ho et al., 2020, equation 4):
#
# $$ x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\; \epsilon $$
#
# ($x_0$ are the clean latents, $\epsilon$ is noise, and $\bar\alpha_t$, no relation of LoRA's $\alpha$, says how much of the
# picture is left at level $t$: the scheduler holds it.)
#
# **Predict**: at which $t$ is the toy no longer to be recognised?


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
        [noised[t] for t in few], titles=[f"t = {t}" for t in few], title="An outline outlasts much noise"
    ),
    alt="The toy under growing noise: clear at t = 0, an outline in the middle, coloured noise at the end",
)

# %%
widgets.browse({f"t = {t}": picture for t, picture in noised.items()}, "noise level")

# %% [markdown]
# **What you should see**: the outline lasts to about the middle of the range, where the noise already has the larger share;
# above that the eye finds nothing, and the model still a little. In numbers, the factors of the picture and of the noise:

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
# From $x_t$ and the noise follows the picture, from $x_t$ and the picture the noise. So one may ask for either, or for a
# mix of both. Stable Diffusion 1 is asked for the noise, $\epsilon$, and so is Stable Diffusion 2 at 512 pixels. Stable
# Diffusion 2 at 768 pixels (the preset `sd21`) and the miniature are asked for
#
# $$ v = \sqrt{\bar\alpha_t}\, \epsilon - \sqrt{1 - \bar\alpha_t}\; x_0 $$
#
# which is called *[v-prediction](../docs/glossary.md#v-prediction)* (Salimans and Ho, 2022). Why? At $t = 999$ nearly all of $x_t$ is noise. "The noise is what you see" is then an answer
# that is nearly right and says nothing about the picture. There $v$ is nearly minus the picture: the model has to commit
# itself to a place and a colour. At $t = 0$ it is nearly the noise. A scheduler says which it is.

# %%
# NBVAL_CHECK_OUTPUT
schedule = components.noise_scheduler
print(schedule.config.prediction_type)

# %% [markdown]
# ## One step, by hand
#
# Clean latents, noise, a level for each picture, the noisy latents, what is asked, the UNet's answer: a line each. The
# levels are spread evenly here, low to high, once for the four of the subject and once for the four of the class; in
# training they are drawn at random.

# %%
latents = clean_latents(components, batch, seed=0)
noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
timesteps = torch.tensor([50, 350, 650, 950] * 2)
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
# Now every tensor of this step as a picture. Three of them are pictures once they are decoded: the clean latents, the
# noisy ones, and what the model *believes* the clean ones to be, which follows from its answer:
# $\hat x_0 = \sqrt{\bar\alpha_t}\, x_t - \sqrt{1 - \bar\alpha_t}\; \hat v$. The noise, the target and the prediction are
# no pictures; three of their channels are drawn as red, green and blue, a square for each number. **Predict**: in which
# columns will the prediction look like the target?


# %%
def tint(x: torch.Tensor) -> list[Image.Image]:
    """The first three channels of each tensor of (B, C, h, w) as red, green and blue; gray is 0."""
    colors = ((x[:, :3] / 6 + 0.5).clamp(0, 1) * 255).byte()
    return [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in colors]


answer = prediction.detach()
believed = a.sqrt() * noisy - (1 - a).sqrt() * answer
errors = F.mse_loss(answer, target, reduction="none").mean((1, 2, 3))
rows = {
    "clean": decode(latents),
    "noise": tint(noise),
    "noisy: what\nthe UNet sees": decode(noisy),
    "target v: what\nit is asked": tint(target),
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
        title="Under little noise the belief is sharp, under much it is a guess",
    ),
    alt="Six rows by eight columns: clean pictures, noise, noisy pictures, target, prediction, the model's belief",
)

# %% [markdown]
# **What you should see**: at $t = 50$ the target is nearly the noise in the second row, at $t = 950$ nearly the clean *latents*
# with their sign turned: the dog's outline shows in it, not its colours. The prediction is nearest in the middle columns
# (the smallest errors above them): at $t = 50$ there is hardly any noise to find, at $t = 950$ hardly any picture. In the last
# row the belief is sharp where little was hidden, and vague, or altogether another toy, where much was. That guess is
# where a subject is learned: at $t = 950$ with `sks` in the prompt, the best guess is the teal dog.
#
# ## The loss, in two halves
#
# The number over each column is the mean squared difference between answer and target. The batch's first half is the
# subject, the second the class: two means, then a sum.

# %%
instance, prior = (half.mean() for half in errors.chunk(2))
loss = instance + config.prior_loss_weight * prior
print(f"instance {instance:.4f} + {config.prior_loss_weight:g} x prior {prior:.4f} = {loss:.4f}")

# %% [markdown]
# One forward pass serves both halves. **Predict**: would two passes, one for each half, give the same loss? (Scripts have
# got this wrong by pairing the halves another way; notebook 09 does it on purpose.)

# %%
# NBVAL_CHECK_OUTPUT
with torch.no_grad():
    apart = [
        F.mse_loss(components.unet(x, t, encoder_hidden_states=h).sample, y).item()
        for x, t, h, y in zip(*(v.chunk(2) for v in (noisy, timesteps, hidden, target)), strict=True)
    ]
print("two passes, the same loss:", abs(sum(apart) - loss.item()) < 1e-4)

# %% [markdown]
# `training_step` is these lines as a function, with the draws made from the seed and the samples' numbers. It returns
# all tensors on the way, so that you can look at any step of any run like this.

# %%
record = training_step(components, batch, seed=config.seed, prior_loss_weight=config.prior_loss_weight)
print(f"loss {record.loss:.4f} = {record.instance_loss:.4f} + {record.prior_loss:.4f}, t = {record.timesteps.tolist()}")

# %% [markdown]
# ## What moves?
#
# Backwards. **Predict**: where do gradients arrive?

# %%
# NBVAL_CHECK_OUTPUT
record.loss.backward()
touched = [n for m in components.modules().values() for n, p in m.named_parameters() if p.grad is not None]
print("only adapters have gradients:", all("lora" in name for name in touched), "| how many:", len(touched))
for module in components.modules().values():
    module.zero_grad(set_to_none=True)

# %% [markdown]
# At the adapters, and nowhere else. All other weights only pass them on.
#
# ## How to know whether it learns
#
# A step's loss depends mostly on the levels that were drawn: look at the errors above, column by column. So the curve of
# single values is a cloud. A fair comparison asks the **same pictures at the same levels with the same noise** each time:
# a *[held-out](../docs/glossary.md#held-out-loss)* loss. Three of them answer three questions.
#
# | held-out loss on | at noise never drawn in training | asks |
# |---|---|---|
# | the photographs | yes | does it learn these pictures? |
# | further photographs of the toy | yes | does it learn the *toy*, or just these pictures? |
# | class images that are not trained on | yes | does it keep what it knew of dogs? |
#
# `measure` takes all three and draws four pictures, always from the same noise. An identity encoder (notebook 08) says how
# near those come to the photographs. First, before any training:

# %%
held_out = {"photographs, new noise": {}, "further photographs": {}, "class images not trained on": {}}
samples, likeness = {}, {}
encoders = metrics.load_encoders(components.base)
real = encoders.identity_features(concept.images())


def measure(step: int) -> None:
    """The three held-out losses, four pictures, and how near these come to the photographs."""
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
# In a live notebook a figure can be redrawn while a cell runs: it is displayed once, with a handle, and the handle puts
# another figure in its place. The loop below calls `look` every ten steps; every forty it measures as well.

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
# Everything is there. The text encoder's adapters get a lower learning rate of their own: at too high a rate the words for
# places stop working. **Predict**: which of the five curves will fall, which stay?

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
# **What you should see**: two clouds whose means wander, and three lines of few points that mean something. That is
# DreamBooth. The three lines by themselves:

# %%
changes = [values[config.max_train_steps] - values[0] for values in held_out.values()]
plots.show(
    plots.curves(
        {name: (list(values), list(values.values())) for name, values in held_out.items()},
        xlabel="step",
        ylabel="held-out mean squared error",
        colors=plots.HELD_OUT,
        title="From first to last: photographs {:+.2f}, further ones {:+.2f}, class {:+.2f}".format(*changes),
    ),
    alt="Three lines: the loss falls on the photographs and on further ones, on other dogs it changes less",
)

# %% [markdown]
# **What you should see**: the photographs' line falls furthest. That of the further photographs falls at first, since they show
# the same toy from other sides, half of them in other places, and then hardly any more: what the first line gains from there
# on is knowledge of these five photographs. Where the second turns up, training has begun to memorise (notebook 09). The
# class images' line rises a little at the beginning: prior preservation holds the class, but not for nothing. Compare its
# rise with the fall of the further photographs' line, not only with that of the first (the axis does not begin at 0). Said
# as claims that can fail:

# %%
# NBVAL_CHECK_OUTPUT
fell = {name: values[0] - values[config.max_train_steps] for name, values in held_out.items()}
mine, others, dogs = fell.values()
assert mine > 0, f"the photographs were not learned: {fell}"
assert others > 0, f"the toy was not learned, only its photographs: {fell}"
assert -dogs < mine, f"the class lost as much as the subject won: {fell}"
print("learned the photographs, learned the toy, and lost less of the class than was won on the photographs")

# %% [markdown]
# **Predict**: at which step does the dog take on the toy's colour? When do the spots come?

# %%
plots.show(
    plots.image_rows(
        list(samples.values()),
        labels=[f"step {step}:\nlikeness {likeness[step]:.2f}" for step in samples],
        inches=1.2,
        title="The same noise: from any dog towards the toy",
    ),
    alt="Five rows of four dogs from the same noise: any dogs at step 0, dogs in the toy's colours further down",
)

# %% [markdown]
# **What you should see**: what is coarse comes first, the colour of the body; the yellow and the pattern follow. The default
# training of notebook 00 takes more steps than this one and goes further. In a picture that is painted from noise, too,
# coarse things come first (notebook 03). `likeness` is the mean cosine between these four pictures and the five photographs
# in the space of a strict encoder, which counts a wrong pattern or a wrong hue as another toy. It may fall in between. Did it
# rise from the first row to the last?

# %%
# NBVAL_CHECK_OUTPUT
first, *_, last = likeness.values()
assert last > first, likeness
print("nearer to the photographs than at first:", last > first)

# %% [markdown]
# ## The loop, and `train`
#
# `train` in `dbnb.training` is this loop with what a long run needs besides: [checkpoints](../docs/glossary.md#checkpoint), resuming, schedules, mixed
# precision, accumulation. A test of this project runs the cell under *The loop* and `train`, and compares the adapters bit for bit.
# Here are its first five steps, on a fresh copy of the base:

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
# ## Exercises
#
# ### Exercise A: the forward process, for a batch (6 minutes)
#
# Write equation 4 for a batch in which every picture has its own level. `alphas` is the scheduler's table $\bar\alpha$.

# %%
from dbnb.exercises import check_06a


def noisy_latents(x0, noise, alphas, timesteps):
    """x_t for clean latents and noise (B, C, h, w), a table of one number for each level, and B levels."""
    ...


check_06a(noisy_latents)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `alphas[timesteps]` has the shape (B,). Multiplied with (B, C, h, w), torch would lay it along the *last* dimension.
# </details>
#
# <details><summary>Hint 2</summary>
#
# `.view(-1, 1, 1, 1)` lays it along the first.
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
# One prediction for the whole batch, instances first and class images second: make the loss of it.

# %%
from dbnb.exercises import check_06b


def dreambooth_loss(prediction, target, prior_loss_weight: float):
    """Instance loss plus weighted prior loss, from (2B, C, h, w) each: a tensor that gradients flow back from."""
    ...


check_06b(dreambooth_loss)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `errors.chunk(2)` cuts a batch into its halves. Before the mean or after it?
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
# The loss is there. Write what has to happen until the weights have changed and the next step can begin, and return the loss as a
# plain number for the log.

# %%
from dbnb.exercises import check_06c


def optimizer_step(optimizer, parameters, loss, max_grad_norm: float) -> float:
    """Change the parameters by one step, with gradients of at most this norm, and leave no gradient behind."""
    ...


check_06c(optimizer_step)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Four calls in an order that matters: `loss.backward()`, `torch.nn.utils.clip_grad_norm_(…)`, `optimizer.step()`,
# `optimizer.zero_grad()`.
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
# 1. Which levels are hard? Plot the error of single samples against $t$. (4 minutes)
# 2. Run twenty steps with a learning rate of 0.02. What do the held-out losses say after them, and
#    what the pictures? (3 minutes)
# 3. The line of the further photographs does not start where that of the photographs starts. Does that say anything about
#    the training? (think)
#
# <details><summary>Answers</summary>
#
# 1. It is high at both ends: where nearly all is noise the picture has to be guessed, and where there is hardly any noise
#    it is hard to find.
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
# 2. Both losses are far above their beginnings, and the pictures have fallen apart with them.
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
# Five questions about *why*. Choose an answer, then open it: each says whether it is right, and why or why not.
#
# **1. Why are the shares of picture and noise square roots?**
#
# <details><summary>A. The variances then add up to 1, so that the noisy latents keep their size.</summary>
#
# Right: the shares' squares are alpha and 1 - alpha, and variances add like squares.
# </details>
#
# <details><summary>B. The roots make the noise grow evenly, by the same amount from level to level.</summary>
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
# <details><summary>B. Noise levels are drawn at random, and some are much harder than others.</summary>
#
# Right: a held-out loss asks the same pictures at the same levels with the same noise.
# </details>
#
# <details><summary>C. It is the loss of the class half alone, which has nothing to do with the toy.</summary>
#
# No: it is the sum of both halves, and both parts stand in the log.
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
# Right: where the first loss falls and this one rises, training has begun to memorise.
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
# <details><summary>A. The scheduler has swapped two pictures of the batch, as it does at high levels.</summary>
#
# No: nothing is swapped; the noisy picture in the column belongs to the clean one above.
# </details>
#
# <details><summary>B. The text encoder is frozen, and so the guess cannot depend on the prompt.</summary>
#
# No: the guess does depend on the prompt: with `sks` in it, the best guess is the teal dog.
# </details>
#
# <details><summary>C. Hardly anything is left of the picture, and many toys fit the prompt.</summary>
#
# Right: a sharp guess is impossible there, and so training can teach it a subject.
# </details>
#
# ## In short
#
# - Noise by a formula, a UNet that is asked for noise or for $v$, two means of squares, one sum.
# - Only adapters get gradients.
# - Judge by held-out losses (these pictures, further pictures, the class) and by pictures from fixed noise, never by the
#   last loss value.
#
# Next: [07 Validation and export](07_validation_and_export.ipynb), what to do with the result.
