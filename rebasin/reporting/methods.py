"""What a comparison of methods leaves: table.md, methods.png, report.html, and the terminal's table."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .answers import Answer
from .metrics import numbers_of
from .numbers import signed
from .results import Results
from .style import LINES, MUTED, Drawings, figure
from .table import Table

KIND = "methods"
ENDPOINT, NAIVE, ALIGNED = "endpoint", "naive", "aligned"
"""The kinds of rows."""
PLAIN = "weighted_sum"


def drawings(results: Results) -> Drawings:
    return {"methods.png": lambda: draw_methods(results)}


def page(results: Results) -> dict[str, Any]:
    return {"table": table(results), "answers": verdicts(results)}


def told(results: Results) -> list[Table | Answer | str]:
    """The table, the best, and what was moved."""
    note = "* the 95 % interval of the difference to plain averaging does not hold 0"
    return [table(results, short=True), "", *verdicts(results), "", results["moved"], note]


def table(results: Results, short: bool = False) -> Table:
    """The comparison in words, a line for each merge; `short`: without the intervals, so that it fits a terminal."""
    head, lines = ["method", "", "weight"], []
    for aim in results["aims"]:
        head += [aim["name"], "± plain" if short else f"{aim['name']} ± plain"]
    for row in results["rows"]:
        line = [row["name"], row["kind"], "" if row["weight"] is None else f"{row['weight']:g}"]
        for aim in results["aims"]:
            one = row["aims"].get(aim["name"])
            line += ["can't be made", ""] if one is None else [_mean(one, aim), _gap(one, aim, not short)]
        if not short:
            line.append("" if row["kind"] == ENDPOINT or row["error"] else f"{row['seconds']:.2f}")
        lines.append(tuple(line))
    return Table((*head, *([] if short else ["s"])), tuple(lines), labels=2)


def verdicts(results: Results) -> list[Answer]:
    """For each objective the best merge, in words that the figures alone choose."""
    found = []
    for aim in results["aims"]:
        name, question = aim["name"], f"Best by {aim['name']}"
        merges = _measured(results, aim, NAIVE, ALIGNED)
        if not merges:
            found.append(Answer(question, "None", "No merge has a finite value.", "neutral"))
            continue
        best, one = min(merges, key=lambda pair: pair[1]["mean"])
        ends = [(row, row["aims"][name]) for row in results["rows"] if row["kind"] == ENDPOINT]
        end, other = min(ends, key=lambda pair: pair[1]["mean"])
        text = (
            f"{_mean(one, aim)}, {best['kind']}; the better endpoint, {end['name']}, has {_mean(other, aim)}."
        )
        if best["name"] == PLAIN and best["kind"] == NAIVE:
            text += " That is plain averaging: no other method does better."
        elif "difference" in one:
            gap = _gap(one, aim)
            text += f" Against plain averaging: {gap.rstrip('*').strip()}"
            text += "." if gap.endswith("*") else ", which is no clear difference."
        found.append(Answer(question, best["name"], text, "neutral"))
    return found


def summary(results: Results) -> dict[str, float]:
    """METHOD KIND/AIM: the mean loss."""
    found: dict[str, float] = {}
    for row in results["rows"]:
        means = {name: one["mean"] for name, one in row["aims"].items()}
        found |= numbers_of(means, f"{row['name']} {row['kind']}")
    return found


def draw_methods(results: Results) -> Figure:
    """A row for each method, a panel for each objective: means, naive and aligned.

    The bars are 95 % intervals of the difference to plain averaging.
    """
    aims = results["aims"]
    names = list(dict.fromkeys(row["name"] for row in results["rows"] if row["kind"] != ENDPOINT))
    places = {name: len(names) - i for i, name in enumerate(names)}
    with figure(1.6 + 4.4 * len(aims), 1.1 + 0.27 * len(names)) as fig:
        panels = fig.subplots(1, len(aims), sharey=True, squeeze=False)[0]
        for ax, aim in zip(panels, aims, strict=True):
            for kind, shift in ((NAIVE, 0.14), (ALIGNED, -0.14)):
                own = _measured(results, aim, kind)
                if not own:
                    continue
                values = np.array([aim["sign"] * one["mean"] for _, one in own])
                low, high = np.array([_ends(one, aim) for _, one in own]).T
                ax.errorbar(
                    values, [places[row["name"]] + shift for row, _ in own],
                    xerr=np.maximum(0, [values - low, high - values]),
                    fmt=LINES[kind]["marker"], color=LINES[kind]["color"], markersize=4, elinewidth=1,
                    linestyle="none", label="without aligning" if kind == NAIVE else "aligned",
                )  # fmt: skip
            ends = _measured(results, aim, ENDPOINT)
            for (row, one), dashes in zip(ends, itertools.cycle((":", "--", "-.")), strict=False):
                value = aim["sign"] * one["mean"]
                ax.axvline(value, color=MUTED, linestyle=dashes, linewidth=1.2, label=row["name"])
            shown = [abs(one["mean"]) for _, one in _measured(results, aim, ENDPOINT, NAIVE, ALIGNED)]
            if min(shown) > 0 and max(shown) / min(shown) > 5 and aim["sign"] > 0:
                ax.set_xscale("log")
            ax.set_title(f"{aim['name']} on held-out data")
            ax.grid(axis="y", visible=False)
        panels[0].set_yticks(list(places.values()), list(places))
        panels[-1].legend(fontsize=8, loc="best")
    return fig


def _measured(results: Results, aim: Mapping[str, Any], *kinds: str) -> list[tuple[Any, Any]]:
    """The rows of these kinds that have a value of the objective, with what is known of it."""
    found = [(row, row["aims"].get(aim["name"])) for row in results["rows"] if row["kind"] in kinds]
    return [(row, one) for row, one in found if one is not None and one["mean"] is not None]


def _ends(one: Mapping[str, Any], aim: Mapping[str, Any]) -> list[float]:
    """The interval of the difference to plain averaging, around the value; that of the value itself says how much the
    held-out samples differ, which all merges share.
    """
    ends = one.get("difference_low"), one.get("difference_high")
    if None in ends:
        return [aim["sign"] * one["mean"]] * 2
    return sorted(aim["sign"] * (one["mean"] - one["difference"] + end) for end in ends)


def _mean(one: Mapping[str, Any], aim: dict[str, Any]) -> str:
    return signed(one["mean"], aim, 4)


def _gap(one: Mapping[str, Any], aim: Mapping[str, Any], interval: bool = True) -> str:
    """The difference to plain averaging, with its interval; a star where that does not hold 0."""
    mean = one.get("difference")
    if mean is None or not math.isfinite(mean):
        return ""
    low, high = one["difference_low"], one["difference_high"]
    if mean == low == high == 0:
        return "0"
    if low is None or high is None:
        return f"{aim['sign'] * mean:+.3g}"
    ends = sorted((aim["sign"] * low, aim["sign"] * high))
    between = f" ({ends[0]:+.2g} to {ends[1]:+.2g})" if interval else ""
    return f"{aim['sign'] * mean:+.2g}{between}{' *' if low * high > 0 else ''}"
