"""Step 1: a subject, told by a few photographs, a rare word and a class word. Built in notebook 01."""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dbnb.files import whole
from dbnb.toybox.captions import article_for

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 80_000_000  # refused before decoding: a header can promise more than the memory holds
# A perceptual difference hash of 64 bits: two pictures of at most this many different bits look the same.
_NEAR_DUPLICATE_BITS = 3
SAMPLE_DIR = Path(__file__).parent / "sample"


def load_image(path: Path) -> Image.Image:
    """A picture as upright RGB, transparency on white, the first frame of an animation, without metadata.

    Raises ValueError in one sentence when it is no picture, is truncated or is larger than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # of a large picture, looked at below, and of odd metadata, left out anyway
            image = Image.open(file)
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"{path.name} has {image.width} x {image.height} pixels, more than {MAX_PIXELS // 10**6} million: "
                    "make it smaller."
                )
            image.load()
            image = ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path.name} has more than {MAX_PIXELS // 10**6} million pixels: make it smaller.") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path.name} cannot be read as a picture ({error}): save it again as PNG or JPEG.") from error
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if values.max() > 255 else 255.0
        image = Image.fromarray(np.clip(values / top * 255.0, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    clean = Image.new("RGB", image.size)
    clean.paste(image.convert("RGB"))
    return clean


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


def inspect_images(folder: Path, resolution: int = 64) -> tuple[list[Path], list[ImageNote]]:
    """The usable pictures of a folder, sorted by name, and a note on every entry in it.

    Exact copies are used once. Raises FileNotFoundError or ValueError when nothing usable is there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"Image folder {folder} does not exist: give a folder of photographs.")
    paths: list[Path] = []
    notes: list[ImageNote] = []
    contents: dict[str, str] = {}
    looks: dict[str, int] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.suffix.lower() not in SUFFIXES:
            hint = "HEIC: convert it to JPEG" if path.suffix.lower() in (".heic", ".heif") else "not a picture"
            notes.append(ImageNote(path.name, False, "", "", hint))
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest in contents:
            notes.append(ImageNote(path.name, False, "", "", f"the same file as {contents[digest]}"))
            continue
        try:
            image = load_image(path)
        except ValueError as error:
            notes.append(ImageNote(path.name, False, "", "", str(error)))
            continue
        with Image.open(path) as raw:
            mode, turned = raw.mode, raw.getexif().get(0x0112, 1) != 1
            animated = getattr(raw, "n_frames", 1) > 1
            transparent = raw.has_transparency_data and raw.convert("RGBA").getextrema()[3][0] < 255
        width, height = image.size
        if min(width, height) < 16:
            notes.append(ImageNote(path.name, False, f"{width} x {height}", mode, "smaller than 16 pixels"))
            continue
        remarks = []
        if turned:
            remarks.append("turned upright")
        if animated:
            remarks.append("first frame only")
        if transparent:
            remarks.append("transparent: put on white")
        if min(width, height) < resolution:
            remarks.append(f"smaller than the resolution {resolution}: it will be enlarged")
        if max(width, height) > 3 * min(width, height):
            remarks.append("very long: the crop shows a small part")
        look = _difference_hash(image)
        for name, other in looks.items():
            if (look ^ other).bit_count() <= _NEAR_DUPLICATE_BITS:
                remarks.append(f"looks almost like {name}")
                break
        looks[path.name] = look
        contents[digest] = path.name
        paths.append(path)
        notes.append(ImageNote(path.name, True, f"{width} x {height}", mode, "; ".join(remarks)))
    if not paths:
        found = "; ".join(f"{note.name}: {note.note}" for note in notes[:5]) or "it is empty"
        raise ValueError(f"No usable picture in {folder} ({found}): put {', '.join(SUFFIXES)} files there.")
    return paths, notes


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
        return tuple(i for i in tokenizer(word).input_ids if i not in special)

    def is_rare(ids: tuple[int, ...]) -> bool:
        return len(ids) == 1 and ids[0] > 0.9 * ordinary

    ids = pieces(identifier)
    if is_rare(ids):
        verdict = "one rare token: a good identifier"
    elif len(ids) == 1:
        verdict = "one token, but a common word: it already means something"
    else:
        verdict = f"split into {len(ids)} tokens: it can work, but a single rare token is learned faster"
    others = tuple(word for word in CANDIDATES if word != identifier and is_rare(pieces(word)))
    return TokenReport(identifier, tuple(tokenizer.convert_ids_to_tokens(ids)), ids, is_rare(ids), verdict, others[:4])


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

    @classmethod
    def from_folder(
        cls, folder: Path | str | None, identifier: str, class_word: str, *, resolution: int = 64,
        instance_prompt: str | Sequence[str] | None = None, class_prompt: str | None = None,
    ) -> Concept:  # fmt: skip
        """Look at a folder's pictures and make the prompts; without a folder, the bundled sample subject.

        `instance_prompt` may be several, which training draws from; the first is the one that pictures are asked for
        with. Raises ValueError when one of them does not contain the identifier, or a word is empty.
        """
        if not identifier.strip() or not class_word.strip():
            raise ValueError("identifier and class_word must each be a word, such as 'sks' and 'dog'.")
        prompts = [instance_prompt] if isinstance(instance_prompt, str) else list(instance_prompt or ())
        prompts = prompts or [f"a photo of {identifier} {class_word}"]
        for text in (identifier, class_word, *prompts, class_prompt or ""):
            if not text.isprintable() or set(text) & set("<>`[]|"):
                raise ValueError(f"{text!r} holds a line break, or one of < > ` [ ] |: write it in plain words.")
        paths, notes = inspect_images(Path(folder) if folder else SAMPLE_DIR / "photos", resolution)
        for prompt in prompts:
            if not re.search(rf"(?<!\w){re.escape(identifier)}(?!\w)", prompt):
                raise ValueError(
                    f"instance_prompt {prompt!r} does not contain the identifier {identifier!r}: put it there."
                )
        class_prompt = class_prompt or f"a photo of {article_for(class_word)} {class_word}"
        return cls(identifier, class_word, tuple(paths), tuple(notes), prompts[0], class_prompt, tuple(prompts[1:]))

    @property
    def instance_prompts(self) -> tuple[str, ...]:
        """All that training draws from, the first being the one that pictures are asked for with."""
        return (self.instance_prompt, *self.further_prompts)

    def prompts_in(self, phrases: Sequence[str]) -> list[str]:
        """The subject in other places: 'a photo of sks dog on the beach' for each phrase."""
        return [f"{self.instance_prompt} {phrase}" for phrase in phrases]

    def images(self) -> list[Image.Image]:
        """The instance pictures, upright RGB, in order."""
        return [load_image(path) for path in self.paths]

    def report(self) -> str:
        """A line a file: used or skipped, size, mode, remarks."""
        lines = [f"{self.instance_prompt!r} against {self.class_prompt!r}: {len(self.paths)} pictures"]
        for note in self.notes:
            state = "used   " if note.used else "skipped"
            lines.append(f"  {state} {note.name:<24} {note.size:<12} {note.mode:<6} {note.note}".rstrip())
        if not 3 <= len(self.paths) <= 10:
            lines.append(f"  {len(self.paths)} pictures: three to ten, of different views and places, work best")
        return "\n".join(lines)
