"""Pictures from disk: read upright and in sRGB, looked through before they are trained on. Built in notebook 01."""

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

import numpy as np
from PIL import Image, ImageCms

from dbnb.files import whole
from dbnb.tables import printable

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
_OF_TELEPHONES = {".heic": "HEIC", ".heif": "HEIC", ".avif": "AVIF"}  # not every Pillow reads them
MAX_PIXELS = 80_000_000  # refused before decoding: a header can promise more than the memory holds
# A perceptual difference hash of 64 bits: two pictures of at most this many different bits look the same.
_NEAR_DUPLICATE_BITS = 3
_LOOK = 128  # pixels along the shorter side: enough to tell pictures apart
SHOWN = 512  # pixels along the shorter side: more than figures and encoders look at


# EXIF's orientations (tag 0x0112) except for the upright one, and what turns them back.
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
    profile: str  # of colours that were converted; "" for sRGB
    alpha: Image.Image | None  # how opaque each pixel is, where not all are


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
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            alpha = image.getchannel("A")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    turned = orientation in _TURN_BACK
    if turned:
        image, size = image.transpose(_TURN_BACK[orientation]), size if orientation < 5 else size[::-1]
        alpha = alpha and alpha.transpose(_TURN_BACK[orientation])
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    smaller = _reduced(size, side)
    if smaller != image.size:
        image = image.resize(smaller, Image.Resampling.LANCZOS)
        alpha = alpha and alpha.resize(smaller, Image.Resampling.BOX)
    image, converted = _to_srgb(image, profile)
    image = image.convert("RGB")
    image.info = {}
    return _Picture(image, size, mode, turned, animated, converted, alpha)


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


MASK = ".mask.png"  # behind a picture's name without its suffix


def load_mask(path: Path, side: int | None = None) -> Image.Image | None:
    """What of a picture shows the subject, white on black, in the size that `load_image` gives it; None where unknown.

    That is the file `dog.mask.png` beside `dog.jpg`, or the picture's own alpha channel. Raises ValueError where the
    mask is of another size, or all black.
    """
    path = Path(path)
    picture, beside = _read(path, side), path.with_name(path.stem + MASK)
    mask = picture.alpha
    if beside.is_file():
        found = _read(beside)
        if found.size != picture.size:
            (width, height), (of_width, of_height) = found.size, picture.size
            raise ValueError(
                f"{printable(beside.name)} has {width} x {height} pixels and its picture {of_width} x {of_height}: "
                "make them equal."
            )
        mask = found.image.convert("L").resize(picture.image.size, Image.Resampling.BOX)
    if mask is not None and not mask.getbbox():
        raise ValueError(f"The mask of {printable(path.name)} is all black: paint the subject white.")
    return mask


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
    folder: Path | str, resolution: int = 128, *, option: str | None = None
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
    stems = {path.stem for path in entries if not path.name.endswith(MASK)}
    for path in entries:
        why = _why_not_read(path)
        if path.name.endswith(MASK) and path.name.removesuffix(MASK) in stems:
            why = "a mask, no picture"
        if why:
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
        if picture.alpha is not None:
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
