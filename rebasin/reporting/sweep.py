"""A sweep's results as one table: what all runs share, what varied, what was measured; kept as sweep.json.

A row is one measurement: a run that aligns two models is a row, a run on many models a row for each line of its
comparison, a study a row for each that it returned. Columns are the options by their names on the command line
(model.width), the figures of `metrics` (barrier/heldout/loss), and a study's own.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from ..errors import CheckpointError
from ..files import write_text
from . import experiments
from .metrics import columns, metrics
from .results import NAME as RESULTS
from .results import Environment, Results, checked, load_results, read_json, relevant
from .sweep_command import place as order_of

NAME = "sweep.json"
FORMAT = 1

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One finished run: its folder below the sweep's, the command that does it again, its wall time in seconds."""

    folder: str
    command: str
    seconds: float


@dataclass(frozen=True)
class Sweep:
    """What was measured.

    Attributes:
        declaration: the experiment's block of its file: name, title, question, figures, table.
        size: "full", "small" or "short".
        common: options that all runs share.
        rows: the options that differ, and the measurements.
        runs: in the order of their folders.
        environment: of the first run.
    """

    declaration: Mapping[str, Any]
    size: str
    common: Mapping[str, Any]
    rows: tuple[Row, ...]
    runs: tuple[Run, ...]
    environment: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.declaration['name']}-{self.size}"

    @property
    def varied(self) -> list[str]:
        """The options that differ between runs."""
        return sorted({key for row in self.rows for key in row.get("varied", ())})

    @property
    def seconds(self) -> float:
        return sum(run.seconds for run in self.runs)

    def value(self, row: Row, column: str | None) -> Any:
        """What `row` has in `column`; None if nothing."""
        return row[column] if column in row else self.common.get(column)  # pyright: ignore

    def where(self, wanted: Mapping[str, Any]) -> list[Row]:
        """The rows that have the wanted value, or one of a list, in each of these columns."""
        lists = {column: one if isinstance(one, list) else [one] for column, one in wanted.items()}
        return [row for row in self.rows if all(self.value(row, c) in values for c, values in lists.items())]

    def distinct(self, rows: Sequence[Row], column: str | None) -> list[Any]:
        """The values of a column: numbers rise, words stay in the order in which they came."""
        found = list(dict.fromkeys(self.value(row, column) for row in rows))
        return sorted(found) if all(isinstance(value, (int, float)) for value in found) else found


SEEDS = ("seed", "model.seeds")
"""Options over which a sweep averages."""


def collect(folder: Path) -> Sweep:
    """The finished runs below `folder`, in the order of the recipe's axes; figures and table are those that the
    experiment's file declares today, so that they can be changed without running anything again.

    Raises:
        CheckpointError: there are none, or not of one experiment.
    """
    found = [(path.parent, load_results(path.parent)) for path in sorted(folder.glob(f"**/{RESULTS}"))]
    if not found:
        raise CheckpointError(f"There is no finished run in {folder}; name a run's or a sweep's folder.")
    declared = [results["config"].get("experiment") for _, results in found]
    if any((d or {}).get("name") != (declared[0] or {}).get("name") for d in declared):
        raise CheckpointError(f"{folder} has runs of several experiments; name the folder of one sweep.")
    declaration = _today(declared[-1])
    size = str(found[0][1]["config"].get("size", "full"))
    found.sort(key=lambda run: order_of(declaration or {}, size, str(run[1].get("command", ""))))
    options = [_flat(relevant(results["config"])) for _, results in found]
    common = {
        name: value
        for name, value in sorted(options[0].items())
        if all(name in flat and flat[name] == value for flat in options)
    }
    rows: list[Row] = []
    runs: list[Run] = []
    for (place, results), flat in zip(found, options, strict=True):
        own = {name: value for name, value in flat.items() if name not in common}
        name = str(place.relative_to(folder))
        head = {**own, "varied": sorted(own), "run": name}
        rows += [{**head, **measured} for measured in measurements(results)]
        runs.append(Run(name, str(results.get("command", "")), float(results["seconds"]["total"])))
    declaration = _told_apart(declaration, size, rows) if declaration else _undeclared(folder, rows)
    return Sweep(declaration, size, common, tuple(rows), tuple(runs), found[0][1]["environment"])


def measurements(results: Results) -> list[dict[str, Any]]:
    """The rows of one run, without its options."""
    if results.get("kind") == "study":
        return [dict(row) for row in results["rows"]]
    if results.get("kind") == "many":
        return [
            {"split": split, "models": len(results["models"]), "seconds/align": results["seconds"]["align"]}
            | {key: value for key, value in row.items() if key not in ("name", "calibration")}
            | {"merge": row["name"].replace(results["algorithm"], "aligned")}
            | {f"reliability/{key}": value for key, value in _filled(row["calibration"] or {}).items()}
            for split, rows in results["rows"].items()
            for row in rows
        ]
    if "curves" not in results:  # a search's, or a comparison of methods: they have reports of their own
        return []
    row: dict[str, Any] = dict(metrics(results))
    for split, kinds in results["curves"].items():
        for kind, curve in kinds.items():
            row[f"line/{split}/lambda"] = curve["lambdas"]
            row[f"line/{split}/{kind}/loss"] = curve["losses"]
            row |= {f"line/{split}/{kind}/{name}": values for name, values in curve["metrics"].items()}
    return [row]


def _filled(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Without confidence and accuracy, 0, of bins in which no sample is: a figure has no point there."""
    shares = calibration.get("share") or ()
    return {
        key: [v if share else None for v, share in zip(value, shares, strict=True)]
        if key in ("confidence", "accuracy")
        else value
        for key, value in calibration.items()
    }


def _today(stored: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What the experiment of this name declares now; what was stored if there is none (any more, or here)."""
    name = (stored or {}).get("name")
    return experiments.declaration(name) if name in experiments.names() else stored


class Stored(TypedDict):
    """What `save` writes."""

    experiment: Mapping[str, Any]
    size: str
    common: Mapping[str, Any]
    rows: list[Mapping[str, Any]]
    runs: list[Run]
    environment: Environment


def save(sweep: Sweep, path: Path) -> Path:
    """Write the sweep as JSON; `load` reads it."""
    fields = vars(sweep) | {"runs": [vars(run) for run in sweep.runs]}
    data = {"format": FORMAT, "kind": "sweep", "experiment": fields.pop("declaration"), **fields}
    # Six digits: what a figure shows, and half the size of a file.
    rounded = json.loads(json.dumps(data), parse_float=lambda digits: float(f"{float(digits):.6g}"))
    return write_text(path, json.dumps(rounded, separators=(",", ":")) + "\n")


def load(path: Path) -> Sweep:
    """The sweep in a sweep.json.

    Raises:
        CheckpointError: the file is missing, or something else.
    """
    data = read_json(path)
    if not isinstance(data, dict) or data.get("kind") != "sweep" or data.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a sweep of this version (format {FORMAT}).")
    data = checked(Stored, data, path)
    rows, runs = tuple(data["rows"]), tuple(data["runs"])
    return Sweep(data["experiment"], data["size"], data["common"], rows, runs, data["environment"])


def csv_text(sweep: Sweep) -> str:
    """All rows with what varied and every single number (lists are in sweep.json), as CSV."""
    scalar = [key for key in columns(sweep.rows) if key not in ("varied", "run")]
    varied = [key for key in sweep.varied if key in scalar]
    head = [*varied, *(key for key in scalar if key not in varied), "run"]
    out = io.StringIO()
    writer = csv.DictWriter(out, head, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(sweep.rows)
    return out.getvalue()


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            flat[f"{prefix}{key}"] = json.dumps(value)
        elif not str(key).startswith("_"):
            flat[f"{prefix}{key}"] = value
    return flat


def _told_apart(declaration: Mapping[str, Any], size: str, rows: Sequence[Row]) -> Mapping[str, Any]:
    """The declaration, with lines of their own for runs that differ in an option that the recipe gives one value, which
    a sweep has that was continued with another: what is averaged differs in its seeds alone.
    """
    plan = [one for one in map(experiments.parsed, experiments.recipe(declaration, size)) if one is not None]
    axes = {experiments.option_of(one) for one in plan if one.is_sweep_override()}
    axes |= {f"{axis}.name" for axis in axes} | set(SEEDS)
    varied = {key for row in rows for key in row["varied"]}
    blocks = [*(declaration.get("figures") or ()), declaration.get("table") or {}]
    fields = [block.get(name) for block in blocks for name in ("x", "panel", "series", "columns", "rows")]
    axes |= varied & {
        key for one in fields for key in ([one] if isinstance(one, str) else one or ())
    }  # told apart
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(json.dumps(row.get(axis)) for axis in sorted(axes)), []).append(row)
    own = [
        key
        for key in sorted(varied - axes)
        if any(len({json.dumps(row.get(key)) for row in group}) > 1 for group in groups.values())
    ]
    if not own:
        return declaration

    table, figures = declaration.get("table"), declaration.get("figures") or ()
    settings = list(
        {json.dumps([row.get(key) for key in own]): [row.get(key) for key in own] for row in rows}.values()
    )
    return {
        **declaration,
        "figures": [_of(figure, own, values, n) for n, values in enumerate(settings) for figure in figures],
        "table": table
        and {**table, "rows": [*own, *(key for key in table.get("rows") or () if key not in own)]},
    }


def _of(figure: Mapping[str, Any], own: Sequence[str], values: Sequence[Any], number: int) -> dict[str, Any]:
    """A figure of the runs with these values of these options alone."""
    told = ", ".join(f"{key} {json.dumps(value)}" for key, value in zip(own, values, strict=True))
    return {
        **figure,
        "name": figure["name"] if number == 0 else f"{figure['name']}-{number + 1}",
        "title": f"{figure.get('title', '')} ({told})".strip(),
        "where": {**(figure.get("where") or {}), **dict(zip(own, values, strict=True))},
    }


def _undeclared(folder: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """The declaration of a sweep without an experiment: the barrier against what varied first."""
    varied = {key for row in rows for key in row["varied"]}
    axes = [key for key in sorted(varied) if len({json.dumps(row.get(key)) for row in rows}) > 1]
    shown = {"naive": "naive/barrier/heldout/loss", "aligned": "barrier/heldout/loss"}
    measured = bool(axes) and all(shown["aligned"] in row for row in rows)
    return {
        "name": folder.name,
        "title": f"Sweep {folder.name}",
        "question": "",
        "figures": [{"name": "barrier", "x": axes[0], "y": shown}] if measured else [],
        "table": {"rows": axes, "values": list(shown.values())} if measured else None,
    }
