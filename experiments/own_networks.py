"""Networks of one's own, as docs/own_model.md shows them: written by `rebasin.new`, run by `python -m rebasin.run`.

    python -m experiments.own_networks                       # writes docs/own_networks.json and the page's table
    python -m experiments.own_networks --only gpt

Each kind is a fresh folder, and each run a process of its own whose working folder that is: two trainings from two
seeds, an alignment, and the line between both on held-out data.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from .checkpoints_end_to_end import measured

Row = dict[str, Any]

KINDS = ("resnet", "vit", "gpt")
ALGORITHMS = {"weight_matching": (), "activation_and_weight": (), "learned": ("algo.steps=200",)}
BEGIN, END = "<!-- made by python -m experiments.own_networks -->", "<!-- end -->"


def examine(kind: str) -> Row:
    """The row of a kind."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        subprocess.run([sys.executable, "-m", "rebasin.new", "study", "--kind", kind], cwd=root, check=True)
        row: Row = {"kind": kind, "barriers": {}, "seconds": {}, "memory": 0.0, "error": 0.0}
        for name, options in ALGORITHMS.items():
            run = [sys.executable, "-m", "rebasin.run", "--config-dir", "conf", "model=study", f"algo={name}"]
            run += [*options, "logger=none", f"hydra.run.dir={root / name}"]
            before = Path.cwd()
            os.chdir(root / "study")
            try:
                cost = measured(run)
            finally:
                os.chdir(before)
            results = json.loads((root / name / "results.json").read_text())
            (proof,) = results["verify"].values()
            curve = results["curves"]["heldout"]
            row |= {"neurons": proof["neurons"], "maps": max(row.get("maps", 0), proof["maps"])}
            row["error"] = max(row["error"], proof["max_relative_error"])
            row["naive"] = curve["naive"]["barrier"]
            row["barriers"][name] = curve["aligned"]["barrier"]
            row["seconds"][name] = cost["cpu"]
            row["memory"] = max(row["memory"], cost["peak"])
        return row


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| | neurons | continuous maps | verified error | naive |"
        + "".join(f" `{name}` |" for name in ALGORITHMS)
        + " CPU seconds | memory |",
        "|---|--:|--:|--:|--:|" + "--:|" * len(ALGORITHMS) + "--:|--:|",
    ]
    for row in rows:
        barriers = "".join(f" {row['barriers'][name]:.3g} |" for name in ALGORITHMS)
        seconds = ", ".join(f"{row['seconds'][name]:.0f}" for name in ALGORITHMS)
        lines.append(
            f"| `--kind {row['kind']}` | {row['neurons']} | {row['maps']} | {row['error']:.0e} |"
            f" {row['naive']:.3g} |{barriers} {seconds} | {row['memory'] / 1e9:.1f} GB |"
        )
    return lines


def main(only: Annotated[list[str] | None, typer.Option(help="a kind; may be repeated")] = None) -> None:
    """Run the networks of the page with three algorithms; some three minutes of a core."""
    rows = [examine(kind) for kind in track([k for k in KINDS if not only or k in only], description="kinds")]
    typer.echo("\n".join(table(rows)))
    if not only:
        page = Path("docs/own_model.md")
        made = "\n".join([BEGIN, "", *table(rows), "", END])
        text = page.read_text(encoding="utf-8")
        page.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: made, text, flags=re.S), encoding="utf-8")
        Path("docs/own_networks.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
