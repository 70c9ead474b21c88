"""`rebasin align`: B brought to A, as a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .request import A, B, Request, command


@command(
    "a b output maps learned prompts learn joint components variant resize_vocabulary start seed device threads check"
    " model_card push_to_hub overwrite dry_run"
)
def align(
    a: A,
    b: B,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Aligned B. Default: B_aligned.safetensors, or the folder B_aligned.",
        ),
    ] = None,
    **given: Any,
) -> None:
    """Bring B's neurons into A's order, without changing what B computes.

    The aligned B is a checkpoint like any other: it makes the same images as
    B, and every tool can merge it with A. Beside it lies the permutation (with
    --maps or --learned the alignment), which moves adapters of B along (rebasin
    apply).

    \b
    Align, then move a LoRA of B along:
        rebasin align base.safetensors mine.safetensors -o aligned.safetensors
        rebasin apply aligned.permutation.safetensors my_lora.safetensors
    """
    from . import pipeline
    from .inputs import aligned_name
    from .session import begin

    output = output or aligned_name(b)
    request = Request((a, b), output, **given)
    pipeline.align(begin(request.device, request.threads), request)
