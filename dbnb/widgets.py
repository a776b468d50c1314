"""Interactive views over the same pictures and functions that the notebooks show without them.

A view is extra: without ipywidgets, or without a front end, the notebook is whole.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from html import escape

from matplotlib.figure import Figure
from PIL import Image

from dbnb.concept import token_report


def _png(picture: Image.Image | Figure, width: int) -> bytes:
    file = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(file, format="png")
    else:
        height = round(picture.height * width / picture.width)
        picture.resize((width, height), Image.Resampling.NEAREST).save(file, format="PNG")
    return file.getvalue()


def browse(pictures: Mapping[str, Image.Image | Figure], description: str, *, width: int = 256):
    """A slider over named pictures, all there from the start, so that moving it waits for nothing."""
    import ipywidgets

    data = {name: _png(picture, width) for name, picture in pictures.items()}
    slider = ipywidgets.SelectionSlider(
        options=list(data), description=description, style={"description_width": "initial"},
        layout={"width": "480px"},
    )  # fmt: skip
    image = ipywidgets.Image(value=data[slider.value], format="png")

    def change(event) -> None:
        image.value = data[event["new"]]

    slider.observe(change, names="value")
    return ipywidgets.VBox([slider, image])


def identifier_explorer(tokenizer, identifier: str = "sks"):
    """A text field: how the tokenizer splits what is typed, and whether that makes a good identifier."""
    import ipywidgets

    field = ipywidgets.Text(value=identifier, description="identifier")
    answer = ipywidgets.HTML()

    def tell(event=None) -> None:
        word = field.value.strip()
        if word:
            report = token_report(tokenizer, word)
            tokens = " | ".join(escape(token) for token in report.tokens)
            answer.value = f"<b>{tokens}</b> {list(report.ids)}: {escape(report.verdict)}"

    field.observe(tell, names="value")
    tell()
    return ipywidgets.VBox([field, answer])
