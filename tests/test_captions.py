"""Captions and masks that photographs come with: read, said, and used where that is asked for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from families import write
from PIL import Image

from dbnb import metrics, miniature, toybox
from dbnb.__main__ import main
from dbnb.captions import read_captions
from dbnb.checkpoints import run_identity
from dbnb.concept import Concept
from dbnb.config import DreamBoothConfig
from dbnb.dataset import DreamBoothDataset, Mixture, cache_latents, collate_fn, loss_weights
from dbnb.pictures import inspect_images, load_mask
from dbnb.training import batch_at, training_step


@pytest.fixture
def folder(tmp_path):
    """A kohya folder of four pictures: two with a text file, one in the metadata, one with nothing of its own."""
    place = tmp_path / "10_sks dog"
    place.mkdir()
    for number in range(4):
        toybox.photograph(toybox.random_toy("dog", 3), seed=number).save(place / f"{number}.png")
    (place / "0.txt").write_text("\ufeffsks  dog on grass\nmore", encoding="utf-8")
    (place / "1.caption").write_text("sks dog at night", encoding="utf-8")
    lines = [{"file_name": "0.png", "text": "unused"}, {"file_name": "2.png", "text": "a sks dog in a room"}]
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    return place


def test_captions_come_from_text_files_then_metadata_then_the_folders_name(folder):
    found = read_captions(folder, sorted(folder.glob("*.png")))
    assert found.texts == {
        "0.png": "sks dog on grass",
        "1.png": "sks dog at night",
        "2.png": "a sks dog in a room",
        "3.png": "sks dog",
    }
    assert found.repeats == 10 and str(found) == (
        "2 from text files, 1 from metadata.jsonl, 1 from the folder's name (10 repeats)"
    )


def test_captions_are_said_always_and_used_when_asked(folder):
    unused, used = (Concept.from_folder(folder, "sks", "dog", captions=asked) for asked in (False, True))
    assert "captions: 2 from text files" in unused.report() and "not used; --captions trains on them" in unused.report()
    assert not unused.captions and unused.repeats == 1 and used.repeats == 10
    assert "not used" not in used.report()
    plain, captioned = (DreamBoothDataset.of_concept(concept) for concept in (unused, used))
    for n in range(8):
        index, _ = captioned.draw("instance", n)
        assert captioned[n]["instance_prompt"] == used.captions[f"{index}.png"]
        assert plain[n]["instance_prompt"] == "a photo of sks dog"
    assert set(used.captions.values()) < set(captioned.distinct_prompts())


def test_a_caption_without_the_identifier_is_named(folder, components):
    (folder / "2.txt").write_text("a dog in a room", encoding="utf-8")
    with pytest.raises(ValueError, match="the caption of 2.png, 'a dog in a room' does not contain the identifier"):
        Concept.from_folder(folder, "sks", "dog", captions=True)
    (folder / "2.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="Caption 2.txt cannot be read"):
        Concept.from_folder(folder, "sks", "dog", captions=True)


def test_a_run_with_other_captions_or_masks_is_another_run(folder, components):
    config = DreamBoothConfig()
    toybox.photograph(toybox.random_toy("dog", 3)).convert("L").save(folder / "0.mask.png")
    plain, captioned = (Concept.from_folder(folder, "sks", "dog", captions=asked) for asked in (False, True))
    datasets = [DreamBoothDataset.of_concept(plain), DreamBoothDataset.of_concept(captioned)]
    datasets.append(DreamBoothDataset.of_concept(plain, masked=True))
    identities = [run_identity(config, components, dataset) for dataset in datasets]
    assert identities[0]["captions"] is None is identities[0]["masks"]
    assert identities[1] != identities[0] != identities[2] and identities[1] != identities[2]


def _masked(folder, size=64):
    """A picture whose left half is the subject, as a mask beside it and as an alpha channel."""
    array = np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)
    mask = np.zeros((size, size), np.uint8)
    mask[:, : size // 2] = 255
    Image.fromarray(array).save(folder / "a.png")
    Image.fromarray(mask).save(folder / "a.mask.png")
    Image.fromarray(np.dstack([array, mask])).save(folder / "b.png")
    Image.fromarray(255 - array).save(folder / "c.png")
    return mask


def test_masks_are_no_pictures_and_come_from_files_or_alpha(tmp_path):
    mask = _masked(tmp_path)
    paths, notes = inspect_images(tmp_path)
    assert [path.name for path in paths] == ["a.png", "b.png", "c.png"]
    assert [note.note for note in notes if not note.used] == ["a mask, no picture"]
    assert all(np.array_equal(np.asarray(load_mask(tmp_path / name)), mask) for name in ("a.png", "b.png"))
    assert load_mask(tmp_path / "c.png") is None and load_mask(tmp_path / "a.png", 16).size == (16, 16)
    Image.new("L", (64, 64)).save(tmp_path / "a.mask.png")
    with pytest.raises(ValueError, match="The mask of a.png is all black"):
        load_mask(tmp_path / "a.png")


def test_masks_are_cropped_and_flipped_as_their_pictures(tmp_path):
    # Where the picture is bright, the mask is white: so it must be after every crop and flip.
    wide = np.zeros((48, 96, 3), np.uint8)
    wide[10:30, 20:50] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(wide[..., 0]).save(tmp_path / "a.mask.png")
    concept = Concept.from_folder(tmp_path, "sks", "dog", resolution=48)
    dataset = DreamBoothDataset.of_concept(concept, masked=True, size=48, center_crop=False, random_flip=True)
    seen = set()
    for n in range(12):
        example = dataset[n]
        assert torch.equal((example["instance_pixels"][:1] + 1) / 2, example["instance_mask"])
        seen.add(example["instance_mask"].flatten(1).argmax().item())
    assert len(seen) > 4


def test_what_a_mask_leaves_out_gives_no_gradient_and_the_rest_counts_as_much_as_before(tmp_path, components):
    _masked(tmp_path)
    concept = Concept.from_folder(tmp_path, "sks", "dog")
    dataset = DreamBoothDataset.of_concept(concept, concept.paths[2:], masked=True)
    cache_latents(dataset, components.vae)
    batch = batch_at(dataset, 0, 3)
    weights = loss_weights(batch, 16, 16)
    assert weights.shape == (6, 1, 16, 16) and torch.allclose(weights.mean((1, 2, 3)), torch.ones(6))
    predictions = []
    components.unet.register_forward_hook(
        lambda module, inputs, output: predictions.append(output.sample.requires_grad_().retain_grad() or output.sample)
    )
    record = training_step(components, batch, seed=0)
    record.loss.backward()
    touched = predictions[0].grad.abs().sum(1, keepdim=True) > 0
    assert torch.equal(touched, weights > 0) and not touched[:3].all() and touched[3:].all()
    errors = (record.prediction - record.target).square()
    assert torch.allclose(record.instance_loss, (errors[:3] * weights[:3]).mean())
    assert torch.allclose(record.prior_loss, errors[3:].mean())


def _two(concept, class_paths, tmp_path):
    for number in range(2):
        toybox.photograph(toybox.random_toy("cat", 5), seed=number).save(tmp_path / f"{number}.png")
    other = Concept.from_folder(tmp_path, "zwx", "cat")
    return [DreamBoothDataset.of_concept(one, class_paths) for one in (concept, other)]


def test_a_mixture_holds_every_concept_in_each_batch(concept, class_paths, tmp_path):
    parts = _two(concept, class_paths, tmp_path)
    mixture = Mixture(parts)
    batch = collate_fn([mixture[n] for n in range(4, 8)])
    assert batch["prompts"][:4] == ["a photo of sks dog", "a photo of zwx cat"] * 2 and batch["n"] == [4, 5, 6, 7]
    assert batch["prompts"][4:] == ["a photo of a dog", "a photo of a cat"] * 2
    # Each concept's own pictures, each once an epoch.
    assert torch.equal(mixture[7]["instance_pixels"], parts[1][3]["instance_pixels"])
    assert mixture.distinct_prompts() == [p for part in parts for p in part.distinct_prompts()]


def test_shares_of_a_mixture_are_kept_in_every_round(concept, class_paths, tmp_path):
    parts = _two(concept, class_paths, tmp_path)
    mixture = Mixture(parts, [10, 30])
    assert mixture.shares == (1, 3)
    names = [mixture[n]["instance_prompt"].split()[-1] for n in range(8)]
    assert names[:4].count("dog") == names[4:].count("dog") == 1
    cats = [n for n, name in enumerate(names) if name == "cat"]
    for m, n in enumerate(cats):
        assert torch.equal(mixture[n]["instance_pixels"], parts[1][m]["instance_pixels"])


@pytest.mark.long
def test_several_concepts_from_a_file_are_trained_measured_and_told_apart(concept, tmp_path, monkeypatch, capsys):
    encoders = metrics.load_encoders(miniature.path())
    monkeypatch.setattr(metrics, "load_encoders", lambda base: encoders)
    (tmp_path / "cats").mkdir()
    for number in range(3):
        toybox.photograph(toybox.random_toy("cat", 5), seed=number).save(tmp_path / "cats" / f"{number}.png")
    entries = [
        {"instance_data_dir": str(concept.paths[0].parent), "identifier": "sks", "class_word": "dog"},
        {"instance_data_dir": "cats", "identifier": "zwx", "class_word": "cat"},  # beside the file
    ]
    (tmp_path / "two.json").write_text(json.dumps(entries), encoding="utf-8")
    arguments = ["--base", str(write("sd1", tmp_path / "base")), "--concepts", str(tmp_path / "two.json")]
    arguments += ["--output_dir", str(tmp_path / "run"), "--train_batch_size", "2", "--num_class_images", "2"]
    arguments += "--resolution 32 --max_train_steps 2 --rank 2 --num_inference_steps 2".split()
    arguments += "--num_validation_images 1 --validation_steps 1 --measure_validation".split()
    assert main(arguments) == 0
    said = capsys.readouterr().out
    numbers = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert {"sks dog: subject_fidelity", "zwx cat: subject_fidelity"} <= set(numbers["after"])
    assert set(numbers["likeness"]) == {f"{a} like {b}" for a in ("sks dog", "zwx cat") for b in ("sks dog", "zwx cat")}
    assert "pictures of" in said and "like zwx cat" in said and "a photo of a cat" in said
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all({"trade_off", "zwx cat: subject_fidelity", "subject_gained"} <= set(line) for line in log)
    assert str(tmp_path) not in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_who_looks_like_whom_is_highest_for_each_subject_itself():
    encoders = metrics.load_encoders(miniature.path())
    toys = {"sks dog": toybox.random_toy("dog", 1), "zwx cat": toybox.random_toy("cat", 5)}

    def shots(start):
        return {
            name: [toybox.photograph(toy, scene="beach", seed=start + i) for i in range(3)]
            for name, toy in toys.items()
        }

    likeness = metrics.who_looks_like_whom(encoders, shots(0), shots(10))
    assert all(max(row, key=row.get) == name for name, row in likeness.items())
    table = metrics.likeness_table(likeness)
    assert [row["pictures of"] for row in table] == list(toys) and float(table[0]["like sks dog"]) > 0.5
