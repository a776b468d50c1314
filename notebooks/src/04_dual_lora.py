# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 Dual LoRA: what is trained, and why it fits in a small file
#
# **What you will do**: read a low-rank [adapter](../docs/glossary.md#adapter) of ten lines and try it out, let peft
# put the same thing on a UNet and a text encoder, look at what training makes of it, and write one of your own that
# equals peft's.
#
# **What you will learn**: [rank](../docs/glossary.md#rank), [alpha](../docs/glossary.md#alpha) and target layers, and
# what adapters on [attention](../docs/glossary.md#attention) alone paint less well; why nothing changes at first; why
# trainable weights are `float32` whatever the base is; what "dual" means. Afterwards you can say of any adapter how
# large it is, where it sits and how much it changes.
#
# **What you need**: notebook [03](03_loading_and_freezing.ipynb). About three minutes on two CPU cores if notebook 00
# has run, whose training is compared with two others here; a minute more if not; half a minute when you come back.
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
# The new module is `dbnb.adapters`.

# %%
import dataclasses

import numpy as np
import torch
from torch import nn

from dbnb import metrics, plots, workflow
from dbnb.adapters import ATTENTION, adapted_modules, adapter_table, add_adapters, lora_targets, trainable_parameters
from dbnb.config import DreamBoothConfig
from dbnb.models import encode_prompts, load_components
from dbnb.presets import suggested
from dbnb.tables import Table
from dbnb.validation import draw, validation_images

workflow.quiet_libraries()
config = DreamBoothConfig()

# %%
plots.you_are_here("04")

# %% [markdown]
# ## The idea, in ten lines
#
# A layer with $n$ inputs and $m$ outputs multiplies by a matrix $W$ of $m \times n$ numbers. Fine-tuning changes all of
# $W$, and the DreamBooth paper does this with every layer of the network. It works, but the optimizer then needs memory
# for every weight, and the result is as large as the base itself. **[LoRA](../docs/glossary.md#lora)** (Hu et al.,
# 2021) leaves $W$ alone and adds a product of two thin matrices:
#
# $$ y = W x + \frac{\alpha}{r} \, B A x, \qquad A \in \mathbb{R}^{r \times n},\; B \in \mathbb{R}^{m \times r} $$
#
# The **rank** $r$ says how thin they are; $\alpha$ scales the product. Where you do not set it, $\alpha = r$ here, and
# the factor is 1. (kohya's scripts default to $\alpha = 1$, a factor of $1/r$, so their learning rates do not carry
# over.) Notebook 06 trains both ways and compares memory, size of the file and fidelity.


# %%
class Adapted(nn.Module):
    """A linear layer with a low-rank adapter."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.layer, self.scale = layer.requires_grad_(False), alpha / rank
        self.A = nn.Parameter(torch.randn(rank, layer.in_features) / rank)
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.scale * (x @ self.A.T) @ self.B.T


# %% [markdown]
# What does such a product look like? Two columns times two rows give a whole square, but every row of it is a mixture
# of the same two rows. **Predict**: will you see that in the picture?

# %%
generator = np.random.default_rng(0)
B, A = generator.normal(size=(24, 2)), generator.normal(size=(2, 24))
plots.show(
    plots.matrices(
        {"B": B, "A": A, "B A": B @ A},
        aspect="equal",
        title=f"{B.size + A.size} numbers make a square of {(B @ A).size}",
    ),
    alt="A tall thin matrix, a flat one, and their product: a square with streaks along rows and columns",
)

# %% [markdown]
# **What you should see**: streaks. Whole rows and columns of the square rise and fall together: it has as many entries
# as any square, but few of them are free. The larger the layer, the more is saved. In Stable Diffusion's UNet, the
# smallest attention layers are 320 x 320:

# %%
# NBVAL_CHECK_OUTPUT
layer = nn.Linear(320, 320, bias=False)
numbers = {"all of W": layer.weight.numel()}
for rank in (64, 16, 4, 1):
    numbers[f"rank {rank}"] = sum(p.numel() for p in (Adapted(layer, rank, rank).A, Adapted(layer, rank, rank).B))
for name, count in numbers.items():
    print(f"{name:8} {count:7,} {100 * count / numbers['all of W']:6.1f} %")

# %% [markdown]
# ## Zero at first
#
# $A$ starts with random numbers, $B$ with zeros. **Predict**: how far is the adapted layer's answer from the layer's
# own before training?

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
adapted = Adapted(layer, rank=4, alpha=4)
x = torch.randn(5, 320)
print("difference before training:", (adapted(x) - layer(x)).abs().max().item())

# %% [markdown]
# It is exactly zero: training starts from the base as it is. Why is $A$ not zero as well? Then neither matrix would
# ever get a gradient, because the gradient of each has the other as a factor.

# %%
# NBVAL_CHECK_OUTPUT
adapted(x).square().mean().backward()
print("B gets a gradient:", bool(adapted.B.grad.abs().max() > 0))
print("A gets one, at first:", bool(adapted.A.grad.abs().max() > 0))

# %% [markdown]
# ## The same for a convolution
#
# A UNet consists of convolutions as well as linear layers. A convolution from $n$ to $m$ channels with a kernel of $k
# \times k$ pixels has a weight of $m \times n \times k \times k$ numbers. Its adapter is a pair of convolutions: $A$
# has the same kernel size and only $r$ output channels, and $B$ has a kernel of $1 \times 1$ and mixes these $r$
# channels into $m$. Applied in sequence, they are equal to a single convolution, whose kernel is the product of the two
# weights, written as matrices of $m \times r$ and $r \times n k^2$. **Predict**: how many numbers does the adapter
# have, compared with the kernel?

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
convolution, rank = nn.Conv2d(96, 96, kernel_size=3, padding=1, bias=False), 4
down, up = nn.Conv2d(96, rank, kernel_size=3, padding=1, bias=False), nn.Conv2d(rank, 96, kernel_size=1, bias=False)
kernel = (up.weight.flatten(1) @ down.weight.flatten(1)).view_as(convolution.weight)
picture = torch.randn(1, 96, 16, 16)
with torch.no_grad():
    two_steps = convolution(picture) + up(down(picture))
    one_kernel = nn.functional.conv2d(picture, convolution.weight + kernel, padding=1)
print("A", tuple(down.weight.shape), "| B", tuple(up.weight.shape), "| kernel", tuple(kernel.shape))
print(f"{down.weight.numel() + up.weight.numel():,} numbers instead of {kernel.numel():,}")
print("B after A is one kernel:", torch.allclose(two_steps, one_kernel, atol=1e-4))

# %% [markdown]
# ## Where the adapters sit
#
# In diffusion models, LoRA is usually applied to the **attention** layers. There, each place of the picture compares
# its *query* with the *keys* of all places, and takes up a mixture of their *values*. The matrices that make
# these three, and the output, get the adapters. In [cross-attention](../docs/glossary.md#cross-attention), keys and
# values come from the prompt: here the adapters can respond to the rare word, to which the base's own layers hardly
# respond (notebook 03).
#
# `lora_layers` says which layers of the UNet get an adapter: `attention`, or `all` (every linear layer and every
# convolution of the UNet's blocks), or the names of layers or of whole blocks. The miniature's default is its last
# two blocks, and two sections below show why. For Stable Diffusion (1.5 to 3.5) it is `attention`, as in most training
# scripts: that is usually enough there, and the files stay small. For FLUX.1 the feed-forward layers get adapters too
# (notebook 11). Here all layers get adapters, so that you can look at every kind.

# %%
# NBVAL_CHECK_OUTPUT
components = load_components(config.base)
print("attention:", ", ".join(ATTENTION))
print("all:", ", ".join(lora_targets(components.unet, "all")))
print("suggested:", {base: suggested(base)["lora_layers"] for base in ("miniature", "sd15", "sdxl")})
print("text encoder:", ", ".join(components.architecture.lora_targets))

# %% [markdown]
# (`add_k_proj` and `add_v_proj` occur in a few UNets only, such as that of DeepFloyd IF; the miniature has none.)
#
# **Dual** means that there is one set of adapters on the UNet and, if you ask for it, another on the text encoder,
# each with its own rank and alpha. By default the miniature and the large bases leave the text encoder frozen: where
# it passes the identifier on, the UNet's adapters are enough (notebook 08 measures it), and prompts have to be encoded
# only once. Here both parts get adapters, with `train_text_encoder=True`, so that you can look at both. `add_adapters`
# uses peft, Hugging Face's library of adapters, with which plain diffusers also loads them. Before that, let us record
# three answers of the base: the text encoder's to a prompt, the UNet's to noise, and four pictures.


# %%
@torch.no_grad()
def answers() -> dict[str, torch.Tensor]:
    """What text encoder and UNet answer to a fixed input."""
    hidden = encode_prompts(components, ["a photo of sks dog"])
    size = components.unet.config.sample_size
    noise = torch.randn(1, components.unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    return {"text encoder": hidden, "UNet": components.unet(noise, 500, encoder_hidden_states=hidden).sample}


before, pictures = answers(), draw(components, ["a photo of sks dog"] * 4, config.sampling)
add_adapters(components, lora_layers="all", rank=16, train_text_encoder=True, text_encoder_rank=8)
components

# %% [markdown]
# Compare the column `trainable` with notebook 03, where it was zero. Here are some of the adapted layers:

# %%
rows = adapter_table(components)
print(len(rows), "adapted layers")
Table(rows[:6] + rows[-4:])

# %% [markdown]
# And here are all of them, counted by block and by kind of layer. (In a name, `attn1` is self-attention, where places
# of the picture look at each other, and `attn2` is cross-attention, where they look at the words.) **Predict**: which
# kind has the most parameters?


# %%
def kind_of(layer: str, part: str = "unet") -> str:
    """What a layer does, by its name."""
    if part != "unet" or "attn" in layer:
        return "cross-attention" if "attn2" in layer else "self-attention"
    is_convolution = any(name in layer for name in ("conv", "sampler", "proj_in", "proj_out"))
    return "convolutions" if is_convolution else "other linear layers"


KINDS, blocks = ("self-attention", "cross-attention", "convolutions", "other linear layers"), {}
for row in rows:
    parts = row["layer"].split(".")
    block = (
        "text\nencoder"
        if row["part"] != "unet"
        else "\n".join(parts[0].split("_") + parts[1:2] * ("mid" not in parts[0]))
    )
    counts = blocks.setdefault(block, dict.fromkeys(KINDS, 0.0))
    counts[kind_of(row["layer"], row["part"])] += int(row["parameters"].replace(",", "")) / 1000
blocks = {name: blocks[name] for name in sorted(blocks, key=lambda name: (name.startswith("text"), name))}

# %%
rounded = {name: {kind: round(n) for kind, n in counts.items() if n} for name, counts in blocks.items()}
plots.show(
    plots.bars(rounded, ylabel="thousand parameters", title="Most of the adapters' parameters belong to convolutions"),
    alt="Groups of four bars for the UNet's blocks, the convolutions' bar the highest, and one bar for the text encoder",
)

# %% [markdown]
# **What you should see**: convolutions have the largest share in every block of the UNet, since the $A$ of a 3 x 3
# convolution has nine numbers where that of a linear layer has one. A block without attention has adapters only
# because `lora_layers` is `all`. All of the text encoder's adapters are in its self-attention, the only kind it has.
#
# With the new adapters, does the whole model still answer as before? **Predict**: the text encoder, and the UNet?

# %%
# NBVAL_CHECK_OUTPUT
for name, answer in answers().items():
    # 1e-5 leaves room for rounding: some processors add the terms of a convolution in another order.
    print(f"the {name} answers as before:", torch.allclose(answer, before[name], rtol=0, atol=1e-5))

# %%
again = draw(components, ["a photo of sks dog"] * 4, config.sampling)
plots.show(
    plots.image_rows(
        [pictures, again], labels=["base", "with new adapters"], inches=1.2, title="New adapters change nothing"
    ),
    alt="Two rows of the same four dogs: without adapters and with untrained ones",
)

# %% [markdown]
# ## In float32, whatever the base is
#
# A frozen base can be stored in `bfloat16`. Adapters cannot: a training step often changes a weight by a
# ten-thousandth of its value, and `bfloat16` has two to three decimal digits. **Predict**: what is 1 plus a thousand
# times 0.0001 in either format?

# %%
# NBVAL_CHECK_OUTPUT
for dtype in (torch.float32, torch.bfloat16):
    weight = torch.ones((), dtype=dtype)
    for _ in range(1000):
        weight += torch.tensor(0.0001, dtype=dtype)
    print(f"{str(dtype):16} {weight.item():.4f}")

# %% [markdown]
# In `bfloat16` every single step was rounded away. peft creates adapters in the format of the layer that they belong
# to, so they have to be cast, and `add_adapters` does that:

# %%
# NBVAL_CHECK_OUTPUT
half = load_components(config.base, weight_dtype=torch.bfloat16)
add_adapters(half, rank=4)
print("base:", half.unet.conv_in.weight.dtype, "| adapters:", {p.dtype for _, p in trainable_parameters(half.unet)})

# %% [markdown]
# ## What training makes of it
#
# This is the training of notebook 00 with one difference: adapters on all layers. Look at one of them, near the end of
# the UNet: the one that makes the values of the prompt's words.

# %%
session = workflow.trained(dataclasses.replace(config, lora_layers="all"))
unet = session.components.unet
name = next(n for n, m in unet.named_modules() if n.startswith("up_blocks.2") and n.endswith("attn2.to_v"))
layer = unet.get_submodule(name)
A, B = (getattr(layer, part)["default"].weight.detach().numpy() for part in ("lora_A", "lora_B"))
W, change = layer.base_layer.weight.detach().numpy(), layer.scaling["default"] * B @ A
ratio = np.linalg.norm(change) / np.linalg.norm(W)
print(f"{name}: W {W.shape}, B {B.shape}, A {A.shape}; the change is {100 * ratio:.0f} % of W in size")

# %% [markdown]
# **Predict**: next to $W$, will the change $\frac{\alpha}{r} BA$ look speckled or streaked?

# %%
plots.show(
    plots.matrices({"W": W, "the change": change}, title="W is speckled, its change is streaked", inches=3.4),
    alt="Two matrices as pictures on one scale: W speckled, the change with streaks along rows and columns",
)

# %% [markdown]
# **What you should see**: speckles, and streaks: in the change, whole rows and columns rise and fall together, as in
# the small example. That is what low rank looks like.
#
# How low is it really? A matrix is a sum of matrices of rank one, its *directions*. The singular values say how large
# each direction is, and the largest few make the best approximation of a given rank (Eckart and Young, 1936). How much
# of the matrix is then missing, for $W$, for its change, and for random numbers?


# %%
def missing(matrix: np.ndarray) -> np.ndarray:
    """What the best approximation of rank 1, 2, … misses, as a share of the matrix's size."""
    squares = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    return np.sqrt(np.maximum(1 - np.cumsum(squares) / squares.sum(), 0))


chance = np.random.default_rng(0).normal(size=W.shape)
errors = {"random numbers": missing(chance), "W": missing(W), "the change": missing(change)}
plots.show(
    plots.curves(
        {which: (range(1, len(e) + 1), e) for which, e in errors.items()},
        xlabel="rank of the approximation",
        ylabel="share that is missing",
        title="W needs many directions, its change hardly more than one",
    ),
    alt="Two curves that fall slowly, for random numbers and W; the change's is near zero from the first direction on",
)

# %%
# NBVAL_CHECK_OUTPUT
rank = layer.r["default"]
assert errors["the change"][rank - 1] < 1e-3 < errors["W"][rank - 1]
print(f"with rank {rank} nothing of the change is missing, and some of W is")

# %% [markdown]
# The end of the curve holds by construction: a product of thin matrices has no more directions than its rank. The
# beginning of the curve was learned: in this layer a single direction carries nearly the whole change. Is this so in
# every layer? For each layer, count the directions that carry nine tenths of the squared change (on the curve above:
# until the missing share falls below $\sqrt{0.1} \approx 0.32$), and measure how
# large the change is beside the weights (`flatten` writes a convolution's weights as matrices):

# %%
moved, needed, adapted_layers = {}, {}, {}
for part, module in adapted_modules(session.components).items():
    for name, sub in module.named_modules():
        if hasattr(sub, "lora_A") and "default" in sub.lora_A:
            A, B = (getattr(sub, matrix)["default"].weight.detach().flatten(1) for matrix in ("lora_A", "lora_B"))
            moved[f"{part}: {name}"] = (sub.scaling["default"] * (B @ A).norm() / sub.base_layer.weight.norm()).item()
            needed[f"{part}: {name}"] = int(np.argmax(missing((B @ A).numpy()) ** 2 <= 0.1)) + 1
            adapted_layers[f"{part}: {name}"] = sub
few = list(needed.values())
print(
    f"directions for nine tenths of the squared change, of {rank}: {min(few)} to {max(few)}, median {int(np.median(few))}"
)

# %% [markdown]
# No: other layers spread their change over several directions, some over many. How many does the toy need? Let us cut
# the trained adapter down to its largest directions, in every layer, and draw. **Predict**: with how many does the toy
# come back?

# %%
concept, encoders, cut = session.concept, metrics.load_encoders(session.components.base), {}
real = encoders.identity_features(concept.images())
with torch.no_grad():
    halves = [[sub.lora_B["default"].weight, sub.lora_A["default"].weight] for sub in adapted_layers.values()]
    trained = [B.clone() for B, _ in halves]
    products = [B.flatten(1) @ A.flatten(1) for B, A in halves]
    directions = [torch.linalg.svd(product, full_matrices=False).U for product in products]  # the largest first
    for keep in (1, 2, 4, rank):
        for (B, _), whole, U in zip(halves, trained, directions, strict=True):
            B.copy_((U[:, :keep] @ U[:, :keep].T @ whole.flatten(1)).view_as(B))
        cut[keep] = draw(session.components, [concept.instance_prompt] * 6, config.sampling)
    for (B, _), whole in zip(halves, trained, strict=True):
        B.copy_(whole)  # as it was trained
fidelity = {keep: metrics.subject_fidelity(encoders.identity_features(images), real) for keep, images in cut.items()}

# %%
plots.show(
    plots.image_rows(
        list(cut.values()),
        labels=[f"{keep} direction{'s' * (keep > 1)}:\nfidelity {fidelity[keep]:.2f}" for keep in cut],
        title="One adapter, cut down to its largest directions in every layer",
    ),
    alt="Four rows of dogs, from one direction in each layer to all: the toy, in places that were photographed",
)

# %% [markdown]
# **What you should see**: one direction in each layer already gives most of the toy, and the labels say how little
# each further one adds. In all rows the dogs stand in places that were photographed. Why train with a higher rank, then? Before
# training, nobody knows which directions are needed. A higher rank offers more of them to start from, and training
# finds the good ones in the same number of steps. So cutting down afterwards is not the same as training with a low
# rank: notebook 08 trains with several ranks and measures what each is worth.
#
# ## Which layers moved?
#
# The layers with the largest and the smallest changes:

# %%
ranked = sorted(moved.items(), key=lambda item: -item[1])
Table({"layer": name, "change / weights": f"{ratio:.3f}"} for name, ratio in ranked[:5] + ranked[-3:])

# %%
means = {kind: np.mean([v for k, v in moved.items() if kind_of(k) == kind]) for kind in KINDS}
plots.show(
    plots.bars(
        {kind.replace(" ", "\n", 1): {"mean": mean} for kind, mean in means.items()},
        ylabel="change / weights",
        title=f"Furthest from their old weights, on average: {max(means, key=means.get)}",
    ),
    alt="Four bars: how far self-attention, cross-attention, convolutions and other layers moved, relative to their weights",
)

# %% [markdown]
# **What you should see**: in one of these layers the change is about as large as the weights themselves, and in all
# the others it is smaller. Every kind of layer has changed. Cross-attention has to change, since the word `sks`
# reaches the picture only there; the others change how the picture is painted.
#
# ## What each block paints
#
# The block whose weights moved furthest need not be the one that you see most of. So draw with the adapters of one block
# alone: `adapters.strength` switches off those of all others. **Predict**: does one block bring the colours, and another one
# the spots?

# %%
from dbnb.adapters import strength


def block_of(layer: str) -> str:
    """The beginning of a layer's name, which it shares with all layers of its block."""
    parts = layer.split(".")
    return f"{parts[0]}." if parts[0] == "mid_block" else f"{parts[0]}.{parts[1]}."


in_order = sorted({block_of(name.removeprefix("unet: ")) for name in adapted_layers})  # down, mid, up
prompts, by_block = [concept.instance_prompt] * 6, {}
with strength(session.components, 0.0):
    by_block["no adapter"] = draw(session.components, prompts, config.sampling)
for block in in_order:
    with strength(session.components, 1.0, only=block):
        by_block[f"{block.strip('.')} alone"] = draw(session.components, prompts, config.sampling)
by_block["all blocks"] = draw(session.components, prompts, config.sampling)

# %%
fidelity = {name: metrics.subject_fidelity(encoders.identity_features(p), real) for name, p in by_block.items()}
gained = {
    name: (f - fidelity["no adapter"]) / (fidelity["all blocks"] - fidelity["no adapter"])
    for name, f in fidelity.items()
}
first, second = sorted(in_order, key=lambda block: -gained[f"{block.strip('.')} alone"])[:2]
first, second = (f"{block.strip('.')} alone" for block in (first, second))
plots.show(
    plots.image_rows(
        list(by_block.values()),
        labels=[f"{name}:\nfidelity {fidelity[name]:.2f}" for name in by_block],
        title=f"{first} brings {gained[first]:.0%} of the gain in fidelity, the next best block {gained[second]:.0%}",
    ),
    alt="Nine rows of dogs: some blocks alone change little, some change colours and places, the last one gives the toy",
)

# %% [markdown]
# **What you should see**: one block brings most of the toy, its colours and its spots together: the last. It is the
# one that paints the details, from all that the others hand on to it. (Some dogs still wear a hat.) The block before
# the last brings spots, but in other colours, and the first block changes colours and places. Alone, each gains
# only a little fidelity. That does not show that they are useless: all blocks were trained together. The other
# blocks alone change places, hats and colours here and there, `down_blocks.2` and the middle block hardly anything.
#
# ## Which layers to train
#
# Would it be enough, then, to *train* only the last blocks? We take the last two, so that the block before the last
# can learn what to hand on. What the other blocks have learned, these two have to learn as well. In return a step is
# shorter, since no gradient has to go back beyond them. This is the miniature's default, and so it is the training of
# notebook 00.
#
# And would attention be enough, in all blocks? Attention decides what goes where: it copies mixtures of features from one
# place of the picture to another. The convolutions and the feed-forward layers decide which features there are, and how a
# colour or a pattern is made from them.
#
# So here are two further trainings with the same steps, the same rank and the same learning rate as the first. The
# number is the mean cosine with the five photographs in the space of an identity encoder (notebook 08), over the eight
# pictures shown and eight more without a place. **Predict**: in which row will the toy look worst, and what suffers: the
# teal, the yellow, the spots?

# %%
sessions = {
    "attention only": workflow.trained(dataclasses.replace(config, lora_layers="attention")),
    "all layers": session,
    "the last two blocks": workflow.trained(config),
}
photographs, further = concept.images(), workflow.references(config)
top = metrics.ceiling(encoders, session.components, photographs, further, config.resolution)["subject_fidelity"]
drawn, fidelity = {}, {}
for name, one in sessions.items():
    images = validation_images(one.components, concept, config.sampling, count=8, sets=("subject", "scenes"))
    drawn[name] = images.scenes
    fidelity[name] = metrics.subject_fidelity(encoders.identity_features([*images.subject, *images.scenes]), real)
print(f"other photographs of the toy reach {top:.2f};", {name: round(value, 2) for name, value in fidelity.items()})

# %%
plots.show(
    plots.image_rows(
        [[photograph.resize((128, 128)) for photograph in photographs], *drawn.values()],
        labels=["photographs", *(f"{name}:\nfidelity {value:.2f}" for name, value in fidelity.items())],
        title="The same steps, rank and learning rate: adapters on attention only paint the toy less cleanly",
    ),
    alt="Photographs of the toy, and the toy drawn for eight places with adapters on attention, on all layers, on two blocks",
)

# %%
# NBVAL_CHECK_OUTPUT
for name in ("all layers", "the last two blocks"):
    assert fidelity[name] > fidelity["attention only"], fidelity
    print(f"with adapters on {name} the pictures are nearer to the photographs than with attention only")

# %% [markdown]
# **What you should see**: compare each row with the photographs in the first one. With adapters on attention only,
# some of the dogs are blurred, the yellow turns orange in places and many spots run together. In the other two rows the spots
# are spots, and the colours are nearer to the photographs', although not in every picture. Compare the places as
# well: the prompt of the last picture in each row asks for the moon. Attention only gives the city, all layers a moon
# without the Earth, and only the last row the whole scene. What they cost:

# %%
for name, one in sessions.items():
    size = sum(
        p.numel() for module in adapted_modules(one.components).values() for _, p in trainable_parameters(module)
    )
    seconds = sorted(line["seconds"] for line in one.log)[len(one.log) // 2]
    print(f"{name:20} {size:9,} parameters, {4 * size / 2**20:.1f} MiB, {seconds:.3f} s a step")

# %% [markdown]
# (The seconds were measured when each training ran, possibly while the machine was busy with something else.) The last two
# blocks paint the toy as well as all blocks together in this run, with less to compute; notebook 08 has more runs. This is
# why the miniature adapts only them.
# A large base already has most of the features that a new subject needs, so there attention is usually enough.
#
# ## Rank, and what it costs

# %%
# NBVAL_CHECK_OUTPUT
for layers in ("attention", "all"):
    for rank in (1, 4, 16, 64):
        fresh = load_components(config.base)
        add_adapters(fresh, lora_layers=layers, rank=rank)
        count = sum(p.numel() for _, p in trainable_parameters(fresh.unet))
        print(f"{layers:9} rank {rank:2}: {count:9,} parameters, file about {4 * count / 2**20:.2f} MiB")

# %% [markdown]
# The number of parameters grows in proportion to the rank. What a rank *buys* is measured in notebook 08.

# %% [markdown]
# ## Exercises
#
# ### Exercise A: LoRA as a module, equal to peft's (20 minutes)
#
# The class at the top of this notebook adapts only linear layers. Write one that also adapts convolutions and gives
# the same answers as peft. Make the two thin parts layers of their own, `self.A` and `self.B`, without biases: for a
# linear layer both are linear; for a convolution, A is a convolution like the layer's with `rank` output channels, and
# B is a 1 x 1 convolution.

# %%
from dbnb.exercises import check_04a


class LoRA(nn.Module):
    """A linear layer or a convolution, frozen, with a low-rank adapter that changes nothing at first."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float) -> None:
        super().__init__()
        ...

    def forward(self, x: torch.Tensor) -> torch.Tensor: ...


check_04a(LoRA)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `forward` is one line for both kinds of layers: the layer's answer plus $\frac{\alpha}{r}$ times `self.B(self.A(x))`.
# </details>
#
# <details><summary>Hint 2</summary>
#
# A convolution with a stride of 2 halves the picture, so A needs the stride, and B must not have it. The same is true
# of the padding and the size of the kernel: `layer.kernel_size`, `layer.stride`, `layer.padding`.
# </details>
#
# <details><summary>Hint 3</summary>
#
# `nn.Linear` and `nn.Conv2d` start with random weights. One of the two has to start at zero:
# `nn.init.zeros_(self.B.weight)`.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# class LoRA(nn.Module):
#     def __init__(self, layer, rank, alpha):
#         super().__init__()
#         self.layer, self.scale = layer.requires_grad_(False), alpha / rank
#         if isinstance(layer, nn.Linear):
#             self.A = nn.Linear(layer.in_features, rank, bias=False)
#             self.B = nn.Linear(rank, layer.out_features, bias=False)
#         else:
#             size = dict(kernel_size=layer.kernel_size, stride=layer.stride, padding=layer.padding)
#             self.A = nn.Conv2d(layer.in_channels, rank, bias=False, **size)
#             self.B = nn.Conv2d(rank, layer.out_channels, kernel_size=1, bias=False)
#         nn.init.normal_(self.A.weight, std=1 / rank)
#         nn.init.zeros_(self.B.weight)
#
#     def forward(self, x):
#         return self.layer(x) + self.scale * self.B(self.A(x))
# ```
# </details>
#
# ### Exercise B: merged into the weight (8 minutes)
#
# An adapter costs a little time at every call. After training it can be *[merged](../docs/glossary.md#merged)*: one
# plain layer with the weight $W + \frac{\alpha}{r} B A$ gives the same answers. Write this for linear layers and
# convolutions, without changing the weight that you are given.

# %%
from dbnb.exercises import check_04b


def merged(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float) -> torch.Tensor:
    """The merged weight. Linear: (m, n), (r, n), (m, r); convolution: (m, n, k, k), (r, n, k, k), (m, r, 1, 1)."""
    ...


check_04b(merged)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The rank is not an argument, because it is one of the sizes of A.
# </details>
#
# <details><summary>Hint 2</summary>
#
# The section on convolutions above multiplies two kernels as matrices: `flatten(1)` before, `view_as(weight)` after. A
# linear layer's matrices pass through both unchanged.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def merged(weight, A, B, alpha):
#     change = B.flatten(1) @ A.flatten(1)
#     return weight + alpha / A.shape[0] * change.view_as(weight)
# ```
# </details>

# %% [markdown]
# ## On your own
#
# 1. What does `alpha = 2 * rank` do at the start of training, and which change of the learning rate does it resemble?
#    (think)
# 2. Train with adapters on the resnets' convolutions only: `lora_layers="conv1,conv2"`. **Predict** first: the prompt
#    enters the UNet in cross-attention. What will `a photo of a dog` become? (3 minutes)
# 3. Merge the layer `layer` that was trained above, and show that one plain layer gives the same answers. (3 minutes)
#
# <details><summary>Answers</summary>
#
# 1. Nothing at the start, because $B$ is zero. Each step then moves the output about twice as far, much like a higher
#    learning rate.
# 2. The convolutions can learn how the toy is painted, but the layers that read the prompt are frozen and hardly
#    respond to `sks`. So both prompts should give nearly the same dogs.
#
# ```python
# settings = dict(lora_layers="conv1,conv2", max_train_steps=100)
# only = workflow.trained(dataclasses.replace(config, **settings)).components
# prompts = [concept.instance_prompt, concept.class_prompt]
# rows = [draw(only, [prompt] * 6, config.sampling) for prompt in prompts]
# plots.show(plots.image_rows(rows, labels=prompts), alt="subject and class with adapters on convolutions only")
# ```
#
# 3. Equal up to rounding:
#
# ```python
# plain = nn.Linear(W.shape[1], W.shape[0], bias=False)
# plain.weight.data = torch.from_numpy(W + change)
# x = torch.randn(5, W.shape[1])
# print((plain(x) - layer(x)).abs().max().item())
# ```
# </details>
#
# ## Quiz
#
# Five questions about *why*. Choose an answer, then open it: it says whether it is right, and why.
#
# **1. Why does training start exactly at the base, although A is random?**
#
# <details><summary>A. The random numbers of A are so small that their effect is rounded away.</summary>
#
# No: the difference was exactly zero before training, not just small.
# </details>
#
# <details><summary>B. The change is a product with B, and B is zero before the first step.</summary>
#
# Right: whatever A is, zero times A is zero, so the adapted layer is the layer.
# </details>
#
# <details><summary>C. The adapters are switched off in the first step and faded in afterwards.</summary>
#
# No: nothing is faded in; the change grows only because B moves away from zero.
# </details>
#
# **2. Why must A and B not both start at zero?**
#
# <details><summary>A. Each one's gradient has the other as a factor, so neither would ever move.</summary>
#
# Right: with A random, B gets a gradient at once, and A from the second step on.
# </details>
#
# <details><summary>B. The optimizer divides by the size of the weights and would divide by zero.</summary>
#
# No: AdamW divides by the size of the gradients, and adds a small number to it.
# </details>
#
# <details><summary>C. A product of two zeros is not defined in the half-precision formats.</summary>
#
# No: zero times zero is zero in every format; the problem is the gradient.
# </details>
#
# **3. Why is alpha divided by the rank?**
#
# <details><summary>A. So that the file of an adapter stays as small for a high rank as for a low one.</summary>
#
# No: a file grows in proportion to the rank, whatever alpha is.
# </details>
#
# <details><summary>B. So that the base's own weights shrink as the adapter's weights grow.</summary>
#
# No: the base's weights stay as they are; alpha scales only the change.
# </details>
#
# <details><summary>C. So that the strength of the change need not be tuned again for another rank.</summary>
#
# Right: as long as alpha stays the same, BA has more terms, and the factor keeps their sum in check.
# </details>
#
# **4. In these runs, adapters on attention alone painted the toy less cleanly. What is the likely reason?**
#
# <details><summary>A. Attention layers are frozen in the miniature, so their adapters cannot move.</summary>
#
# No: every adapted layer is frozen itself, and its adapter moves all the same.
# </details>
#
# <details><summary>B. Their rank is limited to 4, while convolutions may have a rank of up to 64.</summary>
#
# No: both trainings had the same rank; the layers are what was different.
# </details>
#
# <details><summary>C. Attention moves features about, and other layers decide how they look.</summary>
#
# Right: convolutions and feed-forward layers make colours and patterns of the features.
# </details>
#
# **5. With adapters on the resnets' convolutions alone, `sks dog` and `dog` should give nearly the same pictures. Why?**
#
# <details><summary>A. Convolutions see one pixel at a time, and a dog is larger than a pixel.</summary>
#
# No: their kernels cover 3 x 3 places, and layers in a row cover most of the picture.
# </details>
#
# <details><summary>B. The prompt enters in cross-attention, where nothing learned to tell it apart.</summary>
#
# Right: the convolutions can learn to paint the toy, but nothing tells them for which prompt.
# </details>
#
# <details><summary>C. Convolutions have too few parameters to hold two different kinds of dogs.</summary>
#
# No: they have the largest share of the adapters' parameters in every block.
# </details>
#
# ## In short
#
# - DreamBooth fine-tunes all of $W$. LoRA keeps $W$ and adds $BA$; $B = 0$ at first, so training starts at the base.
# - Adapters are added to the UNet, on attention, on all layers or on some blocks, and optionally to the text encoder;
#   each part has its own rank and alpha. Adapters on attention alone paint the toy less cleanly on the miniature.
# - A convolution's adapter is a $k \times k$ convolution to $r$ channels and a $1 \times 1$ convolution.
# - Trainable weights are `float32`.
#
# Next: [05 The dataset](05_dataset.ipynb), on which the adapters are trained.
