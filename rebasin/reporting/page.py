"""report.html: one file that answers the reader's questions first, with all pictures inside."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from omegaconf import OmegaConf

from ..checkpoints import write_text
from .answers import answers, number
from .results import Results
from .search import has_search, time_split

TEMPLATE = "report.html.j2"


def save_html(results: Results, folder: Path) -> Path:
    """Write report.html from `results` and the PNG files in `folder` (samples.png may be missing)."""
    return write_text(folder / "report.html", render_html(results, folder))


def template(name: str) -> Template:
    """A page of this package; what it is given is escaped, and nothing may be missing."""
    environment = Environment(
        loader=PackageLoader("rebasin.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(name)


def render_html(results: Results, folder: Path) -> str:
    """The page's text."""
    rows = curve_rows(results)
    pictures = {name: _picture(folder / f"{name}.png") for name in ("samples", "search", "steps", "blocks")}
    return template(TEMPLATE).render(
        r=results,
        answers=answers(results),
        rows=rows,
        accuracy=any(row["accuracy"] != "" for row in rows),
        distance={name: number(value) for name, value in results["distance"].items()},
        history_keys=_keys(results["match"]["history"]),
        curve=data_uri(folder / "curve.png") if rows else None,
        **pictures,
        rewards=reward_rows(results),
        merge=merge_lines(results),
        split=time_split(results["match"]["search"]) if has_search(results) else "",
        config=OmegaConf.to_yaml(OmegaConf.create(results["config"])),
        number=number,
        cell=_cell,
    )


def curve_rows(results: Results) -> list[dict[str, str]]:
    """One row of words for each curve: the table under the picture, on the page and in the terminal."""
    rows = []
    for split, kinds in results["curves"].items():
        for kind, curve in kinds.items():
            if kind == "aligned" and results["algorithm"] == "naive":
                continue
            losses = np.asarray(curve["losses"], dtype=float)
            accuracy = curve["metrics"].get("accuracy")
            rows.append(
                {
                    "split": split,
                    "kind": kind,
                    "a": number(curve["losses"][0]),
                    "b": number(curve["losses"][-1]),
                    "midpoint": number(float(np.interp(0.5, curve["lambdas"], losses))),
                    "highest": number(float(losses.max())),
                    "at": f"{curve['lambdas'][int(losses.argmax())]:.2f}",
                    "barrier": number(curve["barrier"]),
                    "barrier_mean": number(curve["barrier_mean"]),
                    "accuracy": f"{np.interp(0.5, curve['lambdas'], accuracy):.1%}" if accuracy else "",
                }
            )
    return rows


def merge_lines(results: Results) -> list[str]:
    """The saved merge in words: its method and its own figures, a line for each split."""
    merge = results.get("merge")
    if merge is None:
        return []
    lines = []
    for split, figures in merge["figures"].items():
        more = f", accuracy {figures['accuracy']:.1%}" if figures.get("accuracy") is not None else ""
        lines.append(
            f"The saved merge ({merge['words']}) on {split} data: loss {number(figures['loss'])}{more}."
        )
    return [*lines, *merge["notes"]]


def reward_rows(results: Results) -> list[dict[str, str]]:
    """One row of words for each model that was scored, then for each difference."""
    rewards = results.get("rewards")
    if rewards is None:
        return []
    rows = []
    for kind in ("models", "differences"):
        for label, found in rewards[kind].items():
            low, high = found["low"], found["high"]
            between = "" if low is None or high is None else f"{number(low)} to {number(high)}"
            rows.append({"label": label, "mean": number(found["mean"]), "interval": between, "kind": kind})
    return rows


def _keys(history: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for entry in history for key in entry))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return number(value, 6)
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _picture(path: Path) -> str | None:
    return data_uri(path) if path.is_file() else None


def data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
