"""curve.png: the loss (and accuracy) on the line from A to B, before and after aligning."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .numbers import number
from .results import Results
from .style import INK, LINES, MUTED, figure

SPLITS = {"heldout": "held-out data", "train": "training data"}


def draw_curves(results: Results) -> Figure:
    """One row for each split; the loss on the left and, for classifiers, the accuracy on the right."""
    curves: dict[str, dict[str, Any]] = results["curves"]
    accuracy = any("accuracy" in kind["metrics"] for split in curves.values() for kind in split.values())
    repaired = any("_repaired" in name for kinds in curves.values() for name in kinds)
    width, height = 9.6 if accuracy else 6.4, 3.8
    with figure(width + 3.2 * repaired, (height + 0.4 * repaired) * len(curves)) as fig:
        axes = fig.subplots(len(curves), 2 if accuracy else 1, squeeze=False)
        for row, (split, kinds) in zip(axes, curves.items(), strict=True):
            if results["algorithm"] == "naive":
                kinds = {name: curve for name, curve in kinds.items() if name.startswith("naive")}
            _loss_panel(row[0], kinds)
            _frame(row[0], f"Loss on {SPLITS.get(split, split)}", results["endpoints"])
            if accuracy:
                _accuracy_panel(row[1], kinds)
                _frame(row[1], f"Accuracy on {SPLITS.get(split, split)}", results["endpoints"])
    return fig


def _shown(name: str) -> str:
    return name.replace("_", ", ")


def _loss_panel(ax: Axes, kinds: dict[str, Any]) -> None:
    losses = np.asarray(next(iter(kinds.values()))["losses"], dtype=float)
    ends = losses[[0, -1]]
    ax.plot([0, 1], ends, color=MUTED, linestyle=":", linewidth=1.2, zorder=1)
    highest = max((curve["barrier"] or 0) for curve in kinds.values())
    for i, (name, curve) in enumerate(kinds.items()):
        losses = np.asarray(curve["losses"], dtype=float)
        label = f"{_shown(name)}: barrier {number(curve['barrier'])}"
        ax.plot(curve["lambdas"], losses, label=label, zorder=3, **LINES[name])
        if (curve["barrier"] or 0) > 0.08 * highest:
            shift = 0.012 * (2 * i - len(kinds) + 1)  # side by side where both maxima are at the same lambda
            _mark_barrier(ax, curve, LINES[name]["color"], shift)
    ax.plot([0, 1], ends, "o", color=INK, markersize=6, zorder=4, clip_on=False)
    ax.set_ylabel("loss (lower is better)")


def _mark_barrier(ax: Axes, curve: dict[str, Any], color: str, shift: float) -> None:
    """A double arrow from the line between the endpoints up to the curve, where the difference is largest."""
    losses = curve["losses"]
    x = curve["argmax"] + shift
    top = float(np.interp(x, curve["lambdas"], losses))
    bottom = (1 - x) * losses[0] + x * losses[-1]
    arrow = {"arrowstyle": "<->", "color": color, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", xy=(x, top), xytext=(x, bottom), arrowprops=arrow, zorder=2)


def _accuracy_panel(ax: Axes, kinds: dict[str, Any]) -> None:
    for name, curve in kinds.items():
        values = np.asarray(curve["metrics"]["accuracy"], dtype=float)
        middle = float(np.interp(0.5, curve["lambdas"], values))
        ax.plot(
            curve["lambdas"], values, label=f"{_shown(name)}: midpoint {middle:.1%}", zorder=3, **LINES[name]
        )
        ax.plot([0, 1], values[[0, -1]], "o", color=INK, markersize=6, zorder=4, clip_on=False)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_ylabel("accuracy")


def _frame(ax: Axes, title: str, endpoints: dict[str, str]) -> None:
    lines = len(ax.get_legend_handles_labels()[1])
    ax.set_title(title, pad=24 if lines < 4 else 40)
    ax.set(xlabel="λ, share of B", xlim=(-0.02, 1.02))
    ends = f"0\nA: {endpoints['a']}", f"1\nB: {endpoints['b']}"
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], [ends[0], "0.25", "0.5", "0.75", ends[1]])
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 0.99),
        ncols=3 if lines < 4 else 2,
        columnspacing=1.2,
        handlelength=1.6,
    )
