"""What cannot work is refused in one sentence that names the option, before the costly part, and leaves no trace."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dbnb import workflow
from dbnb.__main__ import main
from dbnb.config import DreamBoothConfig, check_libraries, parse_args


@pytest.fixture
def refusal(monkeypatch, tmp_path, capsys):
    """Run the command until weights would be read, or until training; what it says when it refuses."""
    monkeypatch.setenv("DBNB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "kohya" / "10_sks dog").mkdir(parents=True)
    for name in ("file.png", "kohya/10_sks dog/1.png"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)

    def reached(*args, **options):
        raise AssertionError("it went on")

    def run(arguments: list[str], moment: str) -> str:
        monkeypatch.setattr(workflow, {"loading": "load_components", "training": "train"}[moment], reached)
        before = sorted(tmp_path.rglob("*"))
        try:
            code = main([*arguments, "--output_dir", "run"] if "--output_dir" not in arguments else arguments)
        except SystemExit as error:
            code = error.code
        assert code == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert said and said[-1].startswith(("dbnb: ", "python -m dbnb: error: "))
        assert not any("Traceback" in line for line in said)
        assert sorted(tmp_path.rglob("*")) == before
        return said[-1]

    return run


# Arguments, what the sentence says, and the moment before which it is said.
TABLE = [
    ("--learning_rate -1", "learning_rate=-1.0 must be above 0", "loading"),
    ("--learning_rate 0", "learning_rate=0.0 must be above 0", "loading"),
    ("--learning_rate nan", "learning_rate=nan must be", "loading"),
    ("--text_encoder_learning_rate 0", "text_encoder_learning_rate=0.0 must be above 0", "loading"),
    ("--lora_dropout 1.5", "lora_dropout=1.5 must be at least 0 and below 1", "loading"),
    ("--text_encoder_lora_dropout 1", "text_encoder_lora_dropout=1.0 must be", "loading"),
    ("--lora_alpha 0", "lora_alpha=0.0 must be above 0", "loading"),
    ("--prior_loss_weight -0.1", "prior_loss_weight=-0.1 must not be negative", "loading"),
    ("--prior_loss_weight inf", "prior_loss_weight=inf must", "loading"),
    ("--guidance_scale 0.5", "guidance_scale=0.5 must be at least 1", "loading"),
    ("--max_grad_norm -1", "max_grad_norm=-1.0 must not be negative", "loading"),
    ("--adam_beta1 1", "adam_beta1=1.0 must be at least 0 and below 1", "loading"),
    ("--adam_epsilon 0", "adam_epsilon=0.0 must be above 0", "loading"),
    ("--checkpoints_total_limit 0", "checkpoints_total_limit=0 must be at least 1, or -1", "loading"),
    ("--checkpoints_total_limit -2", "checkpoints_total_limit=-2 must be at least 1, or -1", "loading"),
    ("--seed -1", "seed=-1 must be at least 0", "loading"),
    (f"--seed {2**64}", f"seed={2**64} must be at least 0 and at most {2**64 - 1}", "loading"),
    ("--num_inference_steps 1", "num_inference_steps=1 must be at least 2", "loading"),
    ("--lr_warmup_steps 300", "lr_warmup_steps=300 must be below max_train_steps=300", "loading"),
    ("--rank x", "--rank", "loading"),
    ("--instance_data_dir=", "instance_data_dir='' is empty", "loading"),
    ("--output_dir bad\udce9name", "output_dir='bad\\udce9name' is not valid UTF-8", "loading"),
    ("--report_to foo", "report_to='foo' is none of none, all", "loading"),
    ("--report_to wandb", "report_to='wandb' needs a package that is not installed", "loading"),
    ("--lr_scheduler piecewise_constant", "lr_scheduler='piecewise_constant' needs rules", "loading"),
    ("--instance_data_dir nowhere", "--instance_data_dir nowhere does not exist", "loading"),
    ("--instance_data_dir file.png", "--instance_data_dir file.png is a file", "loading"),
    ("--instance_data_dir empty", "No usable picture in --instance_data_dir empty (it is empty)", "loading"),
    ("--instance_data_dir kohya", "give 'kohya/10_sks dog'", "loading"),
    ("--reference_data_dir nowhere", "--reference_data_dir nowhere does not exist", "loading"),
    ("--identifier a\x1bb", "identifier='a\\x1bb' holds a line break or another control", "loading"),
    ("--class_word \u200b", "class_word='\\u200b' is blank", "loading"),
    ("--instance_prompt dog", "instance_prompt 'dog' does not contain the identifier 'sks'", "loading"),
    ("--resolution 60", "resolution=60 must be a multiple of 8 for this base: take 56 or 64", "loading"),
    ("--resolution 5", "resolution=5 must be a multiple of 8 for this base: take 8", "loading"),
    ("--tokenizer_max_length 78", "tokenizer_max_length=78 must be from 3 to", "loading"),
    ("--tokenizer_max_length 2", "tokenizer_max_length=2 must be from 3 to", "loading"),
    ("--base minature", "Base 'minature' is no folder here", "loading"),
    ("--hub_model_id a/b/c", "hub_model_id='a/b/c' is no repository", "loading"),
    ("--hub_model_id sks--dog", "hub_model_id='sks--dog' is no repository", "loading"),
]


@pytest.mark.parametrize("arguments, words, moment", TABLE, ids=lambda value: str(value)[:40])
def test_what_cannot_work_is_refused_by_name_in_time(refusal, arguments, words, moment):
    assert words in refusal(arguments.split(), moment)


NUMBERS = {
    item.name: item for item in DreamBoothConfig.__dataclass_fields__.values() if item.metadata["range"] is not None
}


def test_every_number_has_a_range_that_help_shows():
    config = DreamBoothConfig(checkpoints_total_limit=3)
    for name in DreamBoothConfig.__dataclass_fields__:
        if isinstance(getattr(config, name), int | float) and not isinstance(getattr(config, name), bool):
            assert name in NUMBERS, name


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(NUMBERS)), st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**64])))
def test_any_number_is_taken_or_refused_by_its_name(name, value):
    within = NUMBERS[name].metadata["range"]
    try:
        config = DreamBoothConfig(**{"max_train_steps": 2**70, name: value})
    except ValueError as error:
        assert name in str(error) and "\n" not in str(error)
        return
    kept = getattr(config, name)
    assert kept is None if value == within.off else kept == value and math.isfinite(kept) and kept in within


def test_minus_one_keeps_all_checkpoints_and_zero_clips_nothing():
    assert parse_args(["--checkpoints_total_limit", "-1"]).checkpoints_total_limit is None
    assert parse_args(["--max_grad_norm", "0"]).max_grad_norm == 0


@pytest.mark.parametrize("value", ["1e-4", True, None.__class__, [1]], ids=str)
def test_a_number_of_another_type_is_refused(value):
    for name in ("learning_rate", "rank"):
        with pytest.raises(ValueError, match=f"{name}=.* must be a"):
            DreamBoothConfig(**{name: value})


def test_every_schedule_and_tracker_on_offer_is_taken():
    for name in "linear cosine cosine_with_restarts polynomial constant constant_with_warmup".split():
        check_libraries(DreamBoothConfig(lr_scheduler=name))
    for name in ("none", "all", "tensorboard"):
        check_libraries(DreamBoothConfig(report_to=name))


_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def _command(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    arguments = [os.fsencode(argument) for argument in (sys.executable, "-m", "dbnb", *arguments)]
    return subprocess.run(arguments, capture_output=True, env=environment, timeout=300)


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "cp1252"}, _C], ids=["cp1252", "C"])
def test_help_and_refusals_are_said_on_any_console(environment):
    said = _command(["--help"], environment)
    assert said.returncode == 0 and b"--learning_rate" in said.stdout and not said.stderr
    said = _command(["--class_word", "狗", "--export", "小明"], environment)
    assert said.returncode == 2 and said.stderr.startswith(b"dbnb: export=") and said.stderr.count(b"\n") == 1


def test_a_run_in_other_letters_ends_well_on_any_console(tmp_path, concept):
    photographs = os.fsencode(tmp_path / "photos") + b"-\xe9"  # no UTF-8
    os.mkdir(photographs)
    for number, path in enumerate(concept.paths[:3]):
        shutil.copy(path, photographs + b"/\xe9-%d.png" % number)
    short = (
        "--max_train_steps 2 --num_class_images 2 --num_validation_images 0 --num_inference_steps 2 --rank 2".split()
    )
    words = ["--identifier", "小明", "--class_word", "狗", "--instance_prompt", "小明的狗"]
    folders = ["--instance_data_dir", os.fsdecode(photographs), "--output_dir", str(tmp_path / "run")]
    said = _command([*short, *words, *folders], _C)
    assert said.returncode == 0, said.stderr
    settings_ = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert settings_["class_word"] == "狗" and "小明的狗" in (tmp_path / "run" / "README.md").read_text(
        encoding="utf-8"
    )
