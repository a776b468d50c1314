"""The course's figures: grids of pictures, curves, bars, matrices, as matplotlib figures in one style."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import textwrap
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure as _Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from dbnb.files import whole
from dbnb.tables import Table

# Okabe and Ito's colours, told apart by colour-blind readers and in a projector's light; markers tell them apart twice.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^Dv*"
COLORS = {"instance_loss": "#D55E00", "prior_loss": "#0072B2"}
HELD_OUT = ("#009E73", "#000000", "#56B4E9")
SMALL, LABEL, TITLE = 8, 9, 11  # points: of numbers in a figure, of labels, of its title
_DPI = 110
_SMALL_PICTURE = 96  # pixels
_CHARACTER = 0.075  # inches: the mean width of one, as a label
# A prompt may hold dollar signs: they are no mathematics. A text keeps the setting that it was made under.
_all_text_is_text = rc_context({"text.parse_math": False})


class Figure(_Figure):
    """A figure that is drawn whatever letters its words have: those that the font lacks become boxes."""

    def draw(self, renderer: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"(Glyph .* missing|Matplotlib currently does not support)")
            super().draw(renderer)


@dataclass(frozen=True, repr=False)
class Shown:
    """A figure as a notebook displays it, also where a handle's `update` redraws it."""

    html: str
    alt: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"[figure: {self.alt}]"


def html(figure: Figure, alt: str) -> Shown:
    """A figure as a small WebP, with a text for those who do not see it.

    `view = display(html(figure, alt), display_id=True)` shows it, `view.update(html(another, alt))` puts another there.
    """
    return Shown(f'<img alt="{escape(alt)}" src="data:image/webp;base64,{_webp(figure)}">', alt)


def _webp(picture: Image.Image | _Figure) -> str:
    """A figure or picture as WebP in base64."""
    file = io.BytesIO()
    if isinstance(picture, _Figure):
        picture.savefig(file, format="webp", pil_kwargs={"quality": 85, "method": 6})
    else:
        picture.save(file, format="webp", quality=85, method=6)
    return base64.b64encode(file.getvalue()).decode()


_ONE_OF = """<style>
.dbnb-one-of {{ position: relative; padding-left: {side}px; min-height: {height}px; line-height: 1.7 }}
.dbnb-one-of input {{ position: absolute; opacity: 0 }}
.dbnb-one-of label {{ padding: 0 .4em; border: 1px solid #8888; border-radius: .3em; cursor: pointer }}
.dbnb-one-of input:checked + label {{ background: #0072B2; color: white }}
.dbnb-one-of input:focus-visible + label {{ outline: 2px solid #E69F00 }}
.dbnb-one-of label + img {{ display: none; position: absolute; left: 0; top: 0; image-rendering: pixelated }}
.dbnb-one-of input:checked + label + img {{ display: block }}
</style>"""


def one_of(groups: Mapping[str, Mapping[str, Image.Image | _Figure]], alt: str, *, width: int = 256) -> Shown:
    """Pictures in one place, of which one is seen at a time: group -> name -> picture.

    Plain HTML, which needs neither a kernel nor a script: names are buttons, and the arrow keys go through them. Where
    a page's style is taken away, as on GitHub, all pictures follow each other, each behind its name.
    """
    data, height = {}, 0
    for group, pictures in groups.items():
        for name, picture in pictures.items():
            if not isinstance(picture, _Figure):
                height = max(height, round(width * picture.height / picture.width))
                if picture.width > _SMALL_PICTURE:
                    picture = picture.resize((width, round(width * picture.height / picture.width)))
                else:  # as far as its pixels stay squares; the browser enlarges it further, without a blur
                    picture = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
            else:
                height = max(height, round(width * picture.get_figheight() / picture.get_figwidth()))
            data[group, name] = _webp(picture)
    key = hashlib.sha256("".join(data.values()).encode()).hexdigest()[:8]  # no two views of a page share their buttons
    lines, number = [], 0
    for group, pictures in groups.items():
        frames = []
        for name in pictures:
            said, chosen = escape(f"{group} {name}".strip()), " checked" * (number == 0)
            frames.append(
                f'<input type="radio" name="{key}" id="{key}-{number}"{chosen}>'
                f'<label for="{key}-{number}">{escape(name)}</label>'
                f'<img alt="{said}" width="{width}" src="data:image/webp;base64,{data[group, name]}">'
            )
            number += 1
        lines.append(f"<div>{escape(group)} {' '.join(frames)}</div>")
    style = _ONE_OF.format(side=width + 16, height=height)
    return Shown(f'{style}<div class="dbnb-one-of" role="group" aria-label="{escape(alt)}">{"".join(lines)}</div>', alt)


def show(figure: Figure, alt: str) -> None:
    """Display a figure in a notebook."""
    from IPython.display import display

    display(html(figure, alt))


@_all_text_is_text
def show_images(
    images: Sequence[Image.Image], *, titles: Sequence[str] = (), columns: int = 8, inches: float = 1.2, title: str = ""
) -> Figure:
    """Pictures in a grid, row by row, each with its title."""
    rows = [list(images[start : start + columns]) for start in range(0, len(images), columns)]
    figure = image_rows(rows, inches=inches, title=title, gap=0.22 if titles else 0.0)
    for axis, text in zip((axis for axis in figure.axes if axis.images), titles, strict=False):
        axis.set_title(text, fontsize=LABEL, pad=3)
    return figure


@_all_text_is_text
def image_rows(
    rows: Sequence[Sequence[Image.Image]],
    *,
    labels: Sequence[str] = (),
    titles: Sequence[str] = (),
    inches: float = 1.1,
    title: str = "",
    gap: float = 0.0,
) -> Figure:
    """Rows of pictures, each row with a label on its left, each column with a title; `gap` inches above each row.

    Small pictures are enlarged by a whole number, so that each of their pixels is as large as every other: their side
    is then the nearest multiple to `inches`.
    """
    columns = max(len(row) for row in rows)
    tile = round(0.97 * inches * _DPI)  # pixels of the figure
    if small := max((image.width for row in rows for image in row if image.width <= _SMALL_PICTURE), default=0):
        tile = max(1, round(tile / small)) * small
    side, above_row = tile + 3, round(gap * _DPI)
    left = round(
        _DPI * (_CHARACTER * max((len(line) for text in labels for line in text.split("\n")), default=0) + 0.1)
    )
    width = left + columns * side
    wrapped = textwrap.wrap(title, max(12, int(width / (_DPI * _CHARACTER * TITLE / LABEL))))
    head = 0.12 + 0.19 * len(wrapped) if title else 0.0
    lines = max((text.count("\n") + 1 for text in titles), default=0)
    top = round(_DPI * (0.1 + head + (0.09 + 0.16 * lines if titles else 0.0)))
    height = top + len(rows) * (side + above_row)
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    for r, row in enumerate(rows):
        for c in range(columns):
            bottom = height - top - (r + 1) * (side + above_row)
            axis = figure.add_axes(
                (_exact(left + c * side, width), _exact(bottom, height), tile / width, tile / height)
            )
            axis.axis("off")
            if c < len(row):
                axis.imshow(np.asarray(row[c]), interpolation="lanczos" if row[c].width > _SMALL_PICTURE else "nearest")
            if r == 0 and c < len(titles):
                axis.set_title(titles[c], fontsize=LABEL)
            if c == 0 and r < len(labels):
                axis.text(-0.05, 0.5, labels[r], transform=axis.transAxes, ha="right", va="center", fontsize=LABEL)
    if title:
        figure.suptitle("\n".join(wrapped), fontsize=TITLE, y=1.0 - 0.08 * _DPI / height)
    return figure


def _exact(pixels: int, of: int) -> float:
    """The share of a figure that is so many of its pixels, and not one less by rounding."""
    share = pixels / of
    return share if share * of >= pixels else math.nextafter(share, 1.0)


def _plot(xlabel: str, ylabel: str, title: str = "", size: tuple[float, float] = (6.4, 3.2)) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    axis = figure.add_subplot()
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.set_title("\n".join(textwrap.wrap(title, int(size[0] / (_CHARACTER * TITLE / LABEL)))), fontsize=TITLE)
    return figure, axis


@_all_text_is_text
def _mark(axis: Any, marks: Mapping[str, float] | None) -> None:
    """Named dashed lines across an axis: what its heights are to be compared with."""
    for name, height in (marks or {}).items():
        axis.axhline(height, color="0.3", lw=1, ls="--")
        axis.annotate(
            textwrap.fill(name, 12),
            (1.0, height),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            color="0.3",
        )


@_all_text_is_text
def loss_curves(
    log: Sequence[Mapping[str, Any]],
    *,
    window: int = 25,
    held_out: Mapping[str, Mapping[int, float]] | None = None,
    title: str = "",
) -> Figure:
    """Instance and prior loss over the steps: each step as a dot, a running mean as a line.

    `held_out` holds further losses by name and step: those at noise, or of pictures, that training never sees.
    """
    figure, axis = _plot("step", "mean squared error", title)
    for name in ("instance_loss", "prior_loss"):
        points = [(line["step"], line[name]) for line in log if name in line]
        if not points:
            continue
        steps, values = np.array(points).T
        axis.plot(steps, values, ".", ms=2, alpha=0.25, color=COLORS[name])
        w = min(window, len(values))
        axis.plot(
            steps[w - 1 :],
            np.convolve(values, np.ones(w) / w, "valid"),
            color=COLORS[name],
            label=f"{name.replace('_', ' ')}, mean of {w} steps",
        )
    for i, (name, values) in enumerate((held_out or {}).items()):
        axis.plot(list(values), list(values.values()), f"{MARKERS[i]}--", ms=5, color=HELD_OUT[i % 3], label=name)
    axis.set_ylim(0, None)
    if axis.lines:
        axis.legend(frameon=False, fontsize=SMALL)
    return figure


@_all_text_is_text
def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    marks: Mapping[str, float] | None = None,
    colors: Sequence[str] = PALETTE,
) -> Figure:
    """Lines with markers: name -> (x values, y values); `marks` are heights to compare with, by name."""
    figure, axis = _plot(xlabel, ylabel, title)
    for i, (name, (x, y)) in enumerate(series.items()):
        axis.plot(x, y, f"{MARKERS[i % len(MARKERS)]}-", ms=4, color=colors[i % len(colors)], label=name)
    if all(float(value).is_integer() for x, _ in series.values() for value in x):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _mark(axis, marks)
    axis.grid(alpha=0.3)
    if len(series) > 1:
        axis.legend(frameon=False, fontsize=LABEL)
    return figure


def _three_digits(value: float) -> str:
    """A number over a bar: three digits, and no more than three decimals."""
    return f"{round(value, 3):.3g}"


@_all_text_is_text
def bars(
    groups: Mapping[str, Mapping[str, float]], *, ylabel: str, title: str = "", marks: Mapping[str, float] | None = None
) -> Figure:
    """Groups of bars: name of a group -> name of a bar -> height; `marks` are heights to compare with, by name."""
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    inches = min(9.0, max(4.8, 1.5 + len(groups) * max(1.1, 0.45 * len(names))))  # room for a number over each bar
    figure, axis = _plot("", ylabel, title, size=(inches, 3.0))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        x = [g + (i - (len(names) - 1) / 2) * width for g in range(len(groups))]
        heights = [values.get(name, np.nan) for values in groups.values()]
        drawn = axis.bar(x, heights, width, color=PALETTE[i % len(PALETTE)], label=name)
        axis.bar_label(drawn, fmt=_three_digits, fontsize=SMALL)
    _mark(axis, marks)
    axis.set_xticks(range(len(groups)), list(groups), fontsize=LABEL)
    axis.margins(y=0.14)
    if len(names) > 1:
        figure.legend(frameon=False, fontsize=SMALL, loc="outside lower center", ncols=len(names))
    return figure


@_all_text_is_text
def bar_rows(groups: Mapping[str, Mapping[str, float]], *, xlabel: str, title: str = "") -> Figure:
    """One bar a row, for many of them or long names: name of a group -> name of a bar -> length."""
    count = sum(map(len, groups.values()))
    figure, axis = _plot(xlabel, "", title, size=(6.4, 1.1 + 0.2 * count))
    start, ticks = 0, []
    for i, (name, values) in enumerate(groups.items()):
        lengths = np.nan_to_num(list(values.values()), posinf=0.0, neginf=0.0)  # a number that is none has no length
        drawn = axis.barh(range(start, start + len(values)), lengths, 0.7, color=PALETTE[i % len(PALETTE)], label=name)
        axis.bar_label(drawn, [f"{value:.3g}" for value in values.values()], fontsize=SMALL, padding=2)
        ticks += list(values)
        start += len(values)
    axis.set_yticks(range(count), ticks, fontsize=SMALL)
    axis.set_ylim(count - 0.4, -0.6)
    axis.margins(x=0.12)
    if len(groups) > 1:
        figure.legend(frameon=False, fontsize=SMALL, loc="outside lower center", ncols=len(groups))
    return figure


@_all_text_is_text
def histogram(
    values: Sequence[float], *, xlabel: str, title: str = "", marks: Mapping[str, float] | None = None
) -> Figure:
    """How often each value occurs; `marks` are values of interest, by name."""
    figure, axis = _plot(xlabel, "how often", title)
    axis.hist(np.asarray(values), bins=40, color=PALETTE[5])
    for i, (name, value) in enumerate((marks or {}).items()):
        style = ("-", "--", ":", "-.")[i % 4]
        axis.axvline(value, color=("0.0", PALETTE[1], PALETTE[0], PALETTE[2])[i % 4], ls=style, label=name)
    if marks:
        axis.legend(frameon=False, fontsize=SMALL)
    return figure


@_all_text_is_text
def scatter(points: Mapping[str, tuple[float, float]], *, xlabel: str, ylabel: str, title: str = "") -> Figure:
    """Named points, each with a mark of its own: labels beside them would cover each other where they are close."""
    figure, axis = _plot(xlabel, ylabel, title, size=(7.2, 4.0))
    for i, (name, (x, y)) in enumerate(points.items()):
        color = PALETTE[(i + i // len(MARKERS)) % len(PALETTE)]
        axis.plot(x, y, MARKERS[i % len(MARKERS)], ms=7, color=color, label=name, alpha=0.85)
    axis.margins(0.1)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize=LABEL)
    return figure


@_all_text_is_text
def plane(
    points: Mapping[str, tuple[float, float]],
    paths: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> Figure:
    """Named points in a plane, and what moves among them: each path from its first place, a ring, to its last."""
    figure, axis = _plot(xlabel, ylabel, title, size=(7.2, 4.4))
    for i, (name, (x, y)) in enumerate(sorted(points.items(), key=lambda point: point[1][1])):
        # By turns to the left and to the right, and away from the points: neighbours do not collide.
        side = dict(ha="left", xytext=(22, 0)) if i % 2 else dict(ha="right", xytext=(-22, 0))
        side |= dict(arrowprops=dict(arrowstyle="-", lw=0.5, color="0.6", shrinkA=1, shrinkB=3))
        axis.plot(x, y, "o", ms=5, color="0.45")
        axis.annotate(name, (x, y), textcoords="offset points", va="center", fontsize=SMALL, color="0.3", **side)
    for i, (name, places) in enumerate(paths.items()):
        style = dict(color=PALETTE[i % len(PALETTE)], label=name)
        axis.plot(*zip(*places, strict=True), marker=MARKERS[i % len(MARKERS)], ms=6, lw=1.5, **style)
        axis.plot(*places[0], "o", ms=11, mfc="none", color=style["color"])
    axis.margins(0.2)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize=LABEL)
    return figure


@_all_text_is_text
def intervals(
    panels: Mapping[str, Mapping[str, tuple[float, float]]], *, faint: Collection[str] = (), title: str = ""
) -> Figure:
    """Panels side by side with the same rows, each a value with the half-width of its interval, and a line at 0.

    `panels` is the label of a panel's axis -> row -> (value, half-width); the rows in `faint` are drawn hollow.
    """
    names = list(dict.fromkeys(name for rows in panels.values() for name in rows))
    figure = Figure(figsize=(2.4 + 3.0 * len(panels), 1.0 + 0.26 * len(names)), dpi=_DPI, layout="constrained")
    for i, (label, rows) in enumerate(panels.items()):
        axis = figure.add_subplot(1, len(panels), i + 1)
        axis.axvline(0.0, color="0.3", lw=1, ls="--")
        for y, name in enumerate(names):
            if name in rows:
                value, half = rows[name]
                away = abs(value) > half
                axis.errorbar(
                    value,
                    y,
                    xerr=half if math.isfinite(half) else None,
                    fmt="o",
                    ms=5,
                    mfc="white" if name in faint else None,
                    color=PALETTE[1] if away else PALETTE[0],
                    capsize=3,
                    lw=1.2,
                )
        axis.set_yticks(range(len(names)), names if i == 0 else [""] * len(names), fontsize=LABEL)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3, axis="x")
    figure.suptitle(title, fontsize=TITLE)
    return figure


@_all_text_is_text
def clouds(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    groups: np.ndarray | None = None,
    labels: Sequence[str] = (),
    titles: Sequence[str] = (),
    title: str = "",
    limit: float = 2.6,
    inches: float = 1.5,
) -> Figure:
    """Rows of panels, each with a cloud of (N, 2) points of the plane, from -`limit` to `limit` both ways.

    `groups`, (N,) numbers from 0, give every point a colour. Each row has a label on its left, each column a title.
    """
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(columns * inches + 1.0, len(rows) * inches + 0.6), dpi=_DPI, layout="constrained")
    for r, row in enumerate(rows):
        for c, points in enumerate(row):
            axis = figure.add_subplot(len(rows), columns, r * columns + c + 1, aspect="equal")
            colors = np.zeros(len(points), dtype=int) if groups is None else groups
            axis.scatter(points[:, 0], points[:, 1], s=1.5, c=np.array(PALETTE)[colors], linewidths=0)
            axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[])
            if r == 0 and c < len(titles):
                axis.set_title(titles[c], fontsize=LABEL)
            if c == 0 and r < len(labels):
                axis.set_ylabel(labels[r], fontsize=LABEL, rotation=0, ha="right", va="center")
    if title:
        figure.suptitle(
            "\n".join(textwrap.wrap(title, int(columns * inches / (_CHARACTER * TITLE / LABEL)))), fontsize=TITLE
        )
    return figure


@_all_text_is_text
def trails(
    panels: Mapping[str, Sequence[np.ndarray]], *, title: str = "", limit: float = 2.6, inches: float = 2.4
) -> Figure:
    """Panels side by side, each with the ways of N points of the plane: name -> its states, each (N, 2), in order.

    A gray mark is where a way begins, an orange one where it ends.
    """
    figure = Figure(figsize=(len(panels) * inches, inches + 0.5), dpi=_DPI, layout="constrained")
    for i, (name, states) in enumerate(panels.items()):
        axis = figure.add_subplot(1, len(panels), i + 1, aspect="equal")
        ways = np.stack(states)
        axis.plot(ways[..., 0], ways[..., 1], "-", lw=1.0, alpha=0.7, color=PALETTE[0])
        axis.plot(*ways[0].T, "o", ms=2.5, color="0.5")
        axis.plot(*ways[-1].T, "o", ms=3, color=PALETTE[1])
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[])
        axis.set_title(name, fontsize=LABEL)
    if title:
        wrapped = textwrap.wrap(title, int(len(panels) * inches / (_CHARACTER * TITLE / LABEL)))
        figure.suptitle("\n".join(wrapped), fontsize=TITLE)
    return figure


@_all_text_is_text
def grid(pictures: Mapping[tuple[int, float], Image.Image], *, title: str = "") -> Figure:
    """The pictures of `validation.grid`: a row a checkpoint, a column a strength."""
    steps, strengths = (list(dict.fromkeys(key[i] for key in pictures)) for i in (0, 1))
    return image_rows(
        [[pictures[step, strength] for strength in strengths] for step in steps],
        labels=[f"step {step}" for step in steps],
        titles=[f"strength {strength:g}" for strength in strengths],
        title=title,
    )


@_all_text_is_text
def trade_off(
    points: Mapping[int, tuple[float, float]], values: Mapping[int, float], *, chosen: int | None = None
) -> Figure:
    """A run's way from the base, step by step: what it kept of the class against what it gained of the subject.

    `points` is step -> (kept, gained), `values` step -> what both come to, drawn beside it; `chosen` is marked in both.
    """
    figure = Figure(figsize=(8.4, 3.4), dpi=_DPI, layout="constrained")
    way, height = figure.subplots(1, 2)
    kept, gained = zip(*(points[step] for step in sorted(points)), strict=True)
    way.plot(kept, gained, "o-", ms=4, color=PALETTE[0])
    for step in sorted(points):
        way.annotate(str(step), points[step], xytext=(4, 4), textcoords="offset points", fontsize=SMALL)
    way.set(xlabel="share of the class kept", ylabel="share of the subject gained")
    way.set_title("step by step", fontsize=LABEL)
    height.plot(list(values), list(values.values()), "o-", ms=4, color=PALETTE[0])
    height.set(xlabel="step", ylabel="trade-off")
    height.set_title("harmonic mean of what was gained and kept", fontsize=LABEL)
    height.xaxis.set_major_locator(MaxNLocator(integer=True))
    if chosen is not None:
        for axis, place in ((way, points[chosen]), (height, (chosen, values[chosen]))):
            axis.plot(*place, "*", ms=15, color=PALETTE[1], label=f"best: step {chosen}")
            axis.legend(frameon=False, fontsize=SMALL)
    for axis in (way, height):
        axis.grid(alpha=0.3)
        axis.margins(0.12)
    return figure


@_all_text_is_text
def matrices(
    values: Mapping[str, np.ndarray],
    *,
    title: str = "",
    inches: float = 2.4,
    labels: Sequence[str] = (),
    groups: Mapping[str, int] | None = None,
    unit: str = "",
    aspect: str = "auto",
) -> Figure:
    """Matrices, each (rows, columns), side by side as pictures, blue below zero and red above, one scale for all.

    Each fills its place, or with `aspect` "equal" shows its numbers as squares.
    `labels` names each row and column; `groups` names so many of them at a time and draws a line between two groups.
    """
    figure = Figure(figsize=(inches * len(values) + 0.6, inches + 0.7), dpi=_DPI, layout="constrained")
    top = max(float(np.abs(matrix).max()) for matrix in values.values()) or 1.0
    for i, (name, matrix) in enumerate(values.items()):
        axis = figure.add_subplot(1, len(values), i + 1)
        image = axis.imshow(matrix, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest", aspect=aspect)
        axis.set_title(f"{name}\n{matrix.shape[0]} x {matrix.shape[1]}", fontsize=LABEL)
        axis.tick_params(labelsize=SMALL if labels or groups else 6)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(4, integer=True))
        if labels:
            axis.set_xticks(range(len(labels)), labels, rotation=60)
            axis.set_yticks(range(len(labels)), labels)
        if groups:
            ends = list(accumulate(groups.values()))
            middles = [end - (size + 1) / 2 for end, size in zip(ends, groups.values(), strict=True)]
            axis.set_xticks(middles, list(groups))
            axis.set_yticks(middles, list(groups) if i == 0 else [""] * len(groups), rotation=90, va="center")
            for end in ends[:-1]:
                axis.axhline(end - 0.5, color="black", lw=1)
                axis.axvline(end - 0.5, color="black", lw=1)
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.8, label=unit)
    bar.ax.tick_params(labelsize=SMALL)
    if title:
        wrapped = textwrap.wrap(title, max(12, int((inches * len(values) + 0.6) / (_CHARACTER * TITLE / LABEL))))
        figure.suptitle("\n".join(wrapped), fontsize=TITLE)
    return figure


# The course's notebooks: what each is about, and its place in a grid of columns and rows, counted from the top left.
_COURSE = {
    "01": ("photographs\nand prompts", (0, 0)),
    "02": ("class images", (0, 1)),
    "03": ("the base,\nloaded, frozen", (0, 2)),
    "04": ("adapters", (1, 2)),
    "05": ("dataset\nand batches", (1, 0)),
    "06": ("training", (2, 1)),
    "07": ("pictures,\nadapter file", (3, 1)),
    "08": ("measures", (4, 1)),
    "00b": ("how a base\ndraws", (2, 2)),
    "09": ("when it\ngoes wrong", (3, 2)),
    "10": ("on a\nreal base", (4, 2)),
    "11": ("flow\nmatching", (2, 0)),
}
_ARROWS = (
    ("01", "05"),
    ("02", "05"),
    ("03", "02"),
    ("03", "04"),
    ("05", "06"),
    ("04", "06"),
    ("06", "07"),
    ("07", "08"),
)
_BOX = (1.5, 0.62)  # inches
HERE = "#D55E00"


def _box(axis: Any, center: tuple[float, float], size: tuple[float, float], text: str, *, here: bool = False) -> None:
    """A box with a text in the middle, filled where the reader is."""
    axis.add_patch(
        FancyBboxPatch(
            (center[0] - size[0] / 2, center[1] - size[1] / 2),
            *size,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=HERE if here else "white",
            edgecolor=HERE if here else "0.4",
            lw=1.2,
            zorder=2,
        )
    )
    axis.text(*center, text, ha="center", va="center", fontsize=SMALL, color="white" if here else "black", zorder=3)


def _arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    style = {"color": "0.4", "lw": 1.2} | style
    axis.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", shrinkA=2, shrinkB=2, **style), zorder=1)


def _sheet(width: float, height: float) -> tuple[Figure, Any]:
    """A figure without axes, to be drawn on in inches."""
    figure = Figure(figsize=(width, height), dpi=_DPI)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.axis("off")
    return figure, axis


def course_map(here: str) -> Figure:
    """The way from photographs to measures, a box for each notebook: `here` is filled; "00" frames all.

    Raises ValueError for a number that no notebook has.
    """
    if here != "00" and here not in _COURSE:
        raise ValueError(f"There is no notebook {here!r}: give one of 00, {', '.join(sorted(_COURSE))}.")
    figure, axis = _sheet(9.2, 2.95)
    places = {number: (1.0 + 1.8 * x, 2.2 - 0.85 * y) for number, (_, (x, y)) in _COURSE.items()}
    for number, (name, _) in _COURSE.items():
        _box(axis, places[number], _BOX, f"{number}  {name}", here=number == here)
    for start, end in _ARROWS:
        (x0, y0), (x1, y1) = places[start], places[end]
        if x0 == x1:
            up = math.copysign(_BOX[1] / 2, y1 - y0)
            _arrow(axis, (x0, y0 + up), (x1, y1 - up))
        else:
            _arrow(axis, (x0 + _BOX[0] / 2, y0), (x1 - _BOX[0] / 2, y1))
    if here == "00":
        axis.add_patch(FancyBboxPatch((0.12, 0.1), 8.96, 2.5, boxstyle="round,pad=0", fill=False, ec=HERE, lw=2))
        axis.text(4.6, 2.78, "you are here: all of it, in one go", ha="center", va="center", color=HERE, fontsize=LABEL)
    else:
        x, y = places[here]
        side = -1 if _COURSE[here][1][1] == 2 else 1  # below the last row: an arrow goes up from it
        axis.text(x, y + 0.41 * side, "you are here", ha="center", va="center", color=HERE, fontsize=LABEL, zorder=3)
    return figure


def you_are_here(number: str) -> None:
    """Display the course's map in a notebook, with the place of that notebook marked."""
    name = "the whole course" if number == "00" else " ".join(_COURSE[number][0].split())
    alt = (
        "The course as boxes: photographs and class images make the dataset, the base gets adapters, both meet in "
        f"training, after which come pictures, the adapter file and measures. You are here: {number}, {name}"
    )
    show(course_map(number), alt=alt)


def unet(network: Any, *, title: str = "") -> Figure:
    """A UNet as a U: its blocks with their layers, skip connections, the timestep's and the prompt's ways in.

    `network` is a diffusers UNet2DConditionModel; what is drawn is read from its config.
    """
    config = network.config
    channels, count = config.block_out_channels, len(config.block_out_channels)
    side = config.sample_size
    size, left, right, step = (2.1, 0.66), 2.1, 6.7, 0.95
    height = step * (count + 1) + 1.75
    figure, axis = _sheet(8.8, height)
    top = height - 1.35

    def layers(kind: str) -> str:
        return "convolutions, self- and\ncross-attention" if "CrossAttn" in kind else "convolutions"

    middle = ((left + right) / 2, top - step * count)
    down = [(left, top - step * i) for i in range(count)]
    up = [(right, top - step * i) for i in range(count)]
    for i, kind in enumerate(config.down_block_types):
        _box(axis, down[i], size, f"down {i}: {side // 2**i} x {side // 2**i}, {channels[i]} channels\n{layers(kind)}")
    small = side // 2 ** (count - 1)
    _box(axis, middle, size, f"middle: {small} x {small}, {channels[-1]} channels\n{layers('CrossAttn')}")
    for i, kind in enumerate(config.up_block_types):
        level = count - 1 - i
        text = f"up {i}: {side // 2**level} x {side // 2**level}, {channels[level]} channels\n{layers(kind)}"
        _box(axis, up[level], size, text)
    half = (size[0] / 2, size[1] / 2)
    for level in range(count):
        _arrow(axis, (left + half[0], down[level][1]), (right - half[0], up[level][1]), ls="--")
        if level:
            _arrow(axis, (left, down[level - 1][1] - half[1]), (left, down[level][1] + half[1]))
            _arrow(axis, (right, up[level][1] + half[1]), (right, up[level - 1][1] - half[1]))
    _arrow(axis, (left, down[-1][1] - half[1]), (middle[0] - half[0], middle[1]))
    _arrow(axis, (middle[0] + half[0], middle[1]), (right, up[-1][1] - half[1]))
    _arrow(axis, (left, top + 0.72), (left, top + half[1]))
    _arrow(axis, (right, top + half[1]), (right, top + 0.72))
    axis.text(middle[0], top + 0.1, "skip connections", ha="center", va="bottom", fontsize=SMALL, color="0.3")
    shape = f"{side} x {side} x"
    for x, text in (
        (left, f"noisy latents, {shape} {config.in_channels}"),
        (right, f"answer, {shape} {config.out_channels}"),
    ):
        axis.text(x, top + 0.76, text, ha="center", va="bottom", fontsize=LABEL)
    _ways_in(
        axis, (*down, *up, middle), (*config.down_block_types, *reversed(config.up_block_types), "CrossAttn"), half
    )
    if title:
        axis.text(middle[0], height - 0.22, title, ha="center", va="center", fontsize=TITLE)
    return figure


def _ways_in(axis: Any, places: Sequence[tuple[float, float]], kinds: Sequence[str], half: tuple[float, float]) -> None:
    """Marks at each block: where timestep and prompt come in, and where adapters can sit."""
    dot, square, diamond = (dict(marker=m, ms=7, color=PALETTE[i], ls="") for m, i in (("o", 0), ("s", 2), ("D", 4)))
    for (x, y), kind in zip(places, kinds, strict=True):
        attention = "CrossAttn" in kind
        axis.plot(x - half[0] + 0.02, y + half[1], **dot, zorder=4)
        axis.plot(x - half[0] + 0.02, y - half[1], **diamond, mfc=PALETTE[4] if attention else "white", zorder=4)
        if attention:
            axis.plot(x + half[0] - 0.02, y + half[1], **square, zorder=4)
    key = (
        (dot, "the timestep, as an embedding,\nenters each block's convolutions"),
        (square, "the prompt's hidden states\nenter in cross-attention"),
        (diamond, "can have adapters: on attention\n(filled) or on other layers only"),
    )
    for i, (mark, text) in enumerate(key):
        axis.plot(0.3 + 2.9 * i, 0.3, **mark)
        axis.text(0.45 + 2.9 * i, 0.3, text, va="center", fontsize=SMALL)


# A joint attention's block, column by column: the layers of the picture's side, then those of the text's.
_JOINT = (
    (("norm1.linear",), ("norm1_context.linear",)),
    (("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    (("attn.to_out.0",), ("attn.to_add_out",)),
    (("ff.net.0.proj", "ff.net.2"), ("ff_context.net.0.proj", "ff_context.net.2")),
)


def joint_block(block: Any, targets: Collection[str], *, title: str = "") -> Figure:
    """A transformer's block with joint attention: the linear layers of both sides, and where the sides meet.

    `block` is a diffusers JointTransformerBlock; what is drawn are the layers that it has, filled where their name ends
    in one of `targets`, as peft reads them.
    """
    names = {name for name, _ in block.named_modules()}
    figure, axis = _sheet(9.2, 3.5)
    rows, meeting, size = (2.35, 0.95), 4.98, (1.5, 0.27)
    columns = (1.75, 3.55, 6.4, 8.3)
    for y, what in zip(rows, ("picture\ntokens", "text\ntokens"), strict=True):
        axis.text(0.4, y, what, ha="center", va="center", fontsize=LABEL)
        stops = [(0.7, 0.0)]
        for x, stacks in zip(columns, _JOINT, strict=True):
            layers = [name for name in stacks[rows.index(y)] if name in names]
            for i, name in enumerate(layers):
                adapted = any(name == target or name.endswith(f".{target}") for target in targets)
                place = (x, y + 0.34 * ((len(layers) - 1) / 2 - i))
                _box(axis, place, size, name.removeprefix("attn."), here=adapted)
            if layers:
                stops.append((x - size[0] / 2, x + size[0] / 2))
            if x == columns[1]:
                stops.append((meeting - 0.4, meeting + 0.4))
        for (*_, end), (start, *_) in zip(stops, stops[1:], strict=False):
            _arrow(axis, (end or 0.7, y), (start, y))
    _box(axis, (meeting, sum(rows) / 2), (0.8, 2.5), "one\nattention\nover both")
    for x, text in zip((columns[0], columns[3]), ("scaled by\nthe time", "each token\nby itself"), strict=True):
        axis.text(x, sum(rows) / 2, text, ha="center", va="center", fontsize=SMALL, color="0.3")
    axis.text(4.6, 0.15, "filled: gets an adapter", ha="center", va="center", fontsize=LABEL, color=HERE)
    axis.text(4.6, 3.28, title, ha="center", va="center", fontsize=TITLE)
    return figure


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>body {{ font: 1rem/1.4 sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }}
img {{ max-width: 100% }} figure {{ margin: 2rem 0 }} td, th {{ padding-right: 1.5rem; text-align: left }}</style>
<h1>{title}</h1>
{table}
{figures}
</html>
"""
_SHOWN = ("normalized_subject_fidelity", "scene_recognised", "class_diversity_ratio", "class_subject_similarity")


def gallery(folders: Sequence[str | Path], path: str | Path, *, title: str = "What we have taught the model") -> Path:
    """Write one HTML page of many runs, such as a class's: each run's figure, and a table of what was measured.

    A folder is one that `python -m dbnb` has written. The pictures are within the page, so that it can be sent as it
    is. Returns its path. Raises FileNotFoundError that names a folder without results.
    """
    rows, figures = Table(), []
    for folder in map(Path, folders):
        try:
            picture = (folder / "before_after.png").read_bytes()
            settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise FileNotFoundError(
                f"{folder} holds no results of a run ({error.strerror}: {Path(error.filename).name}): give a folder "
                "that `python -m dbnb` has written."
            ) from error
        metrics = folder / "metrics.json"
        after = json.loads(metrics.read_text(encoding="utf-8"))["after"] if metrics.is_file() else {}
        name = f"{folder.name}: {settings['identifier']} {settings['class_word']}"
        rows.append(
            {"run": name, "steps": str(settings["max_train_steps"])}
            | {key.replace("_", " "): f"{after[key]:.2f}" if key in after else "" for key in _SHOWN}
        )
        data = base64.b64encode(picture).decode()
        alt = f"The photographs of {name}, and what the model draws before and after"
        figures.append(
            f"<figure><figcaption><h2>{escape(name)}</h2></figcaption>"
            f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}"></figure>'
        )
    with whole(Path(path)) as temporary:
        page = _PAGE.format(title=escape(title), table=rows._repr_html_(), figures="\n".join(figures))
        temporary.write_text(page, encoding="utf-8")
    return Path(path)
