"""The pictures of a search for a merge, drawn from results.json alone: history, importance, front, slices, weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import Results
from .style import BLUE, INK, MUTED, SKY, VERMILION, Drawings, figure

TRIED, BEST, KNOWN = SKY, BLUE, VERMILION
AVERAGE = "plain average"
"""What a search calls the merge that all others are compared with."""

SLICES = 12
"""So many parameters have a slice, the most important ones."""

Point = tuple[Any, float]


def drawings(results: Results) -> Drawings:
    """Of the pictures those for which these results have something."""
    known = {
        "history.png": (_history, True),
        "importance.png": (_importance, any(results["importance"].values())),
        "front.png": (_front, len(results["aims"]) > 1),
        "slices.png": (_slices, bool(results["parameters"])),
        "weights.png": (_weights, isinstance(results["winner"]["candidate"]["weight"], dict)),
    }
    return {name: partial(draw, results) for name, (draw, there) in known.items() if there}


def _history(results: Results) -> Figure:
    aims, trials = results["aims"], results["trials"]
    handles: Any = ()
    with figure(7.2, 3.0 * len(aims)) as fig:
        axes = fig.subplots(len(aims), 1, sharex=True, squeeze=False)[:, 0]
        for i, (ax, aim) in enumerate(zip(axes, aims, strict=True)):
            full = [(t["number"], aim["sign"] * t["values"][i]) for t in trials if _measured(t)]
            early = [t["number"] for t in trials if not t["values"]]
            warm = {t["number"] for t in trials if t["start"]}
            own, known = ([p for p in full if (p[0] in warm) is chosen] for chosen in (False, True))
            ax.plot(*_pairs(own), "o", color=TRIED, markersize=3.5, label="tried")
            ax.plot(*_pairs(known), "D", color=INK, markersize=4.5, label="known merges")
            numbers, values = _pairs(full)
            best = accumulate(values, min if aim["sign"] > 0 else max)
            ax.step(numbers, list(best), where="post", color=BEST, linewidth=1.8, label="best so far")
            _limits(ax, values, aim)
            if early:
                ax.plot(
                    early, [0.02] * len(early), "|", transform=ax.get_xaxis_transform(), color=MUTED, markersize=7,
                    label="given up early",
                )  # fmt: skip
            average = results["baseline"].get(AVERAGE)
            if average is not None and average[i] is not None:
                value = aim["sign"] * average[i]
                ax.axhline(value, color=KNOWN, linestyle="--", linewidth=1.2, label=AVERAGE)
            ax.set(title=f"{aim['name']} on the data of the search", ylabel=aim["name"])
            handles = ax.get_legend_handles_labels()
        axes[-1].set_xlabel("trial")
        fig.legend(
            *handles, fontsize=8, loc="outside lower center", ncols=5
        )  # where nothing can lie below it
    return fig


def _importance(results: Results) -> Figure:
    found = {aim: values for aim, values in results["importance"].items() if values}
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    names = sorted(names, key=lambda name: max(values.get(name, 0.0) for values in found.values()))[-20:]
    with figure(6.4, 0.8 + 0.26 * len(names) * len(found) ** 0.5) as fig:
        ax = fig.subplots()
        for i, (aim, values) in enumerate(found.items()):
            places, height = _beside(i, len(found), len(names))
            widths = [values.get(name, 0.0) for name in names]
            ax.barh(places, widths, height=0.9 * height, color=(BEST, TRIED, INK)[i % 3], label=aim)
        ax.set_yticks(range(len(names)), names)
        ax.set(title="Importance", xlabel="share of the variance among good merges that a parameter explains")
        ax.grid(axis="y", visible=False)
        if len(found) > 1:
            ax.legend(fontsize=8)
    return fig


def _front(results: Results) -> Figure:
    one, two = results["aims"][:2]

    def shown(losses: Iterable[Sequence[float]]) -> list[Point]:
        return [(one["sign"] * x, two["sign"] * y) for x, y in losses]

    known = {label: tuple(values[:2]) for label, values in results["baseline"].items() if None not in values}
    losses = [*(tuple(t["values"][:2]) for t in results["trials"] if _measured(t)), *known.values()]
    front = [pair for pair in sorted(losses) if not any(beats(other, pair) for other in losses)]
    with figure(6.4, 4.4) as fig:
        ax = fig.subplots()
        ax.plot(*_pairs(shown(losses)), "o", color=TRIED, markersize=3.5, alpha=0.7, label="tried")
        ax.plot(*_pairs(shown(front)), "s-", color=BEST, markersize=4.5, linewidth=1.2, label="the front")
        for label, place in zip(known, shown(known.values()), strict=True):
            ax.plot(*place, "X", color=KNOWN, markersize=7)
            ax.annotate(f" {label}", place, fontsize=8, va="bottom")
        x, y = _pairs(shown(losses))
        _limits(ax, y, two)
        _limits(ax, x, one, axis="x")
        ax.set(xlabel=one["name"], ylabel=two["name"], title="The front, on the data of the search")
        ax.legend(fontsize=8)
    return fig


def _slices(results: Results) -> Figure:
    aim = results["aims"][0]
    ranked = results["importance"].get(aim["name"]) or {}
    names = sorted(results["parameters"], key=lambda name: -ranked.get(name, 0.0))[:SLICES]
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    full = [(t["parameters"], aim["sign"] * t["values"][0]) for t in results["trials"] if _measured(t)]
    with figure(2.4 * columns + 0.6, 2.1 * rows + 0.4) as fig:
        axes = fig.subplots(rows, columns, squeeze=False, sharey=True)
        for ax in axes.flat[len(names) :]:
            ax.set_visible(False)
        for name, ax in zip(names, axes.flat, strict=False):
            points = [(parameters[name], value) for parameters, value in full if name in parameters]
            if any(isinstance(x, (str, bool)) for x, _ in points):
                points = [(str(x), y) for x, y in points]
                ax.tick_params(axis="x", labelrotation=45, labelsize=7)
            ax.plot(*_pairs(points), "o", color=BEST, markersize=3, alpha=0.6)
            own = results["winner"]["parameters"].get(name)
            if isinstance(own, (int, float)) and not isinstance(own, bool):
                ax.axvline(own, color=KNOWN, linewidth=1)
            ax.set_title(name, fontsize=8.5)
        _limits(axes.flat[0], [value for _, value in full], aim)
        fig.supylabel(aim["name"], fontsize=9.5)
    return fig


def _weights(results: Results) -> Figure:
    weights = results["winner"]["candidate"]["weight"]
    values = [value if isinstance(value, list) else [value] for value in weights.values()]
    many = len(values[0])
    with figure(max(4.5, 0.34 * len(values) + 1.4), 2.8) as fig:
        ax = fig.subplots()
        for i in range(many):
            places, width = _beside(i, many, len(values))
            color, label = (BEST, KNOWN, TRIED, INK)[i % 4], results["labels"][i]
            ax.bar(places, [value[i] for value in values], width=0.94 * width, label=label, color=color)
        ax.set_xticks(range(len(values)), list(weights), rotation=90, fontsize=8)
        if many > 1:
            ax.legend(fontsize=8)
        else:
            ax.axhline(0.5, color=MUTED, linestyle=":", linewidth=1)
        whose = "" if many > 1 else f"{results['labels'][-1][:24]}'s share or strength"
        ax.set_title("Weights of the winner")
        ax.set_ylabel(whose, wrap=True, fontsize=8.5)
        ax.grid(axis="x", visible=False)
    return fig


def beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """The Pareto order of several losses: at least as low in everything, and lower in something."""
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _beside(number: int, of: int, places: int) -> tuple[list[float], float]:
    """Where the bars of series `number` of `of` stand if each place has one of every series; and their width."""
    width = 0.8 / of
    return [place + (number - (of - 1) / 2) * width for place in range(places)], width


def _measured(trial: dict[str, Any]) -> bool:
    return bool(trial["values"]) and all(value is not None for value in trial["values"])


def _pairs(points: Sequence[Point]) -> tuple[list[Any], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _limits(ax: Axes, values: Sequence[float], aim: dict[str, Any], axis: str = "y") -> None:
    """Show the better nine tenths: one merge that is noise must not flatten the rest."""
    if len(values) < 5:
        return
    ordered = sorted(values, key=lambda value: aim["sign"] * value)
    best, worst = ordered[0], ordered[math.ceil(0.9 * (len(ordered) - 1))]
    if best != worst:
        margin = 0.08 * (worst - best)
        low, high = sorted((best - margin, worst + 2 * margin))
        (ax.set_ylim if axis == "y" else ax.set_xlim)(low, high)
