"""Make the README's figure: `python docs/figures.py`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from dbnb import plots, workflow
from dbnb.config import DreamBoothConfig
from dbnb.models import load_components
from dbnb.toybox import SCENES
from dbnb.validation import validation_images


def main() -> None:
    """Train with the defaults, or take that training from the cache, and draw what a stranger should see first."""
    workflow.quiet_libraries()
    config = DreamBoothConfig()
    session = workflow.trained(config, tell=print)
    drawn = [
        validation_images(components, session.concept, config, count=8, sets=("scenes",))
        for components in (load_components(config.base), session.components)
    ]
    photographs = [ImageOps.fit(image, (256, 256), Image.Resampling.LANCZOS) for image in session.concept.images()]
    figure = plots.image_rows(
        [photographs, *(images.scenes for images in drawn)],
        labels=["five photographs", f"before:\n{session.concept.instance_prompt} …", "after:\nthe same prompts"],
        gap=0.22,
    )
    for axis, name in zip(figure.axes[8:16], drawn[0].scene_names, strict=True):
        axis.set_title(f"… {SCENES[name]}", fontsize=plots.LABEL, pad=3)
    figure.savefig(Path(__file__).parent / "before_after.png")


if __name__ == "__main__":
    main()
