"""The measures do what they are named for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

from dbnb import metrics, miniature, toybox
from dbnb.miniature.alike import DIFFERENCES, differences_of, look_alike
from dbnb.toybox.scenes import SCENES
from dbnb.validation import ValidationImages


@pytest.fixture(scope="module")
def encoders():
    return metrics.load_encoders(miniature.path())


def _shots(toy, scenes, start=0):
    return [toybox.photograph(toy, scene=scene, seed=start + i) for i, scene in enumerate(scenes)]


def test_diversity_and_fidelity_of_known_vectors():
    eye = torch.eye(4)
    assert metrics.diversity(eye) == 1.0 and metrics.diversity(torch.ones(3, 4) / 2) == 0.0
    assert metrics.subject_fidelity(eye, eye) == 0.25


def test_perceptual_diversity_is_zero_for_one_pose_and_larger_for_several(encoders):
    toy = toybox.random_toy("dog", 900)
    same = _shots(toy, ["room"], 1) * 3
    several = [_shots(toy, ["room"], seed)[0] for seed in range(3)]
    noise = np.random.default_rng(0).integers(-2, 3, (3, *np.asarray(same[0]).shape))
    nearly = [Image.fromarray(np.clip(np.asarray(same[0], dtype=int) + n, 0, 255).astype(np.uint8)) for n in noise]
    none, little, much = (metrics.perceptual_diversity(encoders.stages(images)) for images in (same, nearly, several))
    assert none < 1e-5 < little < much / 5
    with pytest.raises(ValueError, match="two"):
        metrics.perceptual_diversity(encoders.stages(same[:1]))


def test_a_transformers_stages_are_its_patches():
    settings = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    vit = metrics.Encoders(ViTModel(settings).eval(), (16, ((0.5,) * 3, (0.5,) * 3)), None, None, (16, ()))
    stages = vit.stages([Image.new("RGB", (16, 16), color) for color in ("red", "blue", "green")])
    assert [tuple(stage.shape) for stage in stages] == [(3, 4, 8)] * 3
    assert all(torch.allclose(stage.norm(dim=2), torch.ones(3, 4)) for stage in stages)


def test_differences_are_paired_by_seed_and_a_single_one_borrows_the_others_spread():
    runs = {
        "default": {0: 1.0, 1: 2.0, 2: 3.0},
        "thrice": {2: 4.0, 0: 2.0, 1: 2.0},
        "once": {0: 3.0},
        "apart": {7: 1.0},
    }
    found = metrics.paired_differences(runs, "default")
    assert found.keys() == {"thrice", "once"}
    spread = (1 / 3) ** 0.5  # of the differences 1, 0 and 1; Student's t of two degrees of freedom is 4.303
    assert found["thrice"] == pytest.approx((2 / 3, 4.303 * spread / 3**0.5))
    assert found["once"] == pytest.approx((2.0, 4.303 * spread))
    alone = {name: runs[name] for name in ("default", "once")}
    assert metrics.paired_differences(alone, "default") == {"once": (2.0, float("inf"))}


@pytest.mark.long
def test_identity_encoder_tells_a_toy_from_others_of_its_kind(encoders):
    right = 0
    for kind in toybox.KINDS:
        toys = [toybox.random_toy(kind, 900 + i) for i in range(6)]
        a = encoders.identity_features([_shots(toy, ["beach"], 1)[0] for toy in toys])
        b = encoders.identity_features([_shots(toy, ["night"], 2)[0] for toy in toys])
        right += int(((a @ b.T).argmax(1) == torch.arange(6)).sum())
    assert right >= 30  # of 36; chance is 6


@pytest.mark.long
def test_real_photographs_score_as_the_measures_mean(encoders):
    toy, other = toybox.random_toy("dog", 1), [toybox.random_toy("dog", 50 + i) for i in range(16)]
    names = list(SCENES) * 2
    scenes = _shots(toy, names)
    classes = [toybox.photograph(o, scene=names[i], seed=i) for i, o in enumerate(other)]
    prompts = [f"a photo of a sks dog {SCENES[name]}" for name in names]
    instances = _shots(toy, ["beach", "grass", "snow"], 70)
    perfect = metrics.evaluate(
        encoders, ValidationImages(scenes, scenes, names, prompts, classes), instances, "a photo of a dog"
    )
    drifted = metrics.evaluate(
        encoders, ValidationImages(classes, scenes[::-1], names, prompts, scenes), instances, "a photo of a dog"
    )
    assert perfect["scene_recognised"] >= 0.9 > drifted["scene_recognised"]
    assert perfect["subject_fidelity"] > drifted["subject_fidelity"]
    assert perfect["class_diversity"] > 2 * drifted["class_diversity"]
    assert perfect["class_subject_similarity"] < drifted["class_subject_similarity"]


def test_other_sentences_are_measured_against_the_training_prompts_own_gain(encoders):
    toy, names = toybox.random_toy("dog", 1), list(SCENES)
    subject, instances = _shots(toy, names), _shots(toy, ["beach", "grass", "snow"], 70)
    others = [toybox.photograph(toybox.random_toy("dog", 50 + i), scene=n, seed=i) for i, n in enumerate(names)]
    # Three sentences draw the toy, one draws any dog.
    drawn = [image for i in range(4) for image in (others[2 * i : 2 * i + 2] if i == 3 else subject[2 * i : 2 * i + 2])]
    prompts = [f"sentence {number}" for number in (0, 0, 1, 1, 2, 2, 3, 3)]
    images = ValidationImages(subject, [], [], [], [], sentences=drawn, sentence_prompts=prompts)
    after = metrics.evaluate(encoders, images, instances, "a photo of a dog")
    worst = metrics.subject_fidelity(encoders.identity_features(others[6:]), encoders.identity_features(instances))
    assert after["worst_sentence_fidelity"] == pytest.approx(worst, abs=1e-5)
    assert after["worst_sentence_fidelity"] < after["sentence_fidelity"] < after["subject_fidelity"]
    before = {"subject_fidelity": 0.0, "clip_i": 0.0}
    ratio = metrics.report(before, after, {})["after"]["sentence_fidelity_ratio"]
    assert ratio == pytest.approx(after["sentence_fidelity"] / after["subject_fidelity"])


@pytest.mark.long
def test_the_identity_encoder_counts_what_an_eye_counts(encoders):
    rng = np.random.default_rng(5)
    falls = dict.fromkeys(DIFFERENCES, 0)
    toys = [
        t for i in range(40) if "hue" in differences_of(t := toybox.random_toy("cat", 700 + i)) and t.pattern != "plain"
    ]
    for toy in toys[:12]:
        known = encoders.identity_features(_shots(toy, list(SCENES)[:5]))
        same = encoders.identity_features(_shots(toy, ["room"], 60)) @ known.T
        for difference in DIFFERENCES:
            changed = encoders.identity_features(_shots(look_alike(toy, difference, rng), ["room"], 60)) @ known.T
            falls[difference] += bool(changed.mean() < same.mean())
    assert all(count >= 11 for count in falls.values()), falls


def test_what_too_few_images_cannot_tell_is_left_out(encoders):
    toy = toybox.random_toy("dog", 1)
    [image] = _shots(toy, ["beach"])
    numbers = metrics.evaluate(encoders, ValidationImages([image], [], [], [], [image]), [image], "a photo of a dog")
    assert set(numbers) == {"subject_fidelity", "clip_i", "class_subject_similarity"}
    assert "class_diversity_ratio" not in metrics.report(numbers, numbers, {})["after"]


def test_report_normalises_between_floor_and_ceiling():
    before = {"subject_fidelity": 0.2, "clip_i": 0.5, "class_diversity": 0.8}
    after = {"subject_fidelity": 0.5, "clip_i": 0.6, "class_diversity": 0.6}
    result = metrics.report(before, after, {"subject_fidelity": 0.8, "clip_i": 0.9})
    assert result["after"]["normalized_subject_fidelity"] == pytest.approx(0.5)
    assert result["after"]["class_diversity_ratio"] == pytest.approx(0.75)
    assert result["floor"] == {"subject_fidelity": 0.2, "clip_i": 0.5}
    assert "normalized_subject_fidelity" in str(metrics.metrics_table(result))


def test_what_a_prompt_set_is_too_small_for_is_left_out(encoders, components):
    [photo] = _shots(toybox.random_toy("dog", 1), ["beach"])
    alone = ValidationImages([photo], [], [], [], [photo])
    numbers = metrics.evaluate(encoders, alone, [photo], "a photo of a dog")
    assert set(numbers) == {"subject_fidelity", "clip_i", "class_subject_similarity"}
    assert metrics.ceiling(encoders, components, [photo], [], 128) == {}
    assert "normalized_subject_fidelity" not in metrics.report(numbers, numbers, {})["after"]
    assert set(metrics.evaluate(encoders, ValidationImages([photo], [], [], [], []), [photo], "a photo of a dog")) == {
        "subject_fidelity",
        "clip_i",
    }
    with pytest.raises(ValueError, match="at least two"):
        metrics.diversity(torch.ones(1, 4))


def test_where_there_is_no_autoencoder_pictures_stay_as_they_are(components):
    components.vae = None
    [photo] = _shots(toybox.random_toy("dog", 1), ["beach"])
    [same] = metrics.through_vae(components, [photo.resize((128, 128))], 128)
    assert same.tobytes() == photo.resize((128, 128)).tobytes()
