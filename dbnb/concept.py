"""Step 1: a subject, told by a few photographs, a rare word and a class word. Built in notebook 01."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from dbnb.files import whole
from dbnb.tables import UNPRINTABLE, printable
from dbnb.toybox.captions import article_for

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
_OF_TELEPHONES = {".heic": "HEIC", ".heif": "HEIC", ".avif": "AVIF"}  # not every Pillow reads them
MAX_PIXELS = 80_000_000  # refused before decoding: a header can promise more than the memory holds
# A perceptual difference hash of 64 bits: two pictures of at most this many different bits look the same.
_NEAR_DUPLICATE_BITS = 3
_LOOK = 128  # pixels along the shorter side: enough to tell pictures apart
SHOWN = 512  # pixels along the shorter side: more than figures and encoders look at
SAMPLE_DIR = Path(__file__).parent / "sample"


# EXIF's orientations (tag 0x0112) but for the upright one, and what turns them back.
_TURN_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class _Picture:
    """A decoded picture, and what its file says of it."""

    image: Image.Image
    size: tuple[int, int]  # of the whole picture, upright
    mode: str
    turned: bool
    animated: bool
    transparent: bool
    profile: str  # of colours that were converted; "" for sRGB


def _reduced(size: tuple[int, int], side: int | None) -> tuple[int, int]:
    """The size of a picture whose shorter side is at most `side` pixels."""
    if side is None or min(size) <= side:
        return size
    scale = side / min(size)
    return max(side, round(size[0] * scale)), max(side, round(size[1] * scale))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata, of which Pillow raises a dozen kinds, harm no picture
        return 1


def _to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """A picture's colours in sRGB, and the name of the profile they had before; "" where it has none that differs."""
    if not profile:
        return image, ""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(source).strip()
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip())
        if mode is None or "srgb" in name.lower() or (mode == "CMYK") != (image.mode == "CMYK"):
            return image, ""
        target = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image.convert(mode), source, target, outputMode="RGB"), name
    except (ImageCms.PyCMSError, OSError, ValueError):  # a damaged profile: most pictures are sRGB
        return image, ""


def _decoded(image: Image.Image, side: int | None) -> _Picture:
    """Decode an opened picture; see `load_image`."""
    size, mode, orientation, profile = image.size, image.mode, _orientation(image), image.info.get("icc_profile")
    if side is not None and min(size) > 2 * side:  # JPEG then decodes to a half, a quarter or an eighth
        image.draft(None, tuple(math.ceil(2 * side * length / min(size)) for length in size))
    image.load()
    animated = getattr(image, "n_frames", 1) > 1  # which looks at all frames
    image.seek(0)
    image.load()
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if values.max() > 255 else 255.0
        image = Image.fromarray(np.clip(values / top * 255.0, 0, 255).astype(np.uint8))
    transparent = False
    if image.has_transparency_data:
        image = image.convert("RGBA")
        transparent = image.getextrema()[3][0] < 255
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    turned = orientation in _TURN_BACK
    if turned:
        image, size = image.transpose(_TURN_BACK[orientation]), size if orientation < 5 else size[::-1]
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    smaller = _reduced(size, side)
    if smaller != image.size:
        image = image.resize(smaller, Image.Resampling.LANCZOS)
    image, converted = _to_srgb(image, profile)
    image = image.convert("RGB")
    image.info = {}
    return _Picture(image, size, mode, turned, animated, transparent, converted)


def _read(path: Path, side: int | None = None) -> _Picture:
    """Read and decode a picture once; see `load_image`."""
    name, too_many = printable(path.name), f"more than {MAX_PIXELS // 10**6} million"
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # of a large picture, looked at below, and of odd metadata, left out anyway
            image = Image.open(file)
            if image.width * image.height <= MAX_PIXELS:
                return _decoded(image, side)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has {too_many} pixels: make it smaller.") from error
    except Exception as error:  # Pillow's readers raise a dozen kinds where a file is damaged
        raise ValueError(f"{name} cannot be read as a picture ({error}): save it again as PNG or JPEG.") from error
    raise ValueError(f"{name} has {image.width} x {image.height} pixels, {too_many}: make it smaller.")


def load_image(path: Path, side: int | None = None) -> Image.Image:
    """A picture as upright RGB in sRGB, transparency on white, the first frame of an animation, without metadata.

    One whose shorter side is longer than `side` pixels comes reduced to that, which saves time and memory. Raises
    ValueError in one sentence when it is no picture, is truncated or is larger than `MAX_PIXELS`.
    """
    return _read(Path(path), side).image


def _difference_hash(image: Image.Image) -> int:
    gray = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS), dtype=np.int16)
    return int("".join("1" if bit else "0" for bit in (gray[:, 1:] > gray[:, :-1]).flatten()), 2)


def save_uploads(uploads: Mapping[str, bytes], folder: str | Path) -> list[Path]:
    """Put uploaded photographs, name -> content as Colab's `files.upload()` returns them, into a folder.

    Of a name its last part counts, in letters, digits, `.`, `-` and `_`; one that is taken gets a number. So nothing
    lands outside the folder or in another's place.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    taken, paths = {path.name.lower() for path in folder.iterdir()}, []
    for name, content in uploads.items():
        name = unicodedata.normalize("NFC", name.replace("\\", "/").rsplit("/", 1)[-1])
        path = Path(re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "photograph")
        unique = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
        path = next(p for p in itertools.chain([path], unique) if p.name.lower() not in taken)
        taken.add(path.name.lower())
        with whole(folder / path) as temporary:
            temporary.write_bytes(content)
        paths.append(folder / path)
    return paths


@dataclass(frozen=True)
class ImageNote:
    """What was found about one file: `used` or not, and why."""

    name: str
    used: bool
    size: str
    mode: str
    note: str


def _why_not_read(path: Path) -> str:
    """Why an entry of a folder is not opened as a picture; "" where it is."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return "a folder, not looked into"
    if path.is_symlink() and not path.exists():
        return "a link to nothing"
    if suffix in _OF_TELEPHONES and suffix not in Image.registered_extensions():
        return f"{_OF_TELEPHONES[suffix]}: convert it to JPEG"
    return "" if path.is_file() and suffix in (*SUFFIXES, *_OF_TELEPHONES) else "not a picture"


def _folders_with_pictures(folder: Path) -> list[Path]:
    """Folders below this one that hold pictures."""
    found = []
    for place, folders, files in itertools.islice(os.walk(folder), 1000):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if Path(place) != folder and any(Path(name).suffix.lower() in SUFFIXES for name in files):
            found.append(Path(place))
    return found


def _no_pictures(where: str, folder: Path, notes: Sequence[ImageNote]) -> str:
    """What is wrong with a folder of which no picture can be used, and which one to give."""
    below = _folders_with_pictures(folder)
    if not below:
        found = "; ".join(f"{printable(note.name)}: {note.note}" for note in notes[:5]) or "it is empty"
        return f"No usable picture in {where} ({found}): put {', '.join(SUFFIXES)} files there."
    names = [path.relative_to(folder).parts[0] for path in below]
    if all(re.fullmatch(r"\d+_.+", name) for name in names):
        kind = "folders as kohya's trainer has them (repeats_words)"
    elif "train" in names:
        kind, below = (
            "an imagefolder with train/",
            [path for path in below if path.relative_to(folder).parts[0] == "train"],
        )
    else:
        kind = "folders"
    give = " or ".join(repr(printable(str(path))) for path in below[:3])
    return f"No picture lies in {where} itself, which holds {kind}: give {give}{' …' if len(below) > 3 else ''}."


def inspect_images(
    folder: Path | str, resolution: int = 64, *, option: str | None = None
) -> tuple[list[Path], list[ImageNote]]:
    """The usable pictures of a folder, sorted by name, and a note on every entry in it.

    Exact copies are used once. `option` is what the folder was given as. Raises OSError or ValueError, naming it, when
    nothing usable is there.
    """
    folder = Path(os.path.expanduser(folder))
    where = f"{f'--{option}' if option else 'image folder'} {printable(str(folder))}"
    try:
        entries = sorted(folder.iterdir())
    except FileNotFoundError as error:
        wrong = "is a link to nothing" if folder.is_symlink() else "does not exist"
        raise FileNotFoundError(f"{_capital(where)} {wrong}: give a folder of photographs.") from error
    except NotADirectoryError as error:
        raise NotADirectoryError(f"{_capital(where)} is a file: give the folder that it lies in.") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise OSError(f"{_capital(where)} cannot be read ({why}): give a folder of photographs.") from error
    paths: list[Path] = []
    notes: list[ImageNote] = []
    contents: dict[str, str] = {}
    looks: dict[str, int] = {}
    for path in entries:
        if why := _why_not_read(path):
            notes.append(ImageNote(path.name, False, "", "", why))
            continue
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest in contents:
                notes.append(ImageNote(path.name, False, "", "", f"the same file as {printable(contents[digest])}"))
                continue
            picture = _read(path, _LOOK)
        except ValueError as error:
            notes.append(ImageNote(path.name, False, "", "", str(error)))
            continue
        except OSError as error:
            notes.append(ImageNote(path.name, False, "", "", f"cannot be read ({error.strerror})"))
            continue
        width, height = picture.size
        size = f"{width} x {height}"
        if min(width, height) < 16:
            notes.append(ImageNote(path.name, False, size, picture.mode, "smaller than 16 pixels"))
            continue
        remarks = []
        if picture.turned:
            remarks.append("turned upright")
        if picture.animated:
            remarks.append("first frame only")
        if picture.transparent:
            remarks.append("transparent: put on white")
        if picture.profile:
            remarks.append(f"colours converted from {printable(picture.profile)} to sRGB")
        if min(width, height) < resolution:
            remarks.append(f"smaller than the resolution {resolution}: it will be enlarged")
        if max(width, height) > 3 * min(width, height):
            remarks.append("very long: the crop shows a small part")
        look = _difference_hash(picture.image)
        for name, other in looks.items():
            if (look ^ other).bit_count() <= _NEAR_DUPLICATE_BITS:
                remarks.append(f"looks almost like {printable(name)}")
                break
        looks[path.name] = look
        contents[digest] = path.name
        paths.append(path)
        notes.append(ImageNote(path.name, True, size, picture.mode, "; ".join(remarks)))
    if not paths:
        raise ValueError(_no_pictures(where, folder, notes))
    return paths, notes


def _capital(where: str) -> str:
    return where[0].upper() + where[1:]


@dataclass(frozen=True)
class TokenReport:
    """How a tokenizer sees an identifier: its pieces, their ids and a verdict."""

    identifier: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    rare: bool
    verdict: str
    alternatives: tuple[str, ...]


CANDIDATES = ("sks", "zwx", "ohwx", "hta", "pjf", "vqz", "xjy", "olis")


def token_report(tokenizer, identifier: str) -> TokenReport:
    """Is the identifier one rare token? Vocabularies learned by byte-pair merges list common words first.

    "Rare" is an id in the last tenth of the ordinary tokens (DreamBooth, section 3.2, takes ids 5000 to 10000 of T5's
    32000). Alternatives are known rare candidates that this tokenizer keeps whole.
    """
    special = set(tokenizer.all_special_ids)
    ordinary = max(i for i in tokenizer.get_vocab().values() if i not in special)

    def pieces(word: str) -> tuple[int, ...]:
        ids = [i for i in tokenizer(word).input_ids if i not in special]
        # A space alone, as some tokenizers put before a word that they do not know, says nothing.
        return tuple(ids) if any(token.strip("▁") for token in tokenizer.convert_ids_to_tokens(ids)) else ()

    def is_rare(ids: tuple[int, ...]) -> bool:
        return len(ids) == 1 and ids[0] > 0.9 * ordinary

    ids = pieces(identifier)
    if not ids:
        verdict = "unknown to this tokenizer: nothing of it is read"
    elif is_rare(ids):
        verdict = "one rare token: a good identifier"
    elif len(ids) == 1:
        verdict = "one token, but a common word: it already means something"
    else:
        verdict = f"split into {len(ids)} tokens: it can work, but a single rare token is learned faster"
    others = tuple(word for word in CANDIDATES if word != identifier and is_rare(pieces(word)))
    return TokenReport(identifier, tuple(tokenizer.convert_ids_to_tokens(ids)), ids, is_rare(ids), verdict, others[:4])


# Alphabets that part their words by spaces, and so need a border around a word.
_SPACED = ("LATIN", "GREEK", "CYRILLIC", "DIGIT")


def _spaced(letter: str) -> bool:
    return letter.isalnum() and unicodedata.name(letter, "").startswith(_SPACED)


def _alike(text: str) -> str:
    """A text without what most tokenizers do not tell apart: case, widths, kinds of spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _holds_words(text: str, words: str) -> bool:
    """Whether a text holds some words, not within a longer word."""
    text, words, start = _alike(text), _alike(words), -1
    while (start := text.find(words, start + 1)) >= 0:
        before, after = text[start - 1 : start], text[start + len(words) :][:1]
        if not (before and _spaced(before) and _spaced(words[0]) or after and _spaced(words[-1]) and _spaced(after)):
            return True
    return False


def holds_identifier(prompt: str, identifier: str, tokenizer: Any = None) -> bool:
    """Whether a prompt holds the identifier, as a base's tokenizer reads both; without one, by its words."""
    if not _holds_words(prompt, identifier) or tokenizer is None:
        return _holds_words(prompt, identifier)
    part, ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (identifier, prompt))
    if any(ids[start : start + len(part)] == part for start in range(len(ids))):
        return True
    # Beside other letters a word is cut into other tokens; their text still tells upper case where the base does.
    decoded = [" ".join(tokenizer.decode(tokens).split()) for tokens in (ids, part)]
    return decoded[1] in decoded[0]


def _check_words(**texts: Sequence[str]) -> None:
    """Raise the ValueError that names the first text which cannot stand on one line of a file, or shows nothing."""
    for name, text in ((name, text) for name, several in texts.items() for text in several):
        if any(unicodedata.category(letter) in UNPRINTABLE for letter in text):
            raise ValueError(
                f"{name}={text!a} holds a line break or another control character: write it in plain words on one line."
            )
        if not any(unicodedata.category(letter)[0] in "LNPS" for letter in text):
            raise ValueError(
                f"{name}={text!a} is blank: identifier and class_word must each be a word, such as 'sks' and 'dog'."
            )


@dataclass(frozen=True)
class Concept:
    """A subject: its pictures, its identifier and its class word; and the prompts made of them."""

    identifier: str
    class_word: str
    paths: tuple[Path, ...]
    notes: tuple[ImageNote, ...] = ()
    instance_prompt: str = ""
    class_prompt: str = ""
    further_prompts: tuple[str, ...] = ()  # other instance prompts that training draws from
    side: int = SHOWN  # pixels: `images` come no larger along the shorter side

    @classmethod
    def from_folder(
        cls, folder: Path | str | None, identifier: str, class_word: str, *, resolution: int = 64,
        instance_prompt: str | Sequence[str] | None = None, class_prompt: str | None = None,
    ) -> Concept:  # fmt: skip
        """Look at a folder's pictures and make the prompts; without a folder, the bundled sample subject.

        `instance_prompt` may be several, which training draws from; the first is the one that pictures are asked for
        with. Raises ValueError when one of them does not contain the identifier, or a word is empty or no plain text;
        whether the base's tokenizer agrees, `check_tokens` says.
        """
        prompts = [instance_prompt] if isinstance(instance_prompt, str) else list(instance_prompt or ())
        _check_words(identifier=[identifier], class_word=[class_word], instance_prompt=prompts)
        _check_words(class_prompt=[] if class_prompt is None else [class_prompt])
        prompts = prompts or [f"a photo of {identifier} {class_word}"]
        folder, option = (folder, "instance_data_dir") if folder else (SAMPLE_DIR / "photos", None)
        paths, notes = inspect_images(folder, resolution, option=option)
        concept = cls(
            identifier,
            class_word,
            tuple(paths),
            tuple(notes),
            prompts[0],
            class_prompt or f"a photo of {article_for(class_word)} {class_word}",
            tuple(prompts[1:]),
            side=max(SHOWN, resolution),
        )
        concept.check_tokens()
        return concept

    @property
    def instance_prompts(self) -> tuple[str, ...]:
        """All that training draws from, the first being the one that pictures are asked for with."""
        return (self.instance_prompt, *self.further_prompts)

    def check_tokens(self, tokenizer: Any = None, *, lowercase: bool = False) -> None:
        """Raise ValueError where an instance prompt does not contain the identifier, as a base's tokenizer sees it.

        Without a tokenizer the words alone count. `lowercase`: the base gets its prompts so.
        """
        identifier = self.identifier.lower() if lowercase else self.identifier
        for prompt in self.instance_prompts:
            if not holds_identifier(prompt.lower() if lowercase else prompt, identifier, tokenizer):
                seen = "" if tokenizer is None else ", as the base's tokenizer reads it"
                raise ValueError(
                    f"instance_prompt {prompt!r} does not contain the identifier {self.identifier!r}{seen}: put it "
                    "there."
                )

    def prompts_in(self, phrases: Sequence[str]) -> list[str]:
        """The subject in other places: 'a photo of sks dog on the beach' for each phrase."""
        return [f"{self.instance_prompt} {phrase}" for phrase in phrases]

    def images(self) -> list[Image.Image]:
        """The instance pictures, upright RGB, in order; large ones reduced to `side`."""
        return [load_image(path, self.side) for path in self.paths]

    def report(self) -> str:
        """A line a file: used or skipped, size, mode, remarks."""
        lines = [f"{self.instance_prompt!r} against {self.class_prompt!r}: {len(self.paths)} pictures"]
        for note in self.notes:
            state = "used   " if note.used else "skipped"
            lines.append(f"  {state} {printable(note.name):<24} {note.size:<12} {note.mode:<6} {note.note}".rstrip())
        if not 3 <= len(self.paths) <= 10:
            lines.append(f"  {len(self.paths)} pictures: three to ten, of different views and places, work best")
        if _alike(self.identifier) == _alike(self.class_word):
            lines.append("  identifier and class word are the same: the class itself will come to mean the subject")
        elif _alike(self.class_prompt) in map(_alike, self.instance_prompts):
            lines.append("  both prompts are the same: the class itself will come to mean the subject")
        return "\n".join(lines)
