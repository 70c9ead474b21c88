"""`rebasin methods`: the merge methods there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .merge_weights import FUNCTIONS

if TYPE_CHECKING:
    from ..merging import Method


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Tell all about this one.", show_default=False)
    ] = None,
) -> None:
    """List the methods of `rebasin merge --method`, or explain one: formula, inputs, options, reference.

    \b
        rebasin methods
        rebasin methods ties_sum
    """
    from rich.console import Console

    from ..merging import METHODS
    from ..merging.block_settings import preset_names
    from ..merging.merged import find_method
    from ..merging.registry import plan_options
    from .session import table

    console = Console(highlight=False, soft_wrap=True)
    if name is None:
        rows = [(m.name, _models(m), _base(m), m.description) for m in METHODS.values()]
        titles = ("method", "models", "base", "what it does")
        console.print(table(titles, rows, words=len(titles)))
        console.print(f"\nPresets of --weights: {', '.join(preset_names())}.", markup=False)
        return
    method = find_method(name)
    planned = plan_options(method.plan)
    weight = {
        "alpha": "--alpha, one number",
        "weights": "--weights, a share for each model (or --alpha, the share of B)",
        "scales": "--alpha, or --weights with a number for each model but the first",
    }
    told = {
        "what": method.description,
        "formula": method.formula,
        "models": _models(method),
        "base": f"{_base(method)} (--base)" if _base(method) else "none",
        "weight": weight.get(method.weight or "", "none") if method.plan is None else "found by the method",
        "options": ", ".join(_option(k, v) for k, v in {**method.options, **planned}.items()) or "none",
        "reference": method.reference,
    }
    if "companions" in method.takes:
        told["Fisher"] = (
            "--fisher FILE for each model: what python -m rebasin.run merge=fisher leaves, or, under the model's"
            " tensor names, what rebasin.merging.diagonal_fisher gives"
        )
    console.print(method.name, style="bold")
    for key, value in told.items():
        console.print(f"  {key:<10} {value}", markup=False)


def _models(method: Method) -> str:
    return f"{method.least} or more" if method.inputs == "N" else str(method.inputs)


def _base(method: Method) -> str:
    return "needed" if method.needs_base else "optional" if method.takes_base else ""


def _option(name: str, default: Any) -> str:
    from ..types import REQUIRED  # late: torch

    if name in FUNCTIONS:
        return f"{name}=package.module:function (needed; takes the merged model's tensors, gives a number)"
    return f"{name} (needed)" if default is REQUIRED else f"{name}={default}"
