"""Checkpoints: what a run must keep to go on bit for bit, and how to tell whether one belongs to it. Notebook 06."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load
from safetensors.torch import save as serialized

from dbnb.adapters import adapted_modules, trainable_parameters
from dbnb.config import DreamBoothConfig, Objective
from dbnb.dataset import DreamBoothDataset, Mixture
from dbnb.models import Components, fingerprint
from dbnb.processes import processes

_ADAPTER_FIELDS = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora")


def run_identity(
    config: DreamBoothConfig, components: Components, dataset: DreamBoothDataset | Mixture
) -> dict[str, Any]:
    """What a checkpoint belongs to: a run may only go on from one whose fields are all equal."""
    digest, masks, parts = hashlib.sha256(), hashlib.sha256(), dataset.parts
    for part in parts:
        for image in [image for half in part.halves for image in part.images[half]]:
            digest.update(image.tobytes())
        for mask in part.masks:
            masks.update(mask.tobytes() if mask else b"all")
    prompts = [{half: list(prompts) for half, prompts in part.prompts.items()} for part in parts]
    return {
        "base": fingerprint(components.base),
        "prompts": prompts if len(parts) > 1 else prompts[0],
        # None where there are none, so that checkpoints without these entries can be gone on from.
        "captions": [part.captions for part in parts] if any(part.captions for part in parts) else None,
        "masks": masks.hexdigest()[:16] if any(part.masks for part in parts) else None,
        "shares": list(dataset.shares) if len(parts) > 1 else None,
        "images": digest.hexdigest()[:16],
        "adapters": {
            part: {name: getattr(module.peft_config["default"], name) for name in _ADAPTER_FIELDS}
            | {"layers": sorted(module.peft_config["default"].target_modules)}
            for part, module in adapted_modules(components).items()
        },
        **_settings(config),
    }


def _settings(config: DreamBoothConfig) -> dict[str, Any]:
    """The part of a run's identity that its settings alone tell."""
    names = (
        "resolution center_crop random_flip gradient_accumulation_steps learning_rate "
        "adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm tokenizer_max_length "
        "text_encoder_learning_rate lr_scheduler lr_warmup_steps prior_loss_weight snr_gamma noise_offset "
        "use_8bit_adam mixed_precision quantization seed"
    ).split()
    if config.lr_scheduler not in ("constant", "constant_with_warmup"):
        names.append("max_train_steps")  # the other schedules end there
    share = config.train_batch_size * processes().num_processes  # of all: that decides the result
    settings = {"train_batch_size": share, **{name: getattr(config, name) for name in names}}
    # None where nothing of the kind is asked, as in checkpoints from before it could be.
    flow = {name: value for name, value in dataclasses.asdict(config.objective).items() if name not in names}
    asked = {name: value for name, value in flow.items() if value != getattr(Objective, name)}
    return settings | {"objective": asked or None}


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
    the last line of its log. Raises OSError where it cannot be written.
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


def prune_checkpoints(output_dir: Path, step: int, limit: int | None, *, keep: int | None = None) -> None:
    """Remove all but the newest `limit` checkpoints to step `step`; None or a number below 1 keeps all of them.

    That of step `keep` stays. Higher steps are an earlier run's: they must not push out what was just written.
    """
    if limit is not None and limit > 0:
        for old in checkpoints(output_dir, step)[:-limit]:
            if old.name != f"checkpoint-{keep}":
                shutil.rmtree(old)


_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError)


def _read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors. Raises ValueError where it cannot be read."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state.pop("sha256") != _seal(state) or not isinstance(state["run"], dict):
            raise ValueError("it is not what was written")
    except _UNREADABLE as error:
        raise ValueError(f"Checkpoint {folder} cannot be read ({error}): resume from another one.") from error
    return state


def _check_run(folder: Path, state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise the ValueError that names each field of an identity in which a checkpoint's run and this one differ."""
    different = [
        f"{key} was {state['run'].get(key)!r} and is {value!r}"
        for key, value in identity.items()
        if state["run"].get(key) != value
    ]
    if different:
        raise ValueError(
            f"Checkpoint {folder} belongs to another run: {'; '.join(different)}; use its settings, or leave "
            "resume_from_checkpoint out."
        )


def _read_tensors(folder: Path, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors. Raises ValueError where they are not those that its state tells of."""
    try:
        data = (folder / "state.safetensors").read_bytes()
        if state["tensors"] != hashlib.sha256(data).hexdigest():
            raise ValueError("it is not what was written")
        return load(data)
    except _UNREADABLE as error:
        raise ValueError(f"Checkpoint {folder} cannot be read ({error}): resume from another one.") from error


def _put_weights(folder: Path, components: Components, tensors: dict[str, torch.Tensor]) -> None:
    """Put a checkpoint's adapters in place. Raises ValueError, before any is, where one does not fit."""
    parameters = {
        f"{part}.{name}": parameter
        for part, module in adapted_modules(components).items()
        for name, parameter in trainable_parameters(module)
    }
    if wrong := [n for n, p in parameters.items() if n not in tensors or tensors[n].shape != p.shape]:
        raise ValueError(f"Checkpoint {folder} lacks {wrong[0]} and {len(wrong) - 1} more: resume from another one.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def load_weights(folder: Path, components: Components) -> int:
    """Put a checkpoint's adapters in place, to draw or export with; returns its step.

    Raises ValueError where it cannot be read, or belongs to other adapters.
    """
    state = _read_state(folder)
    _put_weights(folder, components, _read_tensors(folder, state))
    return state["step"]


def load_checkpoint(folder: Path, components: Components, optimizer, identity: dict[str, Any]) -> dict[str, Any]:
    """Put a checkpoint's adapters and optimizer state in place; returns the rest: its step, and what was saved with it.

    Raises ValueError where it cannot be read, or naming each field in which its run and this one differ.
    """
    state = _read_state(folder)
    tensors = _read_tensors(folder, state)
    _check_run(folder, state, identity)
    _put_weights(folder, components, tensors)
    for name, version in versions().items():
        if (was := state["versions"].get(name)) != version:
            processes().print(f"{name} was {was} and is {version}: results may differ in the last digits.")
    for part, module in adapted_modules(components).items():
        for name, parameter in trainable_parameters(module):
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


def _wanted(config: DreamBoothConfig) -> list[Path]:
    """The checkpoints that the settings allow to go on from, the first that fits being taken."""
    wanted = config.resume_from_checkpoint
    if wanted == "latest":
        return checkpoints(Path(config.output_dir), config.max_train_steps)[::-1]
    return [] if wanted is None else [Path(wanted)]


def check_resume(config: DreamBoothConfig) -> None:
    """Raise the error now that `resume` would meet after the class images: what settings and files alone can tell.

    FileNotFoundError where the checkpoint does not exist, ValueError where each one cannot be read or belongs to a run
    with other settings.
    """
    wanted, problems = config.resume_from_checkpoint, []
    if wanted not in (None, "latest") and not Path(wanted).is_dir():
        raise FileNotFoundError(f"Checkpoint {wanted} does not exist: give its folder, or 'latest'.")
    for folder in _wanted(config):
        try:
            _check_run(folder, _read_state(folder), _settings(config))
            return
        except ValueError as error:
            problems.append(error)
    if problems:
        raise problems[0]


def resume(config: DreamBoothConfig, components: Components, optimizer, identity: dict[str, Any]) -> dict[str, Any]:
    """Go on from the checkpoint that the settings name; `latest` is the newest whole one of this very run.

    Returns what `load_checkpoint` does, or {"step": 0}. Raises ValueError where there are some and none fits.
    """
    start = {"step": 0}
    if config.resume_from_checkpoint is None:
        return start
    found = _wanted(config)
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
