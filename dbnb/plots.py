"""The course's figures: grids of pictures and loss curves, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image


def show_images(
    images: Sequence[Image.Image], *, titles: Sequence[str] = (), columns: int = 8, inches: float = 1.2, title: str = ""
) -> Figure:
    """Pictures in a grid, row by row, each with its title."""
    rows = [list(images[start : start + columns]) for start in range(0, len(images), columns)]
    figure = image_rows(rows, inches=inches, title=title)
    for axis, text in zip(figure.axes, titles, strict=False):
        axis.set_title(text, fontsize=8)
    return figure


def image_rows(
    rows: Sequence[Sequence[Image.Image]], *, labels: Sequence[str] = (), titles: Sequence[str] = (),
    inches: float = 1.1, title: str = "",
) -> Figure:  # fmt: skip
    """Rows of pictures, each row with a label on its left, each column with a title."""
    columns = max(len(row) for row in rows)
    label_inches = 0.075 * max((len(line) for label in labels for line in label.split("\n")), default=0) + 0.1
    top_inches = 0.1 + 0.25 * bool(titles) + 0.3 * bool(title)
    width, height = label_inches + columns * inches, top_inches + len(rows) * inches
    figure = Figure(figsize=(width, height), dpi=110)
    for r, row in enumerate(rows):
        for c in range(columns):
            left = (label_inches + c * inches) / width
            bottom = (height - top_inches - (r + 1) * inches) / height
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


def loss_curves(log: Sequence[dict[str, Any]], *, window: int = 25) -> Figure:
    """Instance and prior loss over the steps: each step as a dot, a running mean as a line."""
    figure = Figure(figsize=(6.4, 3.2), dpi=110, layout="constrained")
    axis = figure.add_subplot()
    for name, color in (("instance_loss", "tab:orange"), ("prior_loss", "tab:blue")):
        points = [(line["step"], line[name]) for line in log if name in line]
        if not points:
            continue
        steps, values = np.array(points).T
        axis.plot(steps, values, ".", ms=2, alpha=0.25, color=color)
        w = min(window, len(values))
        axis.plot(steps[w - 1 :], np.convolve(values, np.ones(w) / w, "valid"), color=color,
                  label=f"{name.replace('_', ' ')}, mean of {w} steps")  # fmt: skip
    axis.set(xlabel="step", ylabel="mean squared error", ylim=(0, None))
    axis.legend(frameon=False, fontsize=8)
    return figure
