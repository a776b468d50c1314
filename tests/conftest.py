"""Fixtures: an own cache for the test run, a fresh base for each test, a batch to train on."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it: what one notebook trained, another need not
    os.environ["DBNB_CACHE"] = tempfile.mkdtemp(prefix="dbnb-tests-")
    atexit.register(shutil.rmtree, os.environ["DBNB_CACHE"], ignore_errors=True)
else:  # several workers share the cores, and so do the programs that tests start
    threads = os.cpu_count() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads))

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from dbnb import miniature, toybox  # noqa: E402
from dbnb.concept import Concept  # noqa: E402
from dbnb.config import DreamBoothConfig  # noqa: E402
from dbnb.dataset import DreamBoothDataset  # noqa: E402
from dbnb.miniature import design  # noqa: E402
from dbnb.models import Components, load_components  # noqa: E402

# The same examples in every run, so that nothing but a change makes a test fail; `pytest --hypothesis-profile search`
# tries new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile("same")


def pytest_collection_modifyitems(items):
    """Mark as quick every test that neither runs a notebook nor takes more than five seconds."""
    for item in items:
        if item.path.suffix == ".py" and not any(item.get_closest_marker(name) for name in ("long", "slow")):
            item.add_marker(pytest.mark.quick)


@pytest.fixture
def components() -> Components:
    """The miniature, loaded anew."""
    return load_components("miniature")


@pytest.fixture(scope="session")
def concept() -> Concept:
    """The sample subject."""
    return Concept.from_folder(None, "sks", "dog")


@pytest.fixture(scope="session")
def class_paths(tmp_path_factory):
    """Six rendered dogs, standing in for class images."""
    folder = tmp_path_factory.mktemp("class")
    for i in range(6):
        toybox.photograph(toybox.random_toy("dog", i), scene="grass", seed=i).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def small_base(tmp_path_factory):
    """The folder of a miniature for 64 pixels as it was before it was grown: autoencoder and UNet are untrained."""
    folder = tmp_path_factory.mktemp("small") / "base"
    shutil.copytree(miniature.path(), folder)
    torch.manual_seed(0)
    design.vae().save_pretrained(folder / "vae")
    design.unet().save_pretrained(folder / "unet")
    recipe = json.loads((folder / "training.json").read_text())
    del recipe["grown"], recipe["further"]
    (folder / "training.json").write_text(json.dumps(recipe))
    return folder


@pytest.fixture
def dataset(concept, class_paths) -> DreamBoothDataset:
    """Instance and class images at 128 px."""
    return DreamBoothDataset(
        concept.paths, concept.instance_prompt, class_paths=class_paths, class_prompt=concept.class_prompt, size=128
    )


@pytest.fixture
def config(tmp_path) -> DreamBoothConfig:
    """A short run into a temporary folder."""
    return DreamBoothConfig(
        output_dir=str(tmp_path / "run"),
        max_train_steps=6,
        train_batch_size=2,
        rank=4,
        num_class_images=4,
        checkpointing_steps=2,
        num_validation_images=8,
        num_inference_steps=3,
        validation_steps=0,
        lr_scheduler="constant",
    )


@pytest.fixture(autouse=True)
def _no_global_randomness():
    """Library code must not depend on torch's global state: give every test another one."""
    torch.seed()
