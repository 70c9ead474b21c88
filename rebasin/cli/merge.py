"""`rebasin merge`: two or more models into one, aligned first."""

from __future__ import annotations

from typing import Any

from .request import Request, command


@command()
def merge(**given: Any) -> None:
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
    The same into an inpainting model; B and C are plain, its further inputs stay:
        rebasin merge INPAINT B -o AB.safetensors --method add_difference --base C
    Other shares in some blocks (--dry-run shows them as a table and a picture):
        rebasin merge A B -o AB.safetensors --alpha 0.5 --weights IN=0.2,OUT=0.7
    A plain merge:
        rebasin merge A B -o AB.safetensors --no-align

    The permutation is kept beside the output and used again as long as the
    inputs are the same, so another --alpha or --method costs no second
    alignment. What was interrupted continues when the same command is given.
    """
    from . import pipeline
    from .session import begin

    request = Request(**given)
    pipeline.merge(begin(request.device, request.threads), request)
