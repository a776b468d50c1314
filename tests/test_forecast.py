"""What a run says before it starts, and once its pictures and steps are timed."""

from __future__ import annotations

import pytest
from PIL import Image

from dbnb.config import DreamBoothConfig, Sampling
from dbnb.drawing import draw_images, timed
from dbnb.forecast import Forecast, duration, images_during


def test_validation_fits_the_base():
    assert DreamBoothConfig().num_validation_images == 16
    assert {DreamBoothConfig(base=base).num_validation_images for base in ("sd15", "sd21", "sdxl", "if")} == {4}
    assert images_during(DreamBoothConfig()) == 8 and images_during(DreamBoothConfig(base="sdxl")) == 4


def test_the_numbers_are_those_of_the_settings():
    config = DreamBoothConfig(max_train_steps=400, validation_steps=200, num_validation_images=4)
    forecast = Forecast.of_run(config, references=6)
    assert forecast.pictures == {"class": 100, "before": 18, "during": 16, "after": 22, "check": 4}
    assert str(forecast).startswith("This run trains 400 steps of 4 instance and as many class images, and draws 100 ")
    measured = Forecast.of_run(DreamBoothConfig(max_train_steps=300, num_validation_images=4, select="best"))
    assert measured.pictures["during"] == 3 * 4 * 3  # at steps 100, 200 and 300
    bare = Forecast.of_run(DreamBoothConfig(num_validation_images=0, with_prior_preservation=False), subjects=2)
    assert bare.pictures == {"check": 4} and "instance images" in str(bare)


def test_the_time_left_follows_from_the_second_batch_and_a_step():
    said = []
    forecast = Forecast({"class": 10, "before": 20, "after": 30}, 100, "4 instance images", said.append)
    forecast.batch_drawn(4, 99.0)  # sets the device up
    assert said == []
    forecast.batch_drawn(4, 8.0)
    assert said == ["A picture takes 2 s: 52 more take at most 2 min, training apart."]
    forecast.done("class")
    forecast.done("before")
    forecast.step_timed(1.5, 40)
    assert said[1] == "A step takes 1.5 s: 40 more take 60 s, with all pictures 2 min."
    forecast.batch_drawn(4, 8.0)
    assert len(said) == 2 and forecast.left() == 26


@pytest.mark.parametrize("seconds, words", [(1, "1 s"), (89, "89 s"), (600, "10 min"), (3600 * 5, "5.0 h")])
def test_times_are_said_as_one_would(seconds, words):
    assert duration(seconds) == words


class _Pipeline:
    unet = type("UNet2DConditionModel", (), {})()

    def __call__(self, prompts, **options):
        return type("Output", (), {"images": [Image.new("RGB", (8, 8)) for _ in prompts]})()


def test_batches_are_told_of_within_the_block_alone():
    told, sampling = [], Sampling(batch_size=2, resolution=8)
    with timed(lambda pictures, seconds: told.append((pictures, seconds >= 0))):
        draw_images(_Pipeline(), ["a"] * 3, [1, 2, 3], sampling)
    draw_images(_Pipeline(), ["a"], [1], sampling)
    assert told == [(2, True), (1, True)]
