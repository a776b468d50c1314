"""How a check runs a learner's answer and says in one sentence what is wrong with it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch


class Wrong(Exception):
    """What is wrong with an answer: the sentence that the learner reads."""


class NotWritten(Exception):
    """An answer that is still the exercise's stub."""


def checked(check: Callable[[Any], str]) -> Callable[[Any], None]:
    """What a learner calls: it prints one line, `Right: …`, `Not yet: …` or `Not written yet: …`, and never raises.

    `check` takes the learner's function (or class), raises `Wrong` or `NotWritten`, and otherwise returns a sentence on
    what it has confirmed.
    """

    @functools.wraps(check)
    def report(answer: Any) -> None:
        try:
            print("Right:", check(answer))
        except NotWritten as empty:
            print("Not written yet:", empty)
        except Wrong as wrong:
            print("Not yet:", wrong)
        except Exception as error:  # an answer of a kind that the check did not think of
            print(f"Not yet: the result has another form than the exercise asks for ({type(error).__name__}: {error}).")

    return report


def call(function: Callable[..., Any], *arguments: Any, copies: bool = True) -> Any:
    """The learner's answer to these arguments; to copies of them, so that what it changes is not seen by the next call.

    Raises NotWritten where it returns nothing, and Wrong where it stops with an error.
    """
    name = getattr(function, "__name__", "your answer")
    try:
        found = function(*(copy.deepcopy(arguments) if copies else arguments))
    except NotImplementedError as error:
        raise NotWritten(f"`{name}` is empty. Replace its `...` with your own lines.") from error
    except Exception as error:
        raise Wrong(f"`{name}` stops with {type(error).__name__}: {error}") from error
    if found is None or found is Ellipsis:
        raise NotWritten(f"`{name}` returns nothing. Replace its `...` with your own lines, and return the result.")
    return found


def numbers(found: Any, shape: tuple[int, ...], what: str) -> torch.Tensor:
    """A tensor, an array or a number of this shape as a detached float64 tensor; raises Wrong for anything else."""
    try:
        tensor = torch.as_tensor(np.asarray(found.detach() if isinstance(found, torch.Tensor) else found)).double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise Wrong(f"{what} should be numbers of the shape {shape}, and is {type(found).__name__}.") from error
    if tuple(tensor.shape) != shape:
        raise Wrong(f"{what} should have the shape {shape}, and has the shape {tuple(tensor.shape)}.")
    return tensor


def close(found: Any, right: Any) -> bool:
    """Whether two numbers or tensors are equal except for rounding."""
    found, right = torch.as_tensor(found).double(), torch.as_tensor(right).double()
    return found.shape == right.shape and torch.allclose(found, right, rtol=1e-4, atol=1e-5)


def compare(found: Any, right: Any, mistakes: Mapping[str, Any], otherwise: str) -> None:
    """Raise Wrong unless `found` is `right`: with the sentence of the mistake that leads to `found`, or `otherwise`.

    `mistakes` holds a sentence for each of the usual wrong results.
    """
    if close(found, right):
        return
    for sentence, result in mistakes.items():
        if close(found, result):
            raise Wrong(sentence)
    raise Wrong(otherwise)
