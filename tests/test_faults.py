"""Faults for real: killed while writing, a full disk, flipped and missing bytes, markup in words."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys

import pytest
import torch
from PIL import Image

from dbnb import prior
from dbnb.adapters import add_adapters, trainable_parameters
from dbnb.concept import Concept, load_image
from dbnb.config import DreamBoothConfig
from dbnb.training import checkpoints, load_checkpoint, save_checkpoint

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
    load_image(concept.paths[0]).resize((64, 64)).save(path)
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
    options = dict(resolution=64, num_inference_steps=1, guidance_scale=1.0, batch_size=2)
    found = prior.class_images(components, "a photo of a dog", 2, **options)
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
    again = prior.class_images(components, "a photo of a dog", 2, **options)
    assert again.decision == "top up" and {p: p.read_bytes() for p in again.paths}.items() <= whole.items()


@pytest.mark.parametrize("word", ["<script>", "dog\n# injected", "dog](http://x)", "`dog`", "a|b"])
def test_words_cannot_become_markup(word):
    with pytest.raises(ValueError, match="plain words"):
        Concept.from_folder(None, "sks", word)
    with pytest.raises(ValueError, match="plain words"):
        Concept.from_folder(None, "sks", "dog", instance_prompt=f"a photo of sks {word}")


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
