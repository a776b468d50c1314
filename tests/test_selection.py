"""Which checkpoint is best, and when to stop: the rule, the loop, and what is exported."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from families import write
from matplotlib.backends.backend_agg import FigureCanvasAgg
from safetensors.torch import load_file

from dbnb import miniature, plots, progress, workflow
from dbnb.adapters import adapted_modules, add_adapters, without_adapters
from dbnb.checkpoints import load_weights
from dbnb.config import AdapterSettings, DreamBoothConfig, parse_args
from dbnb.dataset import DreamBoothDataset
from dbnb.metrics import load_encoders
from dbnb.models import load_components
from dbnb.selection import best_step, measured, out_of_patience, shares, trade_off
from dbnb.training import ended, train
from dbnb.validation import draw, grid

BEFORE = {"subject_fidelity": 0.2, "class_subject_similarity": 0.2, "class_diversity": 0.8, "clip_t": 0.5}


def test_shares_are_0_at_the_base_and_1_at_its_best():
    assert shares(BEFORE, BEFORE, {"subject_fidelity": 0.8}) == {
        "subject_gained": 0.0,
        "prior_kept": 1.0,
        "prompt_kept": 1.0,
    }
    now = {"subject_fidelity": 0.5, "class_subject_similarity": 0.35, "class_diversity": 0.72, "clip_t": 0.6}
    found = shares(now, BEFORE, {"subject_fidelity": 0.8})
    # Half of the way; the class a quarter of it towards the subject, which is more than a tenth of its diversity lost.
    assert found == pytest.approx({"subject_gained": 0.5, "prior_kept": 0.75, "prompt_kept": 1.0})
    drifted = shares(now | {"class_diversity": 0.4}, BEFORE, {"subject_fidelity": 0.8})
    assert drifted["prior_kept"] == pytest.approx(0.5)
    assert shares({"subject_fidelity": 0.9}, {"subject_fidelity": 0.2}) == pytest.approx({"subject_gained": 0.875})


def test_the_trade_off_is_high_only_where_every_share_is():
    assert trade_off({"a": 1.0, "b": 1.0}) == 1.0 and trade_off({"a": 1.0, "b": 0.0}) == 0.0
    assert trade_off({"a": 0.5, "b": 1.0}) == pytest.approx(2 / 3)
    assert trade_off({"a": 0.9, "b": 0.1}) < trade_off({"a": 0.5, "b": 0.5})


def _log(**values):
    return [{"step": int(step[1:])} | ({} if value is None else {"trade_off": value}) for step, value in values.items()]


def test_the_best_step_is_the_earliest_of_the_highest_and_patience_counts_from_it():
    log = _log(s1=0.1, s2=None, s3=0.6, s4=0.6, s5=0.2)
    assert best_step(log) == 3 and measured(log) == {1: 0.1, 3: 0.6, 4: 0.6, 5: 0.2}
    assert best_step(_log(s1=None)) is None and not out_of_patience(_log(s1=None), 1)
    assert [out_of_patience(log, patience) for patience in (None, 1, 2, 3)] == [False, True, True, False]
    config = DreamBoothConfig(max_train_steps=9, patience=2)
    assert ended(config, log) and not ended(dataclasses.replace(config, patience=3), log)


@pytest.mark.parametrize("changed", [dict(select="best"), dict(patience=1), dict(measure_validation=True)], ids=str)
def test_measures_need_pictures_and_draw_the_last_step_too(changed):
    for missing in ("num_validation_images", "validation_steps"):
        with pytest.raises(ValueError, match=rf"{next(iter(changed))}=.* {missing}=0 draws none"):
            DreamBoothConfig(**changed, **{missing: 0})
    config = DreamBoothConfig(max_train_steps=10, validation_steps=4, **changed)
    assert config.measures and config.validated_steps() == [4, 8, 10]
    assert DreamBoothConfig(max_train_steps=10, validation_steps=4).validated_steps() == [4, 8]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A base of some kilobytes."""
    return write("sd1", tmp_path_factory.mktemp("tiny"))


# A trade-off by step that another measure would find: best at 4, then patience runs out.
_FOUND = {2: 0.3, 4: 0.6, 6: 0.5, 8: 0.4, 10: 0.9}


@pytest.fixture
def short(tiny, tmp_path, concept):
    """Train a few steps of the tiny base with measures that are given; returns weights by part, and the log."""

    def run(folder, on_step=None, **changed):
        options = dict(validation_steps=2, checkpointing_steps=0, select="best", max_train_steps=10) | changed
        config = DreamBoothConfig(
            base=str(tiny),
            resolution=32,
            output_dir=str(tmp_path / folder),
            rank=2,
            num_validation_images=1,
            num_inference_steps=2,
            lr_scheduler="constant",
            **options,
        )
        components = load_components(config.base)
        add_adapters(components, config.adapters)
        dataset = DreamBoothDataset(concept.paths, concept.instance_prompt, size=32)
        asked = []

        def measure(step):
            asked.append(step)
            return {"trade_off": _FOUND[step]} if config.measures else None

        log = train(config, components, dataset, on_step=on_step, on_validation=measure)
        weights = {n: p.detach().clone() for n, p in components.unet.named_parameters() if p.requires_grad}
        return config, components, weights, log, asked

    return run


def _lines(config):
    lines = (Path(config.output_dir) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def test_measuring_changes_no_weight_and_stands_in_the_log(short):
    _, _, plain, log, asked = short("plain", select="last", validation_steps=0)
    config, _, measured_, other, also = short("measured")
    assert asked == [] and also == [2, 4, 6, 8, 10]
    assert all(torch.equal(plain[name], measured_[name]) for name in plain)
    assert [line["loss"] for line in log] == [line["loss"] for line in other]
    assert {line["step"]: line["trade_off"] for line in _lines(config) if "trade_off" in line} == _FOUND


def test_patience_ends_a_run_and_the_best_checkpoint_stays(short):
    config, components, weights, log, _ = short("patience", patience=2, checkpoints_total_limit=1)
    folder = Path(config.output_dir)
    assert (
        log[-1]["step"] == 8
        and ended(config, log)
        and [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    )
    chosen = workflow._choose(config, components, log)
    stored = load_file(folder / "checkpoint-4" / "state.safetensors")
    now = {n: p for n, p in components.unet.named_parameters() if p.requires_grad}
    assert chosen == 4 and all(torch.equal(now[name], stored[f"unet.{name}"]) for name in now)
    assert any(not torch.equal(now[name], weights[name]) for name in now)
    assert workflow._choose(dataclasses.replace(config, select="last"), components, log) is None
    # Gone on with, it has nothing left to do.
    *_, again, asked = short("patience", patience=2, checkpoints_total_limit=1, resume_from_checkpoint="latest")
    assert [line["step"] for line in again][-1] <= 8 and asked in ([], [6, 8])


@pytest.mark.long
@pytest.mark.parametrize("stop", [2, 3, 4])  # steps are counted from 0: before, at and behind a measured one
def test_a_resumed_run_measures_and_chooses_as_one_that_ran_through(short, stop):
    whole, _, weights, log, _ = short("whole")

    def interrupt(step, record):
        if step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    short("parts", on_step=interrupt)
    config, _, resumed, again, _ = short("parts", resume_from_checkpoint="latest")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert _lines(config) == _lines(whole) and best_step(again) == best_step(log)


@pytest.mark.long
def test_a_run_that_was_killed_before_it_measured_goes_on_with_that(short):
    whole, *_ = short("whole", checkpointing_steps=4)
    config, *_ = short("parts", checkpointing_steps=4, max_train_steps=4)
    path = Path(config.output_dir) / "log.jsonl"  # as a kill after the checkpoint of step 4 leaves it
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    del lines[-1]["trade_off"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    *_, asked = short("parts", checkpointing_steps=4, resume_from_checkpoint="latest")
    assert asked == [4, 6, 8, 10] and _lines(config) == _lines(whole)


@pytest.mark.long
@pytest.mark.commands
def test_the_command_measures_holds_out_and_exports_the_best(tiny, tmp_path, capsys, monkeypatch):
    encoders = load_encoders(miniature.path())
    monkeypatch.setattr(progress.metrics, "load_encoders", lambda base: encoders)
    arguments = ["--base", str(tiny), "--output_dir", str(tmp_path), "--num_class_images", "2"]
    arguments += (
        "--resolution 32 --max_train_steps 4 --num_validation_images 2 --rank 2 --num_inference_steps 2".split()
    )
    arguments += (
        "--validation_steps 2 --checkpointing_steps 0 --holdout 1 --select best --report_to tensorboard".split()
    )
    result = workflow.run(parse_args(arguments))
    said = capsys.readouterr().out
    assert "holds out" not in said and "held out" in said and "is exported: of those measured" in said
    lines = [line for line in result.log if "trade_off" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for name in ("subject_gained", "prior_kept", "clip_t", "class_diversity", "held_out_loss", "seen_loss"):
        assert all(isinstance(line[name], float) for line in lines), name
    assert (tmp_path / "trade_off.png").stat().st_size > 1000 and (tmp_path / "samples" / "step-000002.png").is_file()
    stored = load_file(tmp_path / f"checkpoint-{best_step(result.log)}" / "state.safetensors")
    exported = load_file(result.adapter)
    trained = {key.removeprefix("unet.").replace(".default", ""): value for key, value in stored.items()}
    assert exported and all(torch.equal(value, trained[key.removeprefix("unet.")]) for key, value in exported.items())


def test_without_encoders_a_run_that_needs_them_is_refused(monkeypatch, tmp_path):
    def absent(base):
        raise OSError("no network\nand more")

    monkeypatch.setattr(progress.metrics, "load_encoders", absent)
    assert progress.load_encoders(DreamBoothConfig(), tmp_path) is None
    with pytest.raises(OSError, match=r"cannot be loaded \(no network\): check the network"):
        progress.load_encoders(DreamBoothConfig(select="best"), tmp_path)


def test_the_figure_marks_the_choice_and_is_none_without_measures():
    assert progress.figure([{"step": 1, "loss": 0.5}]) is None
    log = [{"step": s, "trade_off": v, "subject_gained": v, "prior_kept": 1 - v} for s, v in ((10, 0.3), (20, 0.6))]
    figure = progress.figure(log, chosen=20)
    assert [text.get_text() for text in figure.axes[0].texts] == ["0", "10", "20"]
    assert "best: step 20" in [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    FigureCanvasAgg(figure).draw()
    assert isinstance(figure, plots.Figure)


def test_the_grid_draws_every_checkpoint_at_every_strength_and_leaves_all_as_it_was(short):
    config, components, weights, *_ = short("grid", checkpointing_steps=4, select="last", learning_rate=0.05)
    folder, prompt = Path(config.output_dir), "a photo of sks dog"
    pictures = grid(components, folder, prompt, config.sampling, strengths=(0.0, 0.5, 1.0), seed=3)
    assert list(pictures) == [(step, factor) for step in (4, 8) for factor in (0.0, 0.5, 1.0)]
    now = {n: p for n, p in components.unet.named_parameters() if p.requires_grad}
    assert all(torch.equal(now[name], weights[name]) for name in weights)
    # At strength 0 it is the base whatever the checkpoint, at 1 what that checkpoint draws.
    bare = draw(load_components(config.base), [prompt], config.sampling, seeds=[3])[0]
    assert pictures[4, 0.0].tobytes() == pictures[8, 0.0].tobytes()
    bare, off, on = (np.asarray(p).astype(int) for p in (bare, pictures[8, 0.0], pictures[8, 1.0]))
    assert abs(off - bare).max() <= 1 < abs(on - bare).max()  # adapters add zeros, in another order
    load_weights(folder / "checkpoint-4", components)
    assert draw(components, [prompt], config.sampling, seeds=[3])[0].tobytes() == pictures[4, 1.0].tobytes()
    figure = plots.grid(pictures, title=prompt)
    assert [axis.get_title() for axis in figure.axes[:3]] == ["strength 0", "strength 0.5", "strength 1"]
    with pytest.raises(ValueError, match="holds no checkpoint"):
        grid(components, folder / "nowhere", prompt, config.sampling)


def test_without_adapters_the_base_is_plain_and_then_the_same_adapters_are_back(tiny, concept):
    components = load_components(tiny)
    plain = {name for name, _ in components.unet.named_modules()}
    add_adapters(components, AdapterSettings(rank=2, train_text_encoder=True))
    before = {f"{part}.{n}": p for part, m in components.modules().items() for n, p in m.named_parameters()}
    with without_adapters(components):
        assert not adapted_modules(components) and {name for name, _ in components.unet.named_modules()} == plain
        add_adapters(components, AdapterSettings(rank=4, lora_layers="all"))
    after = {f"{part}.{n}": p for part, m in components.modules().items() for n, p in m.named_parameters()}
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)
    assert [p.requires_grad for p in after.values()] == ["lora" in name for name in after]
    assert set(adapted_modules(components)) == {"unet", "text_encoder"}
