"""What a caption says of a photograph: sometimes everything, sometimes only the class word, in few words or in many.

Because each attribute is often left out, the class word alone spans the whole class: that is what makes a prior, and
what DreamBooth can destroy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dbnb.toybox.scenes import SCENES

# Letters that mean nothing. No caption carries them; each has a vector of its own, as rare words have in CLIP.
IDENTIFIERS = ("sks", "zwx", "ohwx", "hta", "pjf", "vqz")
_PATTERN_NOUN = {"spotted": "spots", "striped": "stripes"}
_OPENINGS = ("a photo of", "photo of", "one photo of", "a picture of", "picture of", "a render of", "the photo of")
_DETERMINERS = ("the", "my", "one", "her", "his", "this", "")


def article_for(words: str) -> str:
    """ "a", or "an" before a vowel."""
    return "an" if words[:1].lower() in tuple("aeiou") else "a"


@dataclass(frozen=True)
class Content:
    """What a caption says, before it is put into a sentence."""

    kind: str
    adjectives: tuple[str, ...] = ()
    decoration: str = ""  # "blue hat", "yellow spots"
    place: str = ""  # "on the beach"

    def plainly(self, opening: str = "a photo of") -> str:
        """The sentence that the base's training uses: 'a photo of a red dog with a blue hat on the beach'."""
        words = " ".join([*self.adjectives, self.kind])
        parts = [f"{opening} {article_for(words)} {words}", self._decoration(article=True), self.place]
        return " ".join(part for part in parts if part)

    def freely(self, rng: np.random.Generator) -> str:
        """The same in another sentence: without an opening or an article, with the place first, in key words …"""
        words = " ".join([*self.adjectives, self.kind])
        opening = str(rng.choice(_OPENINGS)) if rng.random() < 0.5 else ""
        draws = rng.random(4)
        determiner = article_for(words) if draws[0] < 0.4 else str(rng.choice(_DETERMINERS))
        toy = " ".join(part for part in (determiner, words) if part)
        decoration = self._decoration(article=draws[1] < 0.6)
        if decoration and draws[1] > 0.8:
            decoration = decoration.replace("with", "wearing" if "spots" not in decoration else "and", 1)
        place = self.place
        if place and draws[2] < 0.15:  # key words
            place = place.split()[-1]
        comma = "," if draws[2] < 0.4 else ""
        if place and draws[3] < 0.25:
            parts = [place + comma, opening, toy, decoration]
        else:
            parts = [opening, toy, decoration + (comma if decoration and place else ""), place]
            if comma and place and not decoration:
                parts[1] += comma
        return " ".join(part for part in parts if part)

    def _decoration(self, *, article: bool) -> str:
        if not self.decoration:
            return ""
        plural = self.decoration.split()[-1] in _PATTERN_NOUN.values()
        return f"with {self.decoration}" if plural or not article else f"with a {self.decoration}"


def content(
    kind: str, body: str, accent: str, pattern: str, accessory: str, scene: str, rng: np.random.Generator
) -> Content:
    """What one caption says of a photograph, of a completeness that `rng` draws.

    That a toy is plain, or bare of hat and scarf, is said as often as that it has spots or a hat. Otherwise a caption
    that says nothing of it would mean a plain toy, and guidance would make sure of it: the class would lose variety.
    A colour may be "": it has no name.
    """
    if rng.random() < 0.12:
        return Content(kind)
    adjectives, decoration = [], ""
    says_body, says_pattern, says_accessory = (rng.random() < share for share in (0.75, 0.6, 0.5))
    if says_body and body:
        adjectives.append(body)
    if accessory != "none" and says_accessory:
        decoration = f"{accent} {accessory}" if rng.random() < 0.7 and accent else accessory
    if says_pattern and pattern == "plain":
        if adjectives and accent and not decoration and rng.random() < 0.5:
            adjectives[-1] = f"{body} and {accent}"
        else:
            adjectives.insert(0, "plain")
    elif says_pattern:
        if not decoration and accent and rng.random() < 0.6:
            decoration = f"{accent} {_PATTERN_NOUN[pattern]}"
        else:
            adjectives.append(pattern)
    if accessory == "none" and says_accessory:
        adjectives.insert(0, "bare")
    place = SCENES[scene] if rng.random() < 0.75 else ""
    return Content(kind, tuple(adjectives), decoration, place)


def whole_content(kind: str, body: str, accent: str, pattern: str, accessory: str, scene: str) -> Content:
    """All that can be said of a photograph, the accent's colour of the one thing that a caption names it with."""
    adjectives, decoration = (body,), f"{accent} {accessory}"
    if accessory == "none" and pattern == "plain":
        adjectives, decoration = ("bare", f"{body} and {accent}"), ""
    elif accessory == "none":
        adjectives, decoration = ("bare", body), f"{accent} {_PATTERN_NOUN[pattern]}"
    elif pattern == "plain":
        adjectives = ("plain", body)
    else:
        adjectives = (body, pattern)
    return Content(kind, adjectives, decoration, SCENES[scene])


def caption(
    kind: str, body: str, accent: str, pattern: str, accessory: str, scene: str, rng: np.random.Generator
) -> str:
    """One plain sentence for a photograph, of a completeness that `rng` draws."""
    opening = str(rng.choice(("a photo of", "a picture of", "a render of"), p=(0.84, 0.1, 0.06)))
    return content(kind, body, accent, pattern, accessory, scene, rng).plainly(opening)
