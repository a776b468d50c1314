"""The embedded base: a miniature Stable Diffusion, trained from nothing on the toy world by the code in this folder."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The directory of the embedded base: `StableDiffusionPipeline.from_pretrained(path())` draws with it."""
    return Path(__file__).parent / "weights"


def flow_path() -> Path:
    """The directory of the embedded flow base, which `StableDiffusion3Pipeline.from_pretrained` loads.

    `python -m dbnb.miniature.flow` has trained it, on the other's latents and words.
    """
    return Path(__file__).parent / "flow_weights"
