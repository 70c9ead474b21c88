"""A file of Flux.1-dev's size (11.9 billion parameters, 24 GB): aligned and merged in what memory, in what time?

    python -m experiments.large_files --folder runs/flux                              about 72 GB of disk
    python -m experiments.large_files --folder runs/flux --doubles 2 --singles 2      6 GB, minutes
    python -m experiments.large_files --folder runs/flux --pair same                  48 GB: B is A under another name

A has random weights in bfloat16 under the names of the original file; B is A with its neurons in a random order
(`moved`), A with 2 % noise, as fine-tunes are (`near`), or A itself (`same`). Each step is a process of its own, whose
time and peak of resident memory (pages of mapped files included) the kernel measures; files are dropped from the
system's cache before. `copy` copies both files, one after the other.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from experiments.checkpoints_end_to_end import REBASIN, apart, equal, measured
from rebasin.checkpoints import component_spec, open_checkpoint, save_safetensors
from rebasin.checkpoints.random_weights import noisy, random_state

Shapes = dict[str, tuple[int, ...]]

PREFIX = "model.diffusion_model."


def flux(doubles: int = 19, singles: int = 38, width: int = 3072, text: int = 4096) -> Shapes:
    """Names and shapes of Flux.1-dev's file with so many blocks of both kinds."""
    made: Shapes = {}

    def linear(name: str, out: int, into: int) -> None:
        made[f"{name}.weight"], made[f"{name}.bias"] = (out, into), (out,)

    def norms(name: str) -> None:
        made[f"{name}.query_norm.scale"] = made[f"{name}.key_norm.scale"] = (128,)

    linear("img_in", width, 64)
    linear("txt_in", width, text)
    for name, into in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        linear(f"{name}.in_layer", width, into)
        linear(f"{name}.out_layer", width, width)
    for block in (f"double_blocks.{i}." for i in range(doubles)):
        for kind in ("img", "txt"):
            linear(f"{block}{kind}_mod.lin", 6 * width, width)
            linear(f"{block}{kind}_attn.qkv", 3 * width, width)
            norms(f"{block}{kind}_attn.norm")
            linear(f"{block}{kind}_attn.proj", width, width)
            linear(f"{block}{kind}_mlp.0", 4 * width, width)
            linear(f"{block}{kind}_mlp.2", width, 4 * width)
    for block in (f"single_blocks.{i}." for i in range(singles)):
        linear(f"{block}linear1", 7 * width, width)
        linear(f"{block}linear2", width, 5 * width)
        norms(f"{block}norm")
        linear(f"{block}modulation.lin", 3 * width, width)
    linear("final_layer.linear", 64, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return {PREFIX + name: shape for name, shape in made.items()}


def make(a: Path, doubles: int, singles: int) -> None:
    save_safetensors(a, random_state(flux(doubles, singles), 0, torch.bfloat16), keep_order=True)


def make_b(a: Path, b: Path, pair: str) -> None:
    checkpoint = open_checkpoint(a)
    state = checkpoint.component("transformer")
    moved = component_spec(checkpoint, "transformer").random(1).view(state) if pair == "moved" else None
    changed = moved or noisy(state, 0.02)
    save_safetensors(b, checkpoint.restore({"transformer": changed}), keep_order=True)


def prove(a: Path) -> None:
    component_spec(open_checkpoint(a), "transformer")


def dropped(*paths: Path) -> None:
    """Take files out of the system's cache."""
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def took(figures: dict[str, Any]) -> str:
    return f"{figures['seconds']:.0f} s ({figures['cpu']:.0f} s of processor)"


STEP = "import sys; from pathlib import Path; from experiments import large_files; large_files.{}"


def main(
    folder: Annotated[Path, typer.Option(help="an empty folder, or a new one, for the files")],
    doubles: Annotated[int, typer.Option(help="blocks for pictures and texts apart")] = 19,
    singles: Annotated[int, typer.Option(help="blocks for both together")] = 38,
    pair: Annotated[str, typer.Option(help="what B is: moved, near or same")] = "moved",
    threads: Annotated[int, typer.Option(help="of torch")] = 1,
    copies: Annotated[
        bool, typer.Option(help="measure copying, too, which takes a third file's place")
    ] = True,
) -> None:
    """Make the pair, copy it, align and merge it, print a row; the files are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    a, b, out = (folder / f"{name}.safetensors" for name in ("a", "b", "merged"))
    os.environ["REBASIN_CACHE"] = str(folder / "cache")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    found: dict[str, dict[str, Any]] = {}

    def step(name: str, command: list[str]) -> None:
        dropped(*(path for path in (a, b) if path.exists()))
        found[name] = measured(command)
        typer.echo(f"{name}: {took(found[name])}, peak {found[name]['peak'] / 1e9:.2f} GB")

    def own(call: str) -> list[str]:
        return [sys.executable, "-c", STEP.format(call), *map(str, (a, b, out))]

    try:
        step("make A", own(f"make(Path(sys.argv[1]), {doubles}, {singles})"))
        step("trace and prove", own("prove(Path(sys.argv[1]))"))
        if pair == "same":
            os.link(a, b)
        else:
            step("make B", own(f"make_b(Path(sys.argv[1]), Path(sys.argv[2]), {pair!r})"))
        if copies:
            copy = (
                "for p in sys.argv[1:3]: shutil.copyfile(p, sys.argv[3]); os.sync(); os.remove(sys.argv[3])"
            )
            step(
                "copy A and B",
                [sys.executable, "-c", f"import os, shutil, sys\n{copy}", *map(str, (a, b, out))],
            )
        step("merge", [*REBASIN, "merge", str(a), str(b), "-o", str(out), "--threads", str(threads)])
        told = apart(equal, out, a)
        size = a.stat().st_size
        merge, copying = found["merge"], found.get("copy A and B", {}).get("seconds")
        times = f"{merge['seconds'] / copying:.1f}" if copying else "-"
        typer.echo(
            "| parameters | a file | pair | trace and prove | copying both | merge | as often | peak | as A |"
        )
        typer.echo("|--:|--:|---|--:|--:|--:|--:|--:|---|")
        typer.echo(
            f"| {size / 2e9:.1f} billion | {size / 1e9:.1f} GB | {pair} | {found['trace and prove']['seconds']:.0f} s"
            f" | {copying or 0:.0f} s | {took(merge)} | {times} | {merge['peak'] / 1e9:.1f} GB"
            f" | {told['equal']} of {told['tensors']} tensors |"
        )
    finally:
        for path in (a, b, out, out.with_name("merged.permutation.safetensors")):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder / "cache", ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
