"""What a study leaves: rows in results.json. It is one point of a sweep, whose page has the figures."""

from __future__ import annotations

from .metrics import Tables, columns, numbers_of
from .results import Results

KIND = "study"


def told(results: Results) -> list[str]:
    return [f"{len(results['rows'])} rows."]


def summary(results: Results) -> dict[str, float]:
    """study/NAME, of a study with one row."""
    rows = results["rows"]
    return numbers_of(rows[0], "study") if len(rows) == 1 else {}


def tables(results: Results) -> Tables:
    """rows, without what is no single value."""
    head = columns(results["rows"])
    return {"rows": (head, [[row.get(key) for key in head] for row in results["rows"]])}
