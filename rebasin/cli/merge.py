"""`rebasin merge`: two or more models into one, aligned first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o


def merge(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B [C ...]", help="Two or more models; all are aligned to A.", show_default=False
        ),
    ],
    output: o.Output,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Share of B, or strength of what the method adds. Default: 0.5, or the method's.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="How to combine; `rebasin methods` lists all.")
    ] = "weighted_sum",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="NAME=VALUE", help="An option of the method, e.g. k=0.2; may be repeated."
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The model that all were made from, for methods that need it.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W",
            help="A number for each model (0.5,0.3,0.2), or weights by block (IN=0.2,OUT=0.7,attn1=1), a preset"
            " (GRAD_V) or a YAML file; --alpha is the default for other blocks.",
            show_default=False,
        ),
    ] = None,
    align: Annotated[
        bool, typer.Option("--align/--no-align", help="Bring the neurons into A's order first.")
    ] = True,
    permutation: o.Found = None,
    joint: o.Joint = False,
    only: o.Only = None,
    dtype: o.DType = None,
    prune: o.Prune = False,
    vae: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Put this model's VAE into the result.", show_default=False),
    ] = None,
    fix_clip: o.FixClip = False,
    start: o.Begin = "forward",
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    threads: o.Threads = 0,
    check: o.Check = True,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
) -> None:
    """Align models and merge them into one file, which has A's names, order and types.

    \b
    The midpoint, aligned:
        rebasin merge A.safetensors B.safetensors -o AB.safetensors
    30% of B, as a small file:
        rebasin merge A B -o AB.safetensors --alpha 0.3 --dtype fp16 --prune
    Several models (MergeMany), with weights:
        rebasin merge A B C D -o soup.safetensors --weights 4,2,1,1
    What B has learnt since its base, added to A:
        rebasin merge A B -o AB.safetensors --method add_difference --base C
    Other shares in some blocks (--dry-run shows them as a table and a picture):
        rebasin merge A B -o AB.safetensors --alpha 0.5 --weights IN=0.2,OUT=0.7
    A plain merge:
        rebasin merge A B -o AB.safetensors --no-align

    The permutation is kept beside the output and used again as long as the
    inputs are the same, so another --alpha or --method costs no second
    alignment. What was interrupted continues when the same command is given.
    """
    from . import jobs
    from .request import Request
    from .session import begin

    jobs.merge(
        begin(device, threads),
        Request(
            inputs=tuple(models),
            output=output,
            alpha=alpha,
            method=method,
            options=tuple(option or ()),
            base=base,
            weights=weights,
            align=align,
            permutation=permutation,
            components=tuple(only or ()),
            dtype=dtype,
            prune=prune,
            vae=vae,
            fix_clip=fix_clip,
            start=start,
            seed=seed,
            joint=joint,
            device=device,
            check=check,
            overwrite=overwrite,
            dry_run=dry_run,
        ),
    )
