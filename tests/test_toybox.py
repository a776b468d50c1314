"""The toy world: same arguments, same picture; fast enough; what captions say is true."""

from __future__ import annotations

import collections
import time

import numpy as np
import pytest
from PIL import Image

from dbnb import toybox
from dbnb.miniature.data import ATTRIBUTES, SHOTS, caption_of, draw, held_out, labels_of
from dbnb.toybox.captions import IDENTIFIERS, caption, content, whole_content
from dbnb.toybox.sample import PICTURES, SAMPLE_DIR, SAMPLE_TOY, SIZE


def test_same_arguments_same_picture_and_another_seed_another():
    toy = toybox.random_toy("cat", 3)
    assert toy == toybox.random_toy("cat", 3) != toybox.random_toy("cat", 4)
    pictures = [np.asarray(toybox.photograph(toy, scene="beach", seed=seed)) for seed in (1, 1, 2)]
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).mean() > 0.3


def test_sizes_show_the_same_picture():
    toy = toybox.random_toy("robot", 0)
    small = np.asarray(toybox.photograph(toy, scene="city", seed=5), dtype=float)
    large = toybox.photograph(toy, scene="city", seed=5, size=256).resize((128, 128), Image.Resampling.BOX)
    assert np.abs(small - np.asarray(large, dtype=float)).mean() < 4


@pytest.mark.long
def test_bundled_sample_is_what_the_code_renders():
    for name, shots in PICTURES.items():
        for number, (scene, seed) in enumerate(shots, start=1):
            stored = np.asarray(Image.open(SAMPLE_DIR / name / f"{number:02d}.png"), dtype=int)
            rendered = toybox.pixels(SAMPLE_TOY, scene=scene, seed=seed, size=SIZE, supersample=3)
            assert np.abs(stored - rendered).max() <= 1


def test_sample_body_colour_is_none_of_the_named():
    nearest = min(np.abs(np.subtract(SAMPLE_TOY.body, rgb)).max() for rgb in toybox.COLORS.values())
    assert nearest > 0.1  # a named toy's own shade strays at most 0.045


@pytest.mark.parametrize("kind", toybox.KINDS)
@pytest.mark.parametrize("accessory", toybox.ACCESSORIES)
def test_every_toy_stands_inside_the_picture(kind, accessory):
    toy = toybox.Toy(kind, body="pink", accent="green", accessory=accessory, head=1.14, girth=1.14)
    counts = []
    for seed in range(8):
        with_toy = toybox.pixels(toy, scene="moon", seed=seed).astype(int)
        colour = np.ptp(with_toy, axis=2) > 60
        assert colour.mean() > 0.06
        border = np.concatenate([colour[:, 0], colour[:, -1], colour[-1]])
        counts.append(border.mean())
    assert np.mean(counts) < 0.08


def test_a_small_picture_takes_at_most_40_ms_on_one_core():
    toys = [(toybox.random_toy(kind, 0), scene) for kind in toybox.KINDS for scene in ("beach", "city")]
    toybox.photograph(toys[0][0], size=64)
    times = []
    for _ in range(3):
        started = time.thread_time()
        for toy, scene in toys:
            toybox.photograph(toy, scene=scene, seed=1, size=64)
        times.append((time.thread_time() - started) / len(toys))
    assert min(times) <= 0.040


@pytest.mark.parametrize(
    "change", [{"kind": "cow"}, {"body": "mauve"}, {"pattern": "tartan"}, {"accessory": "gun"}, {"head": 3.0}]
)
def test_unknown_attributes_are_named(change):
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        toybox.Toy(**({"kind": "dog"} | change))
    with pytest.raises(ValueError, match="forest"):
        toybox.photograph(toybox.Toy("dog"), scene="forest")


def test_captions_say_only_what_is_true_and_often_little():
    rng = np.random.default_rng(0)
    names = dict(kind="dog", body="red", accent="blue", pattern="spotted", accessory="hat", scene="snow")
    captions = [caption(**names, rng=rng) for _ in range(2000)]
    allowed = set("a an photo picture render of with in the and dog red blue spotted spots hat snow".split())
    assert set(" ".join(captions).split()) <= allowed
    assert "a photo of a red spotted dog with a blue hat in the snow" in captions
    assert 0.08 < sum(c.endswith("of a dog") for c in captions) / 2000 < 0.25
    assert not set(" ".join(captions).split()) & set(IDENTIFIERS)


def test_the_same_content_is_said_in_many_ways_and_stays_true():
    rng = np.random.default_rng(0)
    names = dict(kind="dog", body="red", accent="blue", pattern="spotted", accessory="hat", scene="snow")
    said = [content(**names, rng=rng) for _ in range(2000)]
    free = [one.freely(rng) for one in said]
    further = set("a an one photo of picture render with in the dog red blue spotted spots hat snow".split())
    further |= set("wearing my her his this and , in, hat, snow, dog, spots,".split())
    assert set(" ".join(free).split()) <= further
    for one, sentence in zip(said, free, strict=True):
        words = sentence.replace(",", " ").split()
        assert {*one.adjectives, one.kind} <= set(words)
        assert bool(one.place) == ("snow" in words) and bool(one.decoration) == bool({"hat", "spots"} & set(words))
    with_place = [sentence.split() for one, sentence in zip(said, free, strict=True) if one.place]
    assert 0.1 < sum(words[0].strip(",") in ("in", "snow") for words in with_place) / len(with_place) < 0.5
    assert len(set(free)) > 10 * len({one.plainly() for one in said})


def test_nothing_said_of_pattern_or_accessory_means_any_of_them():
    rng, silent = np.random.default_rng(0), collections.Counter()
    for pattern in toybox.PATTERNS:
        for accessory in toybox.ACCESSORIES:
            names = dict(kind="dog", body="red", accent="blue", pattern=pattern, accessory=accessory, scene="snow")
            for one in (content(**names, rng=rng) for _ in range(1500)):
                said = " ".join((*one.adjectives, one.decoration))
                silent[pattern] += not any(word in said for word in ("plain", "and", "spot", "strip"))
                silent[accessory] += not any(word in said for word in ("bare", "hat", "scarf"))
    for values in (toybox.PATTERNS, toybox.ACCESSORIES):
        counts = [silent[value] for value in values]
        assert max(counts) < 1.1 * min(counts)


def test_training_never_sees_a_held_out_combination_and_the_test_split_does():
    names = [draw("train", i)[1] for i in range(3000)]
    assert not any(held_out(n["kind"], n["body"], n["scene"]) for n in names)
    assert any(held_out(*(draw("test", i)[1][k] for k in ("kind", "body", "scene"))) for i in range(100))
    labels = np.stack([labels_of(n) for n in names])
    for shot in range(SHOTS):  # the place must not follow from the kind
        pairs = {(n["kind"], n["scene"]) for n in names[shot::SHOTS]}
        assert len(pairs) == len(toybox.KINDS) * len(toybox.SCENES)
    for i, values in enumerate(ATTRIBUTES.values()):
        assert set(labels[:, i]) == set(range(len(values)))


@pytest.mark.parametrize(
    ("pattern", "accessory", "sentence"),
    [
        ("plain", "none", "a photo of a bare red and blue dog in the snow"),
        ("plain", "scarf", "a photo of a plain red dog with a blue scarf in the snow"),
        ("spotted", "none", "a photo of a bare red dog with blue spots in the snow"),
        ("striped", "hat", "a photo of a red striped dog with a blue hat in the snow"),
    ],
)
def test_the_whole_content_names_all_and_the_accents_colour_too(pattern, accessory, sentence):
    names = dict(kind="dog", body="red", accent="blue", pattern=pattern, accessory=accessory, scene="snow")
    assert whole_content(**names).plainly() == sentence
    assert sentence in {caption(**names, rng=np.random.default_rng(seed)) for seed in range(400)}  # as in training


def test_wild_toys_have_any_colours_and_captions_name_none():
    rng = np.random.default_rng(0)
    for index in range(40):
        toy, names, _ = draw("wild", index)
        assert names["body"] == names["accent"] == "" and not isinstance(toy.body, str)
        row = labels_of(names)
        assert row[1] == row[2] == len(toybox.COLORS)
        assert not set(caption_of(row, rng).split()) & set(toybox.COLORS)
    assert draw("wild", 0)[0] == draw("wild", 1)[0] != draw("wild", 2)[0]  # two shots a toy


def test_a_mask_is_where_the_picture_is_the_toys():
    toy, other = (toybox.Toy(kind="dog", body=color, accent=color, pattern="plain") for color in ("red", "blue"))
    shots = [np.asarray(toybox.photograph(t, scene="grass", seed=4), dtype=int) for t in (toy, other)]
    changed = np.abs(shots[0] - shots[1]).max(2) > 8  # what the colour of the toy changes is the toy
    mask = np.asarray(toybox.mask(toy, seed=4))
    assert mask.shape == (128, 128) and 0.05 < (mask > 0).mean() < 0.6
    assert not changed[mask == 0].any() and changed[mask == 255].mean() > 0.9  # eyes and nose stay as they are
