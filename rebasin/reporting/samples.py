"""samples.png: what the endpoints and the midpoints generate from the same prompts and the same noise."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL.Image import Image, Resampling

from ..evaluation.samples import Samples
from .style import INK, MUTED, figure, save_png

NAME = "samples.png"
XYZ = "xyz.png"

DOTS = 150
"""Of an inch, in the file."""

CELL, LARGE = 0.94, 2.0
"""Sides of an image on the page in inches: at least, and at most."""

GAP, MARGIN, LINE, LETTER = 0.11, 0.08, 0.145, 0.1
"""Between images, around all, the height of a line of a title, and about the width of a letter of a label; inches."""

LINES, WIDE = 4, 26
"""At most so many lines of a prompt, and letters in a line of a label: people's prompts and file names are long."""

Columns = Sequence[tuple[str, Sequence[str]]]
"""What stands over the columns: a title over some of them, and what each of those is."""


def draw_samples(samples: Samples) -> Figure:
    """One row for each model, one column for each prompt."""
    return _draw(samples.rows, [(prompt, [""]) for prompt in samples.prompts])


def draw_xyz(seeds: Mapping[int, Samples]) -> Figure:
    """Models downwards, prompts to the right, and the seeds of a prompt side by side: the grid that people post."""
    whole = next(iter(seeds.values()))
    rows = {
        label: [made.rows[label][i] for i in range(len(whole.prompts)) for made in seeds.values()]
        for label in whole.rows
    }
    return _draw(rows, [(prompt, [f"seed {seed}" for seed in seeds]) for prompt in whole.prompts])


def _draw(rows: Mapping[str, Sequence[Image]], columns: Columns) -> Figure:
    """All places are given in inches, so that no title and no label takes room from the images."""
    side = min(max(max(next(iter(rows.values()))[0].size) / DOTS, CELL), LARGE)
    step = side + GAP
    labels = ["\n".join(textwrap.wrap(label, WIDE)) for label in rows]
    left = 2 * MARGIN + LETTER * max(len(line) for label in labels for line in label.split("\n"))
    # Columns of one prompt are close together, prompts further apart.
    starts, at = [], left
    for _, own in columns:
        starts.append(at)
        at += step * len(own) + (GAP if len(own) > 1 else 0)
    titles = [
        textwrap.wrap(title, max(8, int(15 * (side + step * (len(own) - 1)))), max_lines=LINES, placeholder=" ...")
        or ["(no prompt)"]
        for title, own in columns
    ]  # fmt: skip
    seconds = any(any(own) for _, own in columns)
    top = MARGIN + LINE * (max(map(len, titles)) + seconds) + 0.06
    width, height = at - GAP + MARGIN, top + step * len(rows) - GAP + MARGIN
    with figure(width, height, **{"axes.grid": False}) as fig:
        fig.set_layout_engine("none")

        def write(x: float, y: float, text: str, color: str, size: float, **where: Any) -> None:
            fig.text(x / width, 1 - y / height, text, color=color, fontsize=size, **where)

        place = 0
        for start, title, (_, own) in zip(starts, titles, columns, strict=True):
            for number, second in enumerate(own):
                x = start + step * number
                if second:
                    write(x + side / 2, top - 0.05, second, MUTED, 7.5, ha="center", va="bottom")
                for row, images in enumerate(rows.values()):
                    y = top + step * row
                    ax = fig.add_axes((x / width, 1 - (y + side) / height, side / width, side / height))
                    ax.imshow(_seen(images[place], round(side * DOTS)), interpolation="nearest")
                    ax.set_axis_off()
                place += 1
            middle = start + (step * len(own) - GAP) / 2
            low = top - 0.05 - LINE * seconds
            write(middle, low, "\n".join(title), MUTED, 7.5, ha="center", va="bottom")
        for row, label in enumerate(labels):
            write(left - MARGIN, top + step * row + side / 2, label, INK, 10, ha="right", va="center")
    return fig


def _seen(image: Image, dots: int) -> np.ndarray:
    """Small images are shown as they are, not smoothed into something better; large ones are shrunk with care."""
    shown = image.convert("RGB")
    if max(shown.size) > dots:
        shown.thumbnail((dots, dots), Resampling.LANCZOS)
    return np.asarray(shown)


def save_xyz(seeds: Mapping[int, Samples], path: Path) -> Path:
    """Draw the grid of several seeds into the PNG file `path`."""
    return save_png(draw_xyz(seeds), path)


def save_samples(samples: Samples, path: Path) -> Path:
    """Draw the grid into the PNG file `path`."""
    return save_png(draw_samples(samples), path)
