"""Exercises of notebook 10: a memory estimate, and the batch that fits."""

from __future__ import annotations

from collections.abc import Callable

from dbnb.exercises.checking import Wrong, call, checked, compare, numbers

_GIB = 2**30


@checked
def check_10a(memory_gib: Callable) -> str:
    """`memory_gib(frozen, adapters, activations, train_batch_size)`: GiB of a training in half precision."""
    frozen, adapters, activations, batch = 860_000_000, 30_000_000, 700_000_000, 3
    found = numbers(call(memory_gib, frozen, adapters, activations, batch), (), "The estimate")

    def gib(
        frozen_bytes: int = 2, adapter_bytes: int = 16, activation_bytes: int = 2, pictures: int = 2 * batch
    ) -> float:
        return (frozen_bytes * frozen + adapter_bytes * adapters + activation_bytes * activations * pictures) / _GIB

    compare(
        found,
        gib(),
        {
            "you forget the two moments that AdamW keeps of each trained number, and its gradient: an adapter's number "
            "takes 16 bytes.": gib(adapter_bytes=4),
            "an adapter's number takes 4 bytes for itself, 4 for its gradient and 8 for AdamW's two moments: 16 in "
            "all, and you count 8.": gib(adapter_bytes=8),
            "an adapter's number takes 16 bytes, and you count 12: AdamW keeps two moments, not one.": gib(
                adapter_bytes=12
            ),
            "the adapters are float32 whatever the base is: you count them as if they were half precision.": gib(
                adapter_bytes=2
            ),
            "you forget the class images: each pair of a batch is two pictures.": gib(pictures=batch),
            "activations grow with the number of pictures, and you count those of one.": gib(pictures=1),
            "frozen weights need no gradients and no moments: 2 bytes each in half precision.": gib(frozen_bytes=16),
            "you count the frozen weights as float32: in half precision they take 2 bytes each.": gib(frozen_bytes=4),
            "you count the activations as float32: in half precision they take 2 bytes each.": gib(activation_bytes=4),
            "you divide by 10**9, which gives GB: a GiB is 2**30 bytes.": gib() * _GIB / 10**9,
            "that is the number of bytes: divide it by 2**30.": gib() * _GIB,
        },
        f"for these sizes the estimate is {gib():.2f} GiB, and you return {float(found):.2f}.",
    )
    return "weights, adapters, activations: what fills a card fits on one line."


@checked
def check_10b(largest_batch: Callable) -> str:
    """`largest_batch(card, weights, adapters, activations)`: the largest `train_batch_size`; all arguments in GiB."""
    card, weights, adapters, activations = 16.0, 3.5, 0.2, 0.6  # 10.3 GiB are left: 17.2 pictures, 8 pairs
    found = float(numbers(call(largest_batch, card, weights, adapters, activations), (), "The batch"))
    if found != int(found):
        raise Wrong(f"a batch of {found:g} cannot be trained: round down to a whole number.")
    mistakes = {
        17: "you count pictures: `train_batch_size` counts pairs, an instance and a class image each.",
        9: "you round up, and then the last pair is the one that does not fit: round down.",
        10: "2 GiB of the card belong to the CUDA context and the libraries: subtract them.",
        13: "the weights and the libraries take their part before any picture does: subtract them from the card.",
        11: "the frozen weights are missing: they lie on the card as well.",
    }
    if found != 8:
        raise Wrong(mistakes.get(int(found), f"for this card the largest batch is 8 pairs, and you return {found:g}."))
    for sizes, right, sentence in (
        ((16.0, 2.5, 2.7, 0.8), 5, "with adapters of 2.7 GiB only 5 pairs fit, and you return {}: subtract them, too."),
        ((16.0, 2.5, 0.2, 0.71), 7, "at 0.71 GiB a picture 7 pairs fit, and you return {}: round down, never up."),
        ((4.0, 2.5, 0.2, 0.8), 0, "where not even the weights fit, the answer is 0, and you return {}."),
    ):
        found = call(largest_batch, *sizes)
        if found != right:
            raise Wrong(sentence.format(found))
    return "you can plan a training before you download anything."
