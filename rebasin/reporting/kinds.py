"""What jobs leave in their folders, whatever their kind; each kind has a module that draws and tells it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..evaluation.samples import Samples
from ..files import write_text
from . import many, methods, run, search_page, study
from .answers import Answer
from .metrics import Tables
from .page import yaml
from .results import Results, save_results
from .samples import NAME as SAMPLES
from .samples import save_samples
from .table import Table

KINDS: dict[str | None, Any] = {
    None: run,
    many.KIND: many,
    study.KIND: study,
    search_page.KIND: search_page,
    methods.KIND: methods,
}
"""The kind in results.json -> its module: `pictures`, `draw`, `told`, and for trackers `summary` and `tables`."""


def leave(results: Results, folder: Path, samples: Samples | None = None) -> list[Path]:
    """Write results.json, config.yaml, samples.png if there are any, the pictures of this kind, and its pages."""
    save_results(folder, results)
    write_text(folder / "config.yaml", yaml(results["config"]))
    if samples is not None:
        save_samples(samples, folder / SAMPLES)
    return draw(results, folder)


def draw(results: Results, folder: Path) -> list[Path]:
    """Write pictures and pages from what is in results.json."""
    return _module(results).draw(results, folder)


def pictures(results: Results) -> list[str]:
    """The names of the pictures that these results have: others in their folder are not of this job."""
    return _module(results).pictures(results)


def told(results: Results) -> list[Table | Answer | str]:
    """What the terminal shows at the end."""
    return _module(results).told(results)


def summary(results: Results) -> dict[str, float]:
    """The single figures by name, for a tracker."""
    return _module(results).summary(results)


def tables(results: Results) -> Tables:
    """What has rows, for a tracker."""
    return _module(results).tables(results)


def _module(results: Results) -> Any:
    return KINDS[results.get("kind")]
