"""The figures that README.md states of runs: its commands, run; their log, and the sentences that it must bear out.

    python -m experiments.readme_figures                     # runs all: a quarter of an hour of one core
    python -m experiments.readme_figures --only auto,ste     # runs these anew and keeps the others
    python -m experiments.readme_figures --check             # runs nothing: does README say what the log does?

The log is docs/experiments/readme.json; docs/results.md has it as a table.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from subprocess import run
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from experiments.common import console, markdown
from rebasin.files import write_text
from rebasin.reporting.results import load_results
from rebasin.reporting.sweep import measurements

LOG, README = Path("docs/experiments/readme.json"), Path("README.md")

MLP = "model=mlp algo=weight_matching model.width="
RUNS: Mapping[str, str] = {
    "auto": "",
    "weights": "algo=weight_matching",
    "weights_identity": "algo=weight_matching algo.init=identity",
    "ste": "algo=ste",
    "finetunes": "model.a=low model.b=high",
    "demo": "algo=learned_quick model.a=wide0 model.b=wide1 data.train=800 data.draws=4 data.batch_size=32"
    " evaluate.points=11",
    **{f"mlp{width}": f"{MLP}{width}" for width in (32, 128, 512)},
    **{f"mlp{width}_identity": f"{MLP}{width} algo.init=identity" for width in (32, 128, 512)},
}
"""Name -> what stands behind `python -m rebasin.run`."""

KEYS = {
    "naive": "naive/barrier/heldout/loss",
    "barrier": "barrier/heldout/loss",
    "middle": "midpoint/heldout/loss",
    "naive_middle": "naive/midpoint/heldout/loss",
    "a": "endpoints/heldout/loss_a",
    "b": "endpoints/heldout/loss_b",
    "accuracy": "midpoint/heldout/accuracy",
    "naive_accuracy": "naive/midpoint/heldout/accuracy",
    "align": "seconds/align",
    "total": "seconds/total",
}

CLAIMS = (
    "went from {auto[naive]:.3f} to {auto[barrier]:.3f}, {auto[share]:.0%} of naive; a part remains",
    "it takes 22 seconds and leaves {weights[barrier]:.3f}",
    "brings the barrier from {ste[naive]:.3f} to {ste[barrier]:.3f} ({ste[percent]:.0f} %)",
    "the barrier is {finetunes[barrier]:.0f} and the midpoint ({finetunes[middle]:.4f}) is better than both endpoints"
    " ({finetunes[a]:.4f}, {finetunes[b]:.4f})",
    "The barrier on held-out data went from {demo[naive]:.3g} to {demo[barrier]:.3g}, {demo[share]:.0%} of naive",
    *(
        f"| {w} | {{mlp{w}[naive]:.3g}} | {{mlp{w}[barrier]:.3g}} | {{mlp{w}[naive_percent]:.1f}} % /"
        f" {{mlp{w}[accuracy_percent]:.1f}} % |"
        for w in (32, 128, 512)
    ),
    "gives {weights_identity[barrier]:.3f} for the UNets and {mlp32_identity[barrier]:.3f},"
    " {mlp128_identity[barrier]:.3g} and {mlp512_identity[barrier]:.0f} for the three widths",
)
"""What README says, with the log's figures in it; white space does not count."""

Log = dict[str, dict[str, float]]


def figures(log: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The log and what follows from it: shares of naive, and percents."""
    made = {}
    for name, row in log.items():
        own = dict(row)
        own["share"] = row["barrier"] / row["naive"] if row["naive"] else 0.0
        own["percent"] = 100 * own["share"]
        if "accuracy" in row:
            own["accuracy_percent"], own["naive_percent"] = 100 * row["accuracy"], 100 * row["naive_accuracy"]
        made[name] = own
    return made


def read() -> Log:
    return json.loads(LOG.read_text())["runs"]


def wrong(log: Mapping[str, Mapping[str, float]], text: str) -> list[str]:
    """The sentences that README lacks, as the log has them."""
    plain, found = " ".join(text.split()), figures(log)
    return [told for claim in CLAIMS if (told := " ".join(claim.format(**found).split())) not in plain]


def table(log: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each run."""
    rows = [
        [
            f"`{' '.join(['python -m rebasin.run', RUNS[name]]).strip()}`",
            f"{row['naive']:.3g}",
            f"{row['barrier']:.3g}",
            f"{row['share']:.0%}",
            f"{row['middle']:.3g}",
        ]
        for name, row in figures(log).items()
    ]
    head = "| command | naive barrier | barrier, held-out | of naive | loss at the midpoint |"
    return markdown(head, "|:--|" + "--:|" * 4, rows)


def measured(options: str) -> dict[str, float]:
    """One run in a process of its own, by its results."""
    with TemporaryDirectory() as folder:
        given = [*options.split(), f"hydra.run.dir={folder}/run", "logger=none", "threads=1"]
        given += [] if "model=mlp" in options else ["model.samples=0"]
        run([sys.executable, "-m", "rebasin.run", *given], check=True, stdout=sys.stderr)
        (row,) = measurements(load_results(Path(folder) / "run"))
    return {name: float(row[key]) for name, key in KEYS.items() if key in row}


def main(
    only: Annotated[str, typer.Option(help="names of runs, with , between: run these, keep the others")] = "",
    check: Annotated[
        bool, typer.Option("--check", help="only say whether README is what the log says")
    ] = False,
) -> None:
    """Run the commands whose figures README states, and hold its sentences against them."""
    if unknown := set(filter(None, only.split(","))) - RUNS.keys():
        raise typer.BadParameter(f"there is no run {sorted(unknown)[0]!r}; there are {', '.join(RUNS)}.")
    kept: dict[str, Any] = json.loads(LOG.read_text()) if LOG.exists() else {"runs": {}}
    for name, options in {} if check else RUNS.items():
        if only and name not in only.split(","):
            continue
        began = time.perf_counter()
        kept["runs"][name] = measured(options)
        kept["runs"] = {one: kept["runs"][one] for one in RUNS if one in kept["runs"]}
        write_text(LOG, json.dumps(kept, indent=1) + "\n")
        console.print(f"{name}: {kept['runs'][name]}, {time.perf_counter() - began:.0f} s", soft_wrap=True)
    if missing := wrong(kept["runs"], re.sub(r"\*+", "", README.read_text())):
        console.print("README does not say:\n  " + "\n  ".join(missing))
        raise typer.Exit(1)
    console.print("README says what the log says.")


if __name__ == "__main__":
    typer.run(main)
