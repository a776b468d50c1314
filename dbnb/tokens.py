"""How a base's tokenizer reads an identifier, and whether a prompt holds it. Built in notebook 01."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any


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


def normalized(text: str) -> str:
    """A text without what most tokenizers do not tell apart: case, widths, kinds of spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _holds_words(text: str, words: str) -> bool:
    """Whether a text holds some words, not within a longer word."""
    text, words, start = normalized(text), normalized(words), -1
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
