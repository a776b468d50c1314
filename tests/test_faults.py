"""Faults for real: killed while writing, a full disk, flipped and missing bytes, markup in words."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load_file

from dbnb import prior
from dbnb.adapters import add_adapters, trainable_parameters
from dbnb.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from dbnb.concept import Concept
from dbnb.config import DreamBoothConfig, Sampling
from dbnb.export import model_card
from dbnb.pictures import load_image, save_uploads
from dbnb.training import check_start

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
IDENTITY = {"seed": 0}


@pytest.fixture
def state(components):
    """Components with adapters, and an optimizer that has taken one step."""
    add_adapters(components, rank=4, train_text_encoder=True)
    parameters = [p for m in (components.unet, components.text_encoder) for _, p in trainable_parameters(m)]
    optimizer = torch.optim.AdamW(parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return components, optimizer


def _in_child(work) -> int:
    """Do `work` in a child process; the signal that killed it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _all_whole(folder, state) -> list[int]:
    components, optimizer = state
    return [load_checkpoint(path, components, optimizer, IDENTITY)["step"] for path in checkpoints(folder)]


def test_killed_at_any_byte_of_a_checkpoint_the_earlier_ones_stay(state, tmp_path):
    save_checkpoint(tmp_path / "checkpoint-1", *state, 1, IDENTITY)
    size = (tmp_path / "checkpoint-1" / "state.safetensors").stat().st_size
    killed = 0
    for limit in random.Random(0).sample(range(size + 1000), 30):

        def save(limit=limit):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills at the first byte beyond
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            save_checkpoint(tmp_path / "checkpoint-2", *state, 2, IDENTITY)

        killed += _in_child(save) == signal.SIGXFSZ
        assert _all_whole(tmp_path, state) in ([1], [1, 2])
        shutil.rmtree(tmp_path / "checkpoint-2", ignore_errors=True)
    assert killed >= 25


def test_killed_at_any_step_of_saving_what_is_there_is_whole(state, tmp_path):
    save_checkpoint(tmp_path / "checkpoint-1", *state, 1, IDENTITY)
    save_checkpoint(tmp_path / "checkpoint-2", *state, 2, IDENTITY)
    point, found = 0, []
    while True:

        def save(point=point):
            count = 0

            def kill(event, arguments):
                nonlocal count
                if event.split(".")[0] in ("open", "os", "shutil") and event != "os.kill":
                    count += 1
                    if count > point:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(kill)
            save_checkpoint(tmp_path / "checkpoint-2", *state, 3, IDENTITY)

        ended = _in_child(save)
        found.append(tuple(_all_whole(tmp_path, state)))
        if ended == 0:
            break
        if found[-1] == (1,):  # killed between the two renames: the new one is whole beside it
            save_checkpoint(tmp_path / "checkpoint-2", *state, 2, IDENTITY)
        point += 1
    assert point >= 8 and found[0] == (1, 2) and found[-1] == (1, 3)


def test_a_full_disk_is_said_and_loses_nothing(state, tmp_path):
    save_checkpoint(tmp_path / "checkpoint-1", *state, 1, IDENTITY)

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # Python turns the signal into an error
        try:
            save_checkpoint(tmp_path / "checkpoint-2", *state, 2, IDENTITY)
        except OSError as error:
            os._exit(0 if "could not be written" in str(error) and "make room" in str(error) else 1)
        os._exit(2)

    child = os.fork()
    if child == 0:
        save()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"] and _all_whole(tmp_path, state) == [1]


def test_a_read_only_folder_is_said_before_anything_is_made(monkeypatch, components):
    folder = Path(tempfile.mkdtemp())  # pytest's own nobody else may enter
    os.chmod(folder, 0o555)
    monkeypatch.setenv("DBNB_CACHE", str(folder / "cache"))
    sampling = Sampling(resolution=128, num_inference_steps=1, guidance_scale=1.0, batch_size=1)

    def work():
        if os.getuid() == 0:  # who may write everywhere
            os.setuid(65534)
        said = []
        for attempt in (
            lambda: check_start(DreamBoothConfig(output_dir=str(folder / "run"))),
            lambda: prior.class_images(components, "a photo of a dog", 1, sampling),
        ):
            try:
                attempt()
            except OSError as error:
                said.append(str(error))
        right = len(said) == 2 and "choose another --output_dir" in said[0] and "set DBNB_CACHE" in said[1]
        os._exit(0 if right else 1)

    child = os.fork()
    if child == 0:
        work()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and not list(folder.iterdir())
    folder.rmdir()


def _damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut short, or one to eight bytes changed."""
    if rng.random() < 0.4:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] ^= rng.randint(1, 255)
    return bytes(changed)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_never_taken(state, tmp_path, name):
    components, optimizer = state
    folder = tmp_path / "checkpoint-1"
    save_checkpoint(folder, components, optimizer, 1, IDENTITY)
    whole = (folder / name).read_bytes()
    before = [p.detach().clone() for _, p in trainable_parameters(components.unet)]
    rng = random.Random(0)
    for _ in range(100):
        (folder / name).write_bytes(_damaged(whole, rng))
        with pytest.raises(ValueError, match="cannot be read"):
            load_checkpoint(folder, components, optimizer, IDENTITY)
    assert all(torch.equal(a, p) for a, (_, p) in zip(before, trainable_parameters(components.unet), strict=True))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
def test_a_damaged_picture_is_a_picture_or_a_sentence(concept, tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    load_image(concept.paths[0]).resize((128, 128)).save(path)
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(40):
        path.write_bytes(_damaged(whole, rng))
        try:
            assert load_image(path).mode == "RGB"
        except ValueError as error:
            refused += 1
            assert str(error).startswith(path.name)
    assert refused > 5


def test_a_damaged_cache_is_drawn_again_and_never_used(components, tmp_path, monkeypatch):
    monkeypatch.setenv("DBNB_CACHE", str(tmp_path))
    # One at a time: in a batch of another size a pixel may round otherwise.
    sampling = Sampling(resolution=128, num_inference_steps=1, guidance_scale=1.0, batch_size=1)
    found = prior.class_images(components, "a photo of a dog", 2, sampling)
    folder = found.paths[0].parent
    whole = {path: path.read_bytes() for path in folder.iterdir() if path.suffix in (".png", ".json")}
    rng = random.Random(0)
    for path in whole:
        for _ in range(30):
            path.write_bytes(_damaged(whole[path], rng))
            for name in prior._valid_images(folder):
                assert (folder / name).read_bytes() == whole[folder / name]
        path.write_bytes(whole[path])
    found.paths[1].write_bytes(whole[found.paths[1]][:100])
    again = prior.class_images(components, "a photo of a dog", 2, sampling)
    assert again.decision == "top up" and {p: p.read_bytes() for p in again.paths}.items() <= whole.items()


@pytest.mark.parametrize("word", ["<script>", "dog](http://x)", "`dog`", "a|b", "dog\n# injected", "dog\u2028---"])
def test_words_cannot_become_markup(word):
    if not word.isprintable():
        with pytest.raises(ValueError, match="plain words"):
            Concept.from_folder(None, "sks", word)
        with pytest.raises(ValueError, match="plain words"):
            Concept.from_folder(None, "sks", "dog", instance_prompt=f"a photo of sks {word}")
        return
    concept = Concept.from_folder(None, "sks", word, instance_prompt=f"a photo of sks {word}")
    config = DreamBoothConfig(base="owner/name", class_word=word, instance_prompt=concept.instance_prompt)
    tokens = (
        MarkdownIt("commonmark").enable("table").parse(str(model_card(concept, config, None, has_text_encoder=True)))
    )
    shown = [child for token in tokens if token.type == "inline" for child in token.children]
    assert {child.type for child in shown} <= {"text", "text_special", "code_inline", "image", "softbreak"}
    assert (
        sum(
            concept.instance_prompt in "".join(child.content for child in token.children)
            for token in tokens
            if token.type == "inline"
        )
        >= 2
    )


def test_a_class_word_cannot_leave_the_results_folder():
    assert DreamBoothConfig(class_word="../../toy dog").output_dir == "runs/-toy-dog"


def test_where_a_photograph_was_taken_is_never_written(concept, tmp_path):
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif.get_ifd(0x8825)[1] = "N"
    exif[0x010E] = "at home, 48.137 N 11.575 E"
    load_image(concept.paths[0]).save(tmp_path / "photos" / "0.jpg", exif=exif)
    assert b"48.137" in (tmp_path / "photos" / "0.jpg").read_bytes()
    image = load_image(tmp_path / "photos" / "0.jpg")
    image.save(tmp_path / "again.jpg")
    assert b"48.137" not in (tmp_path / "again.jpg").read_bytes() and not image.info


def test_a_checkpoint_holds_no_pickle(state, tmp_path):
    save_checkpoint(tmp_path / "checkpoint-1", *state, 1, IDENTITY)
    assert sorted(path.name for path in (tmp_path / "checkpoint-1").iterdir()) == ["state.json", "state.safetensors"]
    assert json.loads((tmp_path / "checkpoint-1" / "state.json").read_text())["step"] == 1


def test_uploads_stay_in_their_folder_under_names_of_their_own(tmp_path):
    names = [
        "../../out.png",
        "/etc/passwd.png",
        r"C:\Users\me\dog.jpg",
        "dog.jpg",
        "DOG.JPG",
        ".hidden.png",
        "..",
        "",
        "mon chien \u00e9.png",
        "mon chien e\u0301.png",
        "a<b>&c.png",
    ]
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "dog.jpg").write_bytes(b"mine")
    paths = save_uploads({name: name.encode() for name in names}, folder)
    assert [path.read_bytes().decode() for path in paths] == names and (folder / "dog.jpg").read_bytes() == b"mine"
    assert all(path.parent == folder and re.fullmatch(r"[\w-][\w.-]*", path.name) for path in paths)
    assert len({path.name.lower() for path in folder.iterdir()}) == len(names) + 1
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    assert [p.name for p in paths[:3]] == ["out.png", "passwd.png", "dog-2.jpg"]


def test_a_clock_set_back_does_not_change_which_checkpoint_is_newest(state, tmp_path):
    for step, when in ((1, 2_000_000_000), (2, 1_000_000_000), (10, 500_000_000)):
        save_checkpoint(tmp_path / f"checkpoint-{step}", *state, step, IDENTITY)
        for path in (*(tmp_path / f"checkpoint-{step}").iterdir(), tmp_path / f"checkpoint-{step}"):
            os.utime(path, (when, when))
    assert _all_whole(tmp_path, state) == [1, 2, 10]


_COMMAND = (
    "-m dbnb --resolution 64 --max_train_steps 30 --num_class_images 4 --num_validation_images 0 "
    "--num_inference_steps 2 --rank 2 --train_batch_size 1 --checkpointing_steps 12 --resume_from_checkpoint latest"
).split()


def _start(folder, cache, **environment):
    return subprocess.Popen(
        [sys.executable, *_COMMAND, "--output_dir", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"DBNB_CACHE": str(cache), "OMP_NUM_THREADS": "1", **environment},
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # a job in the background ignores it
    )


def _same_adapters(*folders) -> bool:
    a, b = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in folders)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.long
def test_ctrl_c_at_any_moment_loses_nothing_and_the_end_is_the_same(tmp_path):
    cache, log, rng, stopped = tmp_path / "cache", tmp_path / "stopped" / "log.jsonl", random.Random(0), 0
    assert "reloads to the same picture" in _start(tmp_path / "whole", cache).communicate(timeout=120)[0]
    # After any step; then while libraries load and class images are drawn.
    for moment in [*sorted(rng.sample(range(1, 27), 3)), *(rng.uniform(1.0, 8.0) for _ in range(2))]:
        if isinstance(moment, float):
            shutil.rmtree(cache, ignore_errors=True)
        run, started = _start(tmp_path / "stopped", cache), time.monotonic()
        while run.poll() is None and time.monotonic() - started < 60:
            steps = log.read_text().count("\n") if log.exists() else 0
            if (time.monotonic() - started > moment) if isinstance(moment, float) else steps >= moment:
                break
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        output = run.communicate(timeout=120)[0]
        stopped += run.returncode != 0 or "Interrupted: step" in output
        assert not list(cache.rglob(".*.png"))
    assert stopped >= 3
    assert "reloads to the same picture" in _start(tmp_path / "stopped", cache).communicate(timeout=120)[0]
    assert _same_adapters(tmp_path / "whole", tmp_path / "stopped")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 31))


@pytest.mark.long
def test_two_runs_share_one_class_cache_and_a_token_is_nowhere(tmp_path):
    token = "hf_" + "aSecretThatNobodyMayEverReadAnywhere"
    cache = tmp_path / "cache"
    runs = [_start(tmp_path / name, cache, HF_TOKEN=token, HF_HOME=str(tmp_path / "hf")) for name in "ab"]
    outputs = [run.communicate(timeout=180)[0] for run in runs]
    assert all(run.returncode == 0 for run in runs), outputs
    assert _same_adapters(tmp_path / "a", tmp_path / "b") and len(list(cache.rglob("*.png"))) == 4
    for text in outputs:
        assert "class images: " in text and token not in text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15 and not [path for path in files if token.encode() in path.read_bytes()]


@pytest.mark.long
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_whoever_ends_a_training_finds_its_step_saved_and_an_exit_code_that_says_so(tmp_path, number, code):
    folder, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    run = _start(folder, tmp_path / "cache")
    while run.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    run.send_signal(number)
    output = run.communicate(timeout=240)[0]
    steps = log.read_text().count("\n")
    assert run.returncode == code and f"Interrupted: step {steps} is saved" in output
    assert (folder / f"checkpoint-{steps}" / "state.json").is_file() and "Traceback" not in output
    again = _start(folder, tmp_path / "cache")
    output = again.communicate(timeout=240)[0]
    assert f"Resuming from checkpoint-{steps}" in output and again.returncode == 0
