"""One look for all figures: fit for colour-blind people (Okabe and Ito's palette) and for grey print."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..checkpoints import atomic_path

INK, MUTED, GRID = "#1f2328", "#6b7280", "#e5e7eb"

LINES: dict[str, dict[str, Any]] = {
    # Lightness, dashes and markers differ as well as hue, so that the lines stay apart without colour.
    "naive": {
        "color": "#D55E00",
        "linestyle": (0, (4, 1.6)),
        "marker": "o",
        "markersize": 3.5,
        "linewidth": 1.8,
    },
    "aligned": {"color": "#0072B2", "linestyle": "-", "marker": "s", "markersize": 3.5, "linewidth": 2.0},
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


def figure(width: float, height: float) -> Figure:
    """An empty figure, `width` x `height` inches, that no window system knows of."""
    with mpl.rc_context(RC):
        result = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(result)
    return result


def save_png(fig: Figure, path: Path) -> Path:
    """Write `fig` as PNG, atomically."""
    buffer = io.BytesIO()
    with mpl.rc_context(RC):
        fig.savefig(buffer, format="png", metadata={"Software": None})
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return path
