"""Exercises of notebook 02: a cache's key, and what is left to draw."""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable
from unittest import mock

from dbnb.exercises.checking import Wrong, call, checked

_RECIPE = {
    "base": "fingerprint-of-a-base",
    "prompt": "a photo of a dog",
    "resolution": 64,
    "num_inference_steps": 10,
    "guidance_scale": 4.0,
    "seed": 1,
}
_CHANGED = {
    "base": "of-another-base",
    "prompt": "a photo of a cat",
    "resolution": 128,
    "num_inference_steps": 20,
    "guidance_scale": 4.5,
    "seed": 2,
}


@checked
def check_02a(cache_key: Callable) -> str:
    """`cache_key(recipe)`: the name of the folder that keeps what a recipe made."""
    asked: list[object] = []
    with mock.patch.object(builtins, "hash", lambda value: asked.append(value) or id(asked)):
        key = call(cache_key, _RECIPE)
    if asked:
        raise Wrong(
            "Python's `hash` gives a text another number in every process, so nothing would be found tomorrow: take "
            "one of `hashlib`."
        )
    if not isinstance(key, str):
        raise Wrong(f"the key is the name of a folder, so return a string, not {type(key).__name__}.")
    if key != call(cache_key, _RECIPE):
        raise Wrong(
            "the same recipe gives two different keys, so nothing would ever be found: only the recipe may count."
        )
    if not re.fullmatch(r"[\w.-]{1,64}", key):
        raise Wrong(
            f"{key[:30]!r} … cannot be the name of a folder everywhere: hash the text, and take the digest's letters "
            "and digits."
        )
    if key != call(cache_key, dict(reversed(_RECIPE.items()))):
        raise Wrong("the same fields in another order give another key: sort them first.")
    for name, value in _CHANGED.items():
        if call(cache_key, _RECIPE | {name: value}) == key:
            raise Wrong(
                f"two recipes that differ only in {name!r} ({_RECIPE[name]!r} and {value!r}) share a key, and one "
                "would get the other's pictures."
            )
    pairs = ({"resolution": 6, "num_inference_steps": 410}, {"resolution": 6, "seed": 41})
    if any(call(cache_key, _RECIPE | pair) == key for pair in pairs):
        raise Wrong(
            "two recipes share a key because their values run into each other (64 and 1 read as 6 and 41): write the "
            "names of the fields, or something between the values, too."
        )
    keys = {call(cache_key, _RECIPE | {"seed": seed}) for seed in range(3000)}
    if len(keys) < 3000:
        raise Wrong(f"3,000 recipes have only {len(keys):,} keys between them: keep more characters of the digest.")
    return "one key for one recipe, today and tomorrow, and another for every other recipe."


@checked
def check_02b(to_draw: Callable) -> str:
    """`to_draw(recorded, found, count)`: the numbers of the class images that have to be drawn."""
    recorded = {0: "a1", 1: "b2", 2: "c3", 3: "d4"}
    found = {0: "a1", 1: "edited", 3: "d4", 4: "e5"}
    answer = call(to_draw, recorded, found, 6)
    try:
        numbers = sorted(answer)
    except TypeError as error:
        raise Wrong(f"return a list of numbers, not {type(answer).__name__}.") from error
    mistakes = {
        (
            4,
            5,
        ): "you count the files: four are there, but picture 1 was edited, picture 2 is missing, and picture 4 was "
        "never recorded.",
        (
            2,
            4,
            5,
        ): "picture 1 was edited after it was drawn, and you would keep it: compare its hash with the recorded one.",
        (1, 2, 5): "picture 4 lies in the folder but not in the manifest, so nobody knows what made it: draw it.",
        (0, 1, 2, 3, 4, 5): "you draw all six again: pictures 0 and 3 are as they were recorded, and can stay.",
        (0, 3): "these are the pictures that can stay: return the numbers of the others.",
        (
            1,
            2,
            4,
        ): "picture 5 is neither recorded nor there, and nothing equals nothing: ask first whether it is recorded.",
    }
    if numbers != [1, 2, 4, 5]:
        raise Wrong(mistakes.get(tuple(numbers), f"to be drawn are pictures 1, 2, 4 and 5; you return {numbers}."))
    if sorted(call(to_draw, recorded, found, 3)) != [1, 2]:
        raise Wrong("asked for three pictures, you draw more: only the numbers below `count` are wanted.")
    if call(to_draw, recorded, dict(recorded), 4) != []:
        raise Wrong("where all pictures are as they were recorded, the list should be empty.")
    return "what fits its record stays, and nothing else does."
