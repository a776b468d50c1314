"""Interactive views over the same pictures and functions that the notebooks show without them.

A view is extra: without a kernel or without ipywidgets, pictures are chosen by buttons in plain HTML.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from dbnb import plots
from dbnb.tokens import token_report
from dbnb.toybox import ACCESSORIES, KINDS, PATTERNS, Toy, photograph, rgb
from dbnb.toybox.sample import write_toy

_TOY = 160  # pixels along a side of a toy that is being designed: drawn in a tenth of a second


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


class View:
    """A live widget, and the same in plain HTML, which is shown where no kernel runs or ipywidgets are missing.

    `widget` is None without ipywidgets.
    """

    def __init__(self, widget: Any, shown: plots.Shown) -> None:
        self.widget, self.shown = widget, shown

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle = {"text/html": self.shown.html, "text/plain": repr(self.shown)}
        if self.widget is not None:
            reference = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
            bundle["application/vnd.jupyter.widget-view+json"] = reference
        return bundle


def browse(pictures: Mapping[str, Image.Image | Figure], description: str, *, width: int = 256) -> View:
    """A slider over named pictures, all there from the start, so that moving it waits for nothing."""
    shown = plots.one_of({description: pictures}, f"{description}: {', '.join(pictures)}", width=width)
    try:
        import ipywidgets
    except ImportError:
        return View(None, shown)
    data = {name: _png(picture, width) for name, picture in pictures.items()}
    slider = _slider(list(data), description)
    image = _image(data[slider.value])

    def change(event) -> None:
        image.value = data[event["new"]]

    slider.observe(change, names="value")
    return View(ipywidgets.VBox([slider, image]), shown)


def before_after(
    before: Sequence[Image.Image], after: Sequence[Image.Image], labels: Sequence[str], *, width: int = 256
) -> View:
    """A slider over pairs of pictures, and two buttons that change one of a pair for the other in the same place.

    Raises ValueError where the three are not of one length.
    """
    pairs = {
        f"{number}: {label}": {"before": old, "after": new}  # names are told apart where two labels are equal
        for number, (label, old, new) in enumerate(zip(labels, before, after, strict=True), start=1)
    }
    shown = plots.one_of(pairs, f"Pairs, before and after: {', '.join(labels)}", width=width)
    try:
        import ipywidgets
    except ImportError:
        return View(None, shown)
    data = {name: {state: _png(picture, width) for state, picture in pair.items()} for name, pair in pairs.items()}
    slider = _slider(list(data), "prompt")
    buttons = ipywidgets.ToggleButtons(options=["before", "after"], value="after")
    image = _image(data[slider.value][buttons.value])

    def change(event) -> None:
        image.value = data[slider.value][buttons.value]

    slider.observe(change, names="value")
    buttons.observe(change, names="value")
    return View(ipywidgets.VBox([slider, buttons, image]), shown)


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


class ToyDesigner:
    """A toy of your own: choose kind, colours, pattern, accessory and proportions, and its picture follows.

    `toy` is the toy as it is now, `photographs(folder)` writes its pictures and returns the folder to train on. Where
    ipywidgets are not installed or not displayed, it shows as a picture.
    """

    def __init__(self, **start: Any) -> None:
        """`start` are the fields of the `Toy` to begin with. Raises ValueError where one of them is unknown."""
        self.toy = Toy(**{"kind": "cat", "body": "#1fa2a0", "accent": "yellow", "pattern": "striped"} | start)
        try:
            import ipywidgets
        except ImportError:
            self.view = None
            return
        words = {"kind": KINDS, "pattern": PATTERNS, "accessory": ACCESSORIES}
        fields = {name: ipywidgets.Dropdown(options=options) for name, options in words.items()}
        fields |= {name: ipywidgets.ColorPicker() for name in ("body", "accent")}
        fields |= {
            name: ipywidgets.FloatSlider(min=0.85, max=1.15, step=0.05, continuous_update=False)
            for name in ("head", "girth")
        }
        for name, field in fields.items():
            value = getattr(self.toy, name)
            field.value = _hexadecimal(value) if name in ("body", "accent") else value
            field.description = name
            field.observe(partial(self._change, name), names="value")
        self._image, self._answer = _image(_png(self._picture(), _TOY)), ipywidgets.HTML()
        order = ("kind", "body", "accent", "pattern", "accessory", "head", "girth")
        column = ipywidgets.VBox([*(fields[name] for name in order), self._answer])
        self.view = ipywidgets.HBox([column, self._image])

    def _picture(self) -> Image.Image:
        return photograph(self.toy, scene="room", seed=4, size=_TOY)

    def _change(self, name: str, event: Mapping[str, Any]) -> None:
        try:
            self.toy = replace(self.toy, **{name: event["new"]})
        except ValueError as error:  # a colour is typed as well as picked
            self._answer.value = escape(str(error))
            return
        self._answer.value, self._image.value = "", _png(self._picture(), _TOY)

    def photographs(self, folder: str | Path) -> Path:
        """Write the toy's photographs and references to a folder; returns the folder of the photographs."""
        return write_toy(self.toy, Path(folder))

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        toy = self.toy
        shown = plots.html(
            plots.show_images([self._picture()], inches=2.2),
            alt=f"A {toy.pattern} {toy.kind}, accessory: {toy.accessory}",
        )
        return View(self.view, shown)._repr_mimebundle_()


def _hexadecimal(color: str | tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * value):02x}" for value in rgb(color))
