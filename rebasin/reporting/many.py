"""What a run on many models leaves: its figures in results.json, table.md, the reliability diagram, and report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..evaluation.calibration import Calibration
from .metrics import Tables, numbers_of
from .numbers import cell, number, percent
from .reliability import draw_reliability
from .results import Results, described
from .style import Drawings
from .table import Table

if TYPE_CHECKING:
    from ..evaluation.many import Row
    from ..matching.many.result import ManyResult
    from ..spec import PermutationSpec

KIND = "many"
MERGED, REPAIRED = "merged.safetensors", "repaired.safetensors"
FIGURE = "reliability.png"
MEASURED = {
    "loss": number,
    "barrier": number,
    "accuracy": percent,
    "ece": lambda value: "" if value is None else f"{value:.4f}",
}
"""The figures of a merge, and how they are told."""


def figures(
    labels: Sequence[str],
    aligned: str,
    spec: PermutationSpec,
    checks: Mapping[str, Any],
    result: ManyResult,
    rows: Mapping[str, Sequence[Row]],
) -> dict[str, Any]:
    """What was measured; `labels` of the models, `aligned` the part that was, `rows` of each split."""
    return {
        "models": labels,
        "aligned_part": aligned,
        "spec": described(spec),
        "verify": checks,
        "match": result.to_dict(),
        "distance": {"naive": result.distance_before, "aligned": result.distance},
        "rows": {split: [row.to_dict() for row in found] for split, found in rows.items()},
    }


def drawings(results: Results) -> Drawings:
    split = "heldout" if "heldout" in results["rows"] else next(iter(results["rows"]), "nothing")
    curves = {
        row["name"]: Calibration(**{k: v for k, v in row["calibration"].items() if k != "ece"})
        for row in results["rows"].get(split, ())
        if row["calibration"]
    }
    title = f"{len(results['models'])} models, {split}"
    return {FIGURE: lambda: draw_reliability(curves, title)} if curves else {}


def page(results: Results) -> dict[str, Any]:
    return {
        "table": table(results),
        "verdict": verdict(results),
        "worst": number(max(check["max_relative_error"] for check in results["verify"].values()), 2),
        "passes": _passes(results),
    }


def told(results: Results) -> list[Table | str]:
    return [table(results), "", verdict(results)]


def table(results: Results) -> Table:
    """The comparison in words, a line for each split and merge; without what the objective does not have."""
    rows = [
        {"split": split, "name": row["name"], **{name: told(row[name]) for name, told in MEASURED.items()}}
        for split, rows in results["rows"].items()
        for row in rows
    ]
    return Table.of(rows, {name: name for name in ("split", "name", *MEASURED)}, labels=2)


def verdict(results: Results) -> str:
    """What the figures say about merging, in a sentence: the best merge against the members."""
    if not results["rows"]:
        return "Nothing was measured: there are no batches."
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


def summary(results: Results) -> dict[str, float]:
    """many/SPLIT/NAME/loss, .../barrier, .../accuracy, .../ece, many/distance and seconds/STAGE."""
    found: dict[str, float] = {}
    for split, rows in results["rows"].items():
        for row in rows:
            found |= numbers_of({name: row.get(name) for name in MEASURED}, f"many/{split}/{row['name']}")
    seconds = numbers_of(results["seconds"], "seconds")
    return {**found, "many/distance": results["distance"]["aligned"], **seconds}


def tables(results: Results) -> Tables:
    """models: a row for each split and merge."""
    rows = [
        [split, *(row.get(name) for name in ("name", *MEASURED))]
        for split, found in results["rows"].items()
        for row in found
    ]
    return {"models": (["split", "name", *MEASURED], rows)}


def _passes(results: Results) -> Table:
    lines = tuple(
        (str(one["number"]), cell(one["distance"]), f"{one['moved']:,}", f"{one['seconds']:.2f}")
        for one in results["match"]["history"]
    )
    return Table(("pass", "distance", "neurons moved", "seconds"), lines, labels=0)
