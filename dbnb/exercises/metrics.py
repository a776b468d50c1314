"""Exercises of notebook 08: the four measures, and a difference over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from dbnb.exercises.checking import Wrong, call, checked, compare, numbers


def _vectors(count: int, width: int, seed: int) -> torch.Tensor:
    """Vectors of different lengths, all a little alike."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, width, generator=generator) + 0.5
    return vectors * (1 + torch.arange(count)[:, None])


@checked
def check_08a(four_measures: Callable) -> str:
    """`four_measures(drawn, photographs, classes, drawn_clip, texts)`: features (N, D) to four numbers."""
    given = [_vectors(n, d, seed) for seed, (n, d) in enumerate(((4, 6), (3, 6), (5, 6), (4, 8), (4, 8)))]
    drawn, photographs, classes, drawn_clip, texts = (F.normalize(one, dim=1) for one in given)
    found = call(four_measures, *given)
    names = ("subject_fidelity", "prompt_fidelity", "class_subject_similarity", "class_diversity")
    if not isinstance(found, dict) or set(found) != set(names):
        raise Wrong(f"return a dictionary with the four keys {', '.join(names)}.")
    n = len(classes)
    raw = given[0] @ given[1].T
    right = {
        "subject_fidelity": (drawn @ photographs.T).mean(),
        "prompt_fidelity": (drawn_clip * texts).sum(1).mean(),
        "class_subject_similarity": (classes @ photographs.T).mean(),
        "class_diversity": (1 - classes @ classes.T).sum() / (n * (n - 1)),
    }
    mistakes = {
        "subject_fidelity": {
            "the features are not of length 1, and long ones count more than others: normalise them first.": raw.mean(),
            "you take the nearest photograph alone, which measures copying: take the mean over all pairs.": (
                (drawn @ photographs.T).max(1).values.mean()
            ),
            "you compare two mean vectors, which hides how far the pictures are spread: take the mean over all "
            "pairs.": F.cosine_similarity(drawn.mean(0), photographs.mean(0), dim=0),
            "you pair picture number n with photograph number n: they have nothing to do with each other; compare each "
            "picture with every photograph.": (drawn[:3] * photographs).sum(1).mean(),
        },
        "prompt_fidelity": {
            "you compare every picture with every prompt, but a picture on the beach need not fit the snow: compare "
            "each with its own.": (drawn_clip @ texts.T).mean(),
            "a picture's similarity to its prompt is a sum over the features: you take the mean, which is smaller by "
            "the number of features.": (drawn_clip * texts).mean(),
        },
        "class_subject_similarity": {
            "you compare the class with what was drawn of the subject: compare it with the photographs.": (
                (classes @ drawn.T).mean()
            ),
            "you compare the class with itself: the question is whether every dog has become the toy of the "
            "photographs.": (classes @ classes.T).mean(),
        },
        "class_diversity": {
            "each picture is also compared with itself, at a distance of 0: divide by the number of true pairs, n "
            "times n - 1.": (1 - classes @ classes.T).mean(),
            "that is a similarity: the distance is 1 minus the cosine.": (
                ((classes @ classes.T).sum() - n) / (n * (n - 1))
            ),
            "you measure the variety of the subject: the class is what must not lose its own.": (
                (1 - drawn @ drawn.T).sum() / (len(drawn) * (len(drawn) - 1))
            ),
        },
    }
    for name in names:
        value = numbers(found[name], (), name)
        otherwise = f"it should be {right[name]:.4f} for these features, and is {value:.4f}."
        compare(
            value,
            right[name],
            {f"`{name}`: {sentence}": result for sentence, result in mistakes[name].items()},
            f"`{name}`: {otherwise}",
        )
    return "four questions, four numbers: the toy, the prompt, the class, its variety."


@checked
def check_08b(difference: Callable) -> str:
    """`difference(first, second)`: seed -> value, twice, to the mean paired difference and its standard error."""
    first, second = {0: 0.71, 1: 0.52, 2: 0.80, 7: 0.99}, {2: 0.74, 0: 0.66, 1: 0.45, 5: 0.10, 6: 0.05}
    found = call(difference, first, second)
    if not (isinstance(found, tuple | list) and len(found) == 2):
        raise Wrong("return two numbers: the mean of the differences, and its standard error.")
    mean, error = (float(numbers(one, (), "Each of the two results")) for one in found)
    paired = [first[seed] - second[seed] for seed in (0, 1, 2)]
    by_place = [a - b for a, b in zip(first.values(), second.values(), strict=False)]
    root, spread = math.sqrt(len(paired)), statistics.stdev(paired)
    compare(
        mean,
        statistics.mean(paired),
        {
            "you subtract the first row from the second: the difference is first minus second.": -statistics.mean(
                paired
            ),
            "you pair the values by their place, but the two rows hold their seeds in different orders: look them up "
            "by seed.": statistics.mean(by_place),
            "you compare the means of all values, also of seeds that only one row has: a difference needs "
            "both.": statistics.mean(first.values()) - statistics.mean(second.values()),
        },
        f"the mean difference of the seeds that both rows have is {statistics.mean(paired):.3f}, and you return "
        f"{mean:.3f}.",
    )
    common = [[row[seed] for seed in (0, 1, 2)] for row in (first, second)]
    compare(
        error,
        spread / root,
        {
            "that is the standard deviation of the differences: the error of their mean is smaller, by the root of "
            "their number.": spread,
            "you divide by the number of seeds: the error of a mean shrinks with its root.": spread / len(paired),
            "your deviation divides by n: for a sample of n seeds it is n - 1 (`statistics.stdev`).": (
                statistics.pstdev(paired) / root
            ),
            "you add up the spreads of the two rows, and so count what both owe to their seed: take the spread of the "
            "differences.": math.hypot(*(statistics.stdev(row) for row in common)) / root,
        },
        f"the standard error is the deviation of the differences over the root of their number, {spread / root:.4f}; "
        f"you return {error:.4f}.",
    )
    return "seed by seed, what both rows owe to chance cancels out."
