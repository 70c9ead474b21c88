"""samples.png: what the endpoints and the midpoints generate from the same prompts and the same noise."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..evaluation.samples import Samples
from .style import INK, MUTED, figure, save_png

NAME = "samples.png"
XYZ = "xyz.png"


def draw_samples(samples: Samples) -> Figure:
    """One row for each model, one column for each prompt."""
    columns = len(samples.prompts)
    size = 1.5 + 1.05 * columns, 0.55 + 1.08 * len(samples.rows)
    with figure(*size, **{"axes.grid": False}) as fig:
        axes = fig.subplots(len(samples.rows), columns, squeeze=False)
        for row, (label, images) in zip(axes, samples.rows.items(), strict=True):
            for ax, image in zip(row, images, strict=True):
                # Nearest neighbour: small images are shown as they are, not smoothed into something better.
                ax.imshow(np.asarray(image.convert("RGB")), interpolation="nearest")
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
            row[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8, color=INK, fontsize=10)
        for ax, prompt in zip(axes[0], samples.prompts, strict=True):
            text = "\n".join(textwrap.wrap(prompt, 15)) or "(no prompt)"
            ax.set_title(text, fontsize=7.5, fontweight="normal", color=MUTED, loc="center")
    return fig


def draw_xyz(seeds: Mapping[int, Samples]) -> Figure:
    """Models downwards, prompts to the right, and the seeds of a prompt side by side: the grid that people post."""
    whole = next(iter(seeds.values()))
    prompts = [f"{prompt}, seed {seed}" for prompt in whole.prompts for seed in seeds]
    rows = {
        label: [made.rows[label][i] for i in range(len(whole.prompts)) for made in seeds.values()]
        for label in whole.rows
    }
    return draw_samples(Samples(prompts, rows))


def save_xyz(seeds: Mapping[int, Samples], path: Path) -> Path:
    """Draw the grid of several seeds into the PNG file `path`."""
    return save_png(draw_xyz(seeds), path)


def save_samples(samples: Samples, path: Path) -> Path:
    """Draw the grid into the PNG file `path`."""
    return save_png(draw_samples(samples), path)
