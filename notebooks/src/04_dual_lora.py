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
# **What you will do**: write a low-rank adapter in ten lines, let peft put the same thing on a UNet and a text encoder,
# and look at what training makes of it.
#
# **What you will learn**: rank, alpha, targets; why nothing changes at first; why the trainable weights are `float32`
# whatever the base is; what "dual" means.
#
# **What you need**: notebook [03](03_loading_and_freezing.ipynb). Under a minute on two CPU cores, plus two for the
# trained example, the first time.
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
# The new module is `dbnb.adapters`.

# %%

import numpy as np
import torch
from torch import nn

from dbnb import plots, workflow
from dbnb.adapters import UNET_TARGETS, adapted_modules, adapter_table, add_adapters, trainable_parameters
from dbnb.config import DreamBoothConfig
from dbnb.models import encode_prompts, load_components
from dbnb.tables import Table

workflow.quiet_libraries()
config = DreamBoothConfig()

# %% [markdown]
# ## The idea, in ten lines
#
# A layer multiplies by a matrix $W$. Fine-tuning would change all of $W$. **LoRA** (Hu et al., 2021) leaves $W$ alone
# and adds a product of two thin matrices:
#
# $$ y = W x + \frac{\alpha}{r} \, B A x, \qquad A \in \mathbb{R}^{r \times n},\; B \in \mathbb{R}^{m \times r} $$
#
# The **rank** $r$ says how thin; $\alpha$ scales the whole.


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
# $A$ starts at random, $B$ at zero. **Predict**: how far is the adapted layer's answer from the layer's own, before
# training?

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
layer = nn.Linear(320, 320)
adapted = Adapted(layer, rank=4, alpha=4)
x = torch.randn(5, 320)
print("difference before training:", (adapted(x) - layer(x)).abs().max().item())
full, low = layer.weight.numel(), adapted.A.numel() + adapted.B.numel()
print(f"{low:,} parameters instead of {full:,}: {100 * low / full:.1f} %")

# %% [markdown]
# Zero, exactly: training starts from the base as it is. And the adapter of a layer of Stable Diffusion's size is a few
# percent of the layer.
#
# Why is $A$ not zero as well? Then neither matrix would ever get a gradient: each one's gradient is a multiple of the
# other.

# %%
# NBVAL_CHECK_OUTPUT
adapted(x).square().mean().backward()
print(
    "B gets a gradient:",
    bool(adapted.B.grad.abs().max() > 0),
    "| A does, at first:",
    bool(adapted.A.grad.abs().max() > 0),
)

# %% [markdown]
# ## Where the adapters sit
#
# In diffusion models, LoRA goes to the **attention** layers: to the projections that make queries, keys, values and the
# output. In cross-attention, keys and values come from the prompt: here the rare word can be bound to a look.

# %%
# NBVAL_CHECK_OUTPUT
print("UNet:", ", ".join(UNET_TARGETS))
components = load_components(config.base)
print("text encoder:", ", ".join(components.architecture.lora_targets))

# %% [markdown]
# (`add_k_proj` and `add_v_proj` exist in DeepFloyd IF only; where there are none, none get an adapter.)
#
# **Dual** means: one set of adapters on the UNet, and, if asked, another on the text encoder, each with its own rank and
# alpha. `add_adapters` puts them there by way of peft, the library that plain diffusers uses to load them.

# %%
with torch.no_grad():
    before = encode_prompts(components, ["a photo of a sks dog"])
add_adapters(components, rank=16, train_text_encoder=True, text_encoder_rank=8)
components

# %% [markdown]
# Compare the column `trainable` with that of notebook 03: it was zero. Here are some of the adapted layers:

# %%
rows = adapter_table(components)
print(len(rows), "adapted layers")
Table(rows[:4] + rows[-4:])

# %% [markdown]
# And is it true of the whole model that nothing has changed?

# %%
# NBVAL_CHECK_OUTPUT
with torch.no_grad():
    after = encode_prompts(components, ["a photo of a sks dog"])
print("largest change of the text encoder's answer:", (after - before).abs().max().item())

# %% [markdown]
# ## In float32, whatever the base is
#
# A frozen base may well be kept in `bfloat16`. Adapters may not: a step of training changes a weight by a ten-thousandth
# of its size, and `bfloat16` has three decimal digits. **Predict**: a weight of 1 to which a thousand times 0.0001 is
# added, in either format?

# %%
# NBVAL_CHECK_OUTPUT
for dtype in (torch.float32, torch.bfloat16):
    weight = torch.ones((), dtype=dtype)
    for _ in range(1000):
        weight += torch.tensor(0.0001, dtype=dtype)
    print(f"{str(dtype):16} {weight.item():.4f}")

# %% [markdown]
# Every single step was rounded away. peft creates adapters in the format of the layer they sit on, so they have to be
# cast, and `add_adapters` does:

# %%
# NBVAL_CHECK_OUTPUT
half = load_components(config.base, weight_dtype=torch.bfloat16)
add_adapters(half, rank=4)
print("base:", half.unet.conv_in.weight.dtype, "| adapters:", {p.dtype for _, p in trainable_parameters(half.unet)})

# %% [markdown]
# ## What training makes of it
#
# Take the run of notebook 00 (from the cache, if it is there) and look at one layer: a projection of values in
# cross-attention, on the upper side of the UNet.

# %%
session = workflow.trained(config)
unet = session.components.unet
name = next(n for n, m in unet.named_modules() if n.startswith("up_blocks.2") and n.endswith("attn2.to_v"))
layer = unet.get_submodule(name)
A, B = (getattr(layer, part)["default"].weight.detach().numpy() for part in ("lora_A", "lora_B"))
W, scale = layer.base_layer.weight.detach().numpy(), layer.scaling["default"]
print(f"{name}: W {W.shape}, B {B.shape}, A {A.shape}")

# %% [markdown]
# **Predict**: next to $W$, will the change $\frac{\alpha}{r} BA$ be large or small? Speckled, or striped?

# %%
plots.show(
    plots.matrices({"W": W, "the change: scale * B A": scale * B @ A}, title=name),
    alt="Two matrices as pictures: W speckled and strong, the change faint with visible rows and columns",
)

# %% [markdown]
# **What you should see**: a faint pattern with streaks: whole rows and columns rise and fall together. That is what low
# rank looks like. How low is it really? The singular values of the change tell, one after the other, how much each
# direction adds.

# %%
values = np.linalg.svd(scale * B @ A, compute_uv=False)[: layer.r["default"]]
share = np.cumsum(values**2) / np.sum(values**2)
figure = plots.curves(
    {"share of the change": (range(1, len(share) + 1), share)}, xlabel="directions kept",
    ylabel="share of the squared change", title="A few directions carry most of what was learned",
)  # fmt: skip
plots.show(figure, alt="A curve that rises steeply and flattens: the first few of sixteen directions carry most")

# %% [markdown]
# ## Which layers moved?
#
# The size of the change against the size of the weights, layer by layer:

# %%
moved = {}
for part, module in adapted_modules(session.components).items():
    for name, sub in module.named_modules():
        if hasattr(sub, "lora_A") and "default" in sub.lora_A:
            change = sub.scaling["default"] * sub.lora_B["default"].weight @ sub.lora_A["default"].weight
            moved[f"{part}: {name}"] = (change.norm() / sub.base_layer.weight.norm()).item()
ranked = sorted(moved.items(), key=lambda item: -item[1])
Table({"layer": name, "change / weights": f"{ratio:.3f}"} for name, ratio in ranked[:5] + ranked[-3:])

# %% [markdown]
# Changes of a tenth of the weights are enough for a new subject.
#
# ## Rank, and what it costs

# %%
sizes = {}
for rank in (1, 4, 16, 64):
    fresh = load_components(config.base)
    add_adapters(fresh, rank=rank, train_text_encoder=True)
    count = {part: sum(p.numel() for _, p in trainable_parameters(m)) for part, m in adapted_modules(fresh).items()}
    sizes[rank] = count
Table(
    {"rank": str(rank), "UNet": f"{count['unet']:,}", "text encoder": f"{count['text_encoder']:,}",
     "file, about": f"{4 * sum(count.values()) / 2**20:.1f} MiB"}
    for rank, count in sizes.items()
)  # fmt: skip

# %% [markdown]
# The number of parameters grows in proportion to the rank. What a rank *buys* is measured in notebook 08.
#
# ## On your own
#
# 1. What does `alpha = 2 * rank` do at the start of training, and what to the learning rate? (think)
# 2. Turn the text encoder's adapters off in `session` and draw the subject. What is missing? (3 minutes)
# 3. Merge: show that $W + \frac{\alpha}{r}BA$ in one plain layer answers as the adapted layer does. (5 minutes)
#
# <details><summary>Answers</summary>
#
# 1. Nothing at the start, $B$ is zero. Every step then moves the output twice as far: much like a higher learning rate.
# 2. `session.components.text_encoder.disable_adapters()`, then `draw(session.components, ["a photo of a sks dog"] * 4,
#    config)`, then `enable_adapters()`. Notebook 07 makes a figure of it.
# 3. `plain = nn.Linear(W.shape[1], W.shape[0], bias=False); plain.weight.data = torch.from_numpy(W + scale * B @ A)`,
#    and compare it with `layer` on random input: equal but for rounding.
# </details>
#
# ## In short
#
# - $W$ stays, $BA$ is added; $B = 0$ at first, so training starts at the base.
# - Adapters sit in attention, on the UNet and optionally the text encoder, each with its own rank and alpha.
# - Trainable weights are `float32`.
#
# Next: [05 The dataset](05_dataset.ipynb), what the adapters are trained on.
