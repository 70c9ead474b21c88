"""The figures of an experiment, drawn from what its file declares: x, y, series, panels.

    figures:
      - name: barrier                      # the file's name
        kind: lines                        # lines (default), bars, contour
        title: Barrier against width
        x: model.width                     # a column: an option, a measurement, or a list in each row
        y: barrier/heldout/loss            # a column, or several with their labels: {naive: ..., aligned: ...}
        series: [algo.name]                # columns whose values make a line each
        baseline: {naive: naive/barrier/heldout/loss}   # drawn once, over all series
        panel: model.name                  # a picture for each value
        where: {split: heldout}            # rows that count: a value, or a list of values
        x_label: width
        y_label: barrier
        log_x: true
        log_y: false
        diagonal: false                    # the line y = x
        zero: true                         # the y axis begins at 0

Rows that agree in x, series and panel (other seeds) are averaged; the bar goes from the least to the largest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from ..errors import ConfigError, unknown
from .style import INK, LOOKS, MUTED, NAIVE, figure, save_png
from .sweep import Row, Sweep

KINDS = ("lines", "bars", "contour")


@dataclass(frozen=True)
class Plot:
    """What an experiment's file says about a figure; see above."""

    name: str
    x: str
    y: str | Mapping[str, str]
    kind: str = "lines"
    title: str = ""
    series: Sequence[str] = ()
    baseline: Mapping[str, str] = field(default_factory=dict)
    panel: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    x_label: str | None = None
    y_label: str | None = None
    log_x: bool = False
    log_y: bool = False
    diagonal: bool = False
    zero: bool = True
    z: str | None = None  # of contour
    points: str | None = None  # of contour: a column with {label: [x, y]}

    @classmethod
    def declared(cls, data: Mapping[str, Any]) -> Plot:
        """Raises ConfigError: a field that is unknown or missing."""
        for key in data:
            if key not in cls.__dataclass_fields__:
                raise unknown(f"A figure has no field {key!r}", key, cls.__dataclass_fields__)
        series = data.get("series", ())
        try:
            plot = cls(**{**data, "series": (series,) if isinstance(series, str) else tuple(series)})
        except TypeError as error:
            raise ConfigError(f"The figure {data.get('name', '?')!r} is incomplete: {error}.") from error
        if plot.kind not in KINDS:
            raise ConfigError(f"The figure {plot.name!r} has kind {plot.kind!r}; choose {', '.join(KINDS)}.")
        return plot


@dataclass(frozen=True)
class Line:
    """One line of a panel: x (numbers or words), the mean of y there, the least and the largest, how many rows."""

    label: str
    x: list[Any]
    y: list[float]
    low: list[float]
    high: list[float]
    count: list[int]


def plots(sweep: Sweep) -> list[Plot]:
    """The figures that the experiment declares."""
    return [Plot.declared(data) for data in sweep.declaration.get("figures") or ()]


def draw(sweep: Sweep, folder: Path) -> list[Path]:
    """Write NAME.png for each of the experiment's figures for which there is something to draw."""
    found = ((plot, draw_plot(sweep, plot)) for plot in plots(sweep))
    return [save_png(fig, folder / f"{plot.name}.png") for plot, fig in found if fig is not None]


def draw_plot(sweep: Sweep, plot: Plot) -> Figure | None:
    """The figure; None if no row has what it shows."""
    rows = sweep.where(plot.where)
    if plot.kind == "contour":
        return _contours(sweep, plot, rows)
    panels = {
        value: lines(sweep, plot, [row for row in rows if sweep.value(row, plot.panel) == value])
        for value in sweep.distinct(rows, plot.panel)
    }
    drawn = [(panel, found) for panel, found in panels.items() if found]
    if not drawn:
        return None
    columns = min(3, len(drawn))
    lines_of = -(-len(drawn) // columns)
    labels = {line.label: None for _, found in drawn for line in found}
    # The legend is beside the panels: its length must not eat the picture.
    size = 4.5 * columns + 1.2 + 0.085 * max(map(len, labels)), 3.5 * lines_of
    looks = _looks(labels)
    with figure(*size) as fig:
        axes = fig.subplots(lines_of, columns, squeeze=False, sharex=plot.kind == "lines" and len(drawn) < 2)
        for ax in axes.flat[len(drawn) :]:
            ax.set_visible(False)
        handles: dict[str, Any] = {}
        for ax, (panel, found) in zip(axes.flat, drawn, strict=False):
            (_bars if plot.kind == "bars" else _lines)(ax, plot, found, looks, handles)
            title = plot.title if panel is None else words(panel)
            title = f"{words(plot.panel)}: {title}" if isinstance(panel, int | float) else title
            y_label = plot.y_label or (words(plot.y) if isinstance(plot.y, str) else "")
            if panel is None and len(drawn) > 1:
                title = ""
            ax.set(title=title, xlabel=fill(plot.x_label or words(plot.x), 64), ylabel=fill(y_label, 44))
            if plot.log_y:
                ax.set_yscale("log")
            elif plot.zero:
                negative = any(low < 0 for line in found for low in line.low)
                ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]) if negative else 0.0)
        if len(labels) > 1 or next(iter(labels)):
            fig.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8.5)
        if plot.panel is not None and plot.title:
            fig.suptitle(plot.title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return fig


def lines(sweep: Sweep, plot: Plot, rows: Sequence[Row]) -> list[Line]:
    """What is drawn in one panel: its rows by series, averaged where they agree."""
    several = {"": plot.y} if isinstance(plot.y, str) else plot.y
    series: dict[tuple[str, str], dict[Any, list[float]]] = {}
    drawn = [(r, [label], c) for label, c in plot.baseline.items() for r in once(sweep, rows, plot.x)]
    for label, column in several.items():
        own = [label] if label else []
        drawn += [(r, [*(words(sweep.value(r, key)) for key in plot.series), *own], column) for r in rows]
    for row, name, column in drawn:
        points = series.setdefault((column, ", ".join(name)), {})
        x, y = sweep.value(row, plot.x), sweep.value(row, column)
        pairs = zip(x, y, strict=True) if isinstance(x, list) and isinstance(y, list) else [(x, y)]
        for a, b in pairs:
            if b is not None and not isinstance(b, list):
                points.setdefault(a, []).append(float(b))
    return [_line(name, points) for (_, name), points in series.items() if points]


def _line(label: str, points: dict[Any, list[float]]) -> Line:
    """At each x what was measured there."""
    numeric = all(isinstance(x, (int, float)) for x in points)
    order = sorted(points) if numeric else list(points)
    at = [points[x] for x in order]
    x = order if numeric else [words(x) for x in order]
    return Line(label, x, [*map(fmean, at)], [*map(min, at)], [*map(max, at)], [*map(len, at)])


def once(sweep: Sweep, rows: Sequence[Row], x: str = "") -> list[Row]:
    """Of rows that differ in the algorithm alone the first: what they say of the baseline is the same. Options of the
    algorithm along the axis `x` do count: the baseline is drawn at each place.
    """
    keys = [key for key in sweep.varied if key == x or not key.startswith("algo.")]
    return list({tuple(str(row.get(key)) for key in keys): row for row in reversed(rows)}.values())[::-1]


def _looks(labels: Iterable[str]) -> dict[str, tuple[str, str, Any]]:
    """A look for each label; that of the naive merge is the same in all figures."""
    others = [look for look in LOOKS if look != NAIVE]
    rest = [label for label in labels if label != "naive"]
    return {"naive": NAIVE} | {label: others[i % len(others)] for i, label in enumerate(rest)}


WORDS = {
    "activation_matching": "activations",
    "weight_matching": "weights",
    "activation_then_weight": "activations, then weights",
    "activation_and_weight": "activations and weights",
    "ste": "STE",
    "ste_quick": "STE, 20 steps",
    "ste_reward": "STE on the score",
    "ste_reward_quick": "STE on the score, 20 steps",
    "learned": "learned maps",
    "model.width": "width",
    "model.epoch": "epoch",
    "models": "number of models",
    "mlp": "MLP",
    "vgg16": "VGG16",
    "resnet20": "ResNet20",
    "resnet18": "ResNet18",
    "tiny_sd": "tiny Stable Diffusion",
    "merge_many": "MergeMany",
    "merge_many_pivot": "pivot",
    "merge_many_tree": "tree",
    "merge_many_activations": "MergeMany on activations",
    "merge_many_cycle_consistent": "C2M3",
    "barrier/heldout/loss": "barrier, held-out",
    "barrier/train/loss": "barrier, training",
    "naive/barrier/heldout/loss": "naive barrier, held-out",
    "midpoint/heldout/accuracy": "accuracy at the midpoint",
    "naive/midpoint/heldout/accuracy": "naive accuracy at the midpoint",
    "midpoint/heldout/loss": "loss at the midpoint",
    "endpoints/heldout/loss_a": "loss of A",
    "endpoints/heldout/accuracy_a": "accuracy of A",
    "endpoints/heldout/accuracy_b": "accuracy of B",
    "aligned_repaired/barrier/heldout/loss": "barrier, repaired",
    "aligned_repaired/midpoint/heldout/accuracy": "accuracy at the midpoint, repaired",
    "algo.name": "algorithm",
    "algo.statistic": "statistic",
    "inner_product": "inner product",
    "pearson": "Pearson",
    "algo.reads": "read at",
    "algo.init": "start",
    "algo.order": "order",
    "algo.restarts": "starts",
    "match/objective": "objective",
    "match/sweeps": "sweeps",
    "model.a": "A",
    "model.b": "B",
    "model.norm": "norm",
    "model.joint": "as one",
    "model.text": "text encoders",
    "reward/aligned_midpoint": "score at the midpoint",
    "reward_low/aligned_midpoint": "from",
    "reward_high/aligned_midpoint": "to",
    "reward/A": "score of A",
    "reward/B": "score of B",
    "tiny_sd_trained": "tiny Stable Diffusion, trained here",
    "data.split": "split",
    "structure": "moves",
    "ece": "calibration error",
    "midpoint/temperature": "temperature at the midpoint",
    "midpoint/accuracy": "accuracy at the midpoint",
    "model.name": "model",
    "seconds/align": "seconds to align",
    "match/seconds": "seconds to match",
    "match/moved": "neurons moved",
}


def words(value: Any) -> str:
    """A value or a column's name as a reader wants it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return WORDS.get(value, str(value)) if value is not None else "none"


def _lines(ax: Axes, plot: Plot, found: Sequence[Line], looks: Mapping[str, Any], handles: dict) -> None:
    numeric = all(isinstance(x, (int, float)) for line in found for x in line.x)
    places = {x: i for i, x in enumerate({x: None for line in found for x in line.x})}
    for line in found:
        color, marker, dashes = looks[line.label]
        x = np.asarray(line.x if numeric else [places[v] for v in line.x], dtype=float)
        look = {"color": color, "marker": marker, "linestyle": dashes, "markersize": 4, "linewidth": 1.8}
        (handles[line.label],) = ax.plot(x, line.y, **look)
        _spread(ax, x, line, color)
    if plot.diagonal:
        ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=":")
    if not numeric:
        ax.set_xticks(list(places.values()), list(places))
    elif plot.log_x:
        ax.set_xscale("log", base=2)
        ticks = sorted({x for line in found for x in line.x if x > 0})
        if len(ticks) <= 9:
            ax.set_xticks(ticks)
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.xaxis.set_minor_formatter(NullFormatter())


def _bars(ax: Axes, plot: Plot, found: Sequence[Line], looks: Mapping[str, Any], handles: dict) -> None:
    places = {str(x): i for i, x in enumerate({str(x): None for line in found for x in line.x})}
    width = 0.8 / len(found)
    hatches = ("", "//", "..", "xx", "\\\\", "--", "oo", "++")
    for k, line in enumerate(found):
        color = looks[line.label][0]
        x = np.asarray([places[str(v)] for v in line.x]) + (k - (len(found) - 1) / 2) * width
        y = np.asarray(line.y, dtype=float)
        handles[line.label] = ax.bar(
            x, y, 0.92 * width, color=color, hatch=hatches[k % len(hatches)], edgecolor="white", linewidth=0.5
        )
        for at in x[y == 0]:  # or the place looks as if nothing had been measured
            ax.annotate(
                "0", (at, 0), (0, 1), textcoords="offset points", ha="center", fontsize=7.5, color=MUTED
            )
        _spread(ax, x, line, INK)
    if sum(map(len, places)) > 80:  # they would run into each other
        ax.set_xticks(list(places.values()), list(places), fontsize=8.5, rotation=35, ha="right")
        ax.tick_params(axis="x", length=0)
    else:
        short = [n if len(n) < 14 else n.replace(", ", ",\n").replace(" ", "\n", 1) for n in places]
        ax.set_xticks(list(places.values()), short, fontsize=8.5)
    ax.grid(axis="x", visible=False)
    ax.set_axisbelow(True)


def _spread(ax: Axes, x: np.ndarray, line: Line, color: str) -> None:
    """Bars from the least to the largest, where several rows were averaged."""
    if max(line.count) > 1:
        # A mean of equal numbers may be off by a last digit, but a bar has no negative length.
        ends = np.maximum(0, [np.subtract(line.y, line.low), np.subtract(line.high, line.y)])
        ax.errorbar(x, line.y, yerr=ends, fmt="none", ecolor=color, elinewidth=1, capsize=2.5)


def _contours(sweep: Sweep, plot: Plot, rows: Sequence[Row]) -> Figure | None:
    assert isinstance(plot.y, str) and plot.z is not None
    rows = [row for row in rows if isinstance(sweep.value(row, plot.z), list)]
    if not rows:
        return None
    grids = [np.asarray(sweep.value(row, plot.z), dtype=float) for row in rows]
    low = min(float(np.nanmin(grid)) for grid in grids)
    high = max(float(np.nanquantile(grid, 0.8)) for grid in grids)
    levels = np.linspace(low, high, 14)
    with figure(4.6 * len(rows) + 0.8, 4.3, **{"axes.grid": False}) as fig:
        axes = fig.subplots(1, len(rows), squeeze=False)[0]
        for ax, row, grid in zip(axes, rows, grids, strict=True):
            x, y = sweep.value(row, plot.x), sweep.value(row, plot.y)
            # viridis rises evenly in lightness: it reads in grey print, and for colour-blind people
            filled = ax.contourf(x, y, grid, levels=levels, cmap="viridis_r", extend="max")
            ax.contour(x, y, grid, levels=levels, colors="white", linewidths=0.4)
            for label, (px, py) in (sweep.value(row, plot.points) or {}).items() if plot.points else ():
                ax.plot(px, py, "o", color="white", markeredgecolor=INK, markersize=7)
                ax.annotate(label, (px, py), (6, 6), textcoords="offset points", color=INK, fontsize=9,
                            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5})  # fmt: skip
            title = words(sweep.value(row, plot.panel)) if plot.panel else plot.title
            ax.set(aspect="equal", title=title, xlabel=plot.x_label or "")
        fig.colorbar(filled, ax=list(axes), label=plot.y_label or words(plot.z), shrink=0.85)
    return fig
