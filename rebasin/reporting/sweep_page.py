"""What a sweep leaves: sweep.json, sweep.csv, table.md, its figures, and one self-contained page; and its section in
a page of results.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import prepare_folder, write_text
from .kinds import pictures
from .page import data_uri, render
from .results import NAME as RESULTS
from .results import load_results
from .sweep import NAME, Sweep, csv_text, save
from .sweep_command import command
from .sweep_figures import draw, plots, words
from .sweep_tables import table
from .table import Table

PICTURES = ("samples.png", "reliability.png", "curve.png")
MANY = 24
"""Runs of which the page shows the pictures."""


def leave(sweep: Sweep, folder: Path, runs: Path | None = None) -> list[Path]:
    """Write all of it into `folder`; `runs` is the sweep's own folder, whose runs' pictures are shown too."""
    prepare_folder(folder)
    written = [save(sweep, folder / NAME), write_text(folder / "sweep.csv", csv_text(sweep))]
    found = table(sweep)
    if found is not None:
        written.append(write_text(folder / "table.md", found.markdown()))
    written += draw(sweep, folder)
    return [*written, write_text(folder / "report.html", page(sweep, folder, found, runs))]


def page(sweep: Sweep, folder: Path, found: Table | None, runs: Path | None = None) -> str:
    """The page's text; its figures are read from `folder`."""
    figures = [
        {"title": plot.title or words(plot.name), "picture": data_uri(folder / f"{plot.name}.png")}
        for plot in plots(sweep)
        if (folder / f"{plot.name}.png").is_file()
    ]
    return render(
        "sweep",
        s=sweep,
        d={"question": "", "paper": None, **sweep.declaration},
        table=found,
        figures=figures,
        machine=machine(sweep.environment),
        minutes=minutes(sweep.seconds),
        command=command(sweep),
        runs=[_run(sweep, run, runs) for run in sweep.runs],
        words=words,
        own_pictures=bool(sweep.declaration.get("pictures")),
    )


def machine(environment: Mapping[str, Any]) -> str:
    """What the figures were made on."""
    versions = environment["versions"]
    return (
        f"{environment.get('device', 'CPU')}, {environment['cores']} cores of {environment['system']},"
        f" {environment['threads']} thread{'s' if environment['threads'] > 1 else ''};"
        f" Python {environment['python']}, torch {versions.get('torch')}"
    )


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def into_docs(sweep: Sweep, document: Path, place: Path) -> list[Path]:
    """Replace the experiment's section in the Markdown file `document`, or add it at the end; the figures go into the
    folder `place`, and so does sweep.json, from which all can be drawn again.

    A section lies between `<!-- experiment: NAME -->` and `<!-- /experiment -->`.
    """
    prepare_folder(place)
    stored = save(sweep, place / f"{sweep.name}.json")
    written = [path.replace(place / f"{sweep.name}-{path.name}") for path in draw(sweep, place)]
    begin, end = f"<!-- experiment: {sweep.name} -->", "<!-- /experiment -->"
    section = f"{begin}\n{_section(sweep, document, stored, written)}\n{end}"
    text = document.read_text(encoding="utf-8") if document.is_file() else "# Results\n"
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    text, known = pattern.subn(lambda _: section, text)
    text = text if known else f"{text.rstrip()}\n\n{section}\n"
    return [write_text(document, text), stored, *written]


def _section(sweep: Sweep, document: Path, stored: Path, drawn: list[Path]) -> str:
    declared = sweep.declaration
    found = table(sweep)
    runs = f"{len(sweep.runs)} run{'s' if len(sweep.runs) > 1 else ''}"
    parts = [
        f"## {declared['title']}",
        declared.get("question") or "",
        f"`{command(sweep)}`: {runs}, {minutes(sweep.seconds)}, {machine(sweep.environment)}. "
        f"Redraw: `python -m rebasin.report {_relative(stored, Path.cwd())}`.",
        found.markdown().rstrip() if found is not None else "",
        "\n".join(f"![{declared['title']}]({_relative(path, document.parent)})" for path in drawn),
        f"**The paper:** {declared['paper']}" if declared.get("paper") else "",
    ]
    return "\n\n".join(part.strip() for part in parts if part)


def _relative(path: Path, start: Path) -> str:
    """From `start`, or from the folder of the page, if it is not below it: a page names no folder of one machine."""
    path = path.resolve()
    for place in (start.resolve(), path.parent.parent):
        if path.is_relative_to(place):
            return path.relative_to(place).as_posix()
    return path.name


def _tells(sweep: Sweep, key: str) -> bool:
    """Whether an option distinguishes runs: not if it follows from the name of its group's choice, as do the options
    that only one algorithm has.
    """
    name = f"{key.split('.')[0]}.name"
    if key == name or name not in sweep.varied:
        return True
    pairs = {(str(row.get(name)), str(row.get(key))) for row in sweep.rows}
    return len(pairs) > len({choice for choice, _ in pairs})


def _run(sweep: Sweep, run: Any, folder: Path | None) -> dict[str, Any]:
    row = next((row for row in sweep.rows if row["run"] == run.folder), {"varied": ()})
    options = [f"{words(key)} {words(row[key])}" for key in row["varied"] if _tells(sweep, key)]
    picture = None
    if folder is not None and len(sweep.runs) <= MANY and (folder / run.folder / RESULTS).is_file():
        own = folder / run.folder
        made = pictures(load_results(own))
        files = [own / name for name in sweep.declaration.get("pictures") or PICTURES if name in made]
        picture = next((data_uri(file) for file in files if file.is_file()), None)
    seconds = f"{run.seconds:.1f}"
    return {**vars(run), "seconds": seconds, "options": ", ".join(options), "picture": picture}
