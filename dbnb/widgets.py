"""Interactive views over the same pictures and functions that the notebooks show without them.

A view is extra: without a front end the notebook is whole, and without ipywidgets a view of pictures is a plain figure.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape

from matplotlib.figure import Figure
from PIL import Image

from dbnb import plots
from dbnb.tokens import token_report


def _png(picture: Image.Image | Figure, width: int) -> bytes:
    file = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(file, format="png")
    else:
        height = round(picture.height * width / picture.width)
        picture.resize((width, height), Image.Resampling.NEAREST).save(file, format="PNG")
    return file.getvalue()


def _slider(options: Sequence[str], description: str):
    import ipywidgets

    return ipywidgets.SelectionSlider(
        options=list(options),
        description=description,
        style={"description_width": "initial"},
        layout={"width": "480px"},
    )


def _image(value: bytes):
    import ipywidgets

    return ipywidgets.Image(value=value, format="png", layout={"align_self": "flex-start"})  # else it fills the page


def browse(pictures: Mapping[str, Image.Image | Figure], description: str, *, width: int = 256):
    """A slider over named pictures, all there from the start, so that moving it waits for nothing."""
    try:
        import ipywidgets
    except ImportError:
        first = next(iter(pictures.values()))
        if not isinstance(first, Figure):
            first = plots.show_images(list(pictures.values()), titles=list(pictures))
        return plots.html(first, alt=f"{description}: {', '.join(pictures)}")
    data = {name: _png(picture, width) for name, picture in pictures.items()}
    slider = _slider(list(data), description)
    image = _image(data[slider.value])

    def change(event) -> None:
        image.value = data[event["new"]]

    slider.observe(change, names="value")
    return ipywidgets.VBox([slider, image])


def before_after(
    before: Sequence[Image.Image], after: Sequence[Image.Image], labels: Sequence[str], *, width: int = 256
):
    """A slider over pairs of pictures, and two buttons that change one of a pair for the other in the same place.

    Without ipywidgets it is a figure of all the pairs. Raises ValueError where the three are not of one length.
    """
    data = {
        f"{number}: {label}": {"before": _png(old, width), "after": _png(new, width)}  # a slider wants distinct names
        for number, (label, old, new) in enumerate(zip(labels, before, after, strict=True), start=1)
    }
    try:
        import ipywidgets
    except ImportError:
        return plots.html(
            plots.image_rows([before, after], labels=["before", "after"], titles=labels),
            alt=f"Two rows, before and after: {', '.join(labels)}",
        )
    slider = _slider(list(data), "prompt")
    buttons = ipywidgets.ToggleButtons(options=["before", "after"], value="after")
    image = _image(data[slider.value][buttons.value])

    def change(event) -> None:
        image.value = data[slider.value][buttons.value]

    slider.observe(change, names="value")
    buttons.observe(change, names="value")
    return ipywidgets.VBox([slider, buttons, image])


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
