"""Step 6: one training step as a pure function, and the loop around it. Built in notebook 06."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load
from safetensors.torch import save as serialized
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm.auto import tqdm

from dbnb.adapters import adapted_modules, train_mode, trainable_parameters
from dbnb.config import PRESETS, DreamBoothConfig, check_libraries
from dbnb.dataset import (
    NOISE,
    OFFSET,
    POSTERIOR,
    SMALL_NOISE,
    TIMESTEP,
    DreamBoothDataset,
    cache_latents,
    collate_fn,
    posterior_parameters,
    seeded,
)
from dbnb.export import KOHYA_NAME, PUBLISHED, WEIGHT_NAME
from dbnb.files import whole
from dbnb.models import Components, embed_prompts, fingerprint
from dbnb.processes import processes

PREVIOUS = "previous"  # where a run puts what an earlier one left in its folder
_GROWING = ("samples", "logs")  # folders that grow as a run goes on; `log.jsonl` does too
_ADAPTER_FIELDS = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora")


@dataclass
class StepRecord:
    """All that one step computed; B instance samples, then B class samples with prior preservation."""

    loss: torch.Tensor  # instance_loss + prior_loss_weight * prior_loss
    instance_loss: torch.Tensor
    prior_loss: torch.Tensor | None
    timesteps: torch.Tensor  # (2B,)
    latents: torch.Tensor  # (2B, C, h, w), clean
    noise: torch.Tensor
    noisy_latents: torch.Tensor
    prediction: torch.Tensor
    target: torch.Tensor


def _per_sample(batch: dict[str, Any], seed: int, role: int, draw: Callable[[torch.Generator], torch.Tensor]):
    """A draw for each sample, instances first, from (seed, role, half, n)."""
    rows = [draw(seeded(seed, role, half, n)) for half in range(batch["halves"]) for n in batch["n"]]
    return torch.stack(rows)


def clean_latents(components: Components, batch: dict[str, Any], seed: int) -> torch.Tensor:
    """What noise is added to: latents sampled from the VAE's posterior, or pixels where there is no VAE."""
    device = components.device
    if "latent_parameters" in batch:
        parameters = batch["latent_parameters"].to(device)
    else:
        pixels = batch["pixel_values"].to(device)
        if components.vae is None:
            return pixels
        parameters = torch.stack([posterior_parameters(components.vae, picture) for picture in pixels])
    posterior = DiagonalGaussianDistribution(parameters.float())
    shape = posterior.mean.shape[1:]
    noise = _per_sample(batch, seed, POSTERIOR, lambda g: torch.randn(shape, generator=g)).to(device)
    return (posterior.mean + posterior.std * noise) * components.vae.config.scaling_factor


@torch.no_grad()
def precompute_embeds(
    components: Components, prompts: Sequence[str], *, max_length: int | None = None
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Prompt -> (L, D) hidden states and (P,) pooled ones or None: encoded once, while the text encoders are frozen."""
    hidden, pooled = embed_prompts(components, list(prompts), max_length=max_length)
    return {prompt: (hidden[i], None if pooled is None else pooled[i]) for i, prompt in enumerate(prompts)}


def stack_embeds(
    rows: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings of single prompts, (L, D) and (P,) or None -> of a batch."""
    pooled = [row[1] for row in rows]
    return torch.stack([row[0] for row in rows]), None if pooled[0] is None else torch.stack(pooled)


def unet_conditions(
    components: Components, pooled: torch.Tensor | None, timesteps: torch.Tensor, side: int
) -> dict[str, Any]:
    """What a UNet is told besides the prompt, as its own config asks for it.

    SDXL: the pooled prompt, and six numbers, the original height and width, the crop's top and left, the target height
    and width; here a whole square of `side` pixels, as its pipeline assumes. IF's second stage: how noisy the small
    picture is, which in training is as noisy as the large one.
    """
    if components.unet.config.addition_embed_type == "text_time":
        numbers = torch.tensor([side, side, 0, 0, side, side], device=pooled.device, dtype=pooled.dtype)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": numbers.repeat(len(pooled), 1)}}
    if components.unet.config.class_embed_type is not None:
        return {"class_labels": timesteps}
    return {}


def _enlarged(components: Components, batch, pixels: torch.Tensor, timesteps: torch.Tensor, seed: int) -> torch.Tensor:
    """The second picture that an upscaling UNet sees: a quarter of the size, enlarged as its pipeline does, noised."""
    small = F.interpolate(pixels, scale_factor=0.25, mode="area")
    large = F.interpolate(small, size=pixels.shape[-2:], mode="bilinear", align_corners=True)
    noise = _per_sample(batch, seed, SMALL_NOISE, lambda g: torch.randn(pixels.shape[1:], generator=g))
    return components.noise_scheduler.add_noise(large, noise.to(pixels.device), timesteps)


def training_step(
    components: Components,
    batch: dict[str, Any],
    *,
    seed: int,
    prior_loss_weight: float = 1.0,
    snr_gamma: float | None = None,
    noise_offset: float = 0.0,
    prompt_embeds: dict[str, tuple[torch.Tensor, torch.Tensor | None]] | None = None,
    tokenizer_max_length: int | None = None,
) -> StepRecord:
    """The forward process, the prediction and the loss for one batch: a pure function of its arguments.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al., 2020, eq. 4); the UNet predicts the noise, or v (Salimans and
    Ho, 2022); loss = instance + `prior_loss_weight` * prior, each a mean of squares (Ruiz et al., 2023, eq. 2).
    With `snr_gamma` a sample's error counts min(SNR, gamma) / SNR, for v / (SNR + 1) (Hang et al., 2023);
    `noise_offset` adds so much of one number a channel to the noise. `prompt_embeds` holds embeddings by prompt, as
    `precompute_embeds` makes them, where text encoders are frozen.
    """
    device, scheduler = components.device, components.noise_scheduler
    latents = clean_latents(components, batch, seed)
    shape = latents.shape[1:]
    noise = _per_sample(batch, seed, NOISE, lambda g: torch.randn(shape, generator=g)).to(device)
    if noise_offset:
        shift = _per_sample(batch, seed, OFFSET, lambda g: torch.randn((shape[0], 1, 1), generator=g)).to(device)
        noise = noise + noise_offset * shift
    top = scheduler.config.num_train_timesteps
    timesteps = _per_sample(batch, seed, TIMESTEP, lambda g: torch.randint(top, (), generator=g)).to(device)
    noisy = scheduler.add_noise(latents, noise, timesteps)

    if prompt_embeds is None:
        hidden, pooled = embed_prompts(components, batch["prompts"], max_length=tokenizer_max_length)
    else:
        hidden, pooled = stack_embeds([prompt_embeds[prompt] for prompt in batch["prompts"]])
    dtype, seen = components.dtype, noisy
    if components.upscales:
        seen = torch.cat([noisy, _enlarged(components, batch, latents, timesteps, seed)], dim=1)
    pooled = None if pooled is None else pooled.to(dtype)
    conditions = unet_conditions(components, pooled, timesteps, components.downsampling * shape[-1])
    prediction = components.unet(seen.to(dtype), timesteps, encoder_hidden_states=hidden.to(dtype), **conditions).sample
    if prediction.shape[1] == 2 * shape[0]:  # a learned variance comes as further channels; only the mean is trained
        prediction = prediction.chunk(2, dim=1)[0]

    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        raise ValueError(f"The base's scheduler predicts {kind!r}; known are epsilon and v_prediction.")

    errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
    if snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        weights = snr.clamp(max=snr_gamma) / (snr if kind == "epsilon" else snr + 1.0)
        errors = errors * weights.view(-1, 1, 1, 1)
    halves = errors.chunk(batch["halves"])
    instance_loss = halves[0].mean()
    prior_loss = halves[1].mean() if batch["halves"] == 2 else None
    loss = instance_loss if prior_loss is None else instance_loss + prior_loss_weight * prior_loss
    return StepRecord(loss, instance_loss, prior_loss, timesteps, latents, noise, noisy, prediction, target)


def _where(record: StepRecord) -> str:
    """Where a step stopped being finite, and what to change."""
    if torch.isfinite(record.loss):
        return "Another process met a loss that is not finite, and says what to change,"
    if not torch.isfinite(record.latents).all():
        return "The latents are not finite (an autoencoder in float16 overflows): use --mixed_precision bf16 or no,"
    if not torch.isfinite(record.prediction).all():
        return "The UNet's prediction is not finite: lower the learning rate, or use --mixed_precision no,"
    return f"The loss is {record.loss.item()}: lower the learning rate or --prior_loss_weight,"


def batch_at(dataset: DreamBoothDataset, number: int, batch_size: int) -> dict[str, Any]:
    """Batch number `number` of a run, rebuilt from nothing but its number."""
    return collate_fn([dataset[n] for n in range(number * batch_size, (number + 1) * batch_size)])


@torch.no_grad()
def held_out_loss(
    components: Components, dataset: DreamBoothDataset, *, batches: int = 8, batch_size: int = 4,
    tokenizer_max_length: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Instance and prior loss at noise and timesteps that training never draws: the same ones at every call."""
    instance, prior = [], []
    for number in range(batches):
        record = training_step(
            components, batch_at(dataset, number, batch_size), seed=dataset.seed + 2**31,
            tokenizer_max_length=tokenizer_max_length,
        )  # fmt: skip
        instance.append(record.instance_loss.item())
        prior.append(math.nan if record.prior_loss is None else record.prior_loss.item())
    return {"instance_loss": sum(instance) / batches, "prior_loss": sum(prior) / batches}


def run_identity(config: DreamBoothConfig, components: Components, dataset: DreamBoothDataset) -> dict[str, Any]:
    """What a checkpoint belongs to: a run may only go on from one whose fields are all equal."""
    digest = hashlib.sha256()
    for half in dataset.halves:
        for image in dataset.images[half]:
            digest.update(image.tobytes())
    names = (
        "resolution center_crop random_flip gradient_accumulation_steps learning_rate "
        "adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm tokenizer_max_length "
        "text_encoder_learning_rate lr_scheduler lr_warmup_steps prior_loss_weight snr_gamma noise_offset "
        "use_8bit_adam mixed_precision seed"
    ).split()
    if config.lr_scheduler not in ("constant", "constant_with_warmup"):
        names.append("max_train_steps")  # the other schedules end there
    return {
        "base": fingerprint(components.base),
        "prompts": {half: list(prompts) for half, prompts in dataset.prompts.items()},
        "images": digest.hexdigest()[:16],
        "adapters": {
            part: {name: getattr(module.peft_config["default"], name) for name in _ADAPTER_FIELDS}
            | {"layers": sorted(module.peft_config["default"].target_modules)}
            for part, module in adapted_modules(components).items()
        },
        "train_batch_size": config.train_batch_size * processes().num_processes,  # of all: that decides the result
        **{name: getattr(config, name) for name in names},
    }


def versions() -> dict[str, str]:
    """The libraries that compute: another version may round differently."""
    return {library.__name__: library.__version__ for library in (torch, diffusers, transformers, peft)}


def _seal(state: dict[str, Any]) -> str:
    """A hash of all that a checkpoint says, so that a flipped bit does not go unseen."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def save_checkpoint(
    folder: Path, components: Components, optimizer, step: int, identity: dict[str, Any], **further: Any
) -> None:
    """Write a checkpoint whole or not at all: adapters and optimizer state as safetensors, the rest as JSON.

    `further` is what else a run needs to go on (JSON values): where the schedule stands, the scale of fp16 gradients,
    the last line of its log.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    for part, module in adapted_modules(components).items():
        for name, parameter in trainable_parameters(module):
            tensors[f"{part}.{name}"] = parameter.detach().contiguous()
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{part}.{name}"] = torch.as_tensor(value).detach().contiguous()
    try:
        data = serialized(tensors)  # to memory: safetensors' own files keep others out, whatever the umask says
        (temporary / "state.safetensors").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        state = {"step": step, "run": identity, "versions": versions(), "tensors": digest, **further}
        (temporary / "state.json").write_text(json.dumps(state | {"sha256": _seal(state)}, indent=1), encoding="utf-8")
        for path in temporary.iterdir():  # on the disk before the rename makes it count
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        replaced = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        if folder.exists():  # of a run that was resumed from an earlier step: that one is still there
            folder.replace(replaced)
        temporary.replace(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"Checkpoint {folder} could not be written ({error}): make room, or choose another --output_dir."
        ) from error


def checkpoints(output_dir: Path, up_to: float = math.inf) -> list[Path]:
    """Complete checkpoints of a run, oldest first, to step `up_to`."""
    found = {
        int(path.name.rsplit("-", 1)[1]): path
        for path in output_dir.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name)
        and (path / "state.json").is_file()
        and (path / "state.safetensors").is_file()
    }
    return [found[step] for step in sorted(found) if step <= up_to]


def prune_checkpoints(output_dir: Path, step: int, limit: int | None) -> None:
    """Remove all but the newest `limit` checkpoints to step `step`; None or a number below 1 keeps all of them.

    Higher steps are an earlier run's: they must not push out what was just written.
    """
    if limit is not None and limit > 0:
        for old in checkpoints(output_dir, step)[:-limit]:
            shutil.rmtree(old)


def load_checkpoint(folder: Path, components: Components, optimizer, identity: dict[str, Any]) -> dict[str, Any]:
    """Put a checkpoint's adapters and optimizer state in place; returns the rest: its step, and what was saved with it.

    Raises ValueError where it cannot be read, or naming each field in which its run and this one differ.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        data = (folder / "state.safetensors").read_bytes()
        if state.pop("sha256") != _seal(state) or state["tensors"] != hashlib.sha256(data).hexdigest():
            raise ValueError("it is not what was written")
        tensors = load(data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise ValueError(f"Checkpoint {folder} cannot be read ({error}): resume from another one.") from error
    different = [
        f"{key} was {state['run'].get(key)!r} and is {value!r}"
        for key, value in identity.items()
        if state["run"].get(key) != value
    ]
    if different:
        raise ValueError(f"Checkpoint {folder} belongs to another run: {'; '.join(different)}.")
    parameters = {
        f"{part}.{name}": parameter
        for part, module in adapted_modules(components).items()
        for name, parameter in trainable_parameters(module)
    }
    if wrong := [n for n, p in parameters.items() if n not in tensors or tensors[n].shape != p.shape]:
        raise ValueError(f"Checkpoint {folder} lacks {wrong[0]} and {len(wrong) - 1} more: resume from another one.")
    for name, version in versions().items():
        if (was := state["versions"].get(name)) != version:
            processes().print(f"{name} was {was} and is {version}: results may differ in the last digits.")
    for part, module in adapted_modules(components).items():
        for name, parameter in trainable_parameters(module):
            with torch.no_grad():
                parameter.copy_(tensors[f"{part}.{name}"])
            of_parameter = re.compile(rf"optimizer\.(\w+)\.{re.escape(part)}\.{re.escape(name)}")
            found = {match[1]: value for key, value in tensors.items() if (match := of_parameter.fullmatch(key))}
            if found:
                # The step count stays on the CPU but in a fused AdamW, as torch keeps it.
                on_cpu = () if optimizer.defaults.get("fused") else ("step",)
                optimizer.state[parameter] = {
                    key: value.clone() if key in on_cpu else value.clone().to(parameter.device)
                    for key, value in found.items()
                }
    return state


def _resume(config: DreamBoothConfig, output_dir: Path, components: Components, optimizer, identity) -> dict[str, Any]:
    """Go on from the checkpoint that the settings name; `latest` is the newest whole one of this very run."""
    wanted, start = config.resume_from_checkpoint, {"step": 0}
    if wanted is None:
        return start
    found = checkpoints(output_dir, config.max_train_steps)[::-1] if wanted == "latest" else [Path(wanted)]
    if not found:
        processes().print("No checkpoint yet: starting from the beginning.")
        return start
    problems = []
    for folder in found:
        try:
            state = load_checkpoint(folder, components, optimizer, identity)
        except ValueError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            processes().print(f"Passed over: {problem}")
        processes().print(f"Resuming from {folder.name}, step {state['step']}.")
        return state
    raise ValueError(problems[0])


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM wait for the end of a step, so that nothing half-updated is saved; a second one stops at once.

    SIGTERM asks for the end of the whole process: it is delivered again when the block has ended well.
    """
    asked: set[int] = set()

    def ask(number: int, _) -> None:
        asked.add(number)
        tqdm.write("Stopping when this step is done and saved; once more stops at once.")
        signal.signal(number, before[number])

    if threading.current_thread() is not threading.main_thread():  # signals reach only the main thread
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGTERM in asked:
        signal.raise_signal(signal.SIGTERM)


def _logged(path: Path, step: int) -> list[dict[str, Any]]:
    """What a log says of the first `step` steps."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # the line that a killed run was writing
            break
    return [line for line in lines if line["step"] <= step]


def set_aside(output_dir: Path, step: int) -> Path | None:
    """Make room for a run that goes on from `step`; returns the folder that now holds the earlier results, if any.

    An output folder holds the results of one run: what it did not write must not pass for its own. So when training
    begins, and not before (a run that is refused changes nothing), the earlier adapter files, card, figures, measures
    and settings are moved to the folder `previous`, in place of what is there. A run that starts from the beginning
    moves the earlier log and samples too; one that is resumed goes on with its own, up to `step`. What an earlier run
    without an adapter left is removed. Checkpoints stay where they are: each says which run it belongs to.
    """
    fresh, previous = step == 0, output_dir / PREVIOUS
    names = [*PUBLISHED, "config.json", *(("log.jsonl", *_GROWING) if fresh else ())]
    found = [output_dir / name for name in names if (output_dir / name).exists()]
    kept = any((output_dir / name).exists() for name in (WEIGHT_NAME, KOHYA_NAME))
    if kept:
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
    for path in found:
        if kept:
            path.rename(previous / path.name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in (output_dir / "samples").glob("step-*.png"):
        if int(path.stem.removeprefix("step-")) > step:
            path.unlink()
    return previous if kept else None


def optimizer_class(config: DreamBoothConfig) -> Callable[..., torch.optim.Optimizer]:
    """AdamW in one kernel, or bitsandbytes' with state in 8 bits. Raises ValueError where that is not installed."""
    if not config.use_8bit_adam:
        return partial(torch.optim.AdamW, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(f"use_8bit_adam needs bitsandbytes ({error}): pip install bitsandbytes.") from error
    return AdamW8bit


def _holds(folder: Path, path: Path) -> bool:
    """Whether `path`, which need not exist yet, is `folder` or lies in it, whatever links or other spellings say."""
    folder, path = folder.resolve(), path.resolve()
    around = (path, *path.parents)
    return folder in around or (folder.exists() and any(place.exists() and place.samefile(folder) for place in around))


def _keep_apart(config: DreamBoothConfig) -> None:
    """Raise ValueError where a run would write among what it reads: the next run would train on figures of this one."""
    inputs = {name: getattr(config, name) for name in ("instance_data_dir", "class_data_dir", "reference_data_dir")}
    if config.base not in PRESETS and Path(config.base).expanduser().is_dir():
        inputs["base"] = str(Path(config.base).expanduser())
    places = [Path(config.output_dir) / name for name in (".", *_GROWING, PREVIOUS)]
    for name, folder in inputs.items():
        for place in places:
            if folder is None:
                continue
            # The output folder itself may hold an input, such as photos/ beside the results; what a run fills may not.
            within = place != places[0] and _holds(place, Path(folder))
            if within or _holds(Path(folder), place):
                raise ValueError(
                    f"--output_dir {config.output_dir} would put results among the files of --{name} {folder}: choose "
                    "another --output_dir."
                )


def _check_writable(folder: Path) -> None:
    """Raise OSError where nothing can be written to a folder, which is left as it was: missing, if it is missing."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"Nothing can be written to {folder} ({error}): choose another --output_dir.") from error
    finally:
        for path in missing:
            with suppress(OSError):  # not made, or used by now
                path.rmdir()


def check_start(config: DreamBoothConfig) -> None:
    """Raise the ValueError, FileNotFoundError or OSError now that training would meet after all else is done.

    Nothing is written, and no folder made.
    """
    check_libraries(config)
    optimizer_class(config)
    wanted = config.resume_from_checkpoint
    if wanted not in (None, "latest") and not Path(wanted).is_dir():
        raise FileNotFoundError(f"Checkpoint {wanted} does not exist: give its folder, or 'latest'.")
    _keep_apart(config)
    if processes().is_main_process:
        _check_writable(Path(config.output_dir))


@contextmanager
def alone(output_dir: Path) -> Iterator[None]:
    """Hold an output folder, for all processes of this run; raises ValueError where another run holds it."""
    if not processes().is_main_process:
        yield
        return
    name = hashlib.sha256(str(output_dir.resolve()).encode()).hexdigest()[:16]
    lock = Path(tempfile.gettempdir()) / f"dbnb-{name}.lock"  # not in the folder, which is the user's
    try:
        with FileLock(lock, timeout=0, is_singleton=True):  # what `run` holds, `train` may take
            for leftover in output_dir.glob(".checkpoint-*"):  # of a run that was killed while it wrote
                shutil.rmtree(leftover)
            yield
    except Timeout as error:
        raise ValueError(f"Another run writes to {output_dir}: wait for it, or choose another --output_dir.") from error


@contextmanager
def _own_precision() -> Iterator[None]:
    """accelerate knows one precision for the whole process: a run has its own, and then the one before holds again."""
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state()
        AcceleratorState._shared_state.update(before)


def overruled(config: DreamBoothConfig) -> str:
    """What accelerate's environment (`accelerate config`, `accelerate launch`) asks for and this run does otherwise.

    "" where there is nothing of the kind. Its own defaults ask for nothing.
    """
    settings = {
        "ACCELERATE_MIXED_PRECISION": ("no", f"mixed_precision={config.mixed_precision}"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            "1",
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}",
        ),
        "ACCELERATE_DYNAMO_BACKEND": ("no", "no compilation"),
    }
    asked, done = [], []
    for name, (default, setting) in settings.items():
        value = os.environ.get(name) or default
        if value.lower() not in (default, setting.rpartition("=")[2]):
            asked.append(f"{name}={value}")
            done.append(setting)
    return f"Not followed: {', '.join(asked)}; this run has {', '.join(done)}." if asked else ""


def train(
    config: DreamBoothConfig,
    components: Components,
    dataset: DreamBoothDataset,
    *,
    on_step: Callable[[int, StepRecord], None] | None = None,
    on_validation: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Train the adapters for `max_train_steps` and return the log, one dict a step (also in `log.jsonl`).

    Resumes where `config.resume_from_checkpoint` says, bit for bit. Ctrl-C saves a checkpoint and returns (or raises
    KeyboardInterrupt, if that was the last step); SIGTERM saves one and then takes its course. What an earlier run left
    in the folder is put aside (`set_aside`). Several processes share each batch, `train_batch_size` pairs to each, and
    only the first calls back and writes. Raises FloatingPointError before the step in which a loss or gradient is not
    finite, and ValueError where another process trains into the same folder.
    """
    check_start(config)
    with alone(Path(config.output_dir)), _own_precision():
        return _train(config, components, dataset, on_step, on_validation)


def _train(config, components, dataset, on_step, on_validation) -> list[dict[str, Any]]:
    output_dir = Path(config.output_dir)
    accelerator = Accelerator(
        cpu=processes().device.type == "cpu",
        mixed_precision=config.mixed_precision,
        # Its environment would otherwise divide our gradients once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=output_dir / "logs",
    )
    if words := overruled(config):
        processes().print(words)
    components.to(accelerator.device)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    if config.gradient_checkpointing:
        components.unet.enable_gradient_checkpointing()
        for name in components.text_encoders():
            if name in adapted_modules(components):
                components.modules()[name].gradient_checkpointing_enable()

    groups = []
    for part, module in sorted(adapted_modules(components).items(), key=lambda item: item[0] != "unet"):
        rate = config.learning_rate if part == "unet" else config.text_encoder_learning_rate
        groups.append({"params": [p for _, p in trainable_parameters(module)], "lr": rate, "initial_lr": rate})
    parameters = [p for group in groups for p in group["params"]]
    optimizer = optimizer_class(config)(
        groups, betas=(config.adam_beta1, config.adam_beta2), weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )  # fmt: skip
    stepper = accelerator.prepare(optimizer)  # knows how to unscale half-precision gradients

    identity = run_identity(config, components, dataset)
    state = _resume(config, output_dir, components, optimizer, identity)
    first = state["step"]
    if accelerator.scaler is not None and "scaler" in state:
        accelerator.scaler.load_state_dict(state["scaler"])
    schedule = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps, last_epoch=state.get("schedule", 0) - 1,
    )  # fmt: skip

    def save(step: int) -> None:
        scaler = {} if accelerator.scaler is None else {"scaler": accelerator.scaler.state_dict()}
        folder = output_dir / f"checkpoint-{step}"
        save_checkpoint(
            folder, components, optimizer, step, identity, schedule=schedule.last_epoch, line=log[-1], **scaler
        )

    if first < config.max_train_steps and components.vae is not None and dataset.fixed_crop and not dataset.latents:
        cache_latents(dataset, components.vae)
    prompt_embeds = None
    if config.pre_compute_text_embeddings and "text_encoder" not in adapted_modules(components):
        prompt_embeds = precompute_embeds(
            components, dataset.distinct_prompts(), max_length=config.tokenizer_max_length
        )

    writes, share = accelerator.is_main_process, accelerator.num_processes

    def shared_mean(*values: torch.Tensor | None) -> list[float]:
        """The mean over all processes, None as 0: what one of them meets, all must know before they wait in vain."""
        numbers = [0.0 if value is None else float(value.item()) for value in values]
        return accelerator.reduce(torch.tensor(numbers, device=accelerator.device), "mean").tolist()

    log_path, log = output_dir / "log.jsonl", []
    if writes:  # only now, when nothing can be refused any more
        output_dir.mkdir(parents=True, exist_ok=True)
        log = _logged(log_path, first)
        if log and state.get("line", log[-1]) != log[-1]:  # another run's than the checkpoint's
            log = []
        if previous := set_aside(output_dir, first if log else 0):
            processes().print(f"The earlier results in {output_dir} are now in {previous}.")
        config.save(output_dir / "config.json")
        with whole(log_path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    if config.report_to != "none":
        accelerator.init_trackers("dreambooth")
    accumulate = config.gradient_accumulation_steps
    modules = adapted_modules(components).values()

    def to_training() -> None:
        for module in modules:
            train_mode(module)

    bar = tqdm(
        range(first, config.max_train_steps), initial=first, total=config.max_train_steps, desc="train",
        disable=not writes,
    )  # fmt: skip
    to_training()
    stopped = False
    with _interrupts() as interrupted:
        for step in bar:
            # Dropout is the one draw that torch makes itself: seeding it by the step keeps steps independent.
            torch.manual_seed((config.seed * 1_000_003 + step + (accelerator.process_index << 32)) % 2**64)
            started, sums = time.perf_counter(), {"loss": 0.0, "instance_loss": 0.0, "prior_loss": 0.0}
            for micro in range(accumulate):
                number = (step * accumulate + micro) * share + accelerator.process_index
                batch = batch_at(dataset, number, config.train_batch_size)
                with accelerator.autocast():
                    record = training_step(
                        components, batch, seed=config.seed, prior_loss_weight=config.prior_loss_weight,
                        snr_gamma=config.snr_gamma, noise_offset=config.noise_offset,
                        prompt_embeds=prompt_embeds, tokenizer_max_length=config.tokenizer_max_length,
                    )  # fmt: skip
                losses = shared_mean(record.loss, record.instance_loss, record.prior_loss)
                if not math.isfinite(losses[0]):
                    raise FloatingPointError(
                        f"{_where(record)} at step {step + 1}; the adapters are as they were before it."
                    )
                accelerator.backward(record.loss / accumulate)
                for name, value in zip(sums, losses, strict=True):
                    sums[name] += value / accumulate
            if share > 1:
                gradients = [p.grad for p in parameters if p.grad is not None]
                vector_to_parameters(accelerator.reduce(parameters_to_vector(gradients), "mean"), gradients)
            # A bound of infinity scales nothing, and still tells the norm.
            norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
            # With fp16 the scaler meets infinite gradients by design: it skips the step and scales down.
            if not torch.isfinite(norm) and accelerator.scaler is None:
                raise FloatingPointError(f"A gradient is not finite at step {step + 1}: lower the learning rate.")
            rates = {name: rate for name, rate in zip(("lr", "text_encoder_lr"), schedule.get_last_lr(), strict=False)}
            stepper.step()
            if not stepper.step_was_skipped:
                schedule.step()
            stepper.zero_grad(set_to_none=True)
            if batch["halves"] == 1:
                del sums["prior_loss"]
            line = {"step": step + 1, **sums, **rates, "seconds": round(time.perf_counter() - started, 4)}
            log.append(line)
            if writes:
                with log_path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            if config.report_to != "none":
                accelerator.log(sums | rates, step=step + 1)
            bar.set_postfix({key: f"{value:.3f}" for key, value in sums.items() if key != "loss"})
            if on_step is not None and writes:
                on_step(step, record)
                to_training()  # it may have drawn
            due = config.checkpointing_steps and (step + 1) % config.checkpointing_steps == 0
            if due and writes:
                save(step + 1)
                prune_checkpoints(output_dir, step + 1, config.checkpoints_total_limit)
            if on_validation and writes and config.validation_steps and (step + 1) % config.validation_steps == 0:
                for module in modules:
                    module.eval()
                on_validation(step + 1)
                to_training()
            if stopped := any(shared_mean(torch.tensor(interrupted()))):
                if writes and not due:
                    save(step + 1)
                processes().print(
                    f"\nInterrupted: step {step + 1} is saved; go on with --resume_from_checkpoint latest."
                )
                break
    for module in modules:
        module.eval()
    if config.report_to != "none":
        accelerator.end_training()
    if stopped and log[-1]["step"] == config.max_train_steps:
        raise KeyboardInterrupt  # a whole log would not tell that nothing is to come after it
    return log
