"""One look for all figures: fit for colour-blind people (Okabe and Ito's palette) and for grey print."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import atomic_path

Drawings = dict[str, Callable[[], Figure]]
"""The name of a picture's file -> what draws it."""

INK, MUTED, GRID = "#1f2328", "#6b7280", "#e5e7eb"

LOOKS: tuple[tuple[str, str, Any], ...] = (
    # Colour, marker, dashes: in an order in which neighbours differ in lightness, too.
    ("#0072B2", "s", "-"),
    ("#D55E00", "o", (0, (4, 1.6))),
    ("#009E73", "^", "-."),
    ("#CC79A7", "v", (0, (1, 1.2))),
    ("#E69F00", "D", (0, (6, 1.5, 1, 1.5))),
    ("#56B4E9", "P", "-"),
    (INK, "X", (0, (2, 1))),
    ("#8a7a00", "*", "--"),
)
BLUE, VERMILION, ORANGE, SKY = (LOOKS[i][0] for i in (0, 1, 4, 5))
NAIVE = LOOKS[1]
"""The look of the naive merge, the same in all figures."""


LINES: dict[str, dict[str, Any]] = {
    name: {"color": color, "marker": marker, "linestyle": dashes, "markersize": 3.5, "linewidth": width}
    for name, (color, marker, dashes), width in (
        ("naive", NAIVE, 1.8),
        ("permuted", LOOKS[2], 1.8),
        ("aligned", LOOKS[0], 2.0),
        ("naive_repaired", LOOKS[4], 1.4),
        ("aligned_repaired", LOOKS[5], 1.6),
    )
}

RC: Any = {  # matplotlib's own type lists every key
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


@contextmanager
def figure(width: float, height: float, **style: Any) -> Iterator[Figure]:
    """An empty figure, `width` x `height` inches, that no window system knows of; what is drawn within the block has
    the look of all figures, but for the parameters of matplotlib in `style`.
    """
    with mpl.rc_context(RC | style):
        made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(made)
        yield made


def save_png(fig: Figure, path: Path) -> Path:
    """Write `fig` as PNG, atomically."""
    with mpl.rc_context(RC), atomic_path(path) as temporary:
        fig.savefig(temporary, format="png", metadata={"Software": None})
    return path
