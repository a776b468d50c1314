"""Step 1: pictures are checked, prompts are made, tokens are told apart."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from dbnb import concept as concept_module
from dbnb.concept import Concept, inspect_images, load_image, token_report


@pytest.fixture
def folder(tmp_path, concept):
    """Three usable pictures."""
    for path in concept.paths[:3]:
        shutil.copy(path, tmp_path / path.name)
    return tmp_path


def _note(folder, name):
    return next(note for note in inspect_images(folder)[1] if note.name == name)


def test_prompts_and_report(concept):
    assert concept.instance_prompt == "a photo of sks dog"
    assert concept.class_prompt == "a photo of a dog"
    assert concept.prompts_in(["on the beach"]) == ["a photo of sks dog on the beach"]
    assert len(concept.paths) == 5 and "5 pictures" in concept.report()


def test_litter_is_ignored_and_listed(folder):
    for name in (".DS_Store", "Thumbs.db", "caption.txt"):
        (folder / name).write_text("x")
    (folder / ".ipynb_checkpoints").mkdir()
    paths, notes = inspect_images(folder)
    assert len(paths) == 3
    assert {note.name for note in notes if not note.used} == {
        ".DS_Store", "Thumbs.db", "caption.txt", ".ipynb_checkpoints"
    }  # fmt: skip


def test_broken_pictures_are_skipped_by_name(folder):
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("hello")
    whole = folder / "cut.jpg"
    load_image(folder / "01.png").save(whole, quality=95)
    whole.write_bytes(whole.read_bytes()[:3000])
    assert len(inspect_images(folder)[0]) == 3
    for name in ("empty.png", "text.png", "cut.jpg"):
        assert name in _note(folder, name).note


def test_empty_and_missing_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        inspect_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        inspect_images(tmp_path / "nowhere")


def test_turned_photographs_come_upright_and_without_metadata(folder):
    image = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[:, None, None] * 4, (1, 32, 3)))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif)
    loaded = load_image(folder / "turned.jpg")
    assert loaded.size == (64, 32) and not loaded.getexif() and not loaded.info
    assert "upright" in _note(folder, "turned.jpg").note


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "CMYK", "I;16", "1"])
def test_every_mode_becomes_sane_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
    if mode == "I;16":
        Image.fromarray(np.full((20, 20), 32768, np.uint16)).save(path)
    else:
        Image.new("RGB", (20, 20), (128, 128, 128)).convert(mode, palette=Image.Palette.ADAPTIVE).save(path)
    pixel = load_image(path).getpixel((3, 3))
    assert len(pixel) == 3 and (mode == "1" or all(110 <= value <= 145 for value in pixel))


def test_transparency_is_white_not_the_hidden_colour(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png").getpixel((0, 0)) == (255, 255, 255)


def test_too_many_pixels_are_refused_before_decoding(folder, monkeypatch):
    monkeypatch.setattr(concept_module, "MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="256 x 256"):
        load_image(folder / "01.png")


def test_copies_are_used_once_and_lookalikes_named(folder):
    shutil.copy(folder / "01.png", folder / "01 (1).png")
    load_image(folder / "02.png").resize((200, 200)).save(folder / "two.png")
    paths, _ = inspect_images(folder)
    assert len(paths) == 4
    assert "02.png" in _note(folder, "two.png").note


def test_a_prompt_without_the_identifier_is_refused():
    with pytest.raises(ValueError, match="does not contain"):
        Concept.from_folder(None, "sks", "dog", instance_prompt="a photo of a dog")
    with pytest.raises(ValueError, match="'my dog' does not contain"):
        Concept.from_folder(None, "sks", "dog", instance_prompt=["a photo of sks dog", "my dog"])
    several = Concept.from_folder(None, "sks", "dog", instance_prompt=["sks dog", "my sks dog"])
    assert several.instance_prompt == "sks dog" and several.instance_prompts == ("sks dog", "my sks dog")


def test_token_report_tells_rare_from_common_and_split(components):
    rare, common, split = (token_report(components.tokenizer, word) for word in ("sks", "red", "qqqq"))
    assert rare.rare and len(rare.ids) == 1 and rare.alternatives and "sks" not in rare.alternatives
    assert not common.rare and len(common.ids) == 1 and "common" in common.verdict
    assert not split.rare and len(split.ids) > 1


def test_odd_pictures_are_used_or_left_out_with_a_remark(folder):
    Image.new("RGB", (900, 20), "red").save(folder / "long.png")
    Image.new("RGB", (900, 5), "red").save(folder / "thread.png")
    Image.new("RGB", (1, 1), "red").save(folder / "dot.png")
    frames = [Image.new("RGB", (80, 80), color) for color in ("green", "blue")]
    frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:])
    (folder / "phone.HEIC").write_bytes(b"ftypheic")
    Image.new("RGBA", (80, 80), (255, 0, 0, 0)).save(folder / "cut-out.png")
    Image.new("RGBA", (80, 80), (255, 0, 0, 255)).save(folder / "screenshot.png")
    paths, notes = inspect_images(folder)
    remarks = {note.name: (note.used, note.note) for note in notes}
    assert remarks["long.png"][0] and "very long" in remarks["long.png"][1] and "enlarged" in remarks["long.png"][1]
    for name in ("thread.png", "dot.png"):
        assert remarks[name] == (False, "smaller than 16 pixels")
    assert remarks["moves.gif"][0] and "first frame only" in remarks["moves.gif"][1]
    assert load_image(folder / "moves.gif").getpixel((0, 0)) == pytest.approx((0, 128, 0), abs=3)
    assert remarks["cut-out.png"] == (True, "transparent: put on white")
    assert "transparent" not in remarks["screenshot.png"][1]
    assert not remarks["phone.HEIC"][0] and "convert it to JPEG" in remarks["phone.HEIC"][1]


def test_words_must_be_there_and_few_pictures_are_remarked(folder):
    with pytest.raises(ValueError, match="must each be a word"):
        Concept.from_folder(folder, " ", "dog")
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()
    assert "1 pictures: three to ten" in Concept.from_folder(folder, "sks", "dog").report()
