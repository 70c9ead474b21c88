"""What a comparison leaves for people: results.json, table.md, methods.png, report.html and the terminal's table."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from ..checkpoints import write_text
from ..reporting.answers import number
from ..reporting.html import data_uri
from ..reporting.results import FORMAT, Results, environment, plain, save_results
from ..reporting.style import LINES, MUTED, RC, figure, save_png
from .comparison import ALIGNED, ENDPOINT, NAIVE, PLAIN, Row
from .objectives import Aim

KIND = "methods"
TEMPLATE = "methods.html.j2"
PICTURE = "methods.png"


def collect(
    config: Mapping[str, Any],
    labels: Sequence[str],
    base: str | None,
    moved: str,
    aims: Sequence[Aim],
    rows: Sequence[Row],
    seconds: Mapping[str, float],
    command: str,
) -> Results:
    """Everything about a comparison as plain data; losses throughout, also where an aim's `sign` is -1."""
    return plain(
        {
            "format": FORMAT,
            "kind": KIND,
            "name": f"{config['model']['name']}-methods",
            "model": config["model"]["name"],
            "data": config["data"]["name"],
            "algorithm": config["algo"]["name"],
            "seed": config["seed"],
            "labels": list(labels),
            "base": base,
            "moved": moved,
            "aims": [{"name": aim.name, "sign": aim.sign, "units": len(aim.heldout)} for aim in aims],
            "rows": [asdict(row) for row in rows],
            "seconds": {**seconds, "total": sum(seconds.values())},
            "environment": environment(),
            "config": dict(config),
            "command": command,
        }
    )


def leave(results: Results, folder: Path) -> None:
    """Write results.json, config.yaml, table.md, methods.png and report.html."""
    save_results(folder, results)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(results["config"])))
    draw(results, folder)


def draw(results: Results, folder: Path) -> list[Path]:
    """Write table.md, methods.png and report.html from results.json's content."""
    rows, columns = table(results), _columns(results)
    picture = save_png(draw_methods(results), folder / PICTURE)
    page = (
        Environment(
            loader=PackageLoader("rebasin.search", "."),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
        )
        .get_template(TEMPLATE)
        .render(
            r=results,
            rows=rows,
            columns=columns,
            verdicts=verdicts(results),
            picture=data_uri(picture),
            config=OmegaConf.to_yaml(OmegaConf.create(results["config"])),
        )
    )
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "--:|" * (len(columns) - 2)]
    lines += ["| " + " | ".join(row[column] for column in columns) + " |" for row in rows]
    return [
        picture,
        write_text(folder / "table.md", "\n".join(lines) + "\n"),
        write_text(folder / "report.html", page),
    ]


def _columns(results: Results) -> list[str]:
    found = ["method", "", "weight"]
    for aim in results["aims"]:
        found += [aim["name"], f"{aim['name']} ± plain"]
    return [*found, "s"]


def table(results: Results) -> list[dict[str, str]]:
    """The comparison in words, one row for each merge."""
    found = []
    for row in results["rows"]:
        told = {
            "method": row["name"],
            "": row["kind"],
            "weight": "" if row["weight"] is None else f"{row['weight']:g}",
            "s": "" if row["kind"] == ENDPOINT or row["error"] else f"{row['seconds']:.2f}",
        }
        for aim in results["aims"]:
            one = row["aims"].get(aim["name"])
            told[aim["name"]] = "can't be made" if one is None else _signed(one["mean"], aim)
            told[f"{aim['name']} ± plain"] = "" if one is None else _gap(one, aim)
        found.append(told)
    return found


def verdicts(results: Results) -> list[dict[str, str]]:
    """For each objective the best merge, in words that the figures alone choose."""
    found = []
    for aim in results["aims"]:
        name = aim["name"]
        merges = [
            row
            for row in results["rows"]
            if row["kind"] != ENDPOINT and name in row["aims"] and row["aims"][name]["mean"] is not None
        ]
        if not merges:
            found.append({"aim": name, "short": "None", "text": "No merge has a finite value."})
            continue
        best = min(merges, key=lambda row: row["aims"][name]["mean"])
        ends = [row for row in results["rows"] if row["kind"] == ENDPOINT]
        end = min(ends, key=lambda row: row["aims"][name]["mean"])
        text = (
            f"{_signed(best['aims'][name]['mean'], aim)}, {best['kind']}; the better endpoint, {end['name']}, has"
            f" {_signed(end['aims'][name]['mean'], aim)}."
        )
        if best["name"] == PLAIN and best["kind"] == NAIVE:
            text += " That is plain averaging: no other method does better."
        elif "difference" in best["aims"][name]:
            told = _gap(best["aims"][name], aim)
            sure = told.endswith("*")
            text += f" Against plain averaging: {told.rstrip('*').strip()}"
            text += "." if sure else ", which is no clear difference."
        found.append({"aim": name, "short": best["name"], "text": text})
    return found


def draw_methods(results: Results) -> Figure:
    """A row for each method, a panel for each objective: means, naive and aligned.

    The bars are 95 % intervals of the difference to plain averaging.
    """
    aims = results["aims"]
    names = list(dict.fromkeys(row["name"] for row in results["rows"] if row["kind"] != ENDPOINT))
    fig = figure(1.6 + 4.4 * len(aims), 1.1 + 0.27 * len(names))
    places = {name: len(names) - i for i, name in enumerate(names)}
    with mpl.rc_context(RC):
        panels = fig.subplots(1, len(aims), sharey=True, squeeze=False)[0]
        for ax, aim in zip(panels, aims, strict=True):
            for kind, shift in ((NAIVE, 0.14), (ALIGNED, -0.14)):
                style = LINES[kind]
                own = [row for row in results["rows"] if row["kind"] == kind and _known(row, aim)]
                if not own:
                    continue
                values = [aim["sign"] * row["aims"][aim["name"]]["mean"] for row in own]
                ends = [_ends(row["aims"][aim["name"]], aim) for row in own]
                around = [
                    [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)],
                    [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)],
                ]
                ax.errorbar(
                    values, [places[row["name"]] + shift for row in own], xerr=around, fmt=style["marker"],
                    color=style["color"], markersize=4, elinewidth=1, linestyle="none",
                    label="without aligning" if kind == NAIVE else "aligned",
                )  # fmt: skip
            ends = [row for row in results["rows"] if row["kind"] == ENDPOINT and _known(row, aim)]
            for row, dashes in zip(ends, itertools.cycle((":", "--", "-.")), strict=False):
                value = aim["sign"] * row["aims"][aim["name"]]["mean"]
                ax.axvline(value, color=MUTED, linestyle=dashes, linewidth=1.2, label=row["name"])
            shown = [abs(row["aims"][aim["name"]]["mean"]) for row in results["rows"] if _known(row, aim)]
            if min(shown) > 0 and max(shown) / min(shown) > 5 and aim["sign"] > 0:
                ax.set_xscale("log")
            ax.set_title(f"{aim['name']} on held-out data")
            ax.grid(axis="y", visible=False)
        panels[0].set_yticks(list(places.values()), list(places))
        panels[-1].legend(fontsize=8, loc="best")
    return fig


def summary(results: Results, folder: Path, console: Console) -> None:
    """The table, the best, and where the files are."""
    shown = Table(box=None, pad_edge=False, header_style="dim")
    names = [aim["name"] for aim in results["aims"]]
    columns = ["method", "", "weight", *(title for name in names for title in (name, f"{name} ± plain"))]
    for i, column in enumerate(columns):
        title = "± plain" if column.endswith("± plain") else column
        shown.add_column(title, justify="left" if i < 2 else "right", no_wrap=True)
    for row in table(results):
        # Without the intervals, which the files have: it must fit into a terminal.
        short = {key: _without_interval(text) for key, text in row.items()}
        shown.add_row(*(short[column] for column in columns))
    console.print()
    console.print(shown)
    console.print()
    for one in verdicts(results):
        console.print(f"Best by {one['aim']}: {one['short']}, {one['text']}", markup=False)
    console.print(f"\n{results['moved']}", markup=False)
    console.print("* the 95 % interval of the difference to plain averaging does not hold 0", markup=False)
    console.print(f"\nIn {folder}: report.html, table.md, {PICTURE}, results.json", markup=False)


def _without_interval(text: str) -> str:
    before, found, after = text.partition(" (")
    return before + (" *" if found and after.endswith("*") else "")


def _known(row: Mapping[str, Any], aim: Mapping[str, Any]) -> bool:
    one = row["aims"].get(aim["name"])
    return one is not None and one["mean"] is not None


def _ends(one: Mapping[str, Any], aim: Mapping[str, Any]) -> tuple[float, float]:
    """The interval of the difference to plain averaging, around the value; that of the value itself says how much the
    held-out samples differ, which all merges share.
    """
    value = one["mean"]
    low, high = one.get("difference_low"), one.get("difference_high")
    if low is None or high is None:
        return aim["sign"] * value, aim["sign"] * value
    plain_value = value - one["difference"]
    ends = sorted((aim["sign"] * (plain_value + low), aim["sign"] * (plain_value + high)))
    return ends[0], ends[1]


def _signed(value: float | None, aim: Mapping[str, Any]) -> str:
    return number(None if value is None else aim["sign"] * value, 4)


def _gap(one: Mapping[str, Any], aim: Mapping[str, Any]) -> str:
    mean = one.get("difference")
    if mean is None or not math.isfinite(mean):
        return ""
    if mean == one["difference_low"] == one["difference_high"] == 0:
        return "0"
    low, high = one["difference_low"], one["difference_high"]
    if low is None or high is None:
        return f"{aim['sign'] * mean:+.3g}"
    ends = sorted((aim["sign"] * low, aim["sign"] * high))
    mark = " *" if low * high > 0 else ""
    return f"{aim['sign'] * mean:+.2g} ({ends[0]:+.2g} to {ends[1]:+.2g}){mark}"
