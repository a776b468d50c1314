# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 11 From diffusion to flow matching: the same pictures on a straight line
#
# **What you will do**: draw the way from a picture to noise that diffusion takes beside the straight one of flow
# matching; translate between what the two ask of a network, and draw one picture on both ways; train small networks for
# each and count their steps; look into the attention of a transformer; take one training step of a flow model by hand.
#
# **What you will learn**: what is different in Stable Diffusion 3 and FLUX.1, what only has another name, and which
# settings of a training change with them. Afterwards you can read a training script of such a base, and say which
# lines are its path and which are DreamBooth's.
#
# **What you need**: notebooks [00b](00b_how_diffusion_works.ipynb), [03](03_loading_and_freezing.ipynb),
# [04](04_dual_lora.ipynb) and [06](06_training.ipynb). No GPU. About three minutes on two CPU cores.
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
# The new module is `dbnb.paths`. The base is the miniature, which is a diffusion model. Its latents serve here for both
# ways: a picture, and noise of the same shape.

# %%
import math
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from dbnb import plots, workflow
from dbnb.config import DreamBoothConfig, Objective
from dbnb.models import encode_prompts, load_components
from dbnb.paths import Flow
from dbnb.tables import Table

workflow.quiet_libraries()
plots.you_are_here("11")

# %%
from dbnb.concept import Concept
from dbnb.dataset import DreamBoothDataset, cache_latents
from dbnb.prior import class_images
from dbnb.training import batch_at, clean_latents

base = load_components("miniature")
concept = Concept.from_folder(None, "sks", "dog")
drawn = class_images(base, concept.class_prompt, 8, DreamBoothConfig().sampling).paths
dataset = DreamBoothDataset(
    concept.paths,
    concept.instance_prompt,
    class_paths=drawn,
    class_prompt=concept.class_prompt,
    size=DreamBoothConfig().resolution,
)
cache_latents(dataset, base.vae)
x = clean_latents(base, batch_at(dataset, number=0, batch_size=1), seed=0)[:1]
n = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
print("a picture's latents", tuple(x.shape), "| noise", tuple(n.shape))

# %% [markdown]
# ## Two ways to the same noise
#
# A *path* says what is left of a picture $x$ at each time, and how much noise $n$ has come in its place. Diffusion
# (notebook 06) takes square roots, so that the variances add up to 1; **[flow
# matching](../docs/glossary.md#flow-matching)** (Lipman et al., 2023; Liu et al., 2023) takes the straight line from
# one to the other:
#
# $$ x_t = \sqrt{\bar\alpha_t}\, x + \sqrt{1 - \bar\alpha_t}\; n \qquad\qquad x_s = (1 - s)\, x + s\, n $$
#
# The time of a diffusion model is a whole number $t$ from 0 to 999, and a table says what it means. The time of a flow
# is $s$ itself, the **share of noise**, from 0 to 1. **Predict**: draw both in a plane with the picture's factor to
# the right and the noise's upwards. Which shapes are these?

# %%
diffusion, straight = base.path, Flow(FlowMatchEulerDiscreteScheduler())
alpha_bar = base.noise_scheduler.alphas_cumprod
p, q = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
s, every = torch.linspace(0, 1, 21), [*range(0, 1000, 50), 999]
figure = plots.curves(
    {
        "diffusion, every 50th t": (p[every].numpy(), q[every].numpy()),
        "flow, every 0.05 of s": (1 - s.numpy(), s.numpy()),
    },
    xlabel="factor of the picture",
    ylabel="factor of the noise",
    title="From the picture (right) to noise (top): a quarter of a circle, and a straight line",
)
figure.axes[0].set_aspect("equal")  # or the circle would look like an ellipse
figure.axes[0].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
plots.show(
    figure,
    alt="Two curves from the lower right to the upper left: diffusion's an arc of a circle, flow's a straight line",
)

# %% [markdown]
# **What you should see**: an arc, and a line with even marks. On the arc the marks are wide apart at the picture's end
# and close together at that of the noise, because the table is made so. (The arc ends just before the top: at $t =
# 999$ a little of the picture is left.) Here is the same picture with the same noise, at the same times, as both
# classes of `dbnb.paths` make it. `timesteps` are $t$ for one and $1000\,s$ for the other.


# %%
@torch.no_grad()
def decode(latents: torch.Tensor) -> list[Image.Image]:
    """Latents (B, C, h, w) -> B pictures."""
    return VaeImageProcessor().postprocess(base.vae.decode(latents / base.vae.config.scaling_factor).sample)


times = torch.tensor([0, 150, 300, 450, 600, 750, 900, 999])
rows = [decode(path.noisy(x, n, times)) for path in (diffusion, straight)]
plots.show(
    plots.image_rows(
        rows,
        labels=["diffusion", "flow"],
        titles=[f"{time / 1000:.2f}" for time in times.tolist()],
        title="The same picture and the same noise, at the same part of the way",
    ),
    alt="Two rows of eight pictures of the toy under growing noise: diffusion's and flow's",
)

# %% [markdown]
# Which is noisier at the same time? That depends on the table, so it says little about the paths. A fair comparison is
# at the same **share of noise**: divide the noise's factor by the sum of both. On the line this is $s$; on the arc it
# is $\sqrt{1 - \bar\alpha_t} / (\sqrt{\bar\alpha_t} + \sqrt{1 - \bar\alpha_t})$. **Predict**: what is different
# between the two rows then?

# %%
shares = q / (p + q)
matched = torch.tensor([int((shares - share).abs().argmin()) for share in (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)])
scale = (p + q)[matched].view(-1, 1, 1, 1)
on_arc, on_line = diffusion.noisy(x, n, matched), straight.noisy(x, n, 1000 * shares[matched])
assert torch.allclose(on_arc, scale * on_line, atol=1e-5), "the arc's latents are not a multiple of the line's"
plots.show(
    plots.image_rows(
        [decode(on_arc), decode(on_line)],
        labels=["diffusion", "flow"],
        titles=[f"share {shares[t]:.2f}\nt = {t}" for t in matched.tolist()],
        title="At the same share of noise: the same picture, in stronger or weaker contrast",
    ),
    alt="Two rows of six pictures that differ only in contrast, the lower ones paler",
)

# %% [markdown]
# **What you should see**: the same picture twice. A point of the arc and the point of the line at the same share lie
# on one ray from the origin, so one is a multiple of the other; the cell asserts it, number by number. There is
# nothing that a network could see on one way and not on the other.
#
# ## What is the network asked for?
#
# There are three usual *prediction targets*. On the arc a network is asked for the noise $\epsilon = n$, or for $v$
# (notebook 06), as `prediction_type` in diffusers' configs says; on the line for the direction $u$, also called
# **velocity**, which is the same at all times (diffusers' `get_velocity` gives $v$, not $u$):
#
# $$ \epsilon = n \qquad v = \sqrt{\bar\alpha_t}\, n - \sqrt{1 - \bar\alpha_t}\; x \qquad u = n - x $$
#
# With what the network sees, each answer makes two equations with two unknowns. So each answer says what the network
# believes to be the picture, and the noise:
#
# | asked for | the picture | the noise |
# |---|---|---|
# | $\epsilon$ | $(x_t - \sqrt{1 - \bar\alpha_t}\,\epsilon) \,/ \sqrt{\bar\alpha_t}$ | $\epsilon$ |
# | $v$ | $\sqrt{\bar\alpha_t}\, x_t - \sqrt{1 - \bar\alpha_t}\; v$ | $\sqrt{1 - \bar\alpha_t}\; x_t + \sqrt{\bar\alpha_t}\, v$ |
# | $u$ | $x_s - s\, u$ | $x_s + (1 - s)\, u$ |
#
# In code, with `p` and `q` for the factors of the picture and of the noise, whichever the path:


# %%
def question(kind: str, x: torch.Tensor, n: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """What a network should answer for a picture and its noise."""
    return {"noise": n, "v": p * n - q * x, "direction": n - x}[kind]


def belief(kind: str, seen: torch.Tensor, answer: torch.Tensor, p, q) -> tuple[torch.Tensor, torch.Tensor]:
    """The picture and the noise that an answer stands for."""
    if kind == "noise":
        return (seen - q * answer) / p, answer
    if kind == "v":
        return p * seen - q * answer, q * seen + p * answer
    return seen - q * answer, seen + p * answer


# %%
# NBVAL_CHECK_OUTPUT
t = torch.tensor([700])
for kind, path, time in (("noise", None, t), ("v", diffusion, t), ("direction", straight, 1000 * shares[t])):
    factors = (1 - shares[t], shares[t]) if kind == "direction" else (p[t], q[t])
    answer = question(kind, x, n, *factors)
    back = belief(kind, factors[0] * x + factors[1] * n, answer, *factors)
    whole = all(torch.allclose(a, b, atol=1e-4) for a, b in zip(back, (x, n), strict=True))
    print(f"{kind}: picture and noise come back: {whole}")
    if path is not None:
        print("  and dbnb.paths asks the same:", torch.allclose(answer, path.target(x, n, time), atol=1e-5))

# %% [markdown]
# ## One network on both ways
#
# If answers can be translated, then a network that was trained on the arc can be used on the line. The miniature is
# asked for $v$. On the straight line, at the share $s$: scale what is seen up to the arc, ask for $v$ at the $t$ of the
# same share, and turn the answer into a direction. Drawing on a line is short, too. The direction says how the point
# changes with the share; so a step from the share $s$ to the next, smaller share $s'$ is
#
# $$ x_{s'} = x_s + (s' - s)\, u $$
#
# which is **[Euler's method](../docs/glossary.md#eulers-method)**. **Predict**: the next cell draws from one noise with
# DDIM's steps (notebook 00b) on the arc, and with Euler's on the line, at the same shares. Will the two pictures be
# the same, similar, or different?

# %%
hidden = encode_prompts(base, ["a photo of a red dog on the beach", ""])


@torch.no_grad()
def believed(on_the_arc: torch.Tensor, t: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The picture and the noise that the miniature sees in a point of the arc, with guidance."""
    with_prompt, without = base.unet(on_the_arc.repeat(2, 1, 1, 1), t, encoder_hidden_states=hidden).sample.chunk(2)
    return belief("v", on_the_arc, without + 2.5 * (with_prompt - without), p[t], q[t])


way = torch.linspace(999, 0, 13).long().tolist()
arc = [torch.randn(x.shape, generator=torch.Generator().manual_seed(8))]
line = [arc[0] / (p + q)[999]]
for t, to in pairwise(way):
    picture, noise = believed(arc[-1], t)
    arc.append(p[to] * picture + q[to] * noise)  # DDIM
    picture, noise = believed((p + q)[t] * line[-1], t)
    line.append(line[-1] + (shares[to] - shares[t]) * (noise - picture))  # Euler

# %%
assert torch.allclose(arc[-1], (p + q)[0] * line[-1], atol=1e-2), "two ways, two pictures"
at = [0, 3, 5, 7, 9, 10, 11, 12]
plots.show(
    plots.image_rows(
        [decode(torch.cat([points[k] for k in at])) for points in (arc, line)],
        labels=["DDIM on\nthe arc", "Euler on\nthe line"],
        titles=[f"share\n{shares[way[k]]:.2f}" for k in at],
        title="One network, two ways, the same dog",
    ),
    alt="Two rows of eight pictures, from noise to the same red dog on a beach",
)

# %% [markdown]
# **What you should see**: the same dog, and the cell would have stopped if its numbers were not the same. DDIM's step
# mixes the believed picture and the believed noise in the next time's factors, and Euler's step on the line does just
# that in the line's factors. So DDIM *is* Euler's method on the straight line. The path is a choice of coordinates,
# and it is no reason by itself for better pictures. What can make a difference is what the choice brings along: how
# much each error counts, which times are trained on, and where the steps of drawing lie.
#
# ## What an error costs, and when
#
# Suppose that a network's belief of the picture is wrong by 1. By how much is its answer wrong? The square of that
# number is how much the loss makes of the error.


# %%
def cost(kind: str, share: float) -> float:
    """The squared error of the answer, where the believed picture is wrong by 1 and what is seen stays as it is."""
    p, q = 1 - share, share
    if kind != "direction":  # the point of the arc at the same share
        p, q = p / math.hypot(p, q), q / math.hypot(p, q)
    return (question(kind, 1.0, -p / q, p, q) - question(kind, 0.0, 0.0, p, q)) ** 2


table = Table()
for share in (0.1, 0.3, 0.5, 0.7, 0.9):
    t = (shares - share).abs().argmin()[None]
    min_snr = diffusion.weights(t, Objective(snr_gamma=5.0)).item()
    cosmap = straight.weights(torch.tensor([1000 * share]), Objective(weighting_scheme="cosmap")).item()
    costs = {f"asked for {kind}": f"{cost(kind, share):.2f}" for kind in ("noise", "v", "direction")}
    weights = {"weight: min-SNR for v, gamma 5": f"{min_snr:.2f}", "weight: cosmap": f"{cosmap:.2f}"}
    table.append({"share of noise": f"{share:.1f}"} | costs | weights)
table

# %% [markdown]
# **What you should see**: read the three columns downwards. Asked for the noise, a network that is wrong about the
# picture at a high share of noise is hardly punished: the picture has hardly any part in the answer. Asked for $v$ or
# for the direction, it always is. These two columns stay close: the line's cost is $1/s^2$, the arc's is $(s^2 +
# (1-s)^2) / s^2$, and the ratio of the two is between 1 and 2. So flow matching's question is nearly
# $v$-prediction's. The last two columns are weights by which errors can be multiplied: the first on the arc (`snr_gamma`,
# Hang et al., 2023; here for $v$), the second on the line (`weighting_scheme`, Esser et al., 2024). They are off unless you
# ask for them.
#
# The other half of the weighting is hidden: a share that is drawn twice as often counts twice. A diffusion model's $t$
# are drawn evenly. For a flow, Esser et al. draw $s$ as the sigmoid of a normal number (*logit-normal*), which is
# mostly in the middle. **Predict** where diffusion's even $t$ lie as shares.

# %%
generator = torch.Generator().manual_seed(0)
edges, curves = np.linspace(0, 1, 21), {}
for name, path, objective in (
    ("diffusion: t drawn evenly", diffusion, Objective()),
    ("flow: s drawn evenly", straight, Objective(weighting_scheme="none")),
    ("flow: logit-normal", straight, Objective(weighting_scheme="logit_normal")),
):
    values = torch.stack([path.draw(generator, objective, tokens=64) for _ in range(6000)])
    values = shares[values] if path is diffusion else values / 1000
    curves[name] = (edges[:-1] + 0.025, np.histogram(values, edges, density=True)[0])
plots.show(
    plots.curves(
        curves,
        xlabel="share of noise",
        ylabel="density of 6000 draws",
        title="How often each share of noise is trained on",
    ),
    alt="Three densities over the share of noise: diffusion's, an even one, and one with its hump in the middle",
)

# %% [markdown]
# **What you should see**: three different emphases. Even times of the diffusion table lie mostly in the upper half of
# the shares, and end at 0.94, where the table ends; the line's even times are even by definition, and logit-normal
# leaves both ends out. What a training really weighs is the product of such a curve with a column of the table above.
#
# ## Straight lines, curved ways
#
# It is often said that flow models need fewer steps because their ways are straight. Let us measure that where
# measuring is cheap, on the points of notebook 00b: a ring and a cross, here without their words. The same small
# network learns each of the three targets, from three seeds. `factors` is each path, for a time from 0 to 1.


# %%
def points_of(count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 2) points, half of them on a ring, half on a cross."""
    u, other, on_ring = torch.rand(count, 3, generator=generator).T
    ring = 1.2 * torch.stack([torch.cos(2 * math.pi * u), torch.sin(2 * math.pi * u)], 1)
    along = 2.4 * u - 1.2
    cross = torch.stack([along, torch.where(other < 0.5, along, -along)], 1)
    points = torch.where(on_ring[:, None] < 0.5, ring, cross)
    return points + 0.04 * torch.randn(count, 2, generator=generator)


def factors(kind: str, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of picture and noise at times from 0 to 1: on the line, or by the table of the arc."""
    if kind == "direction":
        return 1 - time, time
    t = (1000 * time).round().long().clamp(0, 999)
    return p[t], q[t]


# %%
class Denoiser(torch.nn.Module):
    """(N, 2) noisy points and (N,) times -> (N, 2) answers; notebook 00b's network, half as wide."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = (2 + 24 + 16, width, width, width)
        layers = [part for a, b in pairwise(sizes) for part in (torch.nn.Linear(a, b), torch.nn.SiLU())]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(width, 2))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        angles = time[:, None] * (math.pi / 2) * 2.0 ** torch.arange(8)
        waves = (x[:, None] * 2.0 ** torch.arange(6)[:, None]).flatten(1)
        return self.layers(torch.cat([x, waves.sin(), waves.cos(), angles.sin(), angles.cos()], 1))


# %%
def trained(kind: str, seed: int, steps: int = 1500) -> Denoiser:
    """A network that was asked one kind of question."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = Denoiser()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, n = points_of(256, generator), torch.randn(256, 2, generator=generator)
        time = torch.rand(256, generator=generator)
        p, q = (factor[:, None] for factor in factors(kind, time))
        F.mse_loss(network(p * x + q * n, time), question(kind, x, n, p, q)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return network


KINDS, SEEDS = ("noise", "v", "direction"), (0, 1, 2)
networks = {(kind, seed): trained(kind, seed) for kind in KINDS for seed in SEEDS}

# %% [markdown]
# Drawing is the same loop for all: believe, and mix for the next time. (On the line that is Euler's method, as above.)
# **Predict**: each *training* pair is a picture, a noise and the straight line between the two. Are the ways of drawing
# straight as well?


# %%
@torch.no_grad()
def sample(kind: str, seed: int, way: list[float], count: int = 1000) -> list[torch.Tensor]:
    """The points at each time of the way, from noise on."""
    states = [torch.randn(count, 2, generator=torch.Generator().manual_seed(100 + seed))]
    for time, to in pairwise(way):
        answer = networks[kind, seed](states[-1], torch.full((count,), time))
        picture, noise = belief(kind, states[-1], answer, *factors(kind, torch.tensor(time)))
        p, q = factors(kind, torch.tensor(to)) if to else (1.0, 0.0)
        states.append(p * picture + q * noise)
    return states


def even(kind: str, steps: int) -> list[float]:
    """Times that divide the way evenly, as the path counts them; the table of the arc has no 1.0."""
    return [1.0 if kind == "direction" else 0.999, *torch.linspace(1, 0, steps + 1).tolist()[1:]]


# %%
def length(states: list[torch.Tensor]) -> float:
    """How long the ways are, as a multiple of the straight ones between their ends."""
    way = sum((b - a).norm(dim=1) for a, b in pairwise(states))
    return (way.mean() / (states[-1] - states[0]).norm(dim=1).mean()).item()


panels = {}
for kind in KINDS:
    way = even(kind, 60)
    panels[kind] = sample(kind, 0, way, 400)
    if kind == "v":  # in the line's coordinates: divided by the sum of the factors
        sums = [sum(factors(kind, torch.tensor(time))) if time else 1.0 for time in way]
        panels[f"{kind}, on the line"] = [state / total for state, total in zip(panels[kind], sums, strict=True)]
named = {f"{name}: x {length(states):.2f}": [state[:30].numpy() for state in states] for name, states in panels.items()}
plots.show(
    plots.trails(named, title="From noise (grey) to points (orange): lengths relative to straight lines", limit=3.5),
    alt="Four panels of trajectories: on the arc short and nearly straight; on the line they run towards the centre, turn and come back",
)

# %% [markdown]
# **What you should see**: on the line most of the ways are not straight. They lead inwards at first, past where they
# will end, then turn and come back outwards; only points that start far out run nearly straight to their end. The lines
# of training cross each other: through one noisy point go lines to many pictures. The network answers with their mean
# (notebook 00b), which lies near the centre at first and turns as the noise clears. The ways of $v$, seen on the line
# (third panel), are close to those of the direction (fourth), as they should be: it is the same world.
#
# On the arc, the trajectories of the noise and of $v$ (the first two panels) are *shorter* than those of the
# direction (the last): there the variances add up to 1 and the cloud keeps its size, while on the line it shrinks and
# grows again. So "straight" belongs to the single line between a picture and its noise, and not to the way that a
# picture is drawn on. It does not help the first two either that their ways look straighter, for the steps of DDIM
# are straight on the line.
#
# ## One, two, four, eight steps
#
# How near do the points come with few steps? The *energy distance* compares two clouds by the distances between their
# points, $\sqrt{2\,\mathrm{E}|a - b| - \mathrm{E}|a - a'| - \mathrm{E}|b - b'|}$; it is near 0 where both come from one
# distribution. First the points themselves. **Predict**: where does a single step lead?

# %%
COUNTS = (1, 2, 4, 8)
plots.show(
    plots.clouds(
        [[sample(kind, 0, even(kind, count))[-1].numpy() for count in COUNTS] for kind in KINDS],
        labels=KINDS,
        titles=[f"{count} step{'s' * (count > 1)}" for count in COUNTS],
        title="What the three networks draw in few steps",
    ),
    alt="Three rows of four panels: after one step a wide cloud or a clump, after more steps points that fill a square or a ring",
)


# %%
def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The energy distance of two clouds of as many points; a point's distance to itself is left out."""
    inner = sum(torch.cdist(cloud, cloud).sum() / (len(cloud) * (len(cloud) - 1)) for cloud in (a, b))
    return math.sqrt(max(0.0, (2 * torch.cdist(a, b).mean() - inner).item()))


real = [points_of(1000, torch.Generator().manual_seed(500 + seed)) for seed in SEEDS]


def row(name: str, kind: str, way) -> dict[str, str]:
    """Mean and range over the seeds, for each number of steps."""
    cells = {"asked for": kind, "steps are even in": name}
    for count in COUNTS:
        found = [distance(sample(kind, seed, way(count))[-1], real[seed]) for seed in SEEDS]
        cells[f"{count} step{'s' * (count > 1)}"] = f"{np.mean(found):.2f} ({min(found):.2f} to {max(found):.2f})"
    return cells


# %% [markdown]
# The first three rows let each path count its time as it does. But then the steps lie at different shares of noise. So
# the last three rows exchange the steps: the networks of the arc take steps at even shares, and that of the line takes
# steps at the shares of even $t$. **Predict**: which matters more, the question or where the steps lie?


# %%
def by_share(count: int) -> list[float]:
    """Times of the arc whose shares divide the way evenly."""
    return [0.999, *(int((shares - (1 - k / count)).abs().argmin()) / 1000 for k in range(1, count)), 0.0]


def by_table(count: int) -> list[float]:
    """Shares of noise of the arc's even times."""
    return [1.0, *(shares[round(1000 * (1 - k / count))].item() for k in range(1, count)), 0.0]


own = [row("t" if kind != "direction" else "share", kind, lambda count, kind=kind: even(kind, count)) for kind in KINDS]
exchanged = [row("share", "noise", by_share), row("share", "v", by_share), row("t", "direction", by_table)]
others = [points_of(1000, torch.Generator().manual_seed(600 + seed)) for seed in SEEDS]
print(f"two clouds of real points: {np.mean([distance(*pair) for pair in zip(real, others, strict=True)]):.2f}")
Table(own + exchanged)

# %%
means = {
    (cells["asked for"], cells["steps are even in"]): [
        float(cells[f"{count} steps"].split()[0]) for count in COUNTS[1:]
    ]
    for cells in (*own, *exchanged)
}
assert all(a < b for kind in KINDS for a, b in zip(means[kind, "share"], means[kind, "t"], strict=True)), means
plots.show(
    plots.curves(
        {f"{kind}, even in {what}": (COUNTS[1:], values) for (kind, what), values in means.items()},
        xlabel="steps",
        ylabel="energy distance to real points",
        title="Steps at even shares of noise come nearer, whatever was asked",
    ),
    alt="Six falling curves: for each question, steps that are even in the share lie below those that are even in t",
)

# %% [markdown]
# **What you should see**: compare $v$ and the direction first, each with its own steps (the second and the third
# row). The network of the line is nearer at every number of steps: flow matching needs fewer steps *as each path
# counts its own time*. Now look at the exchanged rows. From two steps on, with steps at even shares, the network that
# was asked for $v$ is as near as that of the line, and with the table's steps the network of the line is as far away
# as $v$ was. So what helped was where the steps lie, and not the line. (A single step leaves nothing to exchange. It
# leads to the mean, and how wide that blur is depends on the small network.)
#
# The network that was asked for the noise is the nearest of all from two steps on, with steps at even shares: here
# flow matching does not win. The table of costs says why that may be. Asked for the noise, the network is hardly
# punished for errors where there is much noise, so it can spend its few parameters on the rest, and in the figure of
# the clouds above, where each path takes its own steps, it alone shows both ring and cross at four steps.
#
# Two cautions. After one step that network does not give the mean but a wide cloud: its belief divides by the factor
# of the picture, which is 0.07 at $t = 999$, and that multiplies every error by nearly 15. By this distance the cloud
# is nearer to the points than their mean is, but it is no better drawing. And these are points in a plane, drawn by
# tiny networks: how pictures compare is not measured here.

# %% [markdown]
# ## Where text and picture meet
#
# Newer bases have a new network as well: a **[transformer](../docs/glossary.md#transformer)** in place of the UNet. It
# cuts the latents into tokens (here 64 of 2 x 2 latents) and lets them pass through blocks that are all alike. In a
# UNet the places of the picture ask the words in cross-attention, and the words stay what they are. In Stable Diffusion
# 3 both are tokens of **one** attention, a [joint attention](../docs/glossary.md#joint-attention): everything asks
# everything, and so the words change from block to block. Each side has projections of its own; those of the words are
# called `add_q_proj`, `add_k_proj`, `add_v_proj` and `to_add_out`.
#
# `Model` makes a small network of this family, untrained, to fit the miniature's latents and words. The figure is
# drawn from the names of the layers in its first block; filled are those that `lora_targets` gives an adapter.

# %%
from dbnb import miniature
from dbnb.adapters import lora_targets
from dbnb.miniature.flow import FEW, Model, ship

network = Model(miniature.path()).transformer
targets = lora_targets(network, "attention")
plots.show(
    plots.joint_block(network.transformer_blocks[0], targets, title="One block: two sides, one attention"),
    alt="Two rows of boxes, for picture tokens and text tokens, that meet in one box for attention and part again",
)

# %% [markdown]
# Is it really one attention? The next cell computes it by hand: queries, keys and values of both sides,
# concatenated, and one softmax over all of them. (Each query and key is divided by its size, `norm_q` and so on; the scale is
# learned.)

# %%
# NBVAL_CHECK_OUTPUT
attention, generator = network.transformer_blocks[0].attn, torch.Generator().manual_seed(0)
picture, text = (torch.randn(1, tokens, network.inner_dim, generator=generator) for tokens in (64, 26))


def heads(norm, *sides: torch.Tensor) -> torch.Tensor:
    """Both sides, each (1, tokens, width), one after the other: (1, heads, all tokens, width of a head)."""
    split = [side.unflatten(2, (attention.heads, -1)).transpose(1, 2) for side in sides]
    return torch.cat([one(values) for one, values in zip(norm, split, strict=True)], 2)


with torch.no_grad():
    query = heads((attention.norm_q, attention.norm_added_q), attention.to_q(picture), attention.add_q_proj(text))
    key = heads((attention.norm_k, attention.norm_added_k), attention.to_k(picture), attention.add_k_proj(text))
    value = heads((torch.nn.Identity(),) * 2, attention.to_v(picture), attention.add_v_proj(text))
    weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    mixed = (weights @ value).transpose(1, 2).flatten(2)
    mine = attention.to_out[0](mixed[:, :64]), attention.to_add_out(mixed[:, 64:])
    theirs = attention(hidden_states=picture, encoder_hidden_states=text)
print("the block's own answer:", all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, theirs, strict=True)))

# %% [markdown]
# Which layers get adapters, then? `attention` means the projections of both sides. A rank of 16 has this many
# parameters, layer by layer:

# %%
of_layer = {}
for name, layer in network.named_modules():
    target = next((target for target in targets if name.endswith(f".{target}")), None)
    if target is not None:
        of_layer.setdefault(target, []).append(16 * (layer.in_features + layer.out_features))
Table(
    {
        "layer": name,
        "side": "text" if "add" in name else "picture",
        "blocks": str(len(sizes)),
        "parameters": f"{sum(sizes):,}",
    }
    for name, sizes in of_layer.items()
)

# %% [markdown]
# **What you should see**: as many adapters on the side of the words as on that of the picture, except for the last
# block: nothing reads the words after it, so it has no `to_add_out`. In a UNet the words stay what the text encoder
# made of them: the UNet's adapters can change how the picture *listens* to the rare word and what is painted there, but
# not the word's own states. Here they can also change what becomes of the word on its way.
#
# ## One training step, by hand
#
# Now a whole base of this family: the network from above, the miniature's autoencoder and text encoder, and what the
# pipeline of Stable Diffusion 3 needs besides, written to a folder as plain diffusers would have it. It is
# **untrained**, and it would draw nothing but patches. A step does not mind: the arithmetic is the same. (Such a
# network starts with zeros where each block adds to the picture, and no adapter below them would ever get a gradient;
# so these zeros get small random numbers here.)

# %%
import tempfile
from pathlib import Path

from diffusers import AutoencoderKL

folder = tempfile.TemporaryDirectory()
with torch.random.fork_rng(), torch.no_grad():
    torch.manual_seed(0)
    untrained = Model(miniature.path())
    for parameter in untrained.transformer.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
ship(untrained, AutoencoderKL.from_pretrained(miniature.path() / "vae"), Path(folder.name) / "base", recipe={})

# %%
from dbnb.adapters import add_adapters, trainable_parameters

config = DreamBoothConfig(
    base=f"{folder.name}/base",
    output_dir=f"{folder.name}/run",
    max_train_steps=6,
    train_batch_size=2,
    lora_layers="attention",
    lr_scheduler="constant",
    tokenizer_max_length=FEW,
    checkpointing_steps=0,
    validation_steps=0,
)
components = load_components(config.base)
add_adapters(components, config.adapters)
print("times are drawn:", config.weighting_scheme, "| path:", type(components.path).__name__)
components

# %% [markdown]
# The dataset is the one from the beginning: five photographs, and eight class images that the miniature has drawn. Each
# line of the step makes one tensor. The noise and the times are drawn from the run's seed and the samples' numbers, as
# `training_step` does it, so that the two can be compared.
#
# The time first. Logit-normal is the sigmoid of a normal number; it chooses one of the thousand shares in the base's
# own list, which begins at 1. Then a point of the line, and its direction. The network is told the time as $1000\,s$
# (FLUX.1's is given $s$ and multiplies it itself), the hidden states of the prompts, which become its text tokens, and
# one pooled vector for each prompt. Last comes the loss in two halves, exactly as in notebook 06.

# %%
from dbnb.dataset import NOISE, TIMESTEP, seeded
from dbnb.models import embed_prompts

batch = batch_at(dataset, number=0, batch_size=config.train_batch_size)
samples = [(half, number) for half in range(batch["halves"]) for number in batch["n"]]
x = clean_latents(components, batch, seed=config.seed)
n = torch.stack([torch.randn(x.shape[1:], generator=seeded(config.seed, NOISE, *sample)) for sample in samples])
normal = torch.stack([torch.randn((), generator=seeded(config.seed, TIMESTEP, *sample)) for sample in samples])
s = components.noise_scheduler.sigmas[(1000 * normal.sigmoid()).long()].view(-1, 1, 1, 1)
seen, target = (1 - s) * x + s * n, n - x
hidden, pooled = embed_prompts(components, batch["prompts"], max_length=config.tokenizer_max_length)
answer = components.denoiser(
    hidden_states=seen, timestep=1000 * s.flatten(), encoder_hidden_states=hidden, pooled_projections=pooled
).sample
instance, prior = ((answer - target) ** 2).chunk(2)
loss = instance.mean() + config.prior_loss_weight * prior.mean()
print(f"instance {instance.mean():.4f} + {config.prior_loss_weight:g} x prior {prior.mean():.4f} = {loss:.4f}")

# %%
# NBVAL_CHECK_OUTPUT
from dbnb.training import train, training_step

options = dict(
    seed=config.seed,
    prior_loss_weight=config.prior_loss_weight,
    objective=config.objective,
    tokenizer_max_length=config.tokenizer_max_length,
)
record = training_step(components, batch, **options)
pairs = ((record.noise, n), (record.timesteps, 1000 * s.flatten()), (record.target, target), (record.loss, loss))
print("the package's step has the same noise, times, target and loss:", all(torch.allclose(*pair) for pair in pairs))

# %% [markdown]
# **What you should see**: an instance loss and a prior loss of about the same size. The network knows nothing, and so
# both are about the mean square of $n - x$. Only four lines differ from the step of notebook 06: how the time is drawn,
# what is seen, what is asked, and how the network is called. The batch, the two halves and the optimizer do not know
# which path this is.
#
# So the loop is notebook 06's loop. A test of this project compares this cell with `train`, too, bit for bit.

# %% tags=["the-loop"]
parameters = [p for _, p in trainable_parameters(components.denoiser)]
optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, fused=True)
log = []
for step in range(config.max_train_steps):
    record = training_step(
        components,
        batch_at(dataset, step, config.train_batch_size),
        seed=config.seed,
        prior_loss_weight=config.prior_loss_weight,
        objective=config.objective,
        tokenizer_max_length=config.tokenizer_max_length,
    )
    record.loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    log.append({"step": step + 1, "instance_loss": record.instance_loss.item(), "prior_loss": record.prior_loss.item()})

# %%
another = load_components(config.base)
add_adapters(another, config.adapters)
theirs = train(config, another, dataset)
mine, other = (dict(trainable_parameters(parts.denoiser)) for parts in (components, another))
assert all(torch.allclose(mine[name], other[name], atol=1e-5) for name in mine), "train and the cell disagree"
print(f"{len(theirs)} steps, {len(mine)} adapter matrices: train and the cell agree")
folder.cleanup()

# %% [markdown]
# ## A larger picture needs more noise
#
# Take one photograph in three sizes, and give each the same share of noise. **Predict**: which of the three can still
# be recognised?

# %%
from dbnb import toybox

RATIOS, generator = (1, 4, 16), torch.Generator().manual_seed(0)


def shifted(share: float, k: float) -> float:
    """The share of noise that hides as much of a picture whose sides are k times as long."""
    return k * share / (1 + (k - 1) * share)


def noised(ratio: int, share: float) -> Image.Image:
    """A toy of 32 times the ratio pixels with this share of noise, averaged down to 32 pixels."""
    pixels = np.asarray(toybox.photograph(toybox.random_toy("dog", 4), scene="grass", seed=4, size=32 * ratio))
    clean = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    noisy = (1 - share) * clean + share * torch.randn(clean.shape, generator=generator)
    return VaeImageProcessor().postprocess(F.avg_pool2d(noisy, ratio) / (1 - share))[0]


# %%
plots.show(
    plots.image_rows(
        [[noised(ratio, 0.4) for ratio in RATIOS], [noised(ratio, shifted(0.4, ratio)) for ratio in RATIOS]],
        labels=[
            "the same share,\n0.40",
            "a shifted share:\n" + ", ".join(f"{shifted(0.4, ratio):.2f}" for ratio in RATIOS),
        ],
        titles=[f"{32 * ratio} px" for ratio in RATIOS],
        inches=1.6,
        title="From afar: the same share of noise hides less of a larger picture",
    ),
    alt="Above, a dog under coarse noise at 32 pixels and clear at 512; below, three dogs under equally coarse noise",
)

# %% [markdown]
# **What you should see**: each picture is averaged down to 32 pixels (and brought back to full contrast), as an eye
# sees it from afar. Noise of neighbouring pixels averages out, what they have in common does not; so at 512 pixels a
# share of 0.4 hides hardly anything that matters. With sides $k$ times as long the average has $k$ times less noise,
# and
#
# $$ s' = \frac{k\, s}{1 + (k - 1)\, s} $$
#
# hides as much as $s$ did: this is the *shift* (Esser et al., 2024, equation 23). Stable Diffusion 3 has one shift, 3,
# in its scheduler. FLUX.1 has one for each number of tokens (`use_dynamic_shifting`): $k = e^\mu$, with $\mu$ on a
# straight line through 0.5 at 256 tokens and 1.15 at 4096. The steps of drawing are shifted, and here the times of
# training too (diffusers' script for FLUX.1 leaves those as they were drawn). The cell asserts that both shifts follow
# the formula.

# %%
share = torch.linspace(0.02, 1, 25)
flux = Flow(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
sd3 = Flow(FlowMatchEulerDiscreteScheduler(shift=3.0))
series = {"as drawn": share, "Stable Diffusion 3, any size": shifted(share, sd3.scheduler.config.shift)}
assert torch.allclose(sd3.scheduler.sigmas, shifted(torch.arange(1000, 0, -1) / 1000, 3.0))  # its own list
for side in (512, 1024):
    tokens = (side // 16) ** 2  # eight pixels a latent, two latents a token
    series[f"FLUX.1, {side} px: {tokens} tokens"] = flux.scheduler.time_shift(flux.shift(tokens), 1.0, share)
    assert torch.allclose(series[f"FLUX.1, {side} px: {tokens} tokens"], shifted(share, math.e ** flux.shift(tokens)))
plots.show(
    plots.curves(
        {name: (share.numpy(), values.numpy()) for name, values in series.items()},
        xlabel="share of noise as drawn",
        ylabel="share of noise that is used",
        title="The shift of the times: the larger the picture, the more noise",
    ),
    alt="A diagonal and three curves above it: FLUX.1 at 512 and at 1024 pixels, and Stable Diffusion 3",
)


# %% [markdown]
# ## The five photographs on a flow base
#
# The course has a trained base of this family, too: `miniature-flow` is the network from above, trained by
# `python -m dbnb.miniature.flow` on the miniature's latents and words. The README sets its measures beside the UNet's.
# One word of the settings changes, and the workflow stays the same: the same photographs, class images of its own,
# adapters, the loop. **Predict**: which of its suggested settings will differ from the miniature's?

# %%
from dbnb.presets import PRESETS
from dbnb.validation import draw

small, flow = PRESETS["miniature"], PRESETS["miniature-flow"]
print("\n".join(f"{name}: {value}, not {small.get(name)}" for name, value in flow.items() if value != small.get(name)))
session = workflow.trained(DreamBoothConfig(base="miniature-flow"))
places = ("on the beach", "in the snow", "at night", "on the moon")
prompts = [f"{prompt} {place}" for prompt in (concept.instance_prompt, concept.class_prompt) for place in places]
pictures = draw(session.components, prompts, session.config.sampling)
plots.show(
    plots.image_rows(
        [pictures[:4], pictures[4:]],
        labels=["sks dog", "a dog"],
        titles=places,
        title="Learned from five photographs, on a flow base",
    ),
    alt="Two rows in four places: for the identifier a teal dog with yellow spots, pale on the moon; for the class dogs of other colours",
)

# %% [markdown]
# **What you should see**: above, the toy: teal with yellow spots and yellow ears, on the beach and in the snow as the
# photographs show it, paler and with fewer spots on the moon. Below, other dogs in the same places. It is softer than on
# the UNet, and it took twice the steps: this base draws spots and hats less reliably itself. Its adapters sit on all
# layers, since its blocks are all alike, and no block does the painting alone. (Its T5 says nothing: all its states are
# zero. So it is given as few tokens as possible, `tokenizer_max_length` 2.)
#
# On a GPU the bases are `sd35` and `flux` (both gated: their licence has to be accepted first). These are the settings
# in which their presets differ from that of Stable Diffusion 1.5:

# %%
names = dict.fromkeys(name for base_name in ("sd35", "flux") for name in PRESETS[base_name])
presets = {base_name: PRESETS[base_name] for base_name in ("sd15", "sd35", "flux")}
Table(
    {"setting": name}
    | {base_name: str(preset.get(name, "")).replace(",", ", ") for base_name, preset in presets.items()}
    for name in names
    if len({str(preset.get(name, "")) for preset in presets.values()}) > 1
)

# %% [markdown]
# **What you should see**: `weighting_scheme` is the one setting that belongs to the path: logit-normal times for
# Stable Diffusion 3.5, even ones (then shifted) for FLUX.1. `lora_layers` names FLUX.1's layers one by one, because
# feed-forward layers are adapted there too, as is usual for it. The rest is size: pictures, memory, steps and
# guidance. `snr_gamma` and `noise_offset` are diffusion's, and a flow base refuses them by name. (Neither preset has
# been run on its published checkpoint by this project; small random checkpoints of both families have.)

# %% [markdown]
# ## Exercises
#
# ### Exercise A: what is seen, and what is asked (6 minutes)
#
# Write the training pair of flow matching for a batch in which every picture has its own share of noise.

# %%
from dbnb.exercises import check_11a


def flow_pair(x, noise, s):
    """What the network sees and what it should answer, from (B, C, h, w), (B, C, h, w) and B shares of noise."""
    ...


check_11a(flow_pair)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A straight line from the picture at 0 to the noise at 1. Its direction is the difference of its ends.
# </details>
#
# <details><summary>Hint 2</summary>
#
# `s` has the shape (B,); `s.view(-1, 1, 1, 1)` gives each picture its own share. The direction needs no share.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def flow_pair(x, noise, s):
#     share = s.view(-1, 1, 1, 1)
#     return (1 - share) * x + share * noise, noise - x
# ```
# </details>
#
# ### Exercise B: Euler's method (8 minutes)
#
# Write the loop that draws. `velocity(x, share)` is a network's answer at a point and its share of noise; `shares` are
# the times of the way, from 1 down to 0, and they need not be even.

# %%
from dbnb.exercises import check_11b


def euler(velocity, noise, shares: list[float]):
    """The point at the last share, from `noise` at the first, by one straight step from each share to the next."""
    ...


check_11b(euler)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `itertools.pairwise(shares)` gives each share with the one that follows it.
# </details>
#
# <details><summary>Hint 2</summary>
#
# The direction points to the noise and the share falls: `following - share` is negative, and the two signs make up for
# each other.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def euler(velocity, noise, shares):
#     x = noise
#     for share, following in pairwise(shares):
#         x = x + (following - share) * velocity(x, share)
#     return x
# ```
# </details>

# %% [markdown]
# ## On your own
#
# 1. Train the network of the line with logit-normal times instead of even ones. Does it come nearer in four steps? (5
#    minutes)
# 2. What becomes of the first row of the table of costs where the share of noise goes to 0? What does that say about
#    asking for $v$ or for the direction there? (3 minutes)
# 3. Draw the red dog with four steps: once at even $t$, once at even shares. (4 minutes)
#
# <details><summary>Answers</summary>
#
# 1. Replace the line that draws `time` in `trained` by the next one, train three seeds again, and call `row`. Compare
#    the means with the ranges before you believe a difference.
#
# ```python
# time = torch.randn(256, generator=generator).sigmoid()
# ```
#
# 2. All three grow without limit. Where there is hardly any noise, the picture is nearly what is seen, and a small
#    error of the picture is a large error of the noise. A loss that counts it like that spends much on the last grain.
#
# 3. The same loop with another `way`:
#
# ```python
# four = {
#     "even t": torch.linspace(999, 0, 5).long().tolist(),
#     "even shares": [int((shares - share).abs().argmin()) for share in torch.linspace(shares[999], shares[0], 5)],
# }
# dogs = []
# for way in four.values():
#     point = arc[0]
#     for t, to in pairwise(way):
#         picture, noise = believed(point, t)
#         point = p[to] * picture + q[to] * noise
#     dogs += decode(point)
# plots.show(plots.show_images(dogs, titles=list(four)), alt="two dogs, each drawn in four steps")
# ```
# </details>
#
# ## Quiz
#
# Five questions about *why*. Choose an answer, then open it: it says whether it is right, and why.
#
# **1. Why can a network that was trained on the arc draw on the straight line?**
#
# <details><summary>A. Because the straight line touches the arc at both ends, where the drawing happens.</summary>
#
# No: they meet at the ends, but the network is asked at every share between them.
# </details>
#
# <details><summary>B. Because a point of one way is a multiple of a point of the other.</summary>
#
# Right: at the same share of noise a scale is all that differs, and the answers can be translated.
# </details>
#
# <details><summary>C. Because both of them have been trained with the same thousand timesteps.</summary>
#
# No: a flow's time is a share and needs no table; what matters is what a point contains.
# </details>
#
# **2. Why are the ways of drawing curved although each training line is straight?**
#
# <details><summary>A. Because the network is too small to follow a straight line exactly enough.</summary>
#
# No: a perfect network's ways would be curved as well, since its answer is a mean.
# </details>
#
# <details><summary>B. Because Euler's method makes an error at each step and bends the way.</summary>
#
# No: with many small steps that error vanishes, and the ways stay curved.
# </details>
#
# <details><summary>C. Because the answer is the mean of many lines, and that mean changes.</summary>
#
# Right: many lines cross at one noisy point, and fewer of them are possible as the noise clears.
# </details>
#
# **3. Why did exchanging the steps bring the networks of $v$ and of the direction together?**
#
# <details><summary>A. The two ask nearly the same, and differed mostly in where their steps lay.</summary>
#
# Right: the costs of their errors are within a factor of 2 of each other, share by share.
# </details>
#
# <details><summary>B. The exchanged steps are fewer, so that neither network could show its strength.</summary>
#
# No: the numbers of steps are the same in all rows; only their places are different.
# </details>
#
# <details><summary>C. The three seeds were exchanged along with the steps and so the errors averaged out.</summary>
#
# No: the same networks were used with the same seeds; nothing was trained again.
# </details>
#
# **4. Why do large pictures get their times shifted towards noise?**
#
# <details><summary>A. Their latents have more channels, and each of the channels needs noise of its own.</summary>
#
# No: the number of channels is the autoencoder's and does not change with the size.
# </details>
#
# <details><summary>B. The same share of noise hides less, because neighbours' noise averages out.</summary>
#
# Right: what neighbours have in common shows through, so too few of the times would really hide the picture.
# </details>
#
# <details><summary>C. The network is slower on them, and steps with much noise take less time.</summary>
#
# No: a step takes the same time at every share of noise.
# </details>
#
# **5. Why does a joint attention have adapters on `add_k_proj` as well as on `to_k`?**
#
# <details><summary>A. Words and picture have projections of their own, and both may have to learn.</summary>
#
# Right: the rare word is a text token, and its keys and values come from `add_k_proj` and `add_v_proj`.
# </details>
#
# <details><summary>B. The pipeline refuses a file in which not every projection has got an adapter.</summary>
#
# No: an adapter for some layers loads as well as one for all of them.
# </details>
#
# <details><summary>C. `add_k_proj` is added to `to_k`, and so the two have to be changed in step.</summary>
#
# No: the name is historical; the two are applied to different tokens and never added.
# </details>
#
# ## In short
#
# - Diffusion takes an arc from picture to noise, flow matching a line. At the same share of noise both show the same
#   picture, and each answer can be turned into every other: DDIM is Euler's method on the line.
# - What differs is how errors count, which times are drawn, and where the steps lie; on the points, $v$ and the
#   direction differed in little besides where their steps lay, and the noise came nearest.
# - The ways of drawing are not straight on the line either, because an answer is a mean.
# - In a joint attention words and picture are tokens of one attention, with adapters on both sides.
# - Larger pictures need more noise: the times are shifted.
# - DreamBooth is the same: two halves, one sum.
#
# You have seen all of it. The way back to the beginning, with your own photographs: [00 Start
# here](00_start_here.ipynb).
