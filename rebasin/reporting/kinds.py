"""What jobs leave in their folders, whatever their kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.samples import Samples
from ..files import write_text
from . import many, methods, run, search_figures, search_page, study
from .answers import Answer
from .metrics import Tables, metrics
from .page import save_page, yaml
from .results import Results, save_results
from .samples import NAME as SAMPLES
from .samples import save_samples
from .style import Drawings, save_png
from .table import Table


@dataclass(frozen=True)
class Kind:
    """What is made of the results of one kind of job.

    Attributes:
        told: what the terminal shows at the end.
        summary: the single figures by name, for a tracker.
        page: what the template of this kind is given; with a "table", there is a table.md, too. None: there is no page.
        drawings: the pictures that results.json suffices for.
        tables: what has rows, for a tracker.
    """

    told: Callable[[Results], Sequence[Table | Answer | str]]
    summary: Callable[[Results], dict[str, float]]
    page: Callable[[Results], dict[str, Any]] | None = None
    drawings: Callable[[Results], Drawings] = lambda results: {}
    tables: Callable[[Results], Tables] = lambda results: {}


KINDS: dict[str | None, Kind] = {
    None: Kind(run.told, metrics, run.page, run.drawings, run.tables),
    many.KIND: Kind(many.told, many.summary, many.page, many.drawings, many.tables),
    study.KIND: Kind(study.told, study.summary, tables=study.tables),
    search_page.KIND: Kind(search_page.told, search_page.summary, search_page.page, search_figures.drawings),
    methods.KIND: Kind(methods.told, methods.summary, methods.page, methods.drawings),
}
"""By the `kind` in results.json; runs on two models have none."""


def kind_of(results: Results) -> Kind:
    return KINDS[results.get("kind")]


def leave(results: Results, folder: Path, samples: Samples | None = None) -> list[Path]:
    """Write results.json, config.yaml, samples.png if there are any, pictures and pages of this kind; their paths."""
    written = [save_results(folder, results), write_text(folder / "config.yaml", yaml(results["config"]))]
    if samples is not None:
        written.append(save_samples(samples, folder / SAMPLES))
    return [*written, *draw(results, folder)]


def draw(results: Results, folder: Path) -> list[Path]:
    """Write pictures and pages from what is in results.json, and the pictures that the job has made before."""
    kind = kind_of(results)
    drawn = [save_png(make(), folder / name) for name, make in kind.drawings(results).items()]
    if kind.page is not None:
        page = kind.page(results)
        if "table" in page:
            drawn.append(write_text(folder / "table.md", page["table"].markdown()))
        drawn.append(save_page(results.get("kind", "run"), results, folder, pictures(results), **page))
    return drawn


def pictures(results: Results) -> list[str]:
    """The files of pictures that these results have: others in their folder are of an earlier job."""
    made = results.get("pictures")
    if made is None:  # an earlier version did not tell what it had made of its models
        made = run.made_before(results) if kind_of(results).told is run.told else []
    return [*kind_of(results).drawings(results), *made]
