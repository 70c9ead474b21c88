"""Whole merges of single files of today's families, in the names of their own code, at reduced width.

    python -m experiments.single_files                       # writes docs/single_files.md
    python -m experiments.single_files --only Flux.1

Two files of a family with random weights are merged by `rebasin merge --maps`, B is aligned and verified, and A is read
and written unchanged, each in a process of its own. Published sizes: `python -m experiments.model_classes`; what a file
of twelve gigabytes takes: `python -m experiments.large_files`.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from .model_folders import command
from .original_names import ORIGINAL, tensors

Row = dict[str, Any]


def examine(family: str) -> Row:
    """The row of a family."""
    from rebasin.checkpoints import open_checkpoint, save_checkpoint, save_safetensors
    from rebasin.checkpoints.provenance import read
    from rebasin.tensors import load_metadata, load_safetensors

    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        a, b, again = root / "a.safetensors", root / "b.safetensors", root / "again.safetensors"
        for seed, file in enumerate((a, b)):
            own = tensors(ORIGINAL[family](), seed)
            save_safetensors(file, {f"model.diffusion_model.{name}": t for name, t in own.items()})
        checkpoint = open_checkpoint(a)
        component = checkpoint.components[0]
        whole = checkpoint.restore({component: dict(checkpoint.component(component).items())})
        save_checkpoint(again, checkpoint, whole)
        before, after = (dict(load_safetensors(file).items()) for file in (a, again))
        exact = list(before) == list(after) and all(bool((before[n] == after[n]).all()) for n in before)
        text, seconds, memory = command("merge", a, b, "-o", root / "m.safetensors", "--maps")
        command("align", a, b, "-o", root / "aligned.safetensors", "--maps")
        verified, *_ = command("verify", b, root / "aligned.safetensors")
        (made,) = ((read(load_metadata(root / "m.safetensors")) or {})["alignment"] or {}).values()
        error = re.search(r"(\d\.\de[-+]\d+) relative", text) or re.search(r"(\d\.\de[-+]\d+)", verified)
        return {
            "family": checkpoint.title,
            "class": family,
            "tensors": len(before),
            "exact": exact,
            "neurons": made["neurons"],
            "moved": made["moved"],
            "maps": made["maps"],
            "error": float(error[1]) if error else None,
            "seconds": seconds,
            "memory": memory,
        }


def markdown(rows: list[Row]) -> str:
    lines = [
        "# Single files of today's families",
        "",
        "Made by `python -m experiments.single_files`: pairs of files of reduced width with random weights, in the",
        "names of each family's own code. *Round trip*: read as the class of diffusers and written again, all names,",
        "order and bits are those of the file. *Outputs of B*: their largest relative change when B is aligned to A,",
        "maps included, in float32. Seconds and memory are those of the whole `rebasin merge --maps` in a process of",
        "its own, spec and proof included.",
        "[What is understood, and what is not](checkpoints.md#single-files-of-todays-models).",
        "",
        "| family | class | tensors | round trip | neurons | moved | maps | outputs of B | seconds | memory |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if "fault" in row:
            lines.append(f"| {row['family']} | {row['fault']} | | | | | | | | |")
            continue
        error = "-" if row["error"] is None else f"{row['error']:.0e}"
        lines.append(
            f"| {row['family']} | {row['class']} | {row['tensors']} | {'exact' if row['exact'] else '**no**'} |"
            f" {row['neurons']:,} | {row['moved']:,} | {row['maps']} | {error} | {row['seconds']:.0f} |"
            f" {row['memory'] / 1e9:.1f} GB |"
        )
    return "\n".join(lines) + "\n"


def main(only: Annotated[list[str] | None, typer.Option(help="a family; may be repeated")] = None) -> None:
    """Merge narrow files of all families; exits with 1 if one fails."""
    rows: list[Row] = []
    for family in track([one for one in ORIGINAL if not only or one in only], description="families"):
        try:
            rows.append(examine(family))
        except Exception as error:
            rows.append({"family": family, "fault": f"{type(error).__name__}: {error}"[:300]})
    typer.echo(markdown(rows))
    if not only:
        Path("docs/single_files.md").write_text(markdown(rows), encoding="utf-8")
        Path("docs/single_files.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if any("fault" in row or not row["exact"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
