"""Figures and views: they draw what they are given, and carry words for who does not see them."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from dbnb import miniature, plots, widgets
from dbnb.adapters import lora_targets
from dbnb.config import DreamBoothConfig
from dbnb.miniature.flow import Model
from dbnb.models import load_components


def _pixels(figure) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"))


@pytest.mark.parametrize(
    "figure",
    [
        plots.show_images([Image.new("RGB", (64, 64), "red")] * 10, titles=[str(i) for i in range(10)], columns=8),
        plots.loss_curves(
            [{"step": i, "instance_loss": 1 / i, "prior_loss": 0.1} for i in range(1, 60)],
            held_out={"seen": {1: 0.5, 50: 0.2}, "new": {1: 0.6, 50: 0.4}},
            title="t",
        ),
        plots.loss_curves([]),
        plots.curves({"a": ([1, 2], [3, 4]), "b": ([1, 2], [1, 0])}, xlabel="x", ylabel="y"),
        plots.curves({"a": ([1, 2], [3, 4])}, xlabel="x", ylabel="y", marks={"a line": 3.5}),
        plots.bars({"one": {"a": 0.5, "b": 0.7}, "two": {"a": 0.1}}, ylabel="share", marks={"most": 1.0}),
        plots.histogram([0.1, 0.2, 0.2], xlabel="share", marks={"mean": 0.17, "end": 0.2}),
        plots.scatter({"a": (0.1, 0.2)}, xlabel="x", ylabel="y"),
        plots.plane({"a": (0.1, 0.2)}, {"b": [(0.3, 0.1), (0.5, 0.4)]}, xlabel="x", ylabel="y"),
        plots.matrices({"W": np.eye(4)}, title="t", labels="abcd"),
        plots.matrices({"A": np.eye(5), "B": np.eye(5)}, groups={"two": 2, "three": 3}, unit="cosine"),
    ],
)
def test_each_figure_draws(figure):
    assert _pixels(figure).std() > 5


_RED = Image.new("RGB", (64, 64), "red")


@pytest.mark.parametrize(
    "figure",
    [
        plots.show_images([_RED] * 9, titles=["a title"] * 9, columns=8, title="all"),
        plots.image_rows(
            [[_RED] * 2] * 2,
            labels=["before:\na photo of a sks dog", "after"],
            titles=["t = 12\nerror 0.25"] * 2,
            title="A finding in more words than fit in one line",
        ),
        plots.image_rows([[_RED] * 12], title="A finding"),
        plots.image_rows([[_RED]], title="A finding"),
    ],
)
def test_titles_and_pictures_stay_inside_the_figure_and_apart(figure):
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [axis.get_tightbbox(renderer) for axis in figure.axes]
    title = figure._suptitle.get_window_extent(renderer)
    for box in (*boxes, title):
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
    assert title.y0 >= max(box.y1 for box in boxes)


_WORDS = ["$x_$", "a dog for $5 or $6", r"\frac{$", "小明的狗", "שלום", "a\u200bb\u3000c", "[V] <s0><s1> *_`|&", "🐶"]


@pytest.mark.parametrize("words", _WORDS)
def test_any_words_in_a_figure_are_text_and_end_nothing(words):
    figures = [
        plots.show_images([_RED], titles=[words], title=words),
        plots.image_rows([[_RED]], labels=[words], titles=[words]),
        plots.loss_curves([{"step": 1, "instance_loss": 1.0}], held_out={words: {1: 0.5}}, title=words),
        plots.curves({words: ([1, 2], [3, 4]), "b": ([1], [2])}, xlabel=words, ylabel=words, marks={words: 3.5}),
        plots.bars({words: {words: 0.5, "b": 0.7}}, ylabel=words, marks={words: 1.0}),
        plots.histogram([0.1, 0.2], xlabel=words, marks={words: 0.17}),
        plots.scatter({words: (0.1, 0.2)}, xlabel=words, ylabel=words),
        plots.plane({words: (0.1, 0.2)}, {words: [(0.3, 0.1)]}, xlabel=words, ylabel=words, title=words),
        plots.matrices({words: np.eye(2)}, title=words, labels=[words] * 2, unit=words),
        plots.matrices({words: np.eye(2)}, groups={words: 2}),
    ]
    for figure in figures:  # warnings are errors here
        assert plots.html(figure, alt=words).alt == words
        assert not [text for text in figure.findobj(Text) if words in text.get_text() and text.get_parse_math()]


@pytest.mark.parametrize("number", ["00", "00b", *(f"{n:02d}" for n in range(1, 12))])
def test_the_map_of_the_course_fills_one_box_or_frames_all(number, monkeypatch):
    figure = plots.course_map(number)
    filled = [patch for patch in figure.axes[0].patches if patch.get_facecolor()[:3] == to_rgb(plots.HERE)]
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = {text.get_text(): text.get_window_extent(renderer) for text in figure.axes[0].texts if text.get_text()}
    assert len(filled) == (number != "00") and len(texts) == 13
    for box in texts.values():
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    plots.you_are_here(number)
    assert f"You are here: {number}, " in shown[0].alt


def test_the_map_knows_the_notebooks_that_there_are():
    with pytest.raises(ValueError, match="no notebook '12'"):
        plots.course_map("12")


def test_ways_begin_and_end_where_their_points_do():
    states = [np.full((3, 2), value) for value in (2.0, 1.5, 0.5)]
    [axis, other] = plots.trails({"one": states, "two": states[:2]}, title="Ways").axes
    *ways, starts, ends = axis.lines
    assert [way.get_xdata().tolist() for way in ways] == [[2.0, 1.5, 0.5]] * 3
    assert set(starts.get_xdata()) == {2.0} and set(ends.get_xdata()) == {0.5}
    assert (axis.get_title(), other.get_title()) == ("one", "two")


def test_a_joint_block_shows_the_layers_that_it_has_and_fills_those_with_adapters():
    network = Model(miniature.path()).transformer
    for block, missing in ((network.transformer_blocks[0], set()), (network.transformer_blocks[-1], {"to_add_out"})):
        axis = plots.joint_block(block, lora_targets(network), title="A block").axes[0]
        filled = [patch for patch in axis.patches if patch.get_facecolor()[:3] == to_rgb(plots.HERE)]
        words = {text.get_text() for text in axis.texts}
        adapted = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"} - missing
        assert len(filled) == len(adapted) and adapted <= words and not missing & words


def test_a_unet_is_drawn_from_its_config():
    network = load_components("miniature").unet
    figure = plots.unet(network, title="A UNet")
    words = " ".join(text.get_text() for text in figure.axes[0].texts)
    blocks = len(network.config.down_block_types) + len(network.config.up_block_types) + 1
    assert words.count("channels") == blocks == len(figure.axes[0].patches)
    with_attention = 1 + sum(
        "CrossAttn" in kind for kind in (*network.config.down_block_types, *network.config.up_block_types)
    )
    marks = [line.get_marker() for line in figure.axes[0].lines]
    assert marks.count("o") == marks.count("D") == blocks + 1 and marks.count("s") == with_attention + 1  # and a key


def test_a_shown_figure_has_a_text_and_is_small(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    plots.show(plots.show_images([_RED]), alt='a "red" <square>')
    [picture] = shown
    assert 'alt="a &quot;red&quot; &lt;square&gt;"' in picture._repr_html_() and len(picture._repr_html_()) < 20_000
    assert repr(picture) == '[figure: a "red" <square>]'


def test_a_shown_figure_is_redrawn_in_place_with_its_text():
    from IPython.core.formatters import DisplayFormatter

    first, second = (plots.html(plots.image_rows([[_RED] * n]), alt=f"{n} squares") for n in (1, 2))
    data, _ = DisplayFormatter().format(second)
    assert "2 squares" in data["text/html"] and data["text/plain"] == "[figure: 2 squares]" and first != second


def test_moving_a_slider_changes_the_picture():
    view = widgets.browse({"a": Image.new("RGB", (8, 8), "red"), "b": Image.new("RGB", (8, 8), "blue")}, "which")
    slider, image = view.widget.children
    first = image.value
    slider.value = "b"
    assert image.value != first and image.value[:4] == b"\x89PNG"


def test_before_and_after_change_places_at_each_pair():
    before, after = (
        [Image.new("RGB", (8, 8), color) for color in colors] for colors in (("red", "green"), ("blue", "black"))
    )
    view = widgets.before_after(before, after, ["on the beach", "on the beach"])
    slider, buttons, image = view.widget.children
    seen = set()
    for name in slider.options:
        for state in ("before", "after"):
            slider.value, buttons.value = name, state
            seen.add(image.value)
    assert len(slider.options) == 2 and len(seen) == 4
    with pytest.raises(ValueError):
        widgets.before_after(before, after[:1], ["a", "b"])


def _buttons(html: str) -> tuple[list[str], list[str]]:
    """The ids of a page's radio buttons, and what their labels are for."""
    return re.findall(r'<input type="radio"[^>]* id="([^"]+)"', html), re.findall(r'<label for="([^"]+)"', html)


def test_a_view_can_be_looked_through_without_a_kernel():
    two = {"a": Image.new("RGB", (8, 8), "red"), "<b>": Image.new("RGB", (300, 150), "blue")}
    pair = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    views = [widgets.browse(two, "which"), widgets.before_after(pair, pair[::-1], ["at night", "at night"])]
    pages = [view._repr_mimebundle_()["text/html"] for view in views]
    for page, names in zip(pages, (["a", "&lt;b&gt;"], ["before", "after"] * 2), strict=True):
        ids, labels = _buttons(page)
        assert ids == labels and len(set(ids)) == len(names) and page.count(" checked>") == 1
        assert re.findall(r"<label[^>]*>(.*?)</label>", page) == names and page.count("<img alt=") == len(names)
    assert not {*_buttons(pages[0])[0]} & {*_buttons(pages[1])[0]}  # buttons of two views do not switch each other
    pictures = [Image.open(io.BytesIO(base64.b64decode(d))) for d in re.findall(r'base64,([^"]+)"', pages[0])]
    assert [picture.size for picture in pictures] == [(16, 16), (256, 128)]
    red, green, blue = pictures[0].convert("RGB").getpixel((8, 8))
    assert red > 240 and max(green, blue) < 15


def test_without_ipywidgets_a_view_is_plain_html(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    for view in (widgets.before_after([_RED], [_RED], ["at night"]), widgets.browse({"at night": _RED}, "which")):
        bundle = view._repr_mimebundle_()
        assert bundle.keys() == {"text/html", "text/plain"} and "at night" in bundle["text/plain"]


def test_intervals_are_drawn_as_long_as_they_are():
    figure = plots.intervals({"x": {"near": (0.1, 0.2), "far": (1.0, 0.5)}, "y": {"far": (0.3, math.inf)}}, title="t")
    left, right = figure.axes
    near, far = (bar.get_children()[-1].get_segments()[0] for bar in left.containers)
    assert np.allclose(near[:, 0], [-0.1, 0.3]) and np.allclose(far[:, 0], [0.5, 1.5])
    assert len(right.containers) == 1 and not right.containers[0].has_xerr


def test_the_identifier_explorer_answers_and_lets_no_markup_through():
    field, answer = widgets.identifier_explorer(load_components("miniature").tokenizer).children
    assert "a good identifier" in answer.value
    field.value = "<script>"
    assert "<script>" not in answer.value and "split into" in answer.value
    said = answer.value
    field.value = " "  # nothing typed yet: nothing new to say
    assert answer.value == said
    assert widgets.browse({"a": plots.loss_curves([])}, "which").widget.children[1].value[:4] == b"\x89PNG"


def test_small_pictures_are_enlarged_by_a_whole_number():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    figure = plots.image_rows([[image, image], [image, image]], labels=["a", "b"], title="Twice", inches=1.1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    drawn = np.asarray(Image.open(buffer).convert("RGB"))
    enlarged = np.asarray(image).repeat(2, 0).repeat(2, 1)
    height, width = drawn.shape[:2]
    places = ((y, x) for y in range(height - 127) for x in range(width - 127) if (drawn[y, x] == enlarged[0, 0]).all())
    assert sum(np.array_equal(drawn[y : y + 128, x : x + 128], enlarged) for y, x in places) == 4


def test_a_gallery_shows_many_runs_on_one_page(tmp_path):
    for name, word in (("anna", "dog"), ("ben", "<cat>")):
        (tmp_path / name).mkdir()
        _RED.save(tmp_path / name / "before_after.png")
        DreamBoothConfig(class_word=word).save(tmp_path / name / "config.json")
    (tmp_path / "ben" / "metrics.json").write_text(json.dumps({"after": {"normalized_subject_fidelity": 0.875}}))
    page = plots.gallery([tmp_path / "anna", tmp_path / "ben"], tmp_path / "gallery.html", title="Room 4").read_text()
    assert page.count("data:image/png;base64,") == 2 and "<h1>Room 4</h1>" in page
    assert "ben: sks &lt;cat&gt;" in page and "<cat>" not in page and "0.88" in page
    with pytest.raises(FileNotFoundError, match="carl holds no results of a run .*before_after.png"):
        plots.gallery([tmp_path / "carl"], tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()
