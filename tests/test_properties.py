"""What must hold for any input: keys, draws, crops, prompts, manifests."""

from __future__ import annotations

import dataclasses
import json
import string
import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dbnb import prior
from dbnb.concept import Concept
from dbnb.dataset import DreamBoothDataset, seeded
from dbnb.toybox.captions import article_for

WORDS = st.text(string.ascii_letters + string.digits + " -'äöüé", min_size=1, max_size=20).filter(str.strip)
RECIPES = st.builds(
    prior.ClassImageRecipe,
    base=WORDS,
    prompt=WORDS,
    resolution=st.integers(1, 1024),
    num_inference_steps=st.integers(1, 100),
    guidance_scale=st.floats(0, 20),
    scheduler=WORDS,
    dtype=WORDS,
    seed=st.integers(0, 2**31),
    diffusers=WORDS,
)


@given(RECIPES, RECIPES)
def test_two_recipes_share_a_folder_only_if_they_are_equal(a, b):
    assert (a.folder == b.folder) == (a == b)
    assert prior.ClassImageRecipe(**json.loads(json.dumps(dataclasses.asdict(a)))).folder == a.folder


@given(st.integers(0, 2**32), st.lists(st.integers(0, 2**20), max_size=3), st.integers(0, 7), st.integers(0, 7))
def test_a_draw_is_a_function_of_seed_role_and_numbers(seed, numbers, role, other):
    a, b, c = (torch.rand(4, generator=seeded(seed, r, *numbers)) for r in (role, role, other))
    assert torch.equal(a, b) and torch.equal(a, c) == (role == other)


@given(st.integers(0, 2**31), st.lists(st.integers(0, 10**6), min_size=2, max_size=50, unique=True))
def test_image_seeds_do_not_depend_on_how_many_there_are(seed, indices):
    seeds = {index: prior.image_seed(seed, index) for index in indices}
    assert all(prior.image_seed(seed, index) == value for index, value in reversed(seeds.items()))
    assert len(set(seeds.values())) == len(indices)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(16, 90),
    st.integers(16, 90),
    st.integers(8, 40),
    st.integers(0, 10**6),
    st.booleans(),
    st.booleans(),
)
def test_any_picture_gives_a_square_from_inside_it(width, height, size, n, center_crop, random_flip):
    with tempfile.TemporaryDirectory() as folder:
        picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
        picture.save(Path(folder) / "0.png")
        dataset = DreamBoothDataset(
            [Path(folder) / "0.png"], "a sks dog", size=size, center_crop=center_crop, random_flip=random_flip
        )
    pixels, (index, flip) = dataset[n]["instance_pixels"], dataset.draw("instance", n)
    assert pixels.shape == (3, size, size) and pixels.min() >= -1 and pixels.max() <= 1
    assert index == 0 and flip <= random_flip and torch.equal(pixels, dataset[n]["instance_pixels"])
    # A square of the resized picture, or of its mirror image: each of its rows is somewhere in it.
    whole = torch.from_numpy(np.array(dataset.images["instance"][0]))
    rows = {tuple(row.flatten().tolist()) for row in whole.unfold(1, size, 1).permute(0, 1, 3, 2).flatten(0, 1)}
    first = ((pixels.flip(2) if flip else pixels)[:, 0].T + 1) * 127.5
    assert tuple(first.round().long().flatten().tolist()) in rows


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**20), st.integers(0, 50))
def test_an_epoch_shows_each_picture_once(count, seed, epoch):
    dataset = DreamBoothDataset([], "a sks dog", seed=seed)
    dataset.images["instance"] = [Image.new("RGB", (64, 64))] * count
    shown = [dataset.draw("instance", n)[0] for n in range(epoch * count, (epoch + 1) * count)]
    assert sorted(shown) == list(range(count))


@settings(deadline=None, max_examples=30)
@given(WORDS.map(str.strip), WORDS.map(str.strip))
def test_prompts_hold_the_words_with_their_articles(identifier, class_word):
    concept = Concept.from_folder(None, identifier, class_word)
    assert concept.instance_prompt == f"a photo of {identifier} {class_word}"
    assert concept.class_prompt == f"a photo of {article_for(class_word)} {class_word}"
    assert concept.class_prompt.endswith(f" {class_word}") and identifier in concept.prompts_in(["on the beach"])[0]


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(st.integers(0, 9999), st.binary(min_size=1, max_size=50), max_size=5))
def test_a_manifest_gives_back_what_was_written(files):
    import hashlib

    with tempfile.TemporaryDirectory() as name:
        folder, images = Path(name), {}
        for index, data in files.items():
            (folder / f"{index:04d}.png").write_bytes(data)
            images[f"{index:04d}.png"] = {"seed": index, "sha256": hashlib.sha256(data).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps({"recipe": {}, "images": images}))
        assert prior._valid_images(folder) == images
        for index in list(files)[:1]:
            (folder / f"{index:04d}.png").write_bytes(files[index] + b"x")
            assert set(images) - set(prior._valid_images(folder)) == {f"{index:04d}.png"}
