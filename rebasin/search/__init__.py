"""Searching for the merge that is best by an objective, and comparing merge methods.

`python -m rebasin.search` and `python -m rebasin.compare_methods`; see docs/search.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the pictures and pages of a search or a comparison again from its results.json."""
    from . import comparison_report, report

    return (report if results["kind"] == report.KIND else comparison_report).draw(results, folder)
