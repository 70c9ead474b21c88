"""The study's pictures, drawn from results.json alone: history, importance, front, slices, weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..reporting.results import Results
from ..reporting.style import INK, MUTED, RC, figure, save_png
from .pareto import beats

TRIED, BEST, KNOWN, AVERAGE = "#56B4E9", "#0072B2", "#D55E00", "#D55E00"
SLICES = 12
"""So many parameters have a slice, the most important ones."""


def draw(results: Results, folder: Path) -> list[Path]:
    """Write the pictures that these results have something for."""
    found = [save_png(_history(results), folder / "history.png")]
    if any(results["importance"].values()):
        found.append(save_png(_importance(results), folder / "importance.png"))
    if len(results["aims"]) > 1:
        found.append(save_png(_front(results), folder / "front.png"))
    if results["parameters"]:
        found.append(save_png(_slices(results), folder / "slices.png"))
    if isinstance(results["winner"]["candidate"]["weight"], dict):
        found.append(save_png(_weights(results), folder / "weights.png"))
    return found


def shown(aim: dict[str, Any], loss: float) -> float:
    """A loss as its table says it: an accuracy or a reward with its own sign."""
    return aim["sign"] * loss


def _history(results: Results) -> Figure:
    aims = results["aims"]
    fig = figure(7.2, 3.0 * len(aims))
    with mpl.rc_context(RC):
        for i, ax in enumerate(_column(fig, len(aims))):
            aim = aims[i]
            full = [(t["number"], shown(aim, t["values"][i])) for t in results["trials"] if _measured(t)]
            early = [t["number"] for t in results["trials"] if not t["values"]]
            warm = {t["number"] for t in results["trials"] if t["start"]}
            ax.plot(
                *_pairs([point for point in full if point[0] not in warm]),
                "o",
                color=TRIED,
                markersize=3.5,
                label="tried",
            )
            ax.plot(
                *_pairs([point for point in full if point[0] in warm]),
                "D",
                color=INK,
                markersize=4.5,
                label="known merges",
            )
            best, line = math.inf, []
            for number, value in full:
                best = min(best, aim["sign"] * value)
                line.append((number, aim["sign"] * best))
            ax.step(*_pairs(line), where="post", color=BEST, linewidth=1.8, label="best so far")
            _limits(ax, [value for _, value in full], aim)
            if early:
                ax.plot(
                    early, [0.02] * len(early), "|", transform=ax.get_xaxis_transform(), color=MUTED, markersize=7,
                    label="given up early",
                )  # fmt: skip
            average = results["baseline"].get("plain average")
            if average is not None and average[i] is not None:
                ax.axhline(
                    shown(aim, average[i]),
                    color=AVERAGE,
                    linestyle="--",
                    linewidth=1.2,
                    label="plain average",
                )
            ax.set_title(f"{aim['name']} on the data of the search")
            ax.set_ylabel(aim["name"])
            ax.legend(fontsize=8, ncol=3, loc="best")
        ax.set_xlabel("trial")
    return fig


def _importance(results: Results) -> Figure:
    found = {name: values for name, values in results["importance"].items() if values}
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    names = sorted(names, key=lambda name: max(values.get(name, 0.0) for values in found.values()))[-20:]
    fig = figure(6.4, 0.8 + 0.26 * len(names) * len(found) ** 0.5)
    with mpl.rc_context(RC):
        ax = fig.subplots()
        height = 0.8 / len(found)
        for i, (aim, values) in enumerate(found.items()):
            places = [j + (i - (len(found) - 1) / 2) * height for j in range(len(names))]
            ax.barh(
                places,
                [values.get(name, 0.0) for name in names],
                height=height * 0.9,
                color=(BEST, TRIED, INK)[i % 3],
                label=aim,
            )
        ax.set_yticks(range(len(names)), names)
        ax.set_title("Importance: share of the variance among good merges that a parameter explains")
        ax.grid(axis="y", visible=False)
        if len(found) > 1:
            ax.legend(fontsize=8)
    return fig


def _front(results: Results) -> Figure:
    one, two = results["aims"][:2]
    fig = figure(6.4, 4.4)
    with mpl.rc_context(RC):
        ax = fig.subplots()
        losses = [tuple(t["values"][:2]) for t in results["trials"] if _measured(t)]
        losses += [tuple(values[:2]) for values in results["baseline"].values() if None not in values]
        tried = [(shown(one, x), shown(two, y)) for x, y in losses]
        on = [
            (shown(one, x), shown(two, y))
            for x, y in sorted(losses)
            if not any(beats(v, (x, y)) for v in losses)
        ]
        ax.plot(*_pairs(tried), "o", color=TRIED, markersize=3.5, alpha=0.7, label="tried")
        ax.plot(*_pairs(on), "s-", color=BEST, markersize=4.5, linewidth=1.2, label="the front")
        for label, values in results["baseline"].items():
            if None not in values:
                place = (shown(one, values[0]), shown(two, values[1]))
                ax.plot(*place, "X", color=KNOWN, markersize=7)
                ax.annotate(f" {label}", place, fontsize=8, va="bottom")
        _limits(ax, [y for _, y in tried], two)
        _limits(ax, [x for x, _ in tried], one, axis="x")
        ax.set_xlabel(one["name"])
        ax.set_ylabel(two["name"])
        ax.set_title("The front, on the data of the search")
        ax.legend(fontsize=8)
    return fig


def _slices(results: Results) -> Figure:
    aim = results["aims"][0]
    ranked = results["importance"].get(aim["name"]) or {}
    names = sorted(results["parameters"], key=lambda name: -ranked.get(name, 0.0))[:SLICES]
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    fig = figure(2.4 * columns + 0.6, 2.1 * rows + 0.4)
    full = [t for t in results["trials"] if _measured(t)]
    with mpl.rc_context(RC):
        axes = fig.subplots(rows, columns, squeeze=False, sharey=True)
        for ax in axes.flat[len(names) :]:
            ax.set_visible(False)
        for name, ax in zip(names, axes.flat, strict=False):
            points = [
                (t["parameters"][name], shown(aim, t["values"][0])) for t in full if name in t["parameters"]
            ]
            if any(isinstance(x, (str, bool)) for x, _ in points):
                points = [(str(x), y) for x, y in points]
                ax.tick_params(axis="x", labelrotation=45, labelsize=7)
            ax.plot(*_pairs(points), "o", color=BEST, markersize=3, alpha=0.6)
            own = results["winner"]["parameters"].get(name)
            if isinstance(own, (int, float)) and not isinstance(own, bool):
                ax.axvline(own, color=KNOWN, linewidth=1)
            ax.set_title(name, fontsize=8.5)
        _limits(axes.flat[0], [shown(aim, t["values"][0]) for t in full], aim)
        fig.supylabel(aim["name"], fontsize=9.5)
    return fig


def _weights(results: Results) -> Figure:
    weights = results["winner"]["candidate"]["weight"]
    values = {group: value if isinstance(value, list) else [value] for group, value in weights.items()}
    many = len(next(iter(values.values())))
    fig = figure(max(4.5, 0.34 * len(values) + 1.4), 2.8)
    with mpl.rc_context(RC):
        ax = fig.subplots()
        for i in range(many):
            places = [j + (i - (many - 1) / 2) * 0.8 / many for j in range(len(values))]
            ax.bar(
                places,
                [value[i] for value in values.values()],
                width=0.75 / many,
                label=results["labels"][i],
                color=(BEST, KNOWN, TRIED, INK)[i % 4],
            )
        ax.set_xticks(range(len(values)), list(values), rotation=90, fontsize=8)
        if many > 1:
            ax.legend(fontsize=8)
        else:
            ax.axhline(0.5, color=MUTED, linestyle=":", linewidth=1)
        ax.set_title(
            "Weights of the winner" + ("" if many > 1 else f" ({results['labels'][-1]}'s share or strength)")
        )
        ax.grid(axis="x", visible=False)
    return fig


def _column(fig: Figure, number: int) -> list[Axes]:
    found = fig.subplots(number, 1, sharex=True, squeeze=False)
    return list(found[:, 0])


def _measured(trial: dict[str, Any]) -> bool:
    return bool(trial["values"]) and all(value is not None for value in trial["values"])


def _pairs(points: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
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
