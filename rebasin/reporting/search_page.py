"""What a search for a merge leaves for people: its pictures, report.html, and the table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .answers import Answer, Tone
from .numbers import between, number, signed
from .results import Results
from .search_figures import AVERAGE
from .table import Table

KIND = "search"


def page(results: Results) -> dict[str, Any]:
    return {
        "answers": [verdict(results), *_about(results)],
        "heldout": _heldout(results),
        "finalists": _finalists(results),
        "trials": _trials(results),
    }


def told(results: Results) -> list[Table | Answer | str]:
    """The held-out table, the winner, the verdict."""
    winner = results["winner"]
    return [_heldout(results, False), "", f"Winner: {winner['label']}, {winner['words']}", verdict(results)]


def verdict(results: Results) -> Answer:
    """The winner against plain averaging, in words that the figures alone choose."""
    found: list[tuple[Tone, str]] = [_verdict(one) for one in results["judged"]]
    tones = {tone for tone, _ in found}
    tone = found[0][0] if len(tones) == 1 else "mixed"
    short = {"good": "Yes", "bad": "No", "neutral": "No difference"}.get(tone, "In part")
    return Answer("Better than plain averaging?", short, " ".join(text for _, text in found), tone)


def _verdict(one: Mapping[str, Any]) -> tuple[Tone, str]:
    """By one objective."""
    name, found = one["name"], one["differences"][AVERAGE]
    mean, low, high = found["mean"], found["low"], found["high"]
    if mean is None:
        return "bad", f"On {name} a loss is not finite."
    average = abs(one["models"][AVERAGE]["mean"] or 0.0)
    size = number(abs(mean)) + (f", {abs(mean) / average:.2%}" if average else "")
    interval = ""
    if low is not None:
        ends = f"{number(low)} to {number(high)}"
        interval = f" (95 % interval of the difference {ends}, {one['units']} units)"
    if mean == low == high == 0:
        return "neutral", f"On held-out {name} the winner is the plain average itself."
    if high is not None and high < 0:
        return "good", f"On held-out {name} the winner beats plain averaging by {size}{interval}."
    if low is not None and low > 0:
        return "bad", f"On held-out {name} the winner is worse than plain averaging by {size}{interval}."
    return "neutral", f"On held-out {name} winner and plain average can't be told apart{interval}."


def _about(results: Results) -> tuple[Answer, Answer]:
    """What won, and what it cost."""
    seconds, winner, resumed = results["seconds"], results["winner"], results["resumed"]
    given_up = sum(not trial["values"] for trial in results["trials"])
    before = f"; went on after {resumed} trials of an earlier session" if resumed else ""
    cost = (
        f"{len(results['trials'])} trials, {given_up} given up early{before}. Loading, aligning, judging and"
        f" reporting took {seconds['total'] - seconds['search']:.0f} s more."
    )
    return (
        Answer("What won?", winner["label"], winner["words"], "neutral"),
        Answer("What did it cost?", f"{results['spent']:.0f} s", cost, "neutral"),
    )


def _heldout(results: Results, intervals: bool = True) -> Table:
    """Held-out figures: a line for each objective and model; its own interval where `intervals`."""
    lines, won = [], results["winner"]["label"]
    for one in results["judged"]:
        for label, model in one["models"].items():
            if label == won:  # the line of the winner has its name
                continue
            label = f"{label}: {won}" if label == "winner" and won in one["models"] else label
            gap = one["differences"].get(label.partition(":")[0] if label.startswith("winner") else label)
            own = between(model["low"], model["high"], 4, one["sign"])
            line = (one["name"], label, signed(model["mean"], one, 5), *([own] if intervals else []))
            less = ("", "")
            if gap is not None:
                less = signed(gap["mean"], one, 5), between(gap["low"], gap["high"], 4, one["sign"])
            lines.append((*line, *less))
    own_title = ("95 % interval",) if intervals else ()
    head = ("objective", "model", "value", *own_title, "winner minus it", "95 % interval")
    return Table(head, tuple(lines), labels=2, strong="value")


def _finalists(results: Results) -> Table:
    aims = results["aims"]
    head = ["merge"]
    for aim in aims:
        head += [f"{aim['name']}, searched", "chosen by"]
    lines = []
    for one in results["finalists"]:
        line = [one["label"] + (" *" if one["front"] and len(aims) > 1 else "")]
        for i, aim in enumerate(aims):
            line.append(signed(one["search"][i], aim, 5) if one["search"] else "")
            line.append(signed(one["chosen"][i], aim, 5))
        lines.append((*line, one["words"]))
    return Table((*head, "what it is"), tuple(lines), notes=1)


def _trials(results: Results) -> Table:
    aims = results["aims"]
    head = ("trial", *(aim["name"] for aim in aims), "known merge", "parameters")
    lines = []
    again: dict[int, list[str]] = {}
    for trial in results["trials"]:
        if (same := trial.get("same_as")) is not None:
            again.setdefault(same, []).append(str(trial["number"]))
    numbers = {trial["number"] for trial in results["trials"]}
    for trial in results["trials"]:
        if trial.get("same_as") in numbers:  # told in the line of its twin
            continue
        number = ", again ".join([str(trial["number"]), *again.get(trial["number"], [])])
        values = trial["values"] or [None] * len(aims)
        without = trial["error"] or "given up"
        shown = (without if x is None else signed(x, aim, 5) for aim, x in zip(aims, values, strict=True))
        parameters = ", ".join(f"{name} {_value(value)}" for name, value in trial["parameters"].items())
        lines.append((number, *shown, trial["start"] or "", parameters))
    return Table(head, tuple(lines), labels=0, notes=2)


def _value(value: Any) -> str:
    """Of a parameter."""
    return f"{value:.3g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def summary(results: Results) -> dict[str, float]:
    """judge/AIM/MODEL and judge/AIM/winner-average mean, low, high; judge/trials and judge/spent."""
    found: dict[str, float] = {"judge/trials": len(results["trials"]), "judge/spent": results["spent"]}
    for one in results["judged"]:
        for label, model in one["models"].items():
            if model["mean"] is not None:
                found[f"judge/{one['name']}/{label}"] = one["sign"] * model["mean"]
        gap = one["differences"][AVERAGE]
        found |= {f"judge/{one['name']}/winner-average {k}": v for k, v in gap.items() if v is not None}
    return found
