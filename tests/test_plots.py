"""Figures and views: they draw what they are given, and carry words for who does not see them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from dbnb import plots, widgets
from dbnb.models import load_components


def _pixels(figure) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"))


@pytest.mark.parametrize(
    "figure",
    [
        plots.show_images([Image.new("RGB", (64, 64), "red")] * 10, titles=[str(i) for i in range(10)], columns=8),
        plots.loss_curves([{"step": i, "instance_loss": 1 / i, "prior_loss": 0.1} for i in range(1, 60)],
                          held_out={1: 0.5, 50: 0.2}),
        plots.curves({"a": ([1, 2], [3, 4]), "b": ([1, 2], [1, 0])}, xlabel="x", ylabel="y"),
        plots.bars({"one": {"a": 0.5, "b": 0.7}, "two": {"a": 0.1}}, ylabel="share"),
        plots.scatter({"a": (0.1, 0.2)}, xlabel="x", ylabel="y"),
        plots.matrices({"W": np.eye(4)}, title="t", labels="abcd"),
    ],
)  # fmt: skip
def test_each_figure_draws(figure):
    assert _pixels(figure).std() > 5


def test_titles_and_pictures_stay_inside_the_figure():
    figure = plots.show_images([Image.new("RGB", (64, 64), "red")] * 9, titles=["a title"] * 9, columns=8, title="all")
    renderer = FigureCanvasAgg(figure).get_renderer()
    for axis in figure.axes:
        box = axis.get_tightbbox(renderer)
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1


def test_a_shown_figure_has_a_text_and_is_small(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    plots.show(plots.show_images([Image.new("RGB", (64, 64), "red")]), alt='a "red" <square>')
    assert 'alt="a &quot;red&quot; &lt;square&gt;"' in shown[0]["text/html"] and len(shown[0]["text/html"]) < 20_000
    assert shown[0]["text/plain"] == '[figure: a "red" <square>]'


def test_moving_a_slider_changes_the_picture():
    view = widgets.browse({"a": Image.new("RGB", (8, 8), "red"), "b": Image.new("RGB", (8, 8), "blue")}, "which")
    slider, image = view.children
    first = image.value
    slider.value = "b"
    assert image.value != first and image.value[:4] == b"\x89PNG"


def test_the_identifier_explorer_answers_and_lets_no_markup_through():
    field, answer = widgets.identifier_explorer(load_components("miniature").tokenizer).children
    assert "a good identifier" in answer.value
    field.value = "<script>"
    assert "<script>" not in answer.value and "split into" in answer.value
