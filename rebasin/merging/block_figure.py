"""The picture of block weights: one bar for each block, from input to output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..files import atomic_path
from .blocks import BlockWeights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"IN": "#2a6f97", "M": "#e09f3e", "OUT": "#9e2a2b"}
OTHER = "#6c757d"


def block_figure(weights: BlockWeights, title: str = "weight of B by block") -> Figure:
    """Draw the mean weight of every block as a bar, with a line from the smallest to the largest inside it.

    More than 60 blocks (the layers of a model that is no UNet) are drawn as a step curve without their names.
    """
    from matplotlib.figure import Figure

    rows = weights.rows()
    names, means = [row.block for row in rows], [row.mean for row in rows]
    figure = Figure(figsize=(min(14, max(5, 0.38 * len(rows))), 3.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    if len(rows) > 60:
        axes.step(places, means, where="mid", color=OTHER)
        axes.set_xlabel("layer, from input to output")
    else:
        colors = [COLORS.get(name.rstrip("0123456789"), OTHER) for name in names]
        axes.bar(places, means, color=colors, width=0.8)
        axes.vlines(places, [row.low for row in rows], [row.high for row in rows], color="black", linewidth=1)
        axes.set_xticks(list(places), names, rotation=90, fontsize=8)
    low, high = min(row.low for row in rows), max(row.high for row in rows)
    axes.set_ylim(min(0, 1.05 * low), max(1.02, 1.05 * high))
    axes.set_ylabel("weight")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def save_block_figure(weights: BlockWeights, path: Path) -> None:
    """Write the picture."""
    with atomic_path(path) as temporary:
        block_figure(weights).savefig(temporary, dpi=120)
