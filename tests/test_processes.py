"""Several processes make what one makes: gloo on this CPU, launched as the documentation says."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.long
# Where a gradient is as small as its rounding, AdamW's usual epsilon of 1e-8 makes a whole step of that rounding.
_RUN = (
    "--resolution 64 --num_class_images 4 --sample_batch_size 2 --num_validation_images 0 --num_inference_steps 2 "
    "--rank 2 --train_text_encoder --random_flip --learning_rate 1e-4 --text_encoder_learning_rate 1e-4 "
    "--lr_scheduler constant --adam_epsilon 1e-6"
).split()


def _launch(folder, *arguments, processes=1, batch=4, script=("-m", "dbnb")):
    """Start the command in so many processes, each with its share of the batch; its own caches."""
    launcher = ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", str(processes)]
    start = (
        [sys.executable, "-m", *launcher, "--main_process_port", "0", *script]
        if processes > 1
        else [sys.executable, *script]
    )
    environment = os.environ | {"DBNB_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    arguments = [*_RUN, "--train_batch_size", str(batch // processes), "--output_dir", str(folder / "run"), *arguments]
    return subprocess.Popen(
        start + arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _finish(process) -> str:
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    return output


def _adapter(folder):
    return load_file(folder / "run" / "pytorch_lora_weights.safetensors")


def _close(a, b):
    assert set(a) == set(b)
    return all(torch.allclose(a[key], b[key], rtol=0, atol=1e-6) for key in a)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of the same four steps, with a checkpoint after two, by the number of processes that took them."""
    folders = {}
    for processes in (1, 2):
        folders[processes] = folder = tmp_path_factory.mktemp(f"of-{processes}")
        launched = _launch(folder, "--max_train_steps", "4", "--checkpointing_steps", "2", processes=processes)
        (folder / "said").write_text(_finish(launched))
    return folders


def _class_images(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).digest() for p in (folder / "cache").rglob("*.png")}


def test_two_processes_give_the_adapter_and_the_class_images_of_one(runs):
    assert (runs[2] / "said").read_text().count("class images: generate") == 1  # the first alone speaks
    assert _class_images(runs[2]) == _class_images(runs[1]) and len(_class_images(runs[1])) == 4
    manifests = [json.loads(next((folder / "cache").rglob("manifest.json")).read_text()) for folder in runs.values()]
    assert manifests[0] == manifests[1]
    assert _close(_adapter(runs[2]), _adapter(runs[1]))
    logs = [(folder / "run" / "log.jsonl").read_text().splitlines() for folder in runs.values()]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and len(losses[1]) == 4


@pytest.mark.parametrize("was, becomes", [(1, 2), (2, 1)])
def test_a_checkpoint_goes_on_in_another_number_of_processes(runs, tmp_path, was, becomes):
    folder = tmp_path / "copy"
    shutil.copytree(runs[was], folder)
    for path in (*(folder / "run").glob("*.safetensors"), folder / "run" / "checkpoint-4"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    output = _finish(_launch(folder, "--max_train_steps", "4", "--resume_from_checkpoint", "latest", processes=becomes))
    assert output.count("Resuming from checkpoint-2") == 1
    assert _close(_adapter(folder), _adapter(runs[1]))


def test_where_one_process_fails_all_end_and_it_is_said_why(tmp_path):
    """The second process meets a broken loss in step 2, while the first waits for it."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys\n"
        "from dbnb import training\n"
        "step = training.training_step\n"
        "def broken(*arguments, **options):\n"
        "    broken.calls += 1\n"
        "    if broken.calls == 2 and os.environ['RANK'] == '1':\n"
        "        raise ValueError('the second process fails')\n"
        "    return step(*arguments, **options)\n"
        "broken.calls = 0\n"
        "training.training_step = broken\n"
        "from dbnb.__main__ import main\n"
        "sys.exit(main())\n"
    )
    started = time.monotonic()
    process = _launch(tmp_path, "--max_train_steps", "4", processes=2, script=(str(script),))
    output = process.communicate(timeout=240)[0]
    assert process.returncode != 0 and "dbnb: the second process fails" in output
    assert time.monotonic() - started < 120


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_ctrl_c_and_sigterm_stop_all_after_the_same_step(tmp_path, number):
    process = _launch(tmp_path, "--max_train_steps", "100000", processes=2)
    log = tmp_path / "run" / "log.jsonl"
    for _ in range(1200):
        if log.exists() and log.read_text().count("\n") > 3:
            break
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), number)  # one process alone is asked to stop
    output = process.communicate(timeout=240)[0]
    assert process.returncode != 0  # the launcher's own: it does not hand on the processes' 130 or 143
    assert output.count("Interrupted: step") == 1
    steps = len(log.read_text().splitlines())
    assert (tmp_path / "run" / f"checkpoint-{steps}").is_dir()
    assert number == signal.SIGTERM or (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
