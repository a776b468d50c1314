"""Look-alikes differ from a toy by one thing, and how alike they are follows from it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dbnb import toybox
from dbnb.miniature.alike import DIFFERENCES, differences_of, likeness, look_alike, turned
from dbnb.miniature.data import ALIKE, SHOTS, group, look_alikes
from dbnb.toybox import Toy

_FIELDS = {
    "hue": {"body"},
    "pattern": {"pattern"},
    "patches": {"pattern"},
    "accent": {"accent"},
    "accessory": {"accessory"},
    "proportions": {"head", "girth"},
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_look_alike_differs_in_one_thing(difference):
    rng = np.random.default_rng(0)
    for seed in range(30):
        toy = toybox.random_toy(toybox.KINDS[seed % 6], seed)
        if difference not in differences_of(toy):
            continue
        other = look_alike(toy, difference, rng)
        changed = {f.name for f in dataclasses.fields(Toy) if getattr(toy, f.name) != getattr(other, f.name)}
        assert changed == _FIELDS[difference]
        assert likeness(toy, toy) == 1.0 > likeness(toy, other) == pytest.approx(likeness(other, toy))


def test_likeness_falls_with_the_hue_and_with_each_further_difference():
    toy = Toy("dog", body=(0.1, 0.66, 0.62), accent="yellow", pattern="spotted")
    found = [likeness(toy, dataclasses.replace(toy, body=turned(toy.body, degrees))) for degrees in (0, 15, 30, 45, 90)]
    assert found == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0], abs=1e-6)
    plain = dataclasses.replace(toy, pattern="plain")
    assert likeness(toy, plain) > likeness(toy, dataclasses.replace(plain, accessory="hat")) > 0


def test_a_grey_body_has_no_hue_and_a_plain_one_no_patches():
    assert "hue" not in differences_of(Toy("cat", body="white")) and "hue" in differences_of(Toy("cat", body="red"))
    assert "patches" not in differences_of(Toy("cat")) and "patches" in differences_of(Toy("cat", pattern="striped"))


def test_groups_are_the_same_each_time_and_their_pictures_are_kept(tmp_path):
    images, alike = look_alikes("wild", 3, tmp_path, start=7)
    assert images.shape == (3, ALIKE, SHOTS, 128, 128, 3) and alike.shape == (3, ALIKE, ALIKE)
    assert np.allclose(alike, alike.transpose(0, 2, 1)) and np.allclose(alike[:, range(ALIKE), range(ALIKE)], 1.0)
    again, _ = look_alikes("wild", 3, tmp_path, start=7)
    assert np.array_equal(images, again) and len(list(tmp_path.iterdir())) == 1
    assert group("wild", 8)[0] == group("wild", 8)[0] != group("wild", 9)[0]
