"""A toy of one's own: photographs of it by the command line, and a view that designs one."""

from __future__ import annotations

import shlex
import sys

import numpy as np
import pytest
from PIL import Image

from dbnb import toybox, widgets
from dbnb.concept import Concept
from dbnb.config import parse_args
from dbnb.toybox import sample
from dbnb.toybox.__main__ import main
from dbnb.toybox.sample import PICTURES, write_toy


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch):
    """A picture of a quarter of the side takes a sixteenth of the time; test_toybox renders the sample at its own."""
    monkeypatch.setattr(sample, "SIZE", 64)


def test_the_command_photographs_the_toy_that_was_asked_for(tmp_path, capsys):
    folder = tmp_path / "my toy"
    asked = ["--kind", "cat", "--body", "#1fa2a0", "--pattern", "striped", "--accessory", "hat"]
    assert main([*asked, "--output_dir", str(folder)]) == 0
    toy = toybox.Toy("cat", body=(0x1F / 255, 0xA2 / 255, 0xA0 / 255), pattern="striped", accessory="hat")
    for name, shots in PICTURES.items():
        assert sorted(path.name for path in (folder / name).iterdir()) == [
            f"{n:02d}.png" for n in range(1, len(shots) + 1)
        ]
        scene, seed = shots[-1]
        written = np.asarray(Image.open(folder / name / f"{len(shots):02d}.png"))
        assert (written == toybox.pixels(toy, scene=scene, seed=seed, size=sample.SIZE, supersample=3)).all()
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    config = parse_args(command[3:])
    assert config.class_word == "cat" and config.instance_data_dir == str(folder / "photos")
    assert len(Concept.from_folder(config.instance_data_dir, "sks", "cat").paths) == 5


@pytest.mark.parametrize(
    "option, value, known",
    [
        ("--kind", "cow", toybox.KINDS),
        ("--pattern", "tartan", toybox.PATTERNS),
        ("--accessory", "gun", toybox.ACCESSORIES),
        ("--body", "mauve", (*toybox.COLORS, "#rrggbb")),
        ("--accent", "#12345", (*toybox.COLORS, "#rrggbb")),
        ("--head", "3", ("0.6", "1.4")),
        ("--girth", "nan", ("0.6", "1.4")),
    ],
)
def test_what_is_unknown_is_told_with_what_is_known_before_anything_is_written(tmp_path, capsys, option, value, known):
    assert main([option, value, "--output_dir", str(tmp_path / "toy")]) == 2
    said = capsys.readouterr().err
    assert value in said and all(word in said for word in known) and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_pictures_is_left_alone(tmp_path, capsys):
    toy = toybox.Toy("duck")
    photographs = write_toy(toy, tmp_path)
    before = photographs.joinpath("01.png").read_bytes()
    assert write_toy(toybox.Toy("robot"), tmp_path) == photographs  # a toy of its own may be designed again
    assert photographs.joinpath("01.png").read_bytes() != before
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    (tmp_path / "references" / "holiday.jpg").write_bytes(b"")
    assert main(["--output_dir", str(tmp_path)]) == 2
    assert "holiday.jpg" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == before
    (tmp_path / "a file").touch()
    assert main(["--output_dir", str(tmp_path / "a file")]) == 2


def _fields(designer: widgets.ToyDesigner) -> dict:
    return {field.description: field for field in designer.view.children[0].children if hasattr(field, "description")}


def test_the_picture_follows_what_is_chosen(tmp_path):
    designer = widgets.ToyDesigner(kind="dog", body="red")
    fields, image = _fields(designer), designer.view.children[1]
    seen = [image.value]
    for name, value in dict(
        kind="car", body="#102030", accent="#ffffff", pattern="spotted", accessory="hat", head=1.1, girth=0.9
    ).items():
        fields[name].value = value
        seen.append(image.value)
        assert getattr(designer.toy, name) == value
    assert len(set(seen)) == len(seen)
    photographs = designer.photographs(tmp_path / "mine")
    written = np.asarray(Image.open(photographs / "01.png"))
    scene, seed = PICTURES["photos"][0]
    assert (written == toybox.pixels(designer.toy, scene=scene, seed=seed, size=sample.SIZE, supersample=3)).all()


def test_a_colour_that_is_none_is_told_and_changes_nothing():
    designer = widgets.ToyDesigner()
    fields, image = _fields(designer), designer.view.children[1]
    toy, picture = designer.toy, image.value
    fields["body"].value = "tomato"  # a colour of web pages, which the picker takes
    [answer] = [child.value for child in designer.view.children[0].children if "unknown" in str(child.value)]
    assert "tomato" in answer and designer.toy == toy and image.value == picture
    fields["body"].value = "#00ff00"
    assert designer.toy.body == "#00ff00" and image.value != picture
    with pytest.raises(ValueError, match="cow"):
        widgets.ToyDesigner(kind="cow")


def test_where_no_widget_is_displayed_the_designer_is_a_picture(monkeypatch, tmp_path):
    with_widget = widgets.ToyDesigner()._repr_mimebundle_()
    assert "<img alt=" in with_widget["text/html"]
    assert with_widget["application/vnd.jupyter.widget-view+json"]["model_id"]
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    designer = widgets.ToyDesigner(kind="teapot")
    bundle = designer._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"} and "teapot" in bundle["text/plain"]
    assert len(list(designer.photographs(tmp_path).iterdir())) == 5
