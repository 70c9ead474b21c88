"""What the engine finds in classes of transformers and diffusers at their published sizes, and how it is proved.

    python -m experiments.model_classes                               # all of CLASSES; writes docs/model_classes.md
    python -m experiments.model_classes --resume                      # those that have no row there yet
    python -m experiments.model_classes --only LlamaForCausalLM       # prints a row

A row is a process of its own: the class is built with its library's default configuration on no memory, its spec is
derived, a twin of reduced width is made from the configuration, must have the same structure, and is computed with in
float64 under a random member of the group, maps included. That is what `rebasin merge` does with a folder of this class
before it reads a weight; both are kept in the cache after that.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

Row = dict[str, Any]

CLASSES = {
    "transformers": (
        "GPT2LMHeadModel", "BertForMaskedLM", "ViTForImageClassification", "CLIPModel", "T5ForConditionalGeneration",
        "WhisperForConditionalGeneration", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM",
        "Qwen3ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM", "MixtralForCausalLM",
    ),
    "diffusers": (
        "SD3Transformer2DModel", "FluxTransformer2DModel", "Flux2Transformer2DModel", "ChromaTransformer2DModel",
        "Lumina2Transformer2DModel", "ZImageTransformer2DModel", "QwenImageTransformer2DModel",
        "Krea2Transformer2DModel", "WanTransformer3DModel", "PixArtTransformer2DModel", "SanaTransformer2DModel",
    ),
}  # fmt: skip


def default(library: str, name: str) -> dict[str, Any]:
    """The configuration of a class as its library has it by default."""
    import importlib

    import torch

    kind = getattr(importlib.import_module(library), name)
    if library == "transformers":
        return json.loads(kind.config_class().to_json_string(use_diff=False))
    with torch.device("meta"):
        return {key: value for key, value in kind().config.items() if key != "_use_default_values"}


def examine(library: str, name: str) -> Row:
    """The row of a class, in this process."""
    import torch

    import rebasin
    from rebasin.checkpoints.classes.call import call
    from rebasin.checkpoints.classes.known import Known
    from rebasin.checkpoints.classes.narrow import in_double, narrow, shapes_under
    from rebasin.checkpoints.specs import structure

    torch.set_num_threads(1)
    torch.manual_seed(0)
    what = Known(library, name, default(library, name))
    began = time.process_time()
    with torch.device("meta"):
        model, args, kwargs = call(what, name)
    spec = rebasin.trace(model, *args, **kwargs)
    traced = time.process_time()
    twin = in_double(narrow(what))
    small, args, kwargs = call(twin, name)
    own = rebasin.trace(small, *args, **kwargs)
    report = rebasin.verify(small, own, *args, dtype=torch.float64, **kwargs)
    return {
        "library": library,
        "class": name,
        "parameters": sum(map(prod, shapes_under(what).values())),
        "neurons": spec.neurons,
        "coverage": spec.coverage().one,
        "maps": len(spec.continuous),
        "free": sum(group.dimension for group in spec.continuous),
        "twin": sum(map(prod, shapes_under(twin).values())),
        "same structure": structure(own) == structure(spec),
        "error": report.max_relative_error,
        "proved": report.passed and report.maps == len(own.continuous),
        "trace seconds": traced - began,
        "seconds": time.process_time() - began,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def markdown(rows: list[Row]) -> str:
    lines = [
        "# Classes of transformers and diffusers",
        "",
        "Made by `python -m experiments.model_classes`: the default configuration of each class, which for most is a",
        "published model. Parameters count tied matrices twice. The twin is a model of reduced width with the same",
        "tensors, on which the symmetries are proved. *Moved*: the share of parameters with an axis that is permuted;",
        "*error*: the largest relative change of an output in float64",
        "under a random member of the group, maps included. Seconds are of CPU, for both specs and the proof, on one",
        "thread; memory is the peak of the whole process. All of it is done once for an architecture and then kept.",
        "",
        "| class | parameters | neurons | moved | maps | free dimensions | twin | error | seconds | memory |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if "fault" in row:
            lines.append(f"| {row['class']} | {row['fault']} | | | | | | | | |")
            continue
        sound = "" if row["proved"] and row["same structure"] else " **not proved**"
        lines.append(
            f"| {row['class']} | {row['parameters']:,} | {row['neurons']:,} | {row['coverage']:.1%} | {row['maps']:,} |"
            f" {row['free']:,} | {row['twin']:,} | {row['error']:.0e}{sound} | {row['seconds']:.0f} |"
            f" {row['memory'] / 1e9:.1f} GB |"
        )
    return "\n".join(lines) + "\n"


def main(
    only: Annotated[list[str] | None, typer.Option(help="a class; may be repeated; default all")] = None,
    out: Annotated[
        Path | None, typer.Option(help="what to write; default docs/model_classes.md for all")
    ] = None,
    resume: Annotated[bool, typer.Option(help="keep the rows that an earlier call wrote")] = False,
    row: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Derive and prove the symmetries of published classes; exits with 1 if one is not proved."""
    if row:
        library, name = row.split(":")
        print("ROW " + json.dumps(examine(library, name)))
        return
    work = [
        (library, name) for library, names in CLASSES.items() for name in names if not only or name in only
    ]
    console, rows = Console(), []
    store = (out or Path("docs/model_classes.md")).with_suffix(".json")
    kept = {one["class"]: one for one in json.loads(store.read_text())} if resume and store.is_file() else {}
    for library, name in track(work, description="classes"):
        if "fault" not in kept.get(name, {"fault": ""}):
            rows.append(kept[name])
            continue
        command = [sys.executable, "-m", "experiments.model_classes", "--row", f"{library}:{name}"]
        done = subprocess.run(command, capture_output=True, text=True)
        found = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
        fault = {"class": name, "fault": (done.stderr.strip().splitlines() or ["nothing"])[-1][:200]}
        rows.append(json.loads(found[0][4:]) if found else fault)
        if not only:
            store.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    table = Table("class", "parameters", "neurons", "maps", "error", "seconds", "GB")
    for one in rows:
        cells = (
            [one["fault"]]
            if "fault" in one
            else [f"{one['parameters']:,}", f"{one['neurons']:,}", f"{one['maps']}", f"{one['error']:.0e}",
                  f"{one['seconds']:.0f}", f"{one['memory'] / 1e9:.1f}"]
        )  # fmt: skip
        table.add_row(one["class"], *cells)
    console.print(table)
    if not only or out is not None:
        (out or Path("docs/model_classes.md")).write_text(markdown(rows), encoding="utf-8")
    if not all(one.get("proved") and one.get("same structure") for one in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
