"""Exercises of notebook 01: the two prompts, and the report on an identifier."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from dbnb import miniature
from dbnb.exercises.checking import Wrong, call, checked
from dbnb.models import read_tokenizer


@checked
def check_01a(prompts: Callable) -> str:
    """`prompts(identifier, class_word)`: the instance prompt and the class prompt."""
    found = call(prompts, "sks", "dog")
    if not (isinstance(found, tuple | list) and len(found) == 2 and all(isinstance(one, str) for one in found)):
        raise Wrong("return two strings, the instance prompt and then the class prompt.")
    instance, of_class = found
    if "sks" in of_class.split():
        turned = "sks" not in instance.split()
        raise Wrong(
            "the two prompts come in the other order: the instance prompt is the first."
            if turned
            else f"the class prompt {of_class!r} holds the identifier, so the class images would be drawn under the "
            "subject's name: it names the class alone."
        )
    if "dog" not in instance.split():
        raise Wrong(
            f"the instance prompt {instance!r} lacks the class word, so the subject inherits nothing of what the model "
            "knows of dogs."
        )
    if "a sks" in instance:
        raise Wrong(f"in {instance!r} an article stands before the identifier: it is used like a name, without one.")
    if of_class == "a photo of dog":
        raise Wrong("the class prompt lacks its article: the model's captions say 'a photo of a dog'.")
    for words, right in (
        (("sks", "dog"), ("a photo of sks dog", "a photo of a dog")),
        (("ohwx", "teapot"), ("a photo of ohwx teapot", "a photo of a teapot")),
        (("sks", "elephant"), ("a photo of sks elephant", "a photo of an elephant")),
    ):
        found = tuple(call(prompts, *words))
        if found == right:
            continue
        if "a elephant" in found[1]:
            raise Wrong(
                "'a elephant' is a sentence that no caption holds: before a, e, i, o and u the article is 'an'."
            )
        raise Wrong(f"for {words} the prompts should be {right}, and are {found}.")
    return "the identifier stands like a name, and the class prompt names the class alone."


class _Words:
    """A tokenizer of forty whole words, whose special tokens have far higher numbers, as added tokens do."""

    all_special_ids = (900, 901)

    def get_vocab(self) -> dict[str, int]:
        return {f"w{number}": number for number in range(40)} | {"<start>": 900, "<end>": 901}

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[900, *(self.get_vocab()[word] for word in text.split()), 901])


@checked
def check_01b(verdict: Callable) -> str:
    """`verdict(tokenizer, word)`: "rare", "common" or "split"."""
    tokenizer = read_tokenizer(miniature.path())
    said = {word: call(verdict, tokenizer, word, copies=False) for word in ("dog", "sks", "snow", "sparkle", "ohwx")}
    if strange := [word for word in said if said[word] not in ("rare", "common", "split")]:
        raise Wrong(
            f"for {strange[0]!r} the verdict should be 'rare', 'common' or 'split', and is {said[strange[0]]!r}."
        )
    if said["dog"] == "split":
        raise Wrong(
            "'dog' came out as 'split': the tokenizer puts special tokens before and after every text; leave out what "
            "is in `all_special_ids`."
        )
    if said["dog"] == "rare" and said["sks"] == "rare":
        raise Wrong("every whole word came out as 'rare', 'dog' too: its number has to be looked at as well.")
    if said["dog"] == "rare" or said["sks"] == "common":
        raise Wrong("'dog' and 'sks' came out the wrong way round: low numbers are common words, high ones are rare.")
    if said["sparkle"] != "split":
        pieces = len(tokenizer("sparkle").input_ids) - 2
        raise Wrong(f"'sparkle' came out as {said['sparkle']!r}, but it falls into {pieces} pieces: count them first.")
    if said["snow"] == "rare":
        raise Wrong("'snow' came out as 'rare': only the last tenth of the numbers counts as rare.")
    words = _Words()
    if call(verdict, words, "w39", copies=False) != "rare":
        raise Wrong(
            "with a tokenizer whose special tokens have the highest numbers, its rarest word came out as 'common': "
            "the last tenth is a tenth of the ordinary tokens."
        )
    right = {"dog": "common", "sks": "rare", "snow": "common", "sparkle": "split", "ohwx": "rare"}
    if said != right:
        raise Wrong(f"the verdicts should be {right}, and are {said}.")
    return "one token, and a rare one: that is what an identifier should be."
