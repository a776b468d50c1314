"""The command: all seven steps, the files it promises, and its errors."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from families import write
from PIL import Image
from safetensors.torch import load_file

import dbnb
from dbnb import export, miniature, workflow
from dbnb.__main__ import main
from dbnb.adapters import adapted_modules
from dbnb.checkpoints import checkpoints
from dbnb.config import DreamBoothConfig, parse_args
from dbnb.models import load_components
from dbnb.validation import from_references

_SHORT = "--max_train_steps 4 --num_class_images 4 --num_validation_images 8 --num_inference_steps 2 --rank 2".split()


@pytest.mark.long
@pytest.mark.commands
def test_the_command_writes_what_the_contract_names(tmp_path, capsys):
    assert main([*_SHORT, "--output_dir", str(tmp_path), "--checkpointing_steps", "2", "--validation_steps", "2"]) == 0
    output = capsys.readouterr().out
    for name in (
        "pytorch_lora_weights.safetensors before_after.png loss.png log.jsonl metrics.json config.json README.md"
    ).split():
        assert (tmp_path / name).stat().st_size > 0 and name in output
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert set(numbers) == {"before", "after", "floor", "ceiling"}
    assert all(isinstance(value, float) for state in numbers.values() for value in state.values())
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    assert "normalized_subject_fidelity" in output and "reloads to the same picture" in output
    assert (tmp_path / "samples" / "step-000004.png").is_file() and (tmp_path / "checkpoint-4").is_dir()


def test_no_validation_images_switches_images_and_metrics_off(tmp_path):
    arguments = [*_SHORT, "--output_dir", str(tmp_path), "--num_validation_images", "0", "--no_prior_preservation"]
    assert main([*arguments, "--train_text_encoder", "--report_to", "tensorboard"]) == 0
    assert not (tmp_path / "metrics.json").exists() and not (tmp_path / "before_after.png").exists()
    assert "prior_loss" not in json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert list((tmp_path / "logs").rglob("events*"))


@pytest.mark.long
@pytest.mark.commands
def test_a_cached_training_is_loaded_and_not_run_again(config, capsys):
    first = workflow.trained(config)
    capsys.readouterr()
    again = workflow.trained(config)
    assert "Resuming from checkpoint-6" in capsys.readouterr().out and again.log == first.log
    for part in ("unet", "text_encoder"):
        states = [getattr(s.components, part).state_dict() for s in (first, again)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    other = workflow.trained(dataclasses.replace(config, learning_rate=5e-4))
    assert other.config.output_dir != first.config.output_dir


def test_a_training_shows_itself_at_its_checkpoints_and_a_cached_one_does_not(config):
    seen = []

    def look(session: workflow.Session, step: int) -> None:
        modules = adapted_modules(session.components).values()
        assert not any(module.training for module in modules)  # what is drawn is drawn without dropout
        seen.append((step, session.concept.instance_prompt))

    config = dataclasses.replace(config, seed=5)  # trained by no other test
    session = workflow.trained(config, on_checkpoint=look)
    steps = [int(path.name.rpartition("-")[2]) for path in checkpoints(Path(session.config.output_dir))]
    assert seen == [(step, session.concept.instance_prompt) for step in steps] and len(steps) >= 2
    seen.clear()
    workflow.trained(config, on_checkpoint=look)
    assert not seen


def test_a_torn_cached_training_is_run_again(config):
    first = workflow.trained(config)
    for path in Path(first.config.output_dir).glob("checkpoint-*/state.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    lines = []
    again = workflow.trained(config, tell=lines.append)
    assert any("Trained again" in str(line) for line in lines)
    assert [line["loss"] for line in again.log] == [line["loss"] for line in first.log]


@pytest.mark.long
@pytest.mark.commands
def test_one_validation_image_and_a_kohya_file(tmp_path):
    arguments = [*_SHORT, "--output_dir", str(tmp_path), "--num_validation_images", "1", "--export", "kohya"]
    assert main([*arguments, "--no_prior_preservation"]) == 0
    assert "class_diversity" not in json.loads((tmp_path / "metrics.json").read_text())["after"]
    assert (tmp_path / "kohya_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--base", "minature"], "check the spelling"),
        (["--instance_data_dir", "nowhere"], "nowhere"),
        (["--instance_prompt", "a dog"], "identifier"),
        (["--resume_from_checkpoint", "gone"], "gone"),
        (["--lr_scheduler", "cosin"], "cosine"),
    ],
)
def test_expected_errors_are_one_sentence(tmp_path, capsys, arguments, words):
    assert main([*_SHORT, "--output_dir", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dbnb: ") and words in error


def test_options_follow_the_presets_and_say_what_is_wrong(capsys):
    assert parse_args([]).resolution == 128 and parse_args(["--base", "sd15"]).resolution == 512
    assert {name: DreamBoothConfig(base=name).resolution for name in ("sd21", "sdxl", "if")} == {
        "sd21": 768,
        "sdxl": 1024,
        "if": 64,
    }
    assert parse_args(["--no_prior_preservation"]).with_prior_preservation is False
    assert parse_args(["--base", str(miniature.path())]) == dataclasses.replace(
        parse_args([]), base=str(miniature.path())
    )
    with pytest.raises(SystemExit):
        parse_args(["--rank", "0"])
    assert "rank=0 must be at least 1" in capsys.readouterr().err


def test_reference_images_are_redrawn_by_strength(config):
    components = load_components("miniature")
    reference = Image.new("RGB", (100, 100), (200, 60, 60))
    config.num_inference_steps = 10
    weak, strong = (
        np.asarray(
            from_references(components, [reference], "a photo of a dog", config.sampling, strength=s)[0], dtype=int
        )
        for s in (0.2, 0.9)
    )
    target = np.array([200, 60, 60])
    assert weak.shape == (128, 128, 3) and np.abs(weak - target).mean() < np.abs(strong - target).mean()


@pytest.mark.parametrize(
    "error, code, words",
    [
        (KeyboardInterrupt(), 130, "interrupted; class images and checkpoints that were complete are kept"),
        (torch.OutOfMemoryError("CUDA out of memory\nand a page more"), 2, "lower --train_batch_size"),
        (FloatingPointError("The loss is nan"), 2, "The loss is nan"),
    ],
    ids=["Ctrl-C", "memory", "not finite"],
)
def test_what_ends_a_run_is_said_in_one_sentence(monkeypatch, capsys, error, code, words):
    def ends(config):
        raise error

    monkeypatch.setattr(workflow, "run", ends)
    assert main(_SHORT) == code
    said = capsys.readouterr().err
    assert said.startswith("dbnb: ") and words in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(text_encoder_rank=0), "text_encoder_rank=0 must be at least 1"),
        (dict(validation_steps=-1), "validation_steps=-1 must not be negative"),
        (dict(mixed_precision="fp8"), "must be one of no, fp16, bf16, half"),
        (dict(export="zip"), "must be one of diffusers, kohya"),
        (dict(export="kohya", use_dora=True), "does not write DoRA"),
        (dict(snr_gamma=0.0), "snr_gamma=0.0 must be above 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_named(changed, words):
    with pytest.raises(ValueError, match=words):
        DreamBoothConfig(**changed)


def test_modules_load_when_they_are_first_named():
    assert dbnb.tables.Table is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dbnb.nothing  # noqa: B018


def _files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
@pytest.mark.commands
def test_a_second_run_puts_the_first_ones_results_aside_and_a_refused_one_changes_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = [*_SHORT, "--output_dir", str(folder), "--no_prior_preservation"]
    more = [
        "--num_validation_images",
        "1",
        "--export",
        "kohya",
        "--validation_steps",
        "2",
        "--checkpointing_steps",
        "2",
    ]
    assert main([*arguments, *more]) == 0
    first = _files(folder)
    assert {"kohya_lora_weights.safetensors", "metrics.json", "samples/step-000004.png"} <= set(first)
    for refused in (
        ["--resume_from_checkpoint", "latest", "--seed", "3"],
        ["--base", "nowhere/at all"],
        ["--reference_data_dir", str(folder / "samples")],
    ):
        assert main([*arguments, "--num_validation_images", "0", *refused]) == 2
        assert _files(folder) == first
    capsys.readouterr()
    assert main([*arguments, "--num_validation_images", "0", "--seed", "1"]) == 0
    assert f"The earlier results in {folder} are now in {folder / 'previous'}." in capsys.readouterr().out
    now = _files(folder)
    written = {"pytorch_lora_weights.safetensors", "README.md", "loss.png", "log.jsonl", "config.json"}
    kept = {name for name in first if name.startswith("checkpoint-")}
    assert set(now) == written | kept | {f"previous/{name}" for name in set(first) - kept}
    assert all(now[f"previous/{name}"] == first[name] for name in set(first) - kept)
    assert "before_after.png" not in now["README.md"].decode() and json.loads(now["config.json"])["seed"] == 1
    assert export.push_to_hub(folder, "me/toy", dry_run=True) == [
        "pytorch_lora_weights.safetensors",
        "README.md",
        "loss.png",
    ]


@pytest.mark.parametrize("refused", [["--base", "nowhere/at all"], ["--push_to_hub"], ["--instance_prompt", "a dog"]])
def test_a_refused_run_makes_no_folder(tmp_path, refused):
    assert main([*_SHORT, "--output_dir", str(tmp_path / "a" / "run"), *refused]) == 2
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The arguments of a run of two steps on a base of some kilobytes."""
    base = write("sd1", tmp_path_factory.mktemp("tiny"))
    numbers = "--resolution 32 --max_train_steps 2 --num_validation_images 0 --rank 2 --num_inference_steps 2".split()
    return ["--base", str(base), "--no_prior_preservation", *numbers]


@pytest.mark.long
def test_runs_of_another_precision_follow_each_other_in_one_process(tiny, tmp_path):
    adapters = []
    for number, precision in enumerate(("no", "bf16", "no")):
        folder = tmp_path / str(number)
        workflow.run(parse_args([*tiny, "--output_dir", str(folder), "--mixed_precision", precision]))
        adapters.append(load_file(folder / "pytorch_lora_weights.safetensors"))
    first, half, again = adapters
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], half[name]) for name in first)


@pytest.mark.parametrize(
    "error", [RuntimeError("nobody there"), OSError("no space"), ValueError("Invalid token")], ids=str
)
def test_a_failed_upload_ends_a_run_that_has_all_its_results(tiny, tmp_path, capsys, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(export.HfApi, "create_repo", fails)
    monkeypatch.setattr(export, "check_hub", lambda repo_id: None)
    assert main([*tiny, "--output_dir", str(tmp_path), "--push_to_hub", "--class_word", "toy dog"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(
        f"dbnb: The upload to sks-toy-dog failed ({type(error).__name__}: {error}): all results are in"
    )
    assert f"hf upload sks-toy-dog {tmp_path} . --include pytorch_lora_weights.safetensors" in said
    assert {"pytorch_lora_weights.safetensors", "README.md", "loss.png", "config.json"} <= set(_files(tmp_path))


def test_an_interrupted_run_has_its_adapter_and_ends_with_130(tiny, tmp_path, monkeypatch):
    def interrupted(config, components, dataset, **_):
        return train(dataclasses.replace(config, max_train_steps=1), components, dataset)

    train = workflow.train
    monkeypatch.setattr(workflow, "train", interrupted)
    assert main([*tiny, "--output_dir", str(tmp_path)]) == 130
    assert "pytorch_lora_weights.safetensors" in _files(tmp_path) and "README.md" not in _files(tmp_path)


def test_a_resume_with_other_settings_is_refused_before_anything_is_drawn(tiny, tmp_path, capsys, monkeypatch):
    command = [*tiny, "--output_dir", str(tmp_path), "--checkpointing_steps", "2"]
    assert main(command) == 0
    monkeypatch.setattr(workflow, "load_components", lambda *_, **__: pytest.fail("the base was loaded"))
    assert main([*command, "--resume_from_checkpoint", "latest", "--learning_rate", "5e-4"]) == 2
    assert "belongs to another run: learning_rate was 0.003 and is 0.0005" in capsys.readouterr().err


def test_sigterm_unwinds_and_ends_with_143(monkeypatch, capsys):
    ended = []

    def run(config):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            ended.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(workflow, "run", run)
    assert main(_SHORT) == 143 and ended and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err.startswith("dbnb: interrupted; ")
