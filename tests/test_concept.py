"""Step 1: pictures are checked, prompts are made, tokens are told apart."""

from __future__ import annotations

import os
import shutil
import struct

import numpy as np
import pytest
from families import write
from PIL import Image, ImageCms, ImageOps, features

from dbnb import miniature
from dbnb import pictures as pictures_module
from dbnb.concept import Concept
from dbnb.models import read_tokenizer
from dbnb.pictures import inspect_images, load_image
from dbnb.tokens import holds_identifier, token_report


@pytest.fixture
def folder(tmp_path, concept):
    """Three usable pictures."""
    for path in concept.paths[:3]:
        shutil.copy(path, tmp_path / path.name)
    return tmp_path


def _note(folder, name):
    return next(note for note in inspect_images(folder, 64)[1] if note.name == name)


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
        ".DS_Store",
        "Thumbs.db",
        "caption.txt",
        ".ipynb_checkpoints",
    }


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
    monkeypatch.setattr(pictures_module, "MAX_PIXELS", 1000)
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
    paths, notes = inspect_images(folder, 64)
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


def _exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF with these (tag, type, count, value) entries, sound or not."""
    body, data, start = struct.pack("<H", len(entries)), b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in entries:
        place = struct.pack("<L", start + len(data)) if len(value) > 4 else value.ljust(4, b"\0")
        data += value if len(value) > 4 else b""
        body += struct.pack("<HHL", tag, kind, count) + place
    return b"Exif\0\0II*\0" + struct.pack("<L", 8) + body + struct.pack("<L", 0) + data


def _turned(value: int) -> tuple[int, int, int, bytes]:
    return (0x0112, 3, 1, struct.pack("<H", value))


@pytest.mark.parametrize(
    "entries, size",
    [
        ([_turned(6), (0x011A, 2, 8, b"seventy\0")], (30, 40)),
        ([_turned(6), (0x0100, 2, 4, b"abc\0")], (30, 40)),
        ([_turned(8), (0x8769, 2, 4, b"abc\0")], (30, 40)),
        ([_turned(3), (0x8825, 2, 4, b"abc\0")], (40, 30)),
        ([(0x0112, 2, 4, b"six\0")], (40, 30)),
        ([_turned(77)], (40, 30)),
    ],
    ids=["resolution", "width", "pointer", "GPS", "orientation", "unknown"],
)
def test_metadata_with_text_where_a_number_belongs_harm_no_picture(tmp_path, entries, size):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.jpg", exif=_exif(*entries))
    assert load_image(tmp_path / "a.jpg").size == size
    assert inspect_images(tmp_path)[1][0].used


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_is_turned_back_as_the_library_turns_it(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.linear_gradient("L").crop((0, 0, 40, 60)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        right = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), np.asarray(right))


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JPG", "webp", "avif", "tif"])
def test_every_suffix_of_a_picture_counts(tmp_path, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    Image.new("RGB", (64, 64), "red").save(tmp_path / f"a.{suffix}")
    assert len(inspect_images(tmp_path)[0]) == 1


def test_what_this_pillow_cannot_read_is_said_by_its_name(folder, monkeypatch):
    (folder / "a.avif").write_bytes(b"ftypavif")
    known = {suffix: kind for suffix, kind in Image.registered_extensions().items() if suffix != ".avif"}
    monkeypatch.setattr(Image, "registered_extensions", lambda: known)
    assert _note(folder, "a.avif").note == "AVIF: convert it to JPEG"


# Display P3's primaries, adapted to D50.
_P3 = {b"rXYZ": (0.5151, 0.2412, -0.0011), b"gXYZ": (0.2920, 0.6922, 0.0419), b"bXYZ": (0.1571, 0.0666, 0.7841)}


def _wide_gamut() -> bytes:
    """An ICC profile of more colours than sRGB: sRGB's own with other primaries and another name."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for number in range(struct.unpack(">L", profile[128:132])[0]):
        name, offset, size = struct.unpack(">4sLL", profile[132 + 12 * number : 144 + 12 * number])
        if name in _P3:
            profile[offset + 8 : offset + 20] = struct.pack(">3l", *(round(65536 * value) for value in _P3[name]))
        if name == b"desc":
            text = bytes(profile[offset : offset + size])
            profile[offset : offset + size] = text.replace("sRGB".encode("utf-16-be"), "P3 x".encode("utf-16-be"))
    return bytes(profile)


def test_colours_of_another_profile_become_srgb(folder):
    colour, profile = (200, 60, 60), _wide_gamut()
    Image.new("RGB", (64, 64), colour).save(folder / "p3.png", icc_profile=profile)
    Image.new("RGB", (65, 64), colour).save(folder / "damaged.png", icc_profile=b"no profile at all")
    Image.new("RGBA", (67, 64), (*colour, 0)).save(folder / "clear.png", icc_profile=profile)
    Image.new("P", (68, 64)).save(folder / "palette.png", icc_profile=profile)
    Image.new("L", (69, 64), 100).save(folder / "gray.png", icc_profile=profile)
    converted = load_image(folder / "p3.png").getpixel((3, 3))
    assert converted[0] > 210 and converted[1] < 50
    assert load_image(folder / "damaged.png").getpixel((3, 3)) == colour
    assert load_image(folder / "clear.png").getpixel((3, 3)) == pytest.approx((255, 255, 255), abs=1)
    assert load_image(folder / "gray.png").getpixel((3, 3)) == pytest.approx((100, 100, 100), abs=2)
    assert "to sRGB" in _note(folder, "p3.png").note and "to sRGB" not in _note(folder, "damaged.png").note
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (70, 64), colour).save(folder / "srgb.png", icc_profile=srgb)
    assert (
        load_image(folder / "srgb.png").getpixel((3, 3)) == colour and "to sRGB" not in _note(folder, "srgb.png").note
    )


@pytest.mark.parametrize("kind", ["file", "dangling", "loop", "missing", "link to a file"])
def test_what_is_no_folder_is_said_to_be_that(tmp_path, concept, kind):
    place, words = tmp_path / "photos", "does not exist"
    if kind == "file":
        place, words = concept.paths[0], "is a file: give the folder that it lies in"
    elif kind == "dangling":
        place.symlink_to(tmp_path / "gone")
        words = "is a link to nothing"
    elif kind == "loop":
        place.symlink_to(place)
        words = "cannot be read"
    elif kind == "link to a file":
        place.symlink_to(concept.paths[0])
        words = "is a file"
    with pytest.raises(OSError, match=f"^--instance_data_dir .*{words}"):
        Concept.from_folder(place, "sks", "dog")


def test_entries_that_are_no_files_are_left_out_by_name(folder):
    (folder / "gone.png").symlink_to(folder / "nowhere")
    (folder / "inner.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "linked.jpg").symlink_to(folder / "01.png")
    Image.new("RGB", (64, 64), "red").save(os.fsdecode(os.fsencode(folder) + b"/caf\xe9\n.png"), format="PNG")
    paths, notes = inspect_images(folder)
    remarks = {note.name: note.note for note in notes if not note.used}
    assert remarks == {
        "gone.png": "a link to nothing",
        "inner.png": "a folder, not looked into",
        "pipe.png": "not a picture",
        "linked.jpg": "the same file as 01.png",
    }
    assert len(paths) == 4
    report = Concept.from_folder(folder, "sks", "dog").report()
    assert r"caf\udce9\n.png" in report and report.encode("utf-8")


@pytest.mark.parametrize(
    "below, words",
    [
        (["10_sks dog"], r"kohya.*give '.*/10_sks dog'"),
        (["10_sks dog", "1_dog"], r"kohya.*give '.*/10_sks dog' or '.*/1_dog'"),
        (["train"], "imagefolder with train/: give '.*/train'"),
        (["train/sks", "test/sks"], "imagefolder with train/: give '.*/train/sks'"),
        (["mine"], "which holds folders: give '.*/mine'"),
        ([".hidden"], "No usable picture"),
    ],
    ids=str,
)
def test_the_folder_above_the_pictures_says_which_to_give(tmp_path, concept, below, words):
    for name in below:
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(concept.paths[0], tmp_path / name)
    with pytest.raises(ValueError, match=words):
        inspect_images(tmp_path)


def test_a_large_photograph_is_decoded_small_and_looks_the_same(tmp_path):
    bands = [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.new("L", (256, 256), 90)]
    large = Image.merge("RGB", bands).resize((1600, 1200), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    large.save(tmp_path / "a.jpg", quality=95, exif=exif)
    large.save(tmp_path / "a.png", exif=exif)
    large.save(tmp_path / "c.jpg", quality=95)
    for name in ("a.jpg", "a.png", "c.jpg"):
        whole, small = load_image(tmp_path / name), load_image(tmp_path / name, 100)
        assert small.size == ((133, 100) if name == "c.jpg" else (100, 133)) and max(whole.size) == 1600
        right = whole.resize(small.size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(small, dtype=int) - np.asarray(right, dtype=int)).mean() < 1.5
    assert load_image(tmp_path / "a.png", 2000).size == (1200, 1600)
    notes = {note.name: note for note in inspect_images(tmp_path)[1]}
    assert notes["a.jpg"].size == "1200 x 1600" and notes["c.jpg"].size == "1600 x 1200"
    assert {min(image.size) for image in Concept.from_folder(tmp_path, "sks", "dog").images()} == {512}


def test_each_picture_is_decoded_once_when_a_folder_is_looked_at(folder, monkeypatch):
    decoded, decode = [], pictures_module._decoded
    monkeypatch.setattr(pictures_module, "_decoded", lambda image, side: decoded.append(image) or decode(image, side))
    inspect_images(folder)
    assert len(decoded) == 3


_IDENTIFIERS = ["<edfe>", "<s0><s1>", "[V]", "*", "a|b", "`x`", "sks-1", "$5", "小明", "สมชาย", "Ünï", "🐶"]
_IDENTIFIERS += ["x\u200by", "a\u00a0b"]
_PROMPTS = ["a photo of {} dog", "{}", "photo,{}.", "a photo of\u3000{}\u00a0dog \u200b", "({}), hat"]


@pytest.mark.parametrize("identifier", _IDENTIFIERS)
def test_any_words_are_taken_as_an_identifier(identifier):
    tokenizer = read_tokenizer(miniature.path())
    for prompt in _PROMPTS:
        concept = Concept.from_folder(None, identifier, "dog", instance_prompt=prompt.format(identifier))
        concept.check_tokens(tokenizer)


@pytest.mark.parametrize(
    "prompt, identifier, there",
    [
        ("a photo of SKS dog", "sks", True),
        ("a photo of sks dog", "Sks", True),
        ("A PHOTO OF SKS, HAPPY", "sks", True),
        ("一张小明狗的照片", "小明", True),
        ("小明の犬", "小明", True),
        ("강아지는 소파에", "강아지", True),
        ("a photo of\u3000sks\u00a0dog", "sks", True),
        ("a photo of sksdog", "sks", False),
        ("a photo of asks dog", "sks", False),
        ("a photo of a dog", "sks", False),
        ("a photo of toy  dog", "toy dog", True),
        ("一张狗的照片", "小明", False),
    ],
)
def test_whether_a_prompt_holds_the_identifier_is_asked_of_words_and_tokens(prompt, identifier, there):
    assert holds_identifier(prompt, identifier) == there
    assert holds_identifier(prompt, identifier, read_tokenizer(miniature.path())) == there


def test_a_tokenizer_that_tells_upper_case_is_believed(tmp_path):
    tokenizer = read_tokenizer(write("alt", tmp_path))
    assert holds_identifier("a photo of sks dog", "sks", tokenizer)
    concept = Concept.from_folder(None, "sks", "dog", instance_prompt="a photo of SKS dog")
    with pytest.raises(ValueError, match="as the base's tokenizer reads it"):
        concept.check_tokens(tokenizer)
    concept.check_tokens(tokenizer, lowercase=True)
    Concept.from_folder(None, "小明", "dog").check_tokens(tokenizer)  # its letters are unknown there, which is told
    assert "unknown" in token_report(tokenizer, "小明").verdict


@pytest.mark.parametrize("words", [("dog", "dog"), ("Dog", "dog"), ("toy  dog", "toy dog")])
def test_an_identifier_that_is_the_class_word_is_told(words):
    assert "identifier and class word are the same" in Concept.from_folder(None, *words).report()
    assert "are the same" not in Concept.from_folder(None, "sks", "dog").report()
    same = Concept.from_folder(None, "sks", "dog", instance_prompt="a sks dog", class_prompt="a sks dog")
    assert "both prompts are the same" in same.report()


@pytest.mark.parametrize(
    "text", ["a\nb", "a\tb", "a\x1b[31m", "a\u2028b", "a\udce9", "\x00", " ", "\u200b", "\u3000"], ids=ascii
)
def test_only_what_breaks_a_line_or_shows_nothing_is_refused_as_a_word(text):
    for name in ("identifier", "class_word"):
        words = {"identifier": "sks", "class_word": "dog"} | {name: text}
        with pytest.raises(ValueError, match=f"^{name}=.*(plain words|must each be a word)"):
            Concept.from_folder(None, **words)
