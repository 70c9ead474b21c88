"""`rebasin methods`: the merge methods there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .merge_weights import FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from ..merging import Method


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Tell all about this one.", show_default=False)
    ] = None,
    situation: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="WHAT",
            help="Those to try for what you have: finetunes, independent, soup, style, ...; `--for list` has all.",
            show_default=False,
        ),
    ] = None,
    presets: Annotated[
        bool, typer.Option("--presets", help="The presets of --weights, each as a row of bars.")
    ] = False,
) -> None:
    """List the methods of `rebasin merge --method`, or explain one: in words, formula, inputs, options, reference.

    \b
        rebasin methods
        rebasin methods ties_sum
        rebasin methods --for finetunes
        rebasin methods --presets
    """
    from rich.console import Console

    from ..errors import ConfigError
    from ..merging import METHODS
    from ..merging.block_settings import preset_names
    from ..merging.merged import find_method
    from ..merging.registry import plan_options
    from ..merging.situations import WORDS
    from .session import table

    console = Console(highlight=False, soft_wrap=True)
    if (name is not None) + (situation is not None) + presets > 1:
        raise ConfigError("NAME, --for and --presets tell different things; give one of them.")
    if situation is not None:
        return _for(console, situation)
    if presets:
        return _presets(console)
    if name is None:
        rows = [(m.name, _models(m), _base(m), m.description) for m in METHODS.values()]
        titles = ("method", "models", "base", "what it does")
        console.print(table(titles, rows, words=len(titles)))
        console.print(
            "\nWhich one? rebasin methods --for list. In plain words: rebasin methods NAME.", markup=False
        )
        console.print(
            f"Presets of --weights (--presets draws them): {', '.join(preset_names())}.", markup=False
        )
        return
    method = find_method(name)
    planned = plan_options(method.plan)
    weight = {
        "alpha": "--alpha, one number",
        "weights": "--weights, a share for each model (or --alpha, the share of B)",
        "scales": "--alpha, or --weights with a number for each model but the first",
    }
    told = {
        "in words": WORDS[method.name],
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


def _for(console: Console, word: str) -> None:
    """The methods for a situation, or all situations."""
    from ..merging import METHODS
    from ..merging.registry import plan_options
    from ..merging.situations import SITUATIONS, WORDS, situation
    from .session import table

    if word == "list":
        rows = [(name, one.have, ", ".join(one.methods)) for name, one in SITUATIONS.items()]
        return console.print(table(("--for", "you have", "try"), rows, words=3))
    found = situation(word)
    console.print(f"You have {found.have}. Try these, because {found.because}:\n", markup=False)
    for name in found.methods:
        method = METHODS[name]
        files, more = " ".join("ABCDEF"[: max(2, method.least)]), " --base BASE" if method.needs_base else ""
        more += "".join(
            f" --option {one}=package.module:function"
            for one in FUNCTIONS
            if one in plan_options(method.plan)
        )
        more += " --fisher FISHER_A --fisher FISHER_B" if "companions" in method.takes else ""
        console.print(name, style="bold")
        console.print(f"  {WORDS[name]}", markup=False)
        console.print(f"  rebasin merge {files} -o merged.safetensors --method {name}{more}\n", markup=False)


BARS = " ▁▂▃▄▅▆▇█"


def _presets(console: Console) -> None:
    """The share of B in BASE, IN00 to IN11, M00, OUT00 to OUT11, as bars."""
    from ..merging.block_settings import preset, preset_names
    from .session import table

    rows = []
    for name in preset_names():
        base, *blocks = (
            "".join(BARS[round(max(0.0, min(1.0, x)) * 8)] for x in part) for part in _parts(preset(name))
        )
        rows.append((name, base, *blocks))
    console.print(table(("preset", "BASE", "IN00-11", "M00", "OUT00-11"), rows, words=5))
    console.print(
        "\nThe height is the share of B, 0 to 1: rebasin merge A B -o AB.safetensors --weights GRAD_V"
    )


def _parts(weights: Sequence[float]) -> list[Sequence[float]]:
    return [weights[:1], weights[1:13], weights[13:14], weights[14:]]


def _models(method: Method) -> str:
    return f"{method.least} or more" if method.inputs == "N" else str(method.inputs)


def _base(method: Method) -> str:
    return "needed" if method.needs_base else "optional" if method.takes_base else ""


def _option(name: str, default: Any) -> str:
    from ..types import REQUIRED  # late: torch

    if name in FUNCTIONS:
        return f"{name}=package.module:function (needed; takes the merged model's tensors, gives a number)"
    return f"{name} (needed)" if default is REQUIRED else f"{name}={default}"
