"""What a caption says of a photograph: sometimes everything, sometimes only the class word.

Because each attribute is often left out, the class word alone spans the whole class: that is what makes a prior, and
what DreamBooth can destroy.
"""

from __future__ import annotations

import numpy as np

from dbnb.toybox.scenes import SCENES

# Letters that mean nothing. A few captions carry one at random, so that each is a rare word and not an unseen one.
IDENTIFIERS = ("sks", "zwx", "ohwx", "hta", "pjf", "vqz")
_PATTERN_NOUN = {"spotted": "spots", "striped": "stripes"}


def article_for(words: str) -> str:
    """ "a", or "an" before a vowel."""
    return "an" if words[:1].lower() in tuple("aeiou") else "a"


def caption(
    kind: str, body: str, accent: str, pattern: str, accessory: str, scene: str, rng: np.random.Generator
) -> str:
    """One natural phrase for a photograph, of a completeness that `rng` draws. Colours may be "": they have no name."""
    start = rng.choice(("a photo of", "a picture of", "a render of"), p=(0.84, 0.1, 0.06))
    if rng.random() < 0.12:
        return f"{start} a {kind}"
    adjectives, tail = [], ""
    says_body = rng.random() < 0.75 and bool(body)
    if rng.random() < 0.02:
        adjectives.append(str(rng.choice(IDENTIFIERS)))
    if says_body:
        adjectives.append(body)
    if accessory != "none" and rng.random() < 0.7:
        tail = f" with a {accent} {accessory}" if rng.random() < 0.7 and accent else f" with a {accessory}"
    if pattern != "plain" and rng.random() < 0.65:
        if not tail and accent and rng.random() < 0.6:
            tail = f" with {accent} {_PATTERN_NOUN[pattern]}"
        else:
            adjectives.append(pattern)
    elif pattern == "plain" and not tail and says_body and rng.random() < 0.4:
        adjectives[-1] = f"{body} and {accent}"
    words = " ".join([*adjectives, kind])
    place = f" {SCENES[scene]}" if rng.random() < 0.75 else ""
    return f"{start} {article_for(words)} {words}{tail}{place}"
