"""Step 6: the loss is the paper's, only adapters move, and a step is a function of its number."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from dbnb import training
from dbnb.adapters import adapted_modules, add_adapters, trainable_parameters
from dbnb.checkpoints import checkpoints, load_checkpoint, prune_checkpoints, run_identity
from dbnb.config import DreamBoothConfig, Objective
from dbnb.dataset import DreamBoothDataset
from dbnb.models import encode_prompts, load_components
from dbnb.outputs import set_aside
from dbnb.processes import overruled
from dbnb.training import (
    batch_at,
    check_start,
    clean_latents,
    held_out_loss,
    learning_rates,
    optimizer_class,
    train,
    training_step,
)


def _trained(config, dataset, **adapters):
    components = load_components("miniature")
    options = dict(rank=config.rank, seed=config.seed, lora_dropout=config.lora_dropout) | adapters
    add_adapters(components, **options)
    log = train(config, components, dataset)
    return components, log


def _weights(components):
    return [p.detach().clone() for m in adapted_modules(components).values() for _, p in trainable_parameters(m)]


def test_prior_preservation_loss_equals_two_separate_forward_passes(components, dataset):
    batch = batch_at(dataset, 3, 4)
    with torch.no_grad():
        record = training_step(components, batch, seed=5, prior_loss_weight=0.7)
        losses = []
        for part in (slice(0, 4), slice(4, 8)):
            hidden = encode_prompts(components, batch["prompts"][part])
            prediction = components.unet(
                record.noisy_latents[part], record.timesteps[part], encoder_hidden_states=hidden
            ).sample
            losses.append((prediction - record.target[part]).square().mean())
    assert torch.allclose(record.instance_loss, losses[0], rtol=1e-5)
    assert torch.allclose(record.prior_loss, losses[1], rtol=1e-5)
    assert torch.allclose(record.loss, losses[0] + 0.7 * losses[1], rtol=1e-5)


def test_the_forward_process_is_ddpms(components, dataset):
    batch = batch_at(dataset, 0, 2)
    record = training_step(components, batch, seed=0)
    a = components.noise_scheduler.alphas_cumprod[record.timesteps].view(-1, 1, 1, 1)
    expected = a.sqrt() * record.latents + (1 - a).sqrt() * record.noise
    assert torch.allclose(record.noisy_latents, expected, atol=1e-6)
    assert record.latents.shape == (4, 12, 16, 16) and torch.equal(clean_latents(components, batch, 0), record.latents)


def test_v_prediction_and_an_unknown_target(components, dataset):
    batch = batch_at(dataset, 0, 2)
    components.noise_scheduler = DDPMScheduler.from_config(
        components.noise_scheduler.config, prediction_type="v_prediction"
    )
    record = training_step(components, batch, seed=0)
    a = components.noise_scheduler.alphas_cumprod[record.timesteps].view(-1, 1, 1, 1)
    assert torch.allclose(record.target, a.sqrt() * record.noise - (1 - a).sqrt() * record.latents, atol=1e-6)
    components.noise_scheduler = DDPMScheduler.from_config(components.noise_scheduler.config, prediction_type="sample")
    with pytest.raises(ValueError, match="sample"):
        training_step(components, batch, seed=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weighs_both_halves_by_the_error_of_the_picture(components, dataset, kind):
    batch = batch_at(dataset, 0, 4)
    components.noise_scheduler = DDPMScheduler.from_config(components.noise_scheduler.config, prediction_type=kind)
    record = training_step(components, batch, seed=0, objective=Objective(snr_gamma=5.0), prior_loss_weight=0.5)
    a = components.noise_scheduler.alphas_cumprod[record.timesteps].view(-1, 1, 1, 1)
    if kind == "epsilon":
        clean = (record.noisy_latents - (1 - a).sqrt() * record.prediction) / a.sqrt()
    else:
        clean = a.sqrt() * record.noisy_latents - (1 - a).sqrt() * record.prediction
    # Hang et al., 2023: the squared error of the picture, weighted by min(SNR, gamma).
    errors = ((clean - record.latents).square() * (a / (1 - a)).clamp(max=5.0)).mean((1, 2, 3))
    assert torch.allclose(record.instance_loss, errors[:4].mean(), rtol=1e-3)
    assert torch.allclose(record.prior_loss, errors[4:].mean(), rtol=1e-3)
    assert torch.allclose(record.loss, record.instance_loss + 0.5 * record.prior_loss)


def test_noise_offset_shifts_each_channel_of_the_noise_as_one(components, dataset):
    batch = batch_at(dataset, 0, 4)
    plain, shifted = (training_step(components, batch, seed=0, noise_offset=amount) for amount in (0.0, 0.1))
    shift = (shifted.noise - plain.noise) / 0.1
    assert shift.std((2, 3)).max() < 1e-4 < shift.mean((2, 3)).abs().min()
    assert 0.5 < shift.mean((2, 3)).std() < 1.5
    again = components.noise_scheduler.add_noise(shifted.latents, shifted.noise, shifted.timesteps)
    assert torch.equal(shifted.noisy_latents, again)


def test_a_learned_variance_is_left_out_of_the_loss(components, dataset):
    batch = batch_at(dataset, 0, 2)

    def doubled(unet, arguments, output):
        output.sample = torch.cat([output.sample, torch.full_like(output.sample, 99.0)], dim=1)

    plain = training_step(components, batch, seed=0)
    components.unet.register_forward_hook(doubled)
    assert torch.equal(training_step(components, batch, seed=0).loss, plain.loss)


def test_a_step_rebuilt_alone_is_the_step_that_was_taken(config, concept, dataset, class_paths):
    seen = []
    components = load_components("miniature")
    add_adapters(components, rank=4)
    train(dataclasses.replace(config, max_train_steps=3), components, dataset, on_step=lambda k, r: seen.append(r))
    # All anew: the base, the pictures (their latents not cached), the adapters as they were after two steps.
    fresh = load_components("miniature")
    add_adapters(fresh, rank=4)
    pictures = DreamBoothDataset(
        concept.paths, concept.instance_prompt, class_paths=class_paths, class_prompt=concept.class_prompt, size=128
    )
    optimizer = torch.optim.AdamW([p for _, p in trainable_parameters(fresh.unet)])
    identity = run_identity(config, fresh, pictures)
    assert load_checkpoint(Path(config.output_dir) / "checkpoint-2", fresh, optimizer, identity)["step"] == 2
    again = training_step(fresh, batch_at(pictures, 2, config.train_batch_size), seed=config.seed)
    for name in ("noise", "timesteps", "latents", "prediction", "loss"):
        assert torch.equal(getattr(again, name), getattr(seen[2], name)), name


def test_only_adapters_get_gradients_and_the_base_stays_bit_identical(config, dataset):
    def digest(components):
        hashes = {}
        for part, module in components.modules().items():
            for name, p in module.named_parameters():
                if "lora" not in name:
                    key = f"{part}.{name.replace('.base_layer', '')}"
                    hashes[key] = hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()
        return hashes

    before = digest(load_components("miniature"))
    components, _ = _trained(dataclasses.replace(config, train_text_encoder=True), dataset, train_text_encoder=True)
    assert digest(components) == before
    for module in adapted_modules(components).values():
        assert all("lora" in name for name, _ in trainable_parameters(module))
    record = training_step(components, batch_at(dataset, 0, 2), seed=0)
    record.loss.backward()
    for part, module in components.modules().items():
        grads = {name for name, p in module.named_parameters() if p.grad is not None}
        assert all("lora" in name for name in grads)
        assert bool(grads) == (part != "vae")


@pytest.mark.long
def test_two_identical_runs_give_identical_adapters(config, dataset, tmp_path):
    runs = []
    for name in ("a", "b"):
        torch.seed()
        runs.append(_trained(dataclasses.replace(config, output_dir=str(tmp_path / name), lora_dropout=0.1), dataset))
    assert all(torch.equal(a, b) for a, b in zip(_weights(runs[0][0]), _weights(runs[1][0]), strict=True))
    assert [line["loss"] for line in runs[0][1]] == [line["loss"] for line in runs[1][1]]
    other = dataclasses.replace(config, output_dir=str(tmp_path / "c"), seed=1)
    assert not torch.equal(_weights(_trained(other, dataset)[0])[0], _weights(runs[0][0])[0])


@pytest.mark.long
@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(config, dataset, tmp_path, text_encoder):
    options = dict(
        train_text_encoder=text_encoder,
        lr_scheduler="cosine",
        gradient_accumulation_steps=2,
        lora_dropout=0.1,
        max_train_steps=4,
    )
    options |= dict(checkpointing_steps=1, checkpoints_total_limit=None)
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"), **options)
    expected, log = _trained(whole, dataset, train_text_encoder=text_encoder)
    last = load_file(tmp_path / "whole" / "checkpoint-4" / "state.safetensors")  # adapters and optimizer
    for step in (1, 2, 3):
        resumed, log_again = _trained(
            dataclasses.replace(whole, resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}")),
            dataset,
            train_text_encoder=text_encoder,
        )
        assert all(torch.equal(a, b) for a, b in zip(_weights(expected), _weights(resumed), strict=True))
        assert [line["loss"] for line in log] == [line["loss"] for line in log_again]
        again = load_file(tmp_path / "whole" / "checkpoint-4" / "state.safetensors")
        assert last.keys() == again.keys() and all(torch.equal(last[key], again[key]) for key in last)
        lines = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_warmup_stable_decay_holds_the_rate_and_lets_it_fall_in_the_last_three_tenths(config):
    config = dataclasses.replace(
        config, lr_scheduler="warmup_stable_decay", max_train_steps=20, lr_warmup_steps=2, learning_rate=1.0
    )
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([{"params": parameter, "initial_lr": 1.0}], lr=1.0)
    schedule, rates = learning_rates(config, optimizer), []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.5] + [1] * 13 + [1 - i / 6 for i in range(1, 6)])
    assert schedule.get_last_lr() == [0]
    # A resumed run goes on where its checkpoint was.
    again = learning_rates(config, torch.optim.SGD([{"params": parameter, "initial_lr": 1.0}], lr=1.0), 16)
    assert again.get_last_lr()[0] == pytest.approx(rates[17])


def test_latest_starts_over_where_there_is_none_and_keeps_the_limit(config, dataset, capsys):
    config = dataclasses.replace(config, resume_from_checkpoint="latest", checkpoints_total_limit=1)
    _trained(config, dataset)
    assert "starting from the beginning" in capsys.readouterr().out
    assert [path.name for path in checkpoints(Path(config.output_dir))] == ["checkpoint-6"]
    # A later, shorter run keeps its own newest and leaves the earlier run's.
    _trained(dataclasses.replace(config, resume_from_checkpoint=None, max_train_steps=4), dataset)
    assert [path.name for path in checkpoints(Path(config.output_dir))] == ["checkpoint-4", "checkpoint-6"]


def test_a_checkpoint_of_another_run_is_refused_field_by_field(config, dataset):
    _trained(config, dataset)
    other = dataclasses.replace(config, resume_from_checkpoint="latest", seed=3, train_batch_size=1)
    with pytest.raises(ValueError, match="train_batch_size was 2 and is 1.*seed was 0 and is 3"):
        _trained(other, dataset)


@pytest.mark.long
def test_training_lowers_the_loss_on_held_out_noise(config, dataset):
    config = dataclasses.replace(config, max_train_steps=60, learning_rate=3e-3, checkpointing_steps=0)
    components = load_components("miniature")
    add_adapters(components, rank=8)
    before = held_out_loss(components, dataset)
    train(config, components, dataset)
    assert held_out_loss(components, dataset)["instance_loss"] < 0.97 * before["instance_loss"]


def test_a_loss_that_is_not_finite_stops_before_the_step(config, dataset):
    components = load_components("miniature")
    add_adapters(components, rank=4)
    before = _weights(components)
    with torch.no_grad():
        components.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 1"):
        train(config, components, dataset)
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(components), strict=True))


def test_a_loss_that_another_process_met_is_not_put_down_to_this_one(config, dataset, monkeypatch):
    monkeypatch.setattr(Accelerator, "reduce", lambda self, tensor, how: tensor * torch.nan)
    with pytest.raises(FloatingPointError, match="Another process"):
        _trained(config, dataset)


def test_ctrl_c_saves_and_returns(config, dataset):
    components = load_components("miniature")
    add_adapters(components, rank=4)

    def interrupt(step, record):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    config = dataclasses.replace(config, checkpointing_steps=0)
    handler = signal.getsignal(signal.SIGINT)
    log = train(config, components, dataset, on_step=interrupt)
    assert len(log) == 3 and signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in checkpoints(Path(config.output_dir))] == ["checkpoint-3"]


def test_latest_passes_over_what_is_torn_or_another_runs(config, dataset, capsys):
    _trained(config, dataset)
    folder = Path(config.output_dir)
    other = dataclasses.replace(config, seed=1, max_train_steps=2)
    _trained(other, dataset)  # beside the first run's checkpoints 4 and 6
    again = dataclasses.replace(other, resume_from_checkpoint="latest", max_train_steps=4, checkpointing_steps=0)
    _trained(again, dataset)
    output = capsys.readouterr().out
    assert "Resuming from" in output and "checkpoint-2, step 2" in output and "seed was 0 and is 1" in output
    torn = folder / "checkpoint-6" / "state.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    _trained(dataclasses.replace(config, resume_from_checkpoint="latest"), dataset)
    output = capsys.readouterr().out
    assert "checkpoint-6 cannot be read" in output and "checkpoint-4, step 4" in output


def test_a_checkpoint_of_other_shapes_is_refused_before_anything_is_copied(config, dataset, tmp_path):
    _trained(config, dataset)
    folder = Path(config.output_dir) / "checkpoint-6"
    components = load_components("miniature")
    add_adapters(components, rank=2)
    before, optimizer = _weights(components), torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="lacks unet"):
        load_checkpoint(folder, components, optimizer, {})
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(components), strict=True))


def test_another_version_of_a_library_is_named(config, dataset, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("peft.__version__", "0.1")
        _trained(config, dataset)
    _trained(dataclasses.replace(config, resume_from_checkpoint="latest", max_train_steps=7), dataset)
    assert "peft was 0.1 and is" in capsys.readouterr().out


def test_what_would_stop_the_run_later_stops_it_now(config, tmp_path):
    for change, words in (
        (dict(lr_scheduler="cosin"), "must be one of linear"),
        (dict(resume_from_checkpoint=str(tmp_path / "nowhere")), "does not exist"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            check_start(dataclasses.replace(config, **change))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="choose another"):
        check_start(dataclasses.replace(config, output_dir=str(tmp_path / "file" / "run")))


def test_8_bit_adam_is_bitsandbytes_or_a_sentence(config, monkeypatch):
    config = dataclasses.replace(config, use_8bit_adam=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        check_start(config)
    library = types.ModuleType("bitsandbytes.optim")
    library.AdamW8bit = type("AdamW8bit", (torch.optim.AdamW,), {})
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", library)
    assert optimizer_class(config) is library.AdamW8bit


@pytest.mark.parametrize("cuda, bf16, expected", [(False, False, "no"), (True, False, "fp16"), (True, True, "bf16")])
def test_half_is_what_the_device_does_well(monkeypatch, cuda, bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert DreamBoothConfig(base="sd15").mixed_precision == expected
    assert DreamBoothConfig().mixed_precision == "no"


@pytest.mark.long
def test_two_runs_cannot_write_into_one_folder(config, dataset):
    holder = "import sys; from pathlib import Path; from dbnb.training import alone\n"
    holder += "with alone(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holder, config.output_dir]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="Another run writes"):
            _trained(config, dataset)
    finally:
        other.communicate()
    _trained(config, dataset)  # the lock went with its holder


def test_gradient_checkpointing_changes_no_loss(config, dataset, tmp_path):
    logs = []
    for on in (False, True):
        changed = dataclasses.replace(
            config, gradient_checkpointing=on, max_train_steps=2, output_dir=str(tmp_path / str(on))
        )
        logs.append([line["loss"] for line in _trained(changed, dataset)[1]])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


@pytest.mark.parametrize(
    "limit, kept", [(None, [2, 4, 6, 8]), (-1, [2, 4, 6, 8]), (1, [6, 8]), (2, [4, 6, 8]), (5, [2, 4, 6, 8])]
)
def test_a_limit_keeps_the_newest_checkpoints_and_no_limit_keeps_all(tmp_path, limit, kept):
    for step in (2, 4, 6, 8):  # the last one is an earlier run's
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("state.json", "state.safetensors"):
            (folder / name).touch()
    prune_checkpoints(tmp_path, 6, limit)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]


def test_a_gradient_norm_of_0_means_no_clipping(config, dataset, tmp_path):
    logs = []
    for norm in (0.0, 1e9):
        changed = dataclasses.replace(
            config, max_grad_norm=norm, max_train_steps=3, output_dir=str(tmp_path / str(norm))
        )
        logs.append([line["loss"] for line in _trained(changed, dataset)[1]])
    assert logs[0] == logs[1]


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(config):
    here = [str(name) for name in get_available_trackers()]
    for name in ("foo", *(name for name in LOGGER_TYPE_TO_CLASS if name not in here)):
        with pytest.raises(ValueError, match=f"report_to='{name}'"):
            check_start(dataclasses.replace(config, report_to=name))
    for name in here:
        check_start(dataclasses.replace(config, report_to=name))


def _tree(folder):
    """Every file below a folder with its content, every folder, every link with what it points to."""
    return {
        path: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    "inputs, output_dir",
    [
        (dict(instance_data_dir="photos"), "photos"),
        (dict(instance_data_dir="photos"), "photos/run/of/today"),
        (dict(instance_data_dir="photos"), "other/../photos"),
        (dict(instance_data_dir="photos"), "link"),
        (dict(instance_data_dir="link"), "photos/run"),
        (dict(class_data_dir="photos"), "link/run"),
        (dict(class_data_dir="not yet there"), "not yet there"),
        (dict(reference_data_dir="photos"), "photos/"),
        (dict(reference_data_dir="runs/dog/samples"), "runs/dog"),
        (dict(class_data_dir="runs/dog/previous/samples"), "runs/dog"),
        (dict(instance_data_dir="photos"), "linked samples"),
        (dict(base="base"), "base/run"),
    ],
    ids=str,
)
def test_outputs_among_inputs_are_refused_and_nothing_is_written(tmp_path, monkeypatch, inputs, output_dir):
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "other", "runs/dog/samples", "linked samples", "base"):
        Path(folder).mkdir(parents=True)
    Path("link").symlink_to("photos")
    Path("linked samples/samples").symlink_to(tmp_path / "photos")
    before = _tree(tmp_path)
    with pytest.raises(ValueError, match=rf"--output_dir .* among the files of --{next(iter(inputs))} "):
        check_start(DreamBoothConfig(**inputs, output_dir=output_dir))
    assert _tree(tmp_path) == before


def test_inputs_beside_outputs_are_fine_and_no_folder_is_made_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for output_dir in (".", "photos-run", "a/b/c", "photos/../run"):
        check_start(DreamBoothConfig(instance_data_dir="photos", output_dir=output_dir))
    assert [path.name for path in tmp_path.iterdir()] == ["photos"] and not list(Path("photos").iterdir())


_LEFT = (
    "pytorch_lora_weights.safetensors kohya_lora_weights.safetensors README.md before_after.png loss.png metrics.json "
    "config.json log.jsonl samples/step-000002.png samples/step-000006.png logs/dreambooth/events mine.txt "
    "checkpoint-2/state.json"
).split()


def _leave(folder, names=_LEFT, text="first"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def _names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_from_the_beginning_puts_aside_all_that_an_earlier_one_left_but_its_checkpoints(tmp_path):
    _leave(tmp_path)
    assert set_aside(tmp_path, 0) == tmp_path / "previous"
    stays = {"checkpoint-2/state.json", "mine.txt"}
    assert _names(tmp_path) == stays | {f"previous/{name}" for name in set(_LEFT) - stays}
    # What a run without an adapter left (it failed) does not push the results out of there.
    _leave(tmp_path, ["config.json", "log.jsonl", "samples/step-000002.png"], "second")
    assert set_aside(tmp_path, 0) is None
    assert _names(tmp_path) == stays | {f"previous/{name}" for name in set(_LEFT) - stays}
    assert (tmp_path / "previous" / "config.json").read_text() == "first"
    _leave(tmp_path, ["pytorch_lora_weights.safetensors"], "third")
    set_aside(tmp_path, 0)
    assert _names(tmp_path) == stays | {"previous/pytorch_lora_weights.safetensors"}


def test_a_resumed_run_goes_on_with_its_own_log_and_samples(tmp_path):
    _leave(tmp_path)
    set_aside(tmp_path, 4)
    stays = {"log.jsonl", "samples/step-000002.png", "logs/dreambooth/events", "checkpoint-2/state.json", "mine.txt"}
    aside = set(_LEFT) - stays - {"samples/step-000006.png"}
    assert _names(tmp_path) == stays | {f"previous/{name}" for name in aside}


def test_a_refused_resume_changes_nothing(config, dataset, tmp_path):
    _trained(config, dataset)
    _leave(Path(config.output_dir), ["pytorch_lora_weights.safetensors", "samples/step-000004.png"])
    before = _tree(tmp_path)
    for change in (dict(seed=3), dict(learning_rate=1.0), dict(report_to="tensorboard", seed=3)):
        with pytest.raises(ValueError, match="belongs to another run"):
            _trained(dataclasses.replace(config, resume_from_checkpoint="latest", **change), dataset)
        assert _tree(tmp_path) == before


def test_the_log_of_another_run_is_not_gone_on_with(config, dataset):
    folder = Path(config.output_dir)
    _, mine = _trained(dataclasses.replace(config, max_train_steps=2), dataset)
    _trained(dataclasses.replace(config, seed=1, max_train_steps=4, checkpointing_steps=4), dataset)
    _, log = _trained(dataclasses.replace(config, resume_from_checkpoint="latest", max_train_steps=3), dataset)
    assert [line["step"] for line in log] == [3] and len((folder / "log.jsonl").read_text().splitlines()) == 1
    assert mine[0]["step"] == 1


@pytest.mark.parametrize(
    "name, value, own",
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps=1"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision=no"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "no compilation"),
    ],
)
def test_accelerates_environment_changes_nothing_and_is_told_of(
    config, dataset, tmp_path, monkeypatch, capsys, name, value, own
):
    logs = []
    for folder in ("without", "with"):
        changed = dataclasses.replace(config, max_train_steps=2, output_dir=str(tmp_path / folder))
        logs.append([line["loss"] for line in _trained(changed, dataset)[1]])
        monkeypatch.setenv(name, value)
    assert logs[0] == logs[1]
    assert capsys.readouterr().out.count(f"Not followed: {name}={value}; this run has {own}.") == 1


def test_what_accelerates_launcher_sets_by_itself_is_not_told_of(monkeypatch):
    for name, value in (
        ("MIXED_PRECISION", "no"),
        ("GRADIENT_ACCUMULATION_STEPS", "1"),
        ("DYNAMO_BACKEND", "NO"),
        ("USE_CPU", "False"),
    ):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert overruled(DreamBoothConfig()) == "" == overruled(DreamBoothConfig(mixed_precision="bf16"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert overruled(DreamBoothConfig(mixed_precision="bf16")) == ""


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_a_model_split_among_processes_is_refused_at_the_start(config, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=f"ACCELERATE_USE_{name} is set"):
        check_start(config)


@pytest.mark.long
def test_runs_of_another_precision_follow_each_other_in_one_process(config, dataset, tmp_path):
    theirs = Accelerator(cpu=True, mixed_precision="bf16")  # one of the user's own, beside ours
    losses = []
    for number, precision in enumerate(("no", "bf16", "no")):
        changed = dataclasses.replace(
            config, mixed_precision=precision, max_train_steps=2, output_dir=str(tmp_path / str(number))
        )
        losses.append([line["loss"] for line in _trained(changed, dataset)[1]])
    assert losses[0] == losses[2] != losses[1]
    assert theirs.mixed_precision == "bf16"


def test_an_interrupt_at_the_last_step_is_not_forgotten(config, dataset):
    components = load_components("miniature")
    add_adapters(components, rank=4)

    def interrupt(step, record):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    config = dataclasses.replace(config, checkpointing_steps=0, max_train_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, components, dataset, on_step=interrupt)
    assert [path.name for path in checkpoints(Path(config.output_dir))] == ["checkpoint-2"]


@pytest.mark.parametrize("text", [False, True], ids=["text-frozen", "text-trained"])
def test_what_no_step_needs_leaves_the_device_and_comes_back(components, dataset, config, monkeypatch, text):
    add_adapters(components, rank=2, train_text_encoder=text)
    moves: list[tuple[str, str]] = []
    for name, module in components.modules().items():
        monkeypatch.setattr(module, "to", lambda place, name=name: moves.append((name, torch.device(place).type)))
    elsewhere = property(lambda self: types.SimpleNamespace(type="cuda"))  # a step is never reached
    begin = training._begin

    def begun(*arguments):
        run = begin(*arguments)
        monkeypatch.setattr(type(components), "device", elsewhere)
        monkeypatch.setattr(training, "_gradients", lambda *_: 1 / 0)
        return run

    monkeypatch.setattr(training, "_begin", begun)
    with pytest.raises(ZeroDivisionError):
        train(dataclasses.replace(config, train_text_encoder=text), components, dataset)
    everything = [(name, "cpu") for name in components.modules()]
    idle = [("vae", "cpu")] if text else [("text_encoder", "cpu"), ("vae", "cpu")]
    assert moves == [*everything, *idle, *everything]
