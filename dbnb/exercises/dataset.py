"""Exercises of notebook 05: a batch in two halves, and an order that follows from a number."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dbnb.exercises.checking import Wrong, call, checked, close, numbers


@checked
def check_05a(collate: Callable) -> str:
    """`collate(samples)`: the pictures and the prompts of a batch, instances first."""
    shape, b = (3, 4, 4), 3
    samples = [
        {
            "instance_pixels": torch.full(shape, 1.0 + n),
            "instance_prompt": f"a photo of sks dog, number {n}",
            "class_pixels": torch.full(shape, -1.0 - n),
            "class_prompt": f"a photo of a dog, number {n}",
        }
        for n in range(b)
    ]
    found = call(collate, samples)
    if not (isinstance(found, tuple | list) and len(found) == 2):
        raise Wrong("return two things: the pictures as one tensor, and the list of the prompts.")
    pixels, prompts = found
    if isinstance(pixels, torch.Tensor) and tuple(pixels.shape) == (2, b, *shape):
        raise Wrong(
            "the halves lie in a dimension of their own: a UNet takes one batch, so stack all pictures in a row."
        )
    if isinstance(pixels, torch.Tensor) and tuple(pixels.shape) == (2 * b * shape[0], *shape[1:]):
        raise Wrong(
            "the pictures' channels run into each other: `stack` makes a new dimension where `cat` lengthens one."
        )
    pixels = numbers(pixels, (2 * b, *shape), "The tensor of pictures")[:, 0, 0, 0]
    halves, pairs = torch.tensor([1.0, 2, 3, -1, -2, -3]), torch.tensor([1.0, -1, 2, -2, 3, -3])
    by_half = [sample[f"{half}_prompt"] for half in ("instance", "class") for sample in samples]
    by_pair = [sample[f"{half}_prompt"] for sample in samples for half in ("instance", "class")]
    prompts = list(prompts)
    if close(pixels, pairs) and prompts == by_half:
        raise Wrong(
            "the pictures alternate while the prompts are grouped: half of the subject would be trained as 'a photo "
            "of a dog', and no error would say so."
        )
    if close(pixels, pairs) and prompts == by_pair:
        raise Wrong(
            "pictures and prompts agree, but they alternate: the loss cuts the batch in the middle, so all instances "
            "come first."
        )
    if close(pixels, halves) and prompts == by_pair:
        raise Wrong("the pictures are in two halves, but the prompts alternate: they need the same order.")
    if close(pixels, -halves):
        raise Wrong("the class comes first: the loss takes the first half for the subject.")
    if not close(pixels, halves):
        raise Wrong("the pictures should be all instance images in order, and then all class images.")
    if prompts != by_half:
        raise Wrong(f"the prompts should be {by_half}, and are {prompts}.")
    return "instances first, classes second, each picture with its own prompt."


@checked
def check_05b(image_number: Callable) -> str:
    """`image_number(n, count, seed)`: which of `count` images sample n shows."""
    count, epochs = 7, 4

    def order(seed: int, numbers: range) -> list[int]:
        found = [call(image_number, n, count, seed) for n in numbers]
        if strange := [one for one in found if int(one) != one or not 0 <= one < count]:
            raise Wrong(f"the number of an image is one of 0 to {count - 1}, and you return {strange[0]}.")
        return [int(one) for one in found]

    found = order(0, range(epochs * count))
    if found != order(0, range(epochs * count)[::-1])[::-1]:
        raise Wrong(
            "asked again, or in another order, a sample shows another image, so a run that was stopped cannot go on "
            "as it was: the generator must start from the seed and the number alone."
        )
    by_epoch = [found[start : start + count] for start in range(0, len(found), count)]
    for number, epoch in enumerate(by_epoch):
        if len(set(epoch)) < count:
            twice = next(one for one in epoch if epoch.count(one) > 1)
            raise Wrong(
                f"in epoch {number} image {twice} comes more than once while others are left out: draw one order for "
                "the whole epoch, and take the sample's place in it."
            )
    if by_epoch[0] == list(range(count)):
        raise Wrong("the images come in the order of their names: each epoch needs a random order.")
    if by_epoch[0] == by_epoch[1]:
        raise Wrong("every epoch repeats the first one's order: the epoch's number has to go into the generator.")
    others = [order(seed, range(epochs * count)) for seed in (1, 2)]
    if found == others[0]:
        raise Wrong("two seeds give the same order: the seed has to go into the generator.")
    if by_epoch[1] == others[0][:count]:
        raise Wrong(
            "epoch 1 of seed 0 has the order of epoch 0 of seed 1: a sum of the two does not tell them apart; give the "
            "generator both."
        )
    return "each image comes once an epoch, in an order that any machine can compute again."
