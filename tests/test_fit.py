"""Is a picture in the base's world: renders are, photographs and patterns are not; on every base it can be asked."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import torch
from families import FAMILIES, write
from matplotlib.cbook import get_sample_data
from PIL import Image

from dbnb import fit, toybox, workflow
from dbnb.fit import autoencoder_psnr, base_fit, denoising_losses
from dbnb.models import load_components
from dbnb.prior import class_images
from dbnb.toybox.sample import SAMPLE_DIR

PROMPT = "a photo of a dog"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Class images that the miniature drew, as a run caches them."""
    components = load_components("miniature")
    return class_images(
        components, PROMPT, fit.CLASS_IMAGES, resolution=128, num_inference_steps=6, guidance_scale=2.5
    ).paths


def _outside(folder):
    """What the miniature has never met: photographs, gradients, noise of two kinds."""
    rng, x = np.random.default_rng(0), np.linspace(0, 255, 128)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
    frequency[0, 0] = 1.0  # photographs' power falls with frequency: noise that does too
    rough = np.stack([np.fft.ifft2(np.fft.fft2(rng.normal(size=(128, 128))) / frequency).real for _ in range(3)], -1)
    pictures = {
        "portrait": Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB"),
        "coin": Image.open(get_sample_data("Minduka_Present_Blue_Pack.png", asfileobj=False)).convert("RGB"),
        "gradient": np.stack(np.broadcast_arrays(x[:, None], x[None], x[:, None]), -1),
        "noise": rng.integers(0, 256, (128, 128, 3)),
        "rough": np.clip(128 + 50 * rough / rough.std(), 0, 255),
    }
    for name, picture in pictures.items():
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture.astype(np.uint8))
        image.save(folder / f"{name}.png")
    return sorted(folder.iterdir())


@pytest.mark.long
def test_renders_are_inside_and_what_the_base_never_met_is_outside(components, drawn, tmp_path):
    strange, renders = _outside(tmp_path), sorted((SAMPLE_DIR / "photos").iterdir())
    renders += sorted((SAMPLE_DIR / "references").iterdir())
    found = base_fit(components, renders + strange, drawn, PROMPT, resolution=128)
    assert [picture.name for picture in found.outside()] == [path.name for path in strange]
    distances = [picture.distance for picture in found.pictures]
    assert min(distances[len(renders) :]) > 1.3 * max(distances[: len(renders)])
    assert all(picture.psnr is not None for picture in found.pictures)
    assert all(path.name in found.remark() for path in strange) and "01.png" not in found.remark()
    assert "dbnb.toybox" in found.remark() and "--base" in found.remark() and "\n" not in found.remark()
    assert base_fit(components, renders, drawn, PROMPT, resolution=128).remark() == ""


@pytest.mark.long
@pytest.mark.parametrize("kind", ["cat", "car", "teapot"])
def test_toys_of_other_kinds_are_inside(components, tmp_path, kind):
    paths = []
    for i in range(4):
        paths.append(tmp_path / f"{i}.png")
        toy, scene = toybox.random_toy(kind, 700 + i), list(toybox.SCENES)[2 * i]
        toybox.photograph(toy, scene=scene, seed=50 + i, size=256).save(paths[-1])
    prompt = f"a photo of a {kind}"
    drawn = class_images(
        components, prompt, fit.CLASS_IMAGES, resolution=128, num_inference_steps=6, guidance_scale=2.5
    ).paths
    found = base_fit(components, paths, drawn, prompt, resolution=128)
    assert not found.outside(), found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_base_can_be_asked(tmp_path, class_paths, family):
    components = load_components(write(family, tmp_path / "base"))
    paths, class_paths = sorted((SAMPLE_DIR / "photos").iterdir())[:2], list(class_paths[: fit.FEWEST // 2]) * 2
    found = base_fit(components, paths, class_paths, PROMPT, resolution=32, batch_size=1)
    has_autoencoder = components.vae is not None
    assert all((picture.psnr is not None) == has_autoencoder for picture in found.pictures)
    assert bool(found.class_psnrs) == has_autoencoder and len(found.table()) == len(paths) + 1
    assert all(picture.loss > 0 and np.isfinite(picture.distance) for picture in found.pictures)
    together = base_fit(components, paths, class_paths, PROMPT, resolution=32)
    for one, other in zip(found.pictures, together.pictures, strict=True):  # the batch size decides nothing
        assert one.loss == pytest.approx(other.loss, rel=1e-4)


def test_the_loss_of_a_picture_depends_on_no_other_and_on_no_global_state(components, drawn):
    data = fit.DreamBoothDataset(drawn[:3], PROMPT, size=128)
    pictures = [data.pixels("instance", index, flip=False) for index in range(3)]
    together = denoising_losses(components, pictures, PROMPT)
    torch.seed()
    assert denoising_losses(components, pictures[1:2], PROMPT) == together[1:2]


def test_psnr_is_ten_times_the_logarithm_of_peak_over_error(components, monkeypatch):
    class Half(torch.nn.Module):
        """Gives back half of what it gets."""

        dtype, device, config = torch.float32, torch.device("cpu"), components.vae.config

        def encode(self, pixels):
            return type("Output", (), {"latent_dist": type("Mode", (), {"mode": lambda self: pixels})()})

        def decode(self, latent):
            return type("Output", (), {"sample": latent / 2})

    halved = dataclasses.replace(components, vae=Half())
    assert autoencoder_psnr(halved, torch.ones(3, 64, 64)) == pytest.approx(10 * np.log10(4 / 0.25))
    assert autoencoder_psnr(halved, torch.zeros(3, 64, 64)) < 60  # rounding to 8 bits is the end


def test_too_few_class_images_are_refused(components, drawn):
    with pytest.raises(ValueError, match="7 class images tell too little"):
        base_fit(components, drawn[:1], drawn[:7], PROMPT, resolution=128)


def test_a_run_remarks_on_pictures_outside_and_says_nothing_of_others(config, tmp_path):
    (tmp_path / "photos").mkdir()
    _outside(tmp_path / "photos")
    said: list[str] = []
    config = dataclasses.replace(config, num_class_images=fit.FEWEST, num_inference_steps=6)
    workflow.prepare(dataclasses.replace(config, instance_data_dir=str(tmp_path / "photos")), tell=said.append)
    assert any("portrait.png" in line and "far outside of what this base draws" in line for line in map(str, said))
    said.clear()
    workflow.prepare(config, tell=said.append)
    assert not any("far outside" in line for line in map(str, said))


@pytest.mark.long
def test_it_costs_less_than_sixteen_training_steps(components, drawn):
    # On two idle cores a step takes 0.11 s: that is 2 s at most.
    from dbnb.adapters import add_adapters
    from dbnb.dataset import DreamBoothDataset
    from dbnb.training import batch_at, training_step

    paths = sorted((SAMPLE_DIR / "photos").iterdir())

    def seconds(work) -> float:
        times = []
        for _ in range(3):
            started = time.process_time()
            work()
            times.append(time.process_time() - started)
        return min(times)

    look = seconds(lambda: base_fit(components, paths, drawn, PROMPT, resolution=128))
    add_adapters(components)
    dataset = DreamBoothDataset(paths, "a photo of sks dog", class_paths=drawn, class_prompt=PROMPT, size=128)
    step = seconds(lambda: training_step(components, batch_at(dataset, 0, 4), seed=0).loss.backward())
    assert look < 16 * step
