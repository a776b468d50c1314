"""Step 5: instance and class images with their prompts, as batches that a step's number alone decides.

Built in notebook 05.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from dbnb.concept import Concept
from dbnb.models import upcast
from dbnb.pictures import load_image, load_mask

# The roles that random draws play; each has its own generator, so that one draw more in one never shifts another.
ORDER, CROP, FLIP, NOISE, TIMESTEP, POSTERIOR, SMALL_NOISE, OFFSET, PROMPT = range(9)


def seeded(seed: int, role: int, *numbers: int) -> torch.Generator:
    """A generator for one draw: the same (seed, role, numbers) always give the same values, on any device."""
    state = np.random.SeedSequence((seed, role, *numbers)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def _resized(image: Image.Image, size: int) -> Image.Image:
    """The shorter side becomes `size` pixels."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS) if (width, height) != image.size else image


class DreamBoothDataset(Dataset):
    """Sample n pairs one instance image with one class image; which ones, how cropped and flipped, n and seed decide.

    n counts samples over the whole run: step k of batch size B takes k*B to k*B + B - 1. Each image is seen once an
    epoch, in another order every epoch. Of several instance prompts each sample draws one.
    """

    def __init__(
        self,
        instance_paths: Sequence[Path],
        instance_prompt: str | Sequence[str],
        *,
        class_paths: Sequence[Path] = (),
        class_prompt: str = "",
        size: int = 128,
        center_crop: bool = True,
        random_flip: bool = False,
        seed: int = 0,
    ) -> None:
        instance_prompts = (instance_prompt,) if isinstance(instance_prompt, str) else tuple(instance_prompt)
        self.prompts = {"instance": instance_prompts, "class": (class_prompt,)}
        self.images = {
            "instance": [_resized(load_image(path, size), size) for path in instance_paths],
            "class": [_resized(load_image(path, size), size) for path in class_paths],
        }
        self.size, self.center_crop, self.random_flip, self.seed = size, center_crop, random_flip, seed
        self.latents: dict[tuple[str, int, bool], torch.Tensor] = {}
        self.captions: list[str] = []  # of each instance image, "" where it has none
        self.masks: list[Image.Image | None] = []  # of each instance image, of its size: white is what counts

    @classmethod
    def of_concept(
        cls,
        concept: Concept,
        class_paths: Sequence[Path] = (),
        *,
        held_out: bool = False,
        masked: bool = False,
        **options: Any,
    ) -> DreamBoothDataset:
        """A concept's pictures with their captions and, if asked, masks; `options` are those of the constructor.

        `held_out`: the pictures that the concept keeps apart instead. Raises ValueError where not one picture has the
        mask that is asked for.
        """
        paths = concept.held_out if held_out else concept.paths
        class_prompt = concept.class_prompt
        dataset = cls(paths, concept.instance_prompts, class_paths=class_paths, class_prompt=class_prompt, **options)
        if concept.captions:
            dataset.captions = [concept.captions.get(path.name, "") for path in paths]
        if masked:
            dataset.masks = [load_mask(path, dataset.size) for path in paths]
            dataset.masks = [mask and _resized(mask, dataset.size) for mask in dataset.masks]
        return dataset

    def __len__(self) -> int:
        return 10**9  # more samples than any run takes: a sample's number says all about it

    @property
    def parts(self) -> tuple[DreamBoothDataset, ...]:
        """Itself, as a `Mixture` of one would have it."""
        return (self,)

    @property
    def halves(self) -> tuple[str, ...]:
        """("instance", "class") with prior preservation, else ("instance",)."""
        return ("instance", "class") if self.images["class"] else ("instance",)

    def draw(self, half: str, n: int) -> tuple[int, bool]:
        """(image number, flipped) of sample n."""
        count, number = len(self.images[half]), ("instance", "class").index(half)
        order = torch.randperm(count, generator=seeded(self.seed, ORDER, number, n // count))
        flip = self.random_flip and torch.rand((), generator=seeded(self.seed, FLIP, number, n)) < 0.5
        return int(order[n % count]), bool(flip)

    def prompt(self, half: str, n: int) -> str:
        """The prompt of sample n: its picture's caption, or of several prompts one drawn for every sample."""
        if half == "instance" and self.captions and (caption := self.captions[self.draw(half, n)[0]]):
            return caption
        choices = self.prompts[half]
        if len(choices) == 1:
            return choices[0]
        number = torch.randint(len(choices), (), generator=seeded(self.seed, PROMPT, self.halves.index(half), n))
        return choices[int(number)]

    def distinct_prompts(self) -> list[str]:
        """Every prompt that a sample may have, once."""
        prompts = [prompt for half in self.halves for prompt in self.prompts[half]]
        return list(dict.fromkeys([*prompts, *filter(None, self.captions)]))

    def pixels(self, half: str, index: int, flip: bool, crop: torch.Generator | None = None) -> torch.Tensor:
        """(3, size, size) in [-1, 1]: the middle of the image, or a place that `crop` draws."""
        array = np.asarray(self._cropped(self.images[half][index], crop))
        pixels = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 127.5 - 1.0
        return pixels.flip(2) if flip else pixels

    def mask(self, index: int, flip: bool, crop: torch.Generator | None = None) -> torch.Tensor:
        """(1, size, size) in [0, 1] of an instance image, cropped and flipped as its `pixels`; 1 without a mask."""
        if self.masks[index] is None:
            return torch.ones(1, self.size, self.size)
        mask = torch.from_numpy(np.asarray(self._cropped(self.masks[index], crop)).copy())[None].float() / 255.0
        return mask.flip(2) if flip else mask

    def _cropped(self, image: Image.Image, crop: torch.Generator | None) -> Image.Image:
        """The middle of an image, or a square that `crop` draws."""
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        if crop is not None:
            left = int(torch.randint(image.width - self.size + 1, (), generator=crop))
            top = int(torch.randint(image.height - self.size + 1, (), generator=crop))
        return image.crop((left, top, left + self.size, top + self.size))

    def __getitem__(self, n: int) -> dict[str, Any]:
        """{"instance_pixels" or "instance_latents", "instance_prompt", and the same for "class"}, perhaps a mask."""
        example: dict[str, Any] = {"n": n}
        for number, half in enumerate(self.halves):
            index, flip = self.draw(half, n)

            def crop(number: int = number) -> torch.Generator | None:
                return None if self.center_crop else seeded(self.seed, CROP, number, n)

            if self.latents:
                example[f"{half}_latents"] = self.latents[half, index, flip]
            else:
                example[f"{half}_pixels"] = self.pixels(half, index, flip, crop())
            if half == "instance" and self.masks:
                example["instance_mask"] = self.mask(index, flip, crop())
            example[f"{half}_prompt"] = self.prompt(half, n)
        return example

    @property
    def fixed_crop(self) -> bool:
        """Whether each image always gives the same pixels (except for flips), so that its latents can be cached."""
        return self.center_crop or all(min(i.size) == max(i.size) == self.size for v in self.images.values() for i in v)


class Mixture(Dataset):
    """Several concepts in turn, so that each batch that is large enough holds all of them.

    Concept k takes `shares[k]` of every sum(shares) samples in a row. Random draws depend on the sample's number in the
    mixture, which of a concept's pictures is taken on its number within the concept.
    """

    def __init__(self, parts: Sequence[DreamBoothDataset], shares: Sequence[int] = ()) -> None:
        shares = tuple(shares) or (1,) * len(parts)
        divisor = math.gcd(*shares)
        self.parts, self.shares = tuple(parts), tuple(share // divisor for share in shares)
        # The one that has had least of its share comes next, so that no concept waits for the end of the round.
        had, self.turns = [0] * len(self.parts), []
        for _ in range(sum(self.shares)):
            k = min(range(len(had)), key=lambda k: ((had[k] + 1) / self.shares[k], k))
            self.turns.append((k, had[k]))
            had[k] += 1

    @property
    def seed(self) -> int:
        """Of all parts."""
        return self.parts[0].seed

    @property
    def latents(self) -> dict:
        """Those of the first part: where they are cached, all are."""
        return self.parts[0].latents

    @property
    def fixed_crop(self) -> bool:
        """Whether it holds for all parts."""
        return all(part.fixed_crop for part in self.parts)

    def distinct_prompts(self) -> list[str]:
        """Every prompt that a sample may have, once."""
        return list(dict.fromkeys(prompt for part in self.parts for prompt in part.distinct_prompts()))

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, n: int) -> dict[str, Any]:
        """As of one concept."""
        k, place = self.turns[n % len(self.turns)]
        return self.parts[k][n // len(self.turns) * self.shares[k] + place] | {"n": n}


def collate_fn(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples -> a batch, instances first and classes second.

    {"pixel_values": (2B, 3, H, W)} or {"latent_parameters": (2B, 2C, h, w)}, "prompts": 2B strings, "n": B numbers,
    "halves": 1 or 2, and "masks": (B, 1, H, W) where instances have some. Every later step relies on this order.
    """
    halves = [half for half in ("instance", "class") if f"{half}_prompt" in examples[0]]
    key, name = ("latents", "latent_parameters") if "instance_latents" in examples[0] else ("pixels", "pixel_values")
    masks = [example["instance_mask"] for example in examples if "instance_mask" in example]
    return {
        **({"masks": torch.stack(masks)} if masks else {}),
        name: torch.stack([example[f"{half}_{key}"] for half in halves for example in examples]),
        "prompts": [example[f"{half}_prompt"] for half in halves for example in examples],
        "n": [example["n"] for example in examples],
        "halves": len(halves),
    }


def loss_weights(batch: dict[str, Any], height: int, width: int) -> torch.Tensor:
    """(halves * B, 1, height, width) from a batch's masks: how much each place of a latent counts, 1 on average.

    A place counts as much as of it is masked; the mean of 1 keeps a small subject from counting less than a large one.
    Class images count everywhere.
    """
    shares = F.adaptive_avg_pool2d(batch["masks"], (height, width))
    weights = shares / shares.mean((1, 2, 3), keepdim=True).clamp(min=1e-6)
    return torch.cat([weights, *[torch.ones_like(weights)] * (batch["halves"] - 1)])


@torch.no_grad()
def posterior_parameters(vae, pixels: torch.Tensor) -> torch.Tensor:
    """(3, H, W) in [-1, 1] -> (2C, h, w): mean and log variance of the latent, one picture at a time.

    In a batch it would round differently.
    """
    with upcast(vae):
        return vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.parameters[0]


def cache_latents(dataset: DreamBoothDataset | Mixture, vae) -> int:
    """Encode every image once (and its mirror image, if flips are on); returns how many were encoded.

    What is kept is the posterior's mean and log variance, (2C, h, w), so that each step can still sample from it.
    Raises ValueError where crops are random, since pixels then differ each time.
    """
    if not dataset.fixed_crop:
        raise ValueError("Latents cannot be cached with random crops: use center_crop, or square images.")
    for part in dataset.parts:
        for half in part.halves:
            for index in range(len(part.images[half])):
                for flip in (False, True) if part.random_flip else (False,):
                    part.latents[half, index, flip] = posterior_parameters(vae, part.pixels(half, index, flip))
    return sum(len(part.latents) for part in dataset.parts)
