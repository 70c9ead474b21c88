"""The reliability diagram: accuracy against confidence, for one or several classifiers."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from ..evaluation.calibration import Calibration
from .style import LOOKS, MUTED, figure

FEW = 5
"""The accuracy of fewer samples says next to nothing."""


def draw_reliability(curves: Mapping[str, Calibration], title: str = "Reliability") -> Figure:
    """One line for each of `curves`; below it, where each one's samples are.

    Bins of fewer than FEW samples are left out. A marker's area is the share of the samples in its bin.
    """
    labels = [f"{name} (ECE {one.ece:.3f})" for name, one in curves.items()]
    # The legend is beside the diagram: inside it would hide lines.
    with figure(5.8 + 0.6 + 0.075 * max(map(len, labels)), 6.0) as fig:
        top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        top.plot(
            [0, 1], [0, 1], color=MUTED, linestyle=(0, (1, 2)), linewidth=1.2, label="perfectly calibrated"
        )
        for number, one in enumerate(curves.values()):
            color, marker, line = LOOKS[number % len(LOOKS)]
            bins = [k for k, share in enumerate(one.share) if round(share * one.samples) >= FEW]
            x, y = [one.confidence[k] for k in bins], [one.accuracy[k] for k in bins]
            top.plot(x, y, color=color, linestyle=line, linewidth=1.5, label=labels[number])
            top.scatter(
                x, y, s=[10 + 150 * one.share[k] for k in bins], color=color, marker=marker, alpha=0.8
            )
            edges = [k / len(one.share) for k in range(len(one.share) + 1)]
            bottom.stairs(one.share, edges, color=color, linestyle=line, linewidth=1.3)
        top.set(xlim=(0, 1.02), ylim=(0, 1.02), ylabel="accuracy", title=title)
        fig.legend(loc="outside right upper", fontsize=8.5, frameon=False)
        bottom.set(xlabel="confidence", ylabel="samples", ylim=(0, 1.02))
    return fig
