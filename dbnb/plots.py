"""The course's figures: grids of pictures, curves, bars, matrices, as matplotlib figures in one style."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's colours, told apart by colour-blind readers and in a projector's light.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
COLORS = {"instance_loss": "#D55E00", "prior_loss": "#0072B2", "held_out": "#009E73"}


def show(figure: Figure, alt: str) -> None:
    """Display a figure in a notebook as a small JPEG, with a text for those who do not see it."""
    from IPython.display import display

    file = io.BytesIO()
    figure.savefig(file, format="jpeg", pil_kwargs={"quality": 85})
    data = base64.b64encode(file.getvalue()).decode()
    html = f'<img alt="{escape(alt)}" src="data:image/jpeg;base64,{data}">'
    display({"text/html": html, "text/plain": f"[figure: {alt}]"}, raw=True)


def show_images(
    images: Sequence[Image.Image], *, titles: Sequence[str] = (), columns: int = 8, inches: float = 1.2, title: str = ""
) -> Figure:
    """Pictures in a grid, row by row, each with its title."""
    rows = [list(images[start : start + columns]) for start in range(0, len(images), columns)]
    figure = image_rows(rows, inches=inches, title=title, gap=0.22 if titles else 0.0)
    for axis, text in zip((axis for axis in figure.axes if axis.images), titles, strict=False):
        axis.set_title(text, fontsize=8, pad=3)
    return figure


def image_rows(
    rows: Sequence[Sequence[Image.Image]], *, labels: Sequence[str] = (), titles: Sequence[str] = (),
    inches: float = 1.1, title: str = "", gap: float = 0.0,
) -> Figure:  # fmt: skip
    """Rows of pictures, each row with a label on its left, each column with a title; `gap` inches above each row."""
    columns = max(len(row) for row in rows)
    label_inches = 0.075 * max((len(line) for label in labels for line in label.split("\n")), default=0) + 0.1
    top_inches = 0.1 + 0.25 * bool(titles) + 0.3 * bool(title)
    width, height = label_inches + columns * inches, top_inches + len(rows) * (inches + gap)
    figure = Figure(figsize=(width, height), dpi=110)
    for r, row in enumerate(rows):
        for c in range(columns):
            left = (label_inches + c * inches) / width
            bottom = (height - top_inches - (r + 1) * (inches + gap)) / height
            axis = figure.add_axes((left, bottom, 0.97 * inches / width, 0.97 * inches / height))
            axis.axis("off")
            if c < len(row):
                axis.imshow(np.asarray(row[c]), interpolation="lanczos" if row[c].width > 64 else "nearest")
            if r == 0 and c < len(titles):
                axis.set_title(titles[c], fontsize=8)
            if c == 0 and r < len(labels):
                axis.text(-0.05, 0.5, labels[r], transform=axis.transAxes, ha="right", va="center", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10, y=1.0 - 0.12 / height)
    return figure


def _plot(xlabel: str, ylabel: str, title: str = "", size: tuple[float, float] = (6.4, 3.2)) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axis = figure.add_subplot()
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    return figure, axis


def loss_curves(
    log: Sequence[Mapping[str, Any]], *, window: int = 25, held_out: Mapping[int, float] | None = None
) -> Figure:  # fmt: skip
    """Instance and prior loss over the steps: each step as a dot, a running mean as a line.

    `held_out` is the instance loss at noise that training never draws, by step.
    """
    figure, axis = _plot("step", "mean squared error")
    for name in ("instance_loss", "prior_loss"):
        points = [(line["step"], line[name]) for line in log if name in line]
        if not points:
            continue
        steps, values = np.array(points).T
        axis.plot(steps, values, ".", ms=2, alpha=0.25, color=COLORS[name])
        w = min(window, len(values))
        axis.plot(steps[w - 1 :], np.convolve(values, np.ones(w) / w, "valid"), color=COLORS[name],
                  label=f"{name.replace('_', ' ')}, mean of {w} steps")  # fmt: skip
    if held_out:
        axis.plot(list(held_out), list(held_out.values()), "o-", ms=4, color=COLORS["held_out"],
                  label="instance loss, held-out noise")  # fmt: skip
    axis.set_ylim(0, None)
    axis.legend(frameon=False, fontsize=8)
    return figure


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, xlabel: str, ylabel: str, title: str = ""
) -> Figure:  # fmt: skip
    """Lines with markers: name -> (x values, y values)."""
    figure, axis = _plot(xlabel, ylabel, title)
    for i, (name, (x, y)) in enumerate(series.items()):
        axis.plot(x, y, "o-", ms=4, color=PALETTE[i % len(PALETTE)], label=name)
    axis.grid(alpha=0.3)
    if len(series) > 1:
        axis.legend(frameon=False, fontsize=8)
    return figure


def bars(groups: Mapping[str, Mapping[str, float]], *, ylabel: str, title: str = "") -> Figure:
    """Groups of bars: name of a group -> name of a bar -> height."""
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    figure, axis = _plot("", ylabel, title, size=(max(4.8, 1.1 * len(groups) + 1.5), 3.0))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        x = [g + (i - (len(names) - 1) / 2) * width for g in range(len(groups))]
        heights = [values.get(name, np.nan) for values in groups.values()]
        drawn = axis.bar(x, heights, width, color=PALETTE[i % len(PALETTE)], label=name)
        axis.bar_label(drawn, fmt="%.3g", fontsize=7)
    axis.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axis.margins(y=0.12)
    if len(names) > 1:
        axis.legend(frameon=False, fontsize=8)
    return figure


def scatter(points: Mapping[str, tuple[float, float]], *, xlabel: str, ylabel: str, title: str = "") -> Figure:
    """Named points."""
    figure, axis = _plot(xlabel, ylabel, title, size=(6.4, 3.8))
    for name, (x, y) in points.items():
        axis.plot(x, y, "o", color=PALETTE[0])
        axis.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axis.margins(x=0.25, y=0.1)
    axis.grid(alpha=0.3)
    return figure


def matrices(
    values: Mapping[str, np.ndarray], *, title: str = "", inches: float = 2.4, labels: Sequence[str] = ()
) -> Figure:  # fmt: skip
    """Matrices side by side as pictures, blue below zero and red above, one scale for all."""
    figure = Figure(figsize=(inches * len(values) + 0.6, inches + 0.7), dpi=110, layout="constrained")
    top = max(float(np.abs(matrix).max()) for matrix in values.values()) or 1.0
    for i, (name, matrix) in enumerate(values.items()):
        axis = figure.add_subplot(1, len(values), i + 1)
        image = axis.imshow(matrix, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest", aspect="auto")
        axis.set_title(f"{name}\n{matrix.shape[0]} x {matrix.shape[1]}", fontsize=8)
        axis.tick_params(labelsize=6)
        if labels:
            axis.set_xticks(range(len(labels)), labels, rotation=60)
            axis.set_yticks(range(len(labels)), labels)
    figure.colorbar(image, ax=figure.axes, shrink=0.8).ax.tick_params(labelsize=7)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure
