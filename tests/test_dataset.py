"""Step 5: pairing, order, crops, flips and caches are functions of (seed, sample)."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from dbnb.dataset import DreamBoothDataset, cache_latents, collate_fn


def _dataset(concept, class_paths, **options):
    return DreamBoothDataset(
        concept.paths, concept.instance_prompt, class_paths=class_paths, class_prompt=concept.class_prompt, **options
    )


def test_instances_come_first_with_their_prompts(dataset):
    batch = collate_fn([dataset[n] for n in range(3)])
    assert batch["pixel_values"].shape == (6, 3, 128, 128) and batch["halves"] == 2
    assert batch["prompts"] == ["a photo of sks dog"] * 3 + ["a photo of a dog"] * 3
    index, _ = dataset.draw("instance", 1)
    assert torch.equal(batch["pixel_values"][1], dataset.pixels("instance", index, False))
    index, _ = dataset.draw("class", 1)
    assert torch.equal(batch["pixel_values"][4], dataset.pixels("class", index, False))


def test_without_class_images_a_batch_is_one_half(concept):
    batch = collate_fn([_dataset(concept, [])[n] for n in range(2)])
    assert batch["halves"] == 1 and len(batch["prompts"]) == 2


def test_every_image_is_seen_once_an_epoch_in_a_new_order(dataset):
    epochs = [[dataset.draw("instance", n)[0] for n in range(5 * e, 5 * e + 5)] for e in range(20)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 10


def test_samples_depend_on_seed_and_number_alone(concept, class_paths):
    options = dict(size=48, center_crop=False, random_flip=True)
    a, b, c = (_dataset(concept, class_paths, seed=seed, **options) for seed in (0, 0, 1))
    later_first = [b[n]["instance_pixels"] for n in (9, 3)]
    assert torch.equal(a[3]["instance_pixels"], later_first[1])
    assert torch.equal(a[9]["instance_pixels"], later_first[0])
    assert any(not torch.equal(a[n]["instance_pixels"], c[n]["instance_pixels"]) for n in range(4))


def test_flips_are_drawn_anew_each_time(concept, class_paths):
    dataset = _dataset(concept, class_paths, random_flip=True)
    flips = {}
    for n in range(60):
        index, flip = dataset.draw("instance", n)
        flips.setdefault(index, set()).add(flip)
    assert all(seen == {True, False} for seen in flips.values())


def test_short_side_becomes_the_size_and_the_middle_is_kept(tmp_path):
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    image.save(tmp_path / "wide.png")
    pixels = DreamBoothDataset([tmp_path / "wide.png"], "a sks dog", size=50).pixels("instance", 0, False)
    assert pixels.shape == (3, 50, 50)
    assert pixels[2, :, 5:45].min() > 0.9 and pixels[0, :, 5:45].max() < -0.9


def test_cached_latents_equal_fresh_ones_flips_included(concept, class_paths, components):
    dataset = _dataset(concept, class_paths, random_flip=True)
    fresh = [dataset[n] for n in range(6)]
    assert cache_latents(dataset, components.vae) == 2 * (5 + 6)
    with torch.no_grad():
        for n in range(6):
            encoded = components.vae.encode(fresh[n]["instance_pixels"][None]).latent_dist.parameters[0]
            assert torch.allclose(dataset[n]["instance_latents"], encoded, atol=1e-5)


def test_random_crops_refuse_a_cache(concept, class_paths, components, tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "wide.png")
    dataset = DreamBoothDataset([tmp_path / "wide.png"], "a sks dog", center_crop=False)
    with pytest.raises(ValueError, match="center_crop"):
        cache_latents(dataset, components.vae)


def test_several_instance_prompts_share_the_samples_out(concept, class_paths):
    prompts = ("a photo of sks dog", "sks dog", "my sks dog")
    options = dict(class_paths=class_paths, class_prompt="a photo of a dog", size=128)
    several = DreamBoothDataset(concept.paths, prompts, **options)
    one = DreamBoothDataset(concept.paths, prompts[0], **options)
    drawn = [several[n]["instance_prompt"] for n in range(300)]
    assert all(70 < drawn.count(prompt) < 130 for prompt in prompts)
    assert drawn == [several.prompt("instance", n) for n in range(300)]
    assert several.distinct_prompts() == [*prompts, "a photo of a dog"]
    for n in range(20):  # what else a sample draws stays what it was
        assert several.draw("instance", n) == one.draw("instance", n)
        assert several[n]["class_prompt"] == one[n]["class_prompt"] == "a photo of a dog"
