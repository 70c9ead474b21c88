"""`rebasin align`: B brought to A, as a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o


def align(
    a: o.A,
    b: o.B,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Aligned B. Default: B_aligned.safetensors."),
    ] = None,
    joint: o.Joint = False,
    only: o.Only = None,
    start: o.Begin = "forward",
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    threads: o.Threads = 0,
    check: o.Check = True,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
) -> None:
    """Bring B's neurons into A's order, without changing what B computes.

    The aligned B is a checkpoint like any other: it makes the same images as
    B, and every tool can merge it with A. Beside it lies the permutation,
    which moves adapters of B along (rebasin apply).

    \b
    Align, then move a LoRA of B along:
        rebasin align base.safetensors mine.safetensors -o aligned.safetensors
        rebasin apply aligned.permutation.safetensors my_lora.safetensors
    """
    from . import jobs
    from .request import Request
    from .session import begin

    output = output or b.with_name(f"{b.name if b.is_dir() else b.stem}_aligned.safetensors")
    jobs.align(
        begin(device, threads),
        Request(
            inputs=(a, b),
            output=output,
            components=tuple(only or ()),
            start=start,
            seed=seed,
            joint=joint,
            device=device,
            check=check,
            overwrite=overwrite,
            dry_run=dry_run,
        ),
    )
