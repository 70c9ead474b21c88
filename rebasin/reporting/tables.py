"""A run's results as named tables and single figures: what a tracker logs, and what is documented in
docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .metrics import metrics
from .results import Results

Tables = dict[str, tuple[list[str], list[list[Any]]]]
"""Name -> columns and rows."""


def job_type(results: Results | Mapping[str, Any]) -> str:
    """What kind of job it was: "match" (two models), "merge" (many) or "study"."""
    return {"many": "merge", "study": "study"}.get(str(results.get("kind", "")), "match")


def summary(results: Results) -> dict[str, float]:
    """The single figures by name: those of `metrics` for two models; many/SPLIT/NAME/loss, .../accuracy, .../ece and
    many/distance for many; for a study with one row its numbers, study/NAME.
    """
    kind = results.get("kind")
    if kind == "study":
        rows = results["rows"]
        return {f"study/{k}": v for k, v in rows[0].items() if _is_number(v)} if len(rows) == 1 else {}
    if kind == "many":
        found = {
            f"many/{split}/{row['name']}/{figure}": row[figure]
            for split, rows in results["rows"].items()
            for row in rows
            for figure in ("loss", "barrier", "accuracy", "ece")
            if _is_number(row.get(figure))
        }
        seconds = {f"seconds/{stage}": value for stage, value in results["seconds"].items()}
        return {**found, "many/distance": results["distance"]["aligned"], **seconds}
    return metrics(results)


def tables(results: Results) -> Tables:
    """curves (each split, line and lambda) and history (each step of the matching) for two models; models for many;
    rows for a study.
    """
    kind = results.get("kind")
    if kind == "study":
        columns = list(
            dict.fromkeys(
                k for row in results["rows"] for k, v in row.items() if not isinstance(v, (list, dict))
            )
        )
        return {"rows": (columns, [[row.get(c) for c in columns] for row in results["rows"]])}
    if kind == "many":
        columns = ["split", "name", "loss", "barrier", "accuracy", "ece"]
        rows = [
            [split, *(row.get(c) for c in columns[1:])]
            for split, found in results["rows"].items()
            for row in found
        ]
        return {"models": (columns, rows)}
    names = sorted({m for kinds in results["curves"].values() for c in kinds.values() for m in c["metrics"]})
    curves = [
        [split, kind, lam, curve["losses"][i], *(curve["metrics"].get(n, [None] * (i + 1))[i] for n in names)]
        for split, kinds in results["curves"].items()
        for kind, curve in kinds.items()
        for i, lam in enumerate(curve["lambdas"])
    ]
    history = results["match"]["history"]
    keys = list(dict.fromkeys(key for entry in history for key in entry))
    found: Tables = {"curves": (["split", "merge", "lambda", "loss", *names], curves)}
    if history:
        found["history"] = (keys, [[entry.get(key) for key in keys] for entry in history])
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
