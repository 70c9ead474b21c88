"""What a run on many models leaves: results.json, the table, the reliability diagram, and one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from ..checkpoints import write_text
from ..evaluation.calibration import Calibration
from .answers import number
from .html import data_uri, template
from .reliability import save_reliability
from .results import Results, described, head, plain, save_results, tail

if TYPE_CHECKING:
    from ..evaluation.many import Row
    from ..matching.many.result import ManyResult
    from ..spec import PermutationSpec
    from ..tasks import Task

KIND = "many"
MERGED, REPAIRED = "merged.safetensors", "repaired.safetensors"
TEMPLATE = "report_many.html.j2"
FIGURE = "reliability.png"
COLUMNS = ("split", "name", "loss", "barrier", "accuracy", "ece")


def collect(
    config: Mapping[str, Any],
    task: Task,
    spec: PermutationSpec,
    checks: Mapping[str, Any],
    result: ManyResult,
    rows: Mapping[str, Sequence[Row]],
    seconds: Mapping[str, float],
    command: str = "",
) -> Results:
    """Everything about a run as plain data, with the keys of results.json; null is what is not finite."""
    return plain(
        {
            **head(config),
            "kind": KIND,
            "models": list(task.labels),
            "aligned_part": task.aligned,
            "spec": described(spec),
            "verify": dict(checks),
            "match": result.to_dict(),
            "distance": {"naive": result.distance_before, "aligned": result.distance},
            "rows": {split: [row.to_dict() for row in found] for split, found in rows.items()},
            **tail(config, seconds, command),
        }
    )


def leave(results: Results, config: Mapping[str, Any], folder: Path) -> None:
    """Write results.json, config.yaml, table.md, and, for classifiers, reliability.png; and report.html."""
    save_results(folder, results)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))
    draw(results, folder)


def draw(results: Results, folder: Path) -> list[Path]:
    """Write table.md, reliability.png (if there is calibration to show) and report.html."""
    drawn = [write_text(folder / "table.md", markdown(results))]
    split = "heldout" if "heldout" in results["rows"] else next(iter(results["rows"]))
    curves = {row["name"]: calibration_from(row) for row in results["rows"][split] if row["calibration"]}
    if curves:
        title = f"{len(results['models'])} models, {split}"
        drawn.append(save_reliability(curves, folder / FIGURE, title))
    page = template(TEMPLATE).render(
        r=results,
        columns=_columns(results),
        rows=table(results),
        reliability=data_uri(folder / FIGURE) if curves else None,
        config=OmegaConf.to_yaml(OmegaConf.create(results["config"])),
        number=number,
        verdict=verdict(results),
    )
    return [*drawn, write_text(folder / "report.html", page)]


def table(results: Results) -> list[dict[str, str]]:
    """The comparison in words, one row for each split and line."""

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    return [
        {
            "split": split,
            "name": row["name"],
            "loss": number(row["loss"]),
            "barrier": number(row["barrier"]),
            "accuracy": share(row["accuracy"]),
            "ece": "" if row["ece"] is None else f"{row['ece']:.4f}",
        }
        for split, rows in results["rows"].items()
        for row in rows
    ]


def verdict(results: Results) -> str:
    """What the figures say about merging, in a sentence: the best merge against the members."""
    split, rows = next(iter(results["rows"].items()))
    merges = [row for row in rows if row["name"] not in ("members", "ensemble") and row["loss"] is not None]
    if not merges:
        return "No merge has a finite loss."
    best = min(merges, key=lambda row: row["loss"])
    naive = next(row for row in rows if row["name"] == "naive")
    return (
        f"The best merge on {split} data is {best['name']!r}, with a loss {number(abs(best['barrier']))}"
        f" {'above' if best['barrier'] > 0 else 'below'} the members' mean; the plain mean lies"
        f" {number(naive['barrier'])} above it."
    )


def markdown(results: Results) -> str:
    columns = _columns(results)
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join(["---"] * 2 + ["--:"] * (len(columns) - 2)) + "|",
    ]
    lines += ["| " + " | ".join(row[c] for c in columns) + " |" for row in table(results)]
    return "\n".join(lines) + "\n"


def summary(results: Results, folder: Path, console: Console) -> None:
    """The table, and where the files are."""
    shown = Table(box=None, pad_edge=False, header_style="dim")
    columns = _columns(results)
    for column in columns:
        shown.add_column(column, justify="left" if column in ("split", "name") else "right", no_wrap=True)
    for row in table(results):
        shown.add_row(*(row[column] for column in columns))
    console.print()
    console.print(shown)
    console.print(f"\n{verdict(results)}\n\nIn {folder}:", markup=False)
    for path in sorted(folder.iterdir()):
        if path.is_file():
            console.print(f"  {path.name}", markup=False)


def calibration_from(row: Mapping[str, Any]) -> Calibration:
    """The calibration of a line of results.json."""
    data = row["calibration"]
    share, confidence, accuracy = (tuple(data[key]) for key in ("share", "confidence", "accuracy"))
    return Calibration(share, confidence, accuracy, data["samples"])


def _columns(results: Results) -> tuple[str, ...]:
    """Without accuracy and calibration where the objective has none."""
    rows = table(results)
    return tuple(column for column in COLUMNS if any(row[column] for row in rows))
