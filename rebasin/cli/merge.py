"""`rebasin merge`: two or more models into one, aligned first."""

from __future__ import annotations

from typing import Any

import typer

from ..errors import ConfigError
from .request import Request, command


@command(free="inputs output")
def merge(context: typer.Context, **given: Any) -> None:
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
    The same again, by a recipe or by the file itself:
        rebasin merge --recipe AB.yaml
        rebasin merge --recipe AB.safetensors -o again.safetensors

    The permutation is kept beside the output and used again as long as the
    inputs are the same, so another --alpha or --method costs no second
    alignment. What was interrupted continues when the same command is given.
    """
    from . import recipe_run
    from .recipe_file import read_recipe
    from .session import begin

    if given["recipe"] is None and (len(given["inputs"]) < 1 or given["output"] is None):
        raise ConfigError("Give two models or more and -o FILE, or a recipe: --recipe FILE.")
    if given["recipe"] is None:
        return recipe_run.plain(begin(given["device"], given["threads"]), Request(**given))
    console = begin()
    said = {
        name for name in given if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    recipe = read_recipe(given["recipe"], alone="inputs" in said)
    recipe_run.follow(console, recipe, {name: given[name] for name in said})
