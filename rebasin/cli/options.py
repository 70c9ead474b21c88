"""The options that several commands have, spelt and explained in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Start = Literal["forward", "identity"]

DTYPES = ("fp32", "fp16", "bf16", "fp8", "fp8_e4m3", "fp8_e5m2")

A = Annotated[Path, typer.Argument(metavar="A", help="The model that stays as it is.", show_default=False)]
B = Annotated[Path, typer.Argument(metavar="B", help="The model that is brought to A.", show_default=False)]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="What to write: NAME.safetensors, NAME.ckpt, or the name of a new diffusers folder.",
        show_default=False,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
DType = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="Store as fp32, fp16, bf16 or fp8 (the UNet's matrices in 8 bits, the rest in fp16). Default: A's types.",
        show_default=False,
    ),
]
Prune = Annotated[
    bool, typer.Option("--prune", help="Leave out what no loader needs: EMA copies, training leftovers.")
]
FixClip = Annotated[
    bool, typer.Option("--fix-clip", help="Write CLIP's position ids anew, as the integers 0 to 76.")
]
Joint = Annotated[
    bool,
    typer.Option(
        "--joint",
        help="Also reorder what the text encoder gives to the UNet. More freedom, but textual inversions and other"
        " text encoders no longer fit.",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only", metavar="PART", help="Only this component (unet, vae, text_encoder, ...); may be repeated."
    ),
]
Begin = Annotated[
    Start,
    typer.Option("--start", help="Where matching starts: a first guess from input to output, or B as it is."),
]
Seed = Annotated[int, typer.Option(help="Of everything random.", min=0)]
Device = Annotated[
    str, typer.Option(help="Where matrices are multiplied: cpu, cuda, cuda:1, mps.", show_default=True)
]
Threads = Annotated[
    int, typer.Option("--threads", help="CPU threads; 0 leaves it to torch.", min=0, show_default=False)
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only print the plan: sizes, memory and an estimate of the time.")
]
Check = Annotated[
    bool,
    typer.Option(
        "--check/--no-check",
        help="Compute with B before and after moving its neurons, and compare the outputs.",
    ),
]
Found = Annotated[
    Path | None,
    typer.Option(
        "--permutation",
        metavar="FILE",
        help="Use this alignment, which `rebasin align` or an earlier merge has left, instead of finding one.",
        show_default=False,
    ),
]
