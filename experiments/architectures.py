"""The engine's conformance table: trace, prove and measure every architecture of the zoo.

    python -m experiments.architectures                        # all; writes docs/architectures.md and .json
    python -m experiments.architectures --family blocks        # one family, printed only
    python -m experiments.architectures --family torchvision --only resnet50 --only vit_b_16
    python -m experiments.architectures --family diffusers --only VQModel --update   # this row anew

Soundness is computed on small random-weight models (a random member of the group, fp32 and fp64, norms and biases
randomised first). Coverage is by shape at the published size. torchvision's wheel wants CUDA; the operators that a CPU
build lacks are declared on import, so `pip install --no-deps torchvision==0.28.0` is enough here.
"""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from rich.table import Table

import rebasin
from rebasin.spec.continuous import KINDS

from .zoo import ZOO
from .zoo_library import NOT_POSSIBLE

Row = dict[str, Any]
SIZED = ("transformers", "diffusers")
"""Families whose published sizes are too large to compute with; the others are examined at their own."""


def examine(family: str, name: str) -> Row:
    """One line of the table; an architecture that fails is a line that says so."""
    build = ZOO[family][name]
    torch.manual_seed(0)
    row: Row = {"family": family, "name": name}
    try:
        model, args, kwargs = build(False)
        spec = rebasin.trace(model, *args, **kwargs)
        single = rebasin.verify(model, spec, *args, dtype=torch.float32, **kwargs)
        double = rebasin.verify(model, spec, *args, dtype=torch.float64, **kwargs)
        proved = single.passed and double.passed and double.maps == len(spec.continuous)
        row |= {"fp32": single.max_relative_error, "fp64": double.max_relative_error, "moved": double.moved}
        if family in SIZED:
            with torch.device("meta"):
                model, args, kwargs = build(True)
        started = time.perf_counter()
        spec = rebasin.trace(model, *args, **kwargs)
        row |= {
            "seconds": time.perf_counter() - started,
            "parameters": sum(p.numel() for p in model.parameters()),
            "groups": len(spec),
            "neurons": spec.neurons,
            "one": spec.coverage().one,
            "both": spec.coverage().both,
            "pins": sorted({pin.reason.split(" at ")[0].split(":")[0] for pin in spec.pins}),
            "streams": sum(g.count for g in spec.continuous if g.kind.startswith("rotations")),
            "dimensions": {
                kind: sum(g.dimension for g in spec.continuous if g.kind == kind) for kind in KINDS
            },
            "sound": proved,
        }
    except Exception as error:
        row |= {"sound": False, "error": f"{type(error).__name__}: {error}"[:300]}
    return row


def markdown(rows: list[Row]) -> str:
    lines = [
        "# Architectures",
        "",
        "Made by `python -m experiments.architectures`"
        f" (torch {torch.__version__}, {platform.machine()}, one thread; tracing seconds on a busy machine).",
        "",
        "`fp32`, `fp64`: largest relative change of an output under a random member of the group (small model,",
        "random weights, norms and biases randomised); in fp64 it has a matrix for each continuous group, too. At the",
        "published size: the share of the parameters with at least one, and of the matrices with both, axes permuted;",
        "streams that may be rotated; free dimensions of rotations (O), invertible matrices (GL) and of factors for",
        "single neurons (scales), see [continuous.md](continuous.md). Not permuted: vocabularies, inputs, outputs, and",
        "models whose output *is* their residual stream (encoders without a head: trace them with what reads them).",
        "Rows with the name of a class are measured with the defaults of its library where these are traced in about",
        "a quarter of a minute, else with the small configuration: the parameters say which. A row is of its last run.",
        "",
    ]
    for family in ZOO:
        mine = [r for r in rows if r["family"] == family]
        if not mine:
            continue
        lines += [
            f"## {family}",
            "",
            "| architecture | sound | fp32 | fp64 | parameters | groups | one | both | streams | O | GL | scales |"
            " trace s | pinned by |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for r in mine:
            if "error" in r:
                lines.append(f"| {r['name']} | **no** | {r['error']} | | | | | | | | | | | |")
                continue
            sound = "yes" if r["sound"] else "**no**"
            free = r["dimensions"]
            turned = free["rotations"] + free["rotations that keep ones"]
            scaled = free["scales"] + free["positive scales"]
            lines.append(
                f"| {r['name']} | {sound} | {r['fp32']:.0e} | {r['fp64']:.0e} | {r['parameters']:,} | {r['groups']} |"
                f" {r['one']:.2%} | {r['both']:.1%} | {r['streams']} | {turned:,} | {free['invertible']:,} |"
                f" {scaled:,} |"
                f" {r['seconds']:.1f} | {', '.join(r['pins'])} |"
            )
        lines.append("")
    lines += ["## Not possible here", ""]
    lines += [f"- `{name}`: {why}" for name, why in sorted(NOT_POSSIBLE.items())]
    return "\n".join([*lines, ""])


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """Old rows, those of the same name replaced, in the order of the zoo; what the zoo has no more is left out."""
    known = {(r["family"], r["name"]): r for r in [*old, *new]}
    return [known[family, name] for family in ZOO for name in ZOO[family] if (family, name) in known]


def main(
    family: Annotated[
        list[str] | None, typer.Option(help=f"one or more of {', '.join(ZOO)}; default all")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="architectures by name; default all of the family")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for architectures.md and .json; default docs/ for a full run")
    ] = None,
    update: Annotated[
        bool,
        typer.Option(help="write these rows into the files of the folder (docs/), and keep their others"),
    ] = False,
) -> None:
    """Trace, prove and measure the architectures; exits with 1 if one line is not green."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ["REBASIN_CACHE"] = "off"  # seconds are of tracing, not of reading
    torch.set_num_threads(1)
    unknown = set(family or []) - set(ZOO)
    if unknown:
        raise typer.BadParameter(f"unknown family {', '.join(unknown)}; choose from {', '.join(ZOO)}")
    work = [(f, n) for f in (family or ZOO) for n in ZOO[f] if not only or n in only]
    rows = [examine(f, n) for f, n in track(work, description="architectures")]
    sound = all(r["sound"] for r in rows)
    table = Table("architecture", "sound", "fp32", "fp64", "one", "both", "seconds")
    for r in rows:
        cells = (
            [r.get("error", "")]
            if "error" in r
            else [
                f"{r['fp32']:.0e}",
                f"{r['fp64']:.0e}",
                f"{r['one']:.2%}",
                f"{r['both']:.1%}",
                f"{r['seconds']:.1f}",
            ]
        )
        table.add_row(f"{r['family']}/{r['name']}", "yes" if r["sound"] else "NO", *cells)
    typer.echo("")
    import rich

    rich.print(table)
    folder = out or (Path("docs") if update or (not family and not only) else None)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if update:
            rows = merged(json.loads((folder / "architectures.json").read_text()), rows)
        (folder / "architectures.md").write_text(markdown(rows) + "\n")
        (folder / "architectures.json").write_text(json.dumps(rows, indent=1) + "\n")
    if not sound:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
