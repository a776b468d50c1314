"""What a run needs in memory, computed from the model's shapes before anything is downloaded.

Denoiser and autoencoder are built without storage (torch's "meta" device) from their published configs. A training step
and a picture are then computed on it, and what would be alive at each moment is counted: autograd's saved tensors, the
gradients on their way back, and with checkpointing the block that is just recomputed. Built in notebook 10.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dbnb.adapters import lora_targets, trainable_parameters
from dbnb.denoisers import NETWORKS, Told
from dbnb.quantization import QUANTIZATIONS

CARDS = (8, 12, 16, 24)  # GB that graphics cards have


@dataclass(frozen=True)
class Base:
    """The published sizes of a base: its denoiser's config, and the parameters of what runs before and after it.

    `text_fewer_bits` says of how many of the `text_parameters` each quantization takes fewer bits: those of linear
    layers in large text encoders.
    `vae_parameters` is 0 for a base in pixel space; an autoencoder that overflows in float16 decodes in float32.
    """

    denoiser: dict
    resolution: int
    text_parameters: int
    vae_parameters: int
    text_length: int = 77
    network: str = "UNet2DConditionModel"  # a row of `denoisers.NETWORKS`
    text_fewer_bits: Mapping[str, int] = field(default_factory=dict)
    vae: dict | None = None  # the autoencoder's config
    vae_overflows: bool = False


_T5_XXL = 4_762_310_656
_T5_LINEAR, _T5_OUT = 24 * (4 * 4096 * 4096 + 3 * 4096 * 10240), 24 * 4096 * 10240
# bitsandbytes leaves the second half of its feed-forward layers, `wo`, whole: its states are large.
_T5_FEWER_BITS = {"nf4": _T5_LINEAR - _T5_OUT, "int8": _T5_LINEAR, "fp8": _T5_LINEAR}
# From the configs of the checkpoints on the hub.
_VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
)
_FLOW_VAE = _VAE | dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
_SD = dict(sample_size=64, attention_head_dim=8, cross_attention_dim=768)
BASES = {
    "Stable Diffusion 1.5": Base(_SD, 512, 123_060_480, 83_653_863, vae=_VAE),
    "Stable Diffusion 2.1": Base(
        dict(sample_size=96, attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True),
        768,
        340_387_840,
        83_653_863,
        vae=_VAE,
    ),
    "Stable Diffusion XL": Base(
        dict(
            sample_size=128,
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        1024,
        123_060_480 + 694_659_840,
        83_653_863,
        vae=_VAE,
        vae_overflows=True,
    ),
    # Its T5 is larger than its UNet.
    "DeepFloyd IF": Base(
        dict(
            sample_size=64,
            in_channels=3,
            out_channels=6,
            layers_per_block=3,
            attention_head_dim=64,
            block_out_channels=(704, 1408, 2112, 2816),
            cross_attention_dim=2816,
            cross_attention_norm="group_norm",
            down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
            up_block_types=("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
            encoder_hid_dim=4096,
            addition_embed_type="text",
            addition_embed_type_num_heads=64,
        ),
        64,
        _T5_XXL,
        0,
        text_fewer_bits=_T5_FEWER_BITS,
    ),
    "Stable Diffusion 3.5 medium": Base(
        dict(
            sample_size=128,
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        1024,
        123_650_304 + 694_659_840 + _T5_XXL,
        83_819_683,
        text_length=77 + 256,
        network="SD3Transformer2DModel",
        text_fewer_bits=_T5_FEWER_BITS,
        vae=_FLOW_VAE,
    ),
    "FLUX.1 [dev]": Base(
        dict(guidance_embeds=True),
        512,
        123_060_480 + _T5_XXL,
        83_819_683,
        text_length=512,
        network="FluxTransformer2DModel",
        text_fewer_bits=_T5_FEWER_BITS,
        vae=_FLOW_VAE,
    ),
}


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments or results, also those in lists; torch's own walk is much slower."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _layout(tensor: torch.Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _layouts(value: Any) -> tuple:
    """An operation's argument as a key: each tensor as its layout, and 1, 1.0 and True as different things."""
    if isinstance(value, torch.Tensor):
        return _layout(value)
    return tuple(map(_layouts, value)) if isinstance(value, (list, tuple)) else (type(value), value)


def _without_storage(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


@functools.cache
def _shares_no_storage(function: torch._ops.OpOverload) -> bool:
    """Whether all results of an operation are new storage, and it writes into none of its arguments."""
    schema = function._schema
    return all(value.alias_info is None for value in (*schema.arguments, *schema.returns))


class LiveTensors(TorchDispatchMode):
    """Within it, every tensor that an operation makes is followed to its end; `peak` is the most bytes at once.

    What was there before does not count. On the meta device torch works the layout of every result out in Python, which
    takes most of the time; a network repeats its layers, so most layouts are known from an earlier one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}
        self._results: dict[tuple, list[tuple]] = {}  # the layouts of an operation's results, by those of its arguments

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        given = list(_tensors((*arguments, *options.values())))
        before = {tensor.untyped_storage()._cdata for tensor in given}
        if given and all(tensor.is_meta for tensor in given) and _shares_no_storage(function):
            result = self._repeated(function, arguments, options)
        else:
            result = function(*arguments, **options)
        for tensor in _tensors((result,)):
            self._follow(tensor, before)
        return result

    def _repeated(self, function: torch._ops.OpOverload, arguments: tuple, options: dict) -> Any:
        """What an operation on the meta device returns, without running it where it had such arguments before."""
        key = (function, _layouts(arguments), _layouts(list(options.items())))
        if key in self._results:
            results = [_without_storage(*layout) for layout in self._results[key]]
            return results[0] if len(function._schema.returns) == 1 else tuple(results)
        result = function(*arguments, **options)
        results = result if isinstance(result, tuple) else (result,)
        if all(isinstance(one, torch.Tensor) and one.is_meta for one in results):
            self._results[key] = [_layout(one) for one in results]
        return result

    def _follow(self, tensor: torch.Tensor, before: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in before or key in self._known:  # a view, or written in place
            return

        def ends(_: weakref.ref) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, ends)
        self.now += size
        self.peak = max(self.peak, self.now)


class _MixedPrecision(TorchFunctionMode):
    """What `torch.autocast("cuda", torch.bfloat16)` does to a tensor's precision, on a device that has no autocast.

    Products are made of halves. Norms and powers are made in float32, which their inputs are copied to: that, and a
    copy for each adapter, is what training in half precision holds besides the activations. The lists are torch's,
    for what the networks here call (docs: "CUDA Ops that can autocast").
    """

    _HALF = frozenset("linear conv2d matmul bmm baddbmm einsum".split())
    _FLOAT32 = frozenset("layer_norm group_norm softmax pow rsqrt exp sum norm mse_loss".split())

    def __torch_function__(self, function, types, arguments=(), options=None):
        name, options = getattr(function, "__name__", ""), options or {}
        dtype = torch.bfloat16 if name in self._HALF else torch.float32 if name in self._FLOAT32 else None
        if dtype is not None:
            arguments = [_cast(value, dtype) for value in arguments]
            options = {key: _cast(value, dtype) for key, value in options.items()}
        return function(*arguments, **options)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class _FusedAttention(torch.autograd.Function):
    """The shapes of attention as the fused kernels of GPUs and CPUs compute it: no (queries, keys) is ever stored."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1])  # one number a query, for the way back
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def _fused_attention(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """On the meta device torch would take attention apart into products."""

    def fused(query, key, value, *_, **__):
        return _FusedAttention.apply(*(_cast(tensor, dtype) for tensor in (query, key, value)))

    kept, F.scaled_dot_product_attention = F.scaled_dot_product_attention, fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = kept


def _checkpoint(block: torch.nn.Module, *arguments: Any) -> Any:
    """A block that is computed again on the way back, in the precision of the way there."""
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), _MixedPrecision()))


def _inputs(
    base: Base, denoiser: ModelMixin, pictures: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, Told]:
    """What a base's network is given for so many pictures, without storage: noisy latents, and what it is told."""
    network, settings = NETWORKS[base.network], denoiser.config
    steps, pooled = torch.empty(pictures, dtype=torch.long), None
    if network.part == "transformer":
        side, channels, width = (
            base.resolution // 8,
            settings.in_channels // network.packed,
            settings.joint_attention_dim,
        )
        pooled = torch.empty(pictures, settings.pooled_projection_dim, dtype=dtype)
    else:
        side, channels = settings.sample_size, settings.in_channels
        width = settings.encoder_hid_dim or settings.cross_attention_dim
        if settings.addition_embed_type == "text_time":
            numbers = 6
            width_pooled = settings.projection_class_embeddings_input_dim - numbers * settings.addition_time_embed_dim
            pooled = torch.empty(pictures, width_pooled, dtype=dtype)
    hidden = torch.empty(pictures, base.text_length, width, dtype=dtype)
    return torch.empty(pictures, channels, side, side, dtype=dtype), Told(steps, hidden, pooled, base.resolution)


def _in_fewer_bits(parameters: int, of_them: int, bytes_per_weight: int, quantization: str | None) -> int:
    """Bytes of so many parameters, `of_them` in fewer bits."""
    if quantization is None:
        return bytes_per_weight * parameters
    return bytes_per_weight * (parameters - of_them) + round(QUANTIZATIONS[quantization].bytes_per_weight * of_them)


def _others(base: Base, bytes_per_weight: int, quantization: str | None) -> int:
    """Bytes of what runs before and after the denoiser."""
    fewer = base.text_fewer_bits.get(quantization, 0)
    return _in_fewer_bits(base.text_parameters + base.vae_parameters, fewer, bytes_per_weight, quantization)


def weight_memory(
    base: Base, *, bytes_per_weight: int = 2, cached: bool = False, quantization: str | None = None
) -> int:
    """Bytes of all frozen parts; the options are those of `training_memory`."""
    with torch.device("meta"):
        denoiser = NETWORKS[base.network].network_class(**base.denoiser)
    others = 0 if cached else _others(base, bytes_per_weight, quantization)
    return others + _denoiser_memory(base, denoiser, bytes_per_weight, quantization)


def _denoiser_memory(base: Base, denoiser: ModelMixin, bytes_per_weight: int, quantization: str | None) -> int:
    """Bytes of the denoiser's weights, before it has adapters."""
    in_blocks = sum(layer.weight.numel() for layer in NETWORKS[base.network].linear_layers(denoiser).values())
    parameters = sum(tensor.numel() for tensor in (*denoiser.parameters(), *denoiser.buffers()))
    return _in_fewer_bits(parameters, in_blocks, bytes_per_weight, quantization)


def training_memory(
    base: Base,
    *,
    rank: int = 16,
    batch: int = 2,
    bytes_per_weight: int = 2,
    gradient_checkpointing: bool = False,
    lora_layers: str = "attention",
    cached: bool = False,
    quantization: str | None = None,
) -> dict[str, int]:
    """Bytes by purpose for training the denoiser's adapters; `batch` counts all pictures, instance and class;
    `lora_layers` is as in `adapters.lora_targets`.

    "weights": all frozen parts, or the denoiser alone where embeddings and latents are `cached` and the other parts
    rest beside the device; with `quantization`, a key of `QUANTIZATIONS`, linear layers are in fewer bits. "adapters":
    float32 weights, gradients and AdamW's two moments. "activations": what else is alive at the highest moment of the
    denoiser's forward and backward pass, in mixed precision with 2 bytes a weight. Libraries, the CUDA context and
    fragmentation come on top.
    """
    network = NETWORKS[base.network]
    half = bytes_per_weight < 4
    dtype = torch.bfloat16 if half else torch.float32
    with torch.device("meta"), _fused_attention(dtype):
        denoiser = network.network_class(**base.denoiser).requires_grad_(False)
        if half:
            denoiser.bfloat16()
        weights = _denoiser_memory(base, denoiser, bytes_per_weight, quantization)
        denoiser.add_adapter(LoraConfig(r=rank, target_modules=lora_targets(denoiser, lora_layers)))
        cast_training_params(denoiser, dtype=torch.float32)
        if gradient_checkpointing:
            denoiser.enable_gradient_checkpointing(*([_checkpoint] if half else []))
        adapters = sum(p.numel() for _, p in trainable_parameters(denoiser))
        noisy, told = _inputs(base, denoiser, batch, dtype)
        with LiveTensors() as live, _MixedPrecision() if half else nullcontext():
            loss = network.call(denoiser.train(), noisy, told).float().square().mean()
            torch.autograd.backward(loss)  # loss.backward() would leave the mode
    return {
        "weights": weights + (0 if cached else _others(base, bytes_per_weight, quantization)),
        "adapters": 4 * 4 * adapters,
        # At the highest moment, early in the backward pass, next to no gradient of an adapter is there yet.
        "activations": live.peak,
    }


def drawing_memory(base: Base, *, pictures: int = 4, bytes_per_weight: int = 2) -> dict[str, int]:
    """Bytes that drawing so many pictures at once takes besides the weights, at the highest moment of each part.

    "denoiser": a solver's step, with guidance two predictions a picture, or one where the network is told how strong
    guidance is. "vae": the autoencoder makes pictures of latents, all at once; 0 in pixel space. Class images,
    validation and the check of the adapter's file draw alike.
    """
    network = NETWORKS[base.network]
    with torch.device("meta"), torch.no_grad(), _fused_attention():
        denoiser = network.network_class(**base.denoiser).eval()
        guided = 1 if denoiser.config.get("guidance_embeds") else 2
        noisy, told = _inputs(base, denoiser, guided * pictures)
        with LiveTensors() as live:
            network.call(denoiser, noisy, told)
        found = {"denoiser": bytes_per_weight * live.peak // 4, "vae": 0}  # counted in float32
        if base.vae is not None:
            vae, side = AutoencoderKL(**base.vae).eval(), noisy.shape[-1]
            latents = torch.empty(pictures, vae.config.latent_channels, side, side)
            with LiveTensors() as live:
                vae.decode(latents)
            found["vae"] = (4 if base.vae_overflows else bytes_per_weight) * live.peak // 4
    return found


def peak_memory(
    base: Base, *, pictures: int = 4, bytes_per_weight: int = 2, **training: int | bool | str | None
) -> dict[str, int]:
    """Bytes at the highest moment of each phase of a run: "training", "drawing", "decoding".

    `pictures` are drawn at once (`sample_batch_size`); `training` are options of `training_memory`. A card must hold
    the largest of them; libraries and the CUDA context come on top. What is drawn needs all parts, whatever rests in
    training.
    """
    step = training_memory(base, bytes_per_weight=bytes_per_weight, **training)
    drawing = drawing_memory(base, pictures=pictures, bytes_per_weight=bytes_per_weight)
    kept = step["weights"] + step["adapters"]  # what is drawn after training has the optimizer beside it
    rested = _others(base, bytes_per_weight, training.get("quantization")) if training.get("cached") else 0
    return {
        "training": kept + step["activations"],
        "drawing": kept + rested + drawing["denoiser"],
        "decoding": kept + rested + drawing["vae"] + (4 - bytes_per_weight) * base.vae_parameters * base.vae_overflows,
    }
