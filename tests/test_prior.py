"""Step 2: the class cache reuses, tops up and regenerates exactly when it should."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dbnb import prior
from dbnb.config import Sampling
from dbnb.prior import class_images

SAMPLING = Sampling(num_inference_steps=2, guidance_scale=2.0, resolution=128, batch_size=3)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DBNB_CACHE", str(tmp_path / "cache"))


def _hashes(paths):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_reuse_top_up_and_generate(components):
    first = class_images(components, "a photo of a dog", 3, SAMPLING)
    assert first.decision == "generate" and len(first.paths) == 3
    again = class_images(components, "a photo of a dog", 3, SAMPLING)
    assert again.decision == "reuse" and again.paths == first.paths
    more = class_images(components, "a photo of a dog", 5, SAMPLING)
    assert more.decision == "top up" and "3 of 5" in more.reason
    assert len(set(_hashes(more.paths))) == 5 and _hashes(more.paths)[:3] == _hashes(first.paths)
    fewer = class_images(components, "a photo of a dog", 2, SAMPLING)
    assert fewer.decision == "reuse" and fewer.paths == first.paths[:2]


@pytest.mark.parametrize(
    "name, value",
    [
        ("prompt", "a photo of a cat"),
        ("seed", 1),
        ("num_inference_steps", 3),
        ("guidance_scale", 3.0),
        ("resolution", 32),
    ],
)
def test_whatever_makes_another_image_makes_another_cache_and_is_named(components, name, value):
    prompt, other_prompt, sampling = "a photo of a dog", "a photo of a dog", SAMPLING
    if name == "prompt":
        other_prompt = value
    else:
        sampling = replace(sampling, **{name: value})
    first = class_images(components, prompt, 1, SAMPLING)
    other = class_images(components, other_prompt, 1, sampling)
    assert other.decision == "generate" and name in other.reason and other.paths != first.paths


def test_what_the_safety_checker_blackens_is_drawn_anew_and_never_kept(components, monkeypatch):
    from diffusers import StableDiffusionPipeline

    refusals = iter([True, False, True] + [False] * 5)

    def check(self, image, device, dtype):
        flags = [next(refusals) for _ in image]
        return torch.stack([i * (not flag) for i, flag in zip(image, flags, strict=True)]), flags

    monkeypatch.setattr(StableDiffusionPipeline, "run_safety_checker", check)
    found = class_images(components, "a photo of a dog", 3, SAMPLING)
    assert len(set(_hashes(found.paths))) == 3
    assert all(np.asarray(Image.open(path)).std() > 5 for path in found.paths)
    monkeypatch.setattr(StableDiffusionPipeline, "run_safety_checker", lambda self, i, d, t: (i, [True] * len(i)))
    with pytest.raises(ValueError, match="safety checker refused"):
        class_images(components, "a photo of a cat", 1, SAMPLING)


def _pixels(paths):
    return [np.asarray(Image.open(path), int) for path in paths]


def _almost_equal(a, b):
    """But for rounding: a picture drawn in a batch of another size may differ by one step of 255."""
    return all(np.abs(x - y).max() <= 1 for x, y in zip(a, b, strict=True))


def test_a_torn_image_is_drawn_again(components):
    first = class_images(components, "a photo of a dog", 2, SAMPLING)
    whole = _pixels(first.paths)
    first.paths[1].write_bytes(first.paths[1].read_bytes()[:50])
    again = class_images(components, "a photo of a dog", 2, SAMPLING)
    assert again.decision == "top up" and _almost_equal(_pixels(again.paths), whole)


def test_batch_size_changes_nothing(components, tmp_path, monkeypatch):
    one = class_images(components, "a photo of a dog", 4, replace(SAMPLING, batch_size=4)).paths
    monkeypatch.setenv("DBNB_CACHE", str(tmp_path / "other"))
    two = class_images(components, "a photo of a dog", 4, replace(SAMPLING, batch_size=1)).paths
    assert _almost_equal(_pixels(one), _pixels(two))


def test_ones_own_images_come_first_and_are_never_altered(components, class_paths):
    before = _hashes(class_paths)
    mine = class_images(components, "a photo of a dog", 6, SAMPLING, class_data_dir=class_paths[0].parent)
    assert mine.decision == "own" and list(mine.paths) == list(class_paths)
    more = class_images(components, "a photo of a dog", 8, SAMPLING, class_data_dir=class_paths[0].parent)
    assert len(more.paths) == 8 and list(more.paths[:6]) == list(class_paths)
    assert more.paths[6].parent != class_paths[0].parent and _hashes(class_paths) == before
    assert len(list(class_paths[0].parent.iterdir())) == 6


def test_images_are_png_at_training_resolution_with_a_manifest(components):
    paths = class_images(components, "a photo of a dog", 2, SAMPLING).paths
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG" and image.size == (128, 128)
    manifest = json.loads((paths[0].parent / "manifest.json").read_text())
    assert manifest["recipe"]["prompt"] == "a photo of a dog" and set(manifest["images"]) == {p.name for p in paths}


def test_image_seeds_depend_on_index_alone():
    seeds = [prior.image_seed(0, index) for index in range(200)]
    assert len(set(seeds)) == 200 and seeds[:100] == [prior.image_seed(0, index) for index in range(100)]


@pytest.mark.parametrize("there", [False, True], ids=["missing", "empty"])
def test_without_a_picture_of_ones_own_all_are_drawn_and_it_is_said(components, tmp_path, there):
    mine = tmp_path / "mine"
    if there:
        mine.mkdir()
        (mine / ".DS_Store").touch()
    found = class_images(components, "a photo of a dog", 2, SAMPLING, class_data_dir=mine)
    assert found.decision == "generate" and len(found.paths) == 2 and all(path.is_file() for path in found.paths)
    assert found.reason.startswith(f"{mine} {'is empty' if there else 'does not exist'}: none of them is your own; ")
    again = class_images(components, "a photo of a dog", 2, SAMPLING, class_data_dir=mine)
    assert again.decision == "reuse" and str(mine) in again.reason
    assert mine.exists() == there and (not there or [path.name for path in mine.iterdir()] == [".DS_Store"])


@pytest.mark.parametrize("name, content", [("a.png", b"torn"), ("notes.txt", b"hello"), ("IMG_1.HEIC", b"heic")])
def test_a_folder_of_ones_own_without_a_usable_picture_is_an_error(components, tmp_path, name, content):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"No usable picture in .*mine .*{name}"):
        class_images(components, "a photo of a dog", 2, SAMPLING, class_data_dir=tmp_path / "mine")


def test_the_cache_is_where_the_environment_says_and_only_then_at_home(monkeypatch, tmp_path):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(prior.Path, "home", homeless)
    assert prior.cache_dir() == tmp_path / "cache"  # $DBNB_CACHE
    monkeypatch.delenv("DBNB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prior.cache_dir() == tmp_path / "dbnb"
    for unset in (lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""), lambda: monkeypatch.delenv("XDG_CACHE_HOME")):
        unset()
        with pytest.raises(OSError, match="set DBNB_CACHE"):
            prior.cache_dir()
    monkeypatch.setattr(prior.Path, "home", lambda: tmp_path)
    assert prior.cache_dir() == tmp_path / ".cache" / "dbnb"
