"""Step 1: a subject, told by a few photographs, a rare word and a class word. Built in notebook 01."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from dbnb.captions import Captions, read_captions
from dbnb.pictures import SHOWN, ImageNote, inspect_images, load_image
from dbnb.tables import UNPRINTABLE, printable
from dbnb.tokens import holds_identifier, normalized
from dbnb.toybox.captions import article_for
from dbnb.toybox.sample import SAMPLE_DIR


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


_FEWEST = 3  # photographs to train on, where some are held out


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
    held_out: tuple[Path, ...] = ()  # photographs that training does not see
    captions: dict[str, str] = field(default_factory=dict, hash=False)  # file name -> what it is trained under
    about_captions: str = ""  # which captions the pictures come with, used or not
    repeats: int = 1  # how often its pictures count beside those of another concept
    side: int = SHOWN  # pixels: `images` come no larger along the shorter side

    @classmethod
    def from_folder(
        cls,
        folder: Path | str | None,
        identifier: str,
        class_word: str,
        *,
        resolution: int = 128,
        instance_prompt: str | Sequence[str] | None = None,
        class_prompt: str | None = None,
        holdout: int = 0,
        captions: bool = False,
    ) -> Concept:
        """Look at a folder's pictures and make the prompts; without a folder, the bundled sample subject.

        `instance_prompt` may be several, which training draws from; the first is the one that pictures are asked for
        with. The last `holdout` pictures are kept apart. With `captions` a picture that comes with one is trained on
        under it (`captions.read_captions` says where they are looked for). Raises ValueError when a prompt does not
        contain the identifier, a word is empty or no plain text, or fewer than three pictures would be left to train
        on; whether the base's tokenizer agrees, `check_tokens` says.
        """
        prompts = [instance_prompt] if isinstance(instance_prompt, str) else list(instance_prompt or ())
        _check_words(identifier=[identifier], class_word=[class_word], instance_prompt=prompts)
        _check_words(class_prompt=[] if class_prompt is None else [class_prompt])
        prompts = prompts or [f"a photo of {identifier} {class_word}"]
        folder, option = (folder, "instance_data_dir") if folder else (SAMPLE_DIR / "photos", None)
        paths, notes = inspect_images(folder, resolution, option=option)
        if holdout and len(paths) - holdout < _FEWEST:
            raise ValueError(
                f"holdout={holdout} of {len(paths)} photographs leaves fewer than {_FEWEST} to train on: add "
                f"{_FEWEST + holdout - len(paths)}, or leave the option out."
            )
        kept = len(paths) - holdout
        found = read_captions(paths[0].parent, paths) if option else Captions()
        if captions and not found.texts:
            raise ValueError(
                f"captions=True, but no picture in {printable(str(paths[0].parent))} has one: put {paths[0].stem}.txt "
                f"beside {printable(paths[0].name)} and so on, or leave the option out."
            )
        _check_words(caption=list(found.texts.values()) if captions else [])
        concept = cls(
            identifier,
            class_word,
            tuple(paths[:kept]),
            tuple(notes),
            prompts[0],
            class_prompt or f"a photo of {article_for(class_word)} {class_word}",
            tuple(prompts[1:]),
            held_out=tuple(paths[kept:]),
            captions=found.texts if captions else {},
            about_captions=str(found),
            repeats=found.repeats if captions else 1,
            side=max(SHOWN, resolution),
        )
        concept.check_tokens()
        return concept

    @property
    def name(self) -> str:
        """Identifier and class word."""
        return f"{self.identifier} {self.class_word}"

    @property
    def instance_prompts(self) -> tuple[str, ...]:
        """All that training draws from, the first being the one that pictures are asked for with."""
        return (self.instance_prompt, *self.further_prompts)

    def check_tokens(self, tokenizer: Any = None, *, lowercase: bool = False) -> None:
        """Raise ValueError where an instance prompt does not contain the identifier, as a base's tokenizer sees it.

        Without a tokenizer the words alone count. `lowercase`: the base gets its prompts so.
        """
        identifier = self.identifier.lower() if lowercase else self.identifier
        named = [("instance_prompt", prompt) for prompt in self.instance_prompts]
        named += [(f"the caption of {printable(name)},", caption) for name, caption in self.captions.items()]
        for name, prompt in named:
            if not holds_identifier(prompt.lower() if lowercase else prompt, identifier, tokenizer):
                seen = "" if tokenizer is None else ", as the base's tokenizer reads it"
                raise ValueError(
                    f"{name} {prompt!r} does not contain the identifier {self.identifier!r}{seen}: put it there."
                )

    def training_prompts(self) -> list[str]:
        """All that training may use: instance prompts, captions, the class prompt."""
        return list(dict.fromkeys([*self.instance_prompts, *self.captions.values(), self.class_prompt]))

    def prompts_in(self, phrases: Sequence[str]) -> list[str]:
        """The subject in other places: 'a photo of sks dog on the beach' for each phrase."""
        return [f"{self.instance_prompt} {phrase}" for phrase in phrases]

    def images(self) -> list[Image.Image]:
        """The instance pictures, upright RGB, in order; large ones reduced to `side`."""
        return [load_image(path, self.side) for path in self.paths]

    def report(self) -> str:
        """A line a file: used or skipped, size, mode, remarks."""
        lines = [f"{self.instance_prompt!r} against {self.class_prompt!r}: {len(self.paths)} pictures"]
        kept_apart = {path.name for path in self.held_out}
        for note in self.notes:
            state = "held out" if note.name in kept_apart else "used" if note.used else "skipped"
            lines.append(f"  {state:<8} {printable(note.name):<24} {note.size:<12} {note.mode:<6} {note.note}".rstrip())
        if self.captions:
            without = sum(path.name not in self.captions for path in (*self.paths, *self.held_out))
            rest = f"; {without} without one keep {self.instance_prompt!r}" if without else ""
            lines.append(f"  captions: {self.about_captions}{rest}")
        elif self.about_captions:
            lines.append(f"  captions: {self.about_captions}, not used; --captions trains on them")
        if not 3 <= len(self.paths) <= 10:
            lines.append(f"  {len(self.paths)} pictures: three to ten, of different views and places, work best")
        if normalized(self.identifier) == normalized(self.class_word):
            lines.append("  identifier and class word are the same: the class itself will come to mean the subject")
        elif normalized(self.class_prompt) in map(normalized, self.instance_prompts):
            lines.append("  both prompts are the same: the class itself will come to mean the subject")
        return "\n".join(lines)
