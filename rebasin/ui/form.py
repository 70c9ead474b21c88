"""The form of a merge: which option stands where, and the values of a command line that its fields make."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, shown, unknown
from ..merging import METHODS
from ..merging.registry import plan_options

WAYS = {
    "permutation": "By a permutation",
    "maps": "By linear maps, too",
    "learned": "By maps that are learned",
    "given": "By an alignment that is there",
    "none": "Not at all",
}
"""How B is brought to A."""

LEARN = {"steps": "algo.steps", "samples": "objective.samples", "size": "model.size"}
"""Fields of learned maps, and the options that --learn has for them."""

GROUPS = {
    "Method and base": ("options", "base", "fisher"),
    "Alignment": ("permutation", "prompts", "start", "joint"),
    "Models and components": ("components", "variant", "resize_vocabulary", "mix_predictions"),
    "Output": ("dtype", "prune", "vae", "fix_clip", "overwrite"),
    "Machine": ("device", "threads", "seed", "check"),
}
"""Options of a merge that are shown as they are declared; those that come to be later stand in the last group."""

OWN = ("inputs", "output", "alpha", "method", "weights", "align", "maps", "learned", "learn")
"""Options that have a place of their own on the page."""

LEFT_OUT = ("ray", "dry_run", "recipe")
"""Options that the page does not have: a cluster's address, what the button Plan stands for, and recipes, which name
files that may lie outside its folders.
"""


def methods(functions: tuple[str, ...] = ()) -> list[str]:
    """The merge methods that need no function of the user's."""
    return [name for name, one in METHODS.items() if not set(plan_options(one.plan)) & set(functions)]


def default_alpha(method: str) -> float | None:
    """The weight that a method has by default; None if it takes none."""
    one = METHODS.get(method)
    if one is None or one.weight is None or one.plan is not None:
        return None
    return 0.5 if one.default_weight is None else one.default_weight


def values_of_merge(given: Mapping[str, Any], functions: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of `rebasin merge` that the fields mean: a, b, more, way, alpha, weights, output, those of `LEARN`,
    and options by their own names.

    Raises:
        ConfigError: a model or the name of the result is missing, or an option would run code.
    """
    models = [given.get("a"), given.get("b"), *(given.get("more") or ())]
    if not given.get("a") or not given.get("b"):
        raise ConfigError("Choose two models, A and B; type a path, choose from the list, or upload a file.")
    if not str(given.get("output") or "").strip():
        raise ConfigError("Say under which name to write the result, for example merged.safetensors.")
    own = {
        name: value for name, value in given.items() if name not in (*OWN, *LEARN, "a", "b", "more", "way")
    }
    for pair in own.get("options") or ():
        if pair.partition("=")[0].strip() in functions:
            raise ConfigError(
                f"{shown(pair)} names a function, which would run code; give that on the command line."
            )
    method = str(given.get("method") or "")
    weights = str(given.get("weights") or "").strip() or None
    if weights and weights.endswith((".yaml", ".yml")):
        raise ConfigError("Write the weights themselves here; a YAML file is for the command line.")
    usual, alpha = default_alpha(method), given.get("alpha")
    if alpha is not None and not isinstance(alpha, int | float):
        raise ConfigError(f"Alpha is {shown(alpha)}, but it is a number.")
    share = None
    if usual is not None and alpha is not None and not plain_numbers(weights):
        share = alpha if weights or abs(alpha - usual) > 1e-9 else None
        share = None if len(models) > 2 and METHODS[method].weight == "weights" else share
    way = given.get("way") or "permutation"
    if way != "given":
        own["permutation"] = None
    elif not own.get("permutation"):
        raise ConfigError("Choose the alignment to use, or another way to align.")
    learned = way == "learned"
    if not learned:
        own["prompts"] = None
    learn = [f"{LEARN[n]}={int(given[n])}" for n in LEARN if learned and given.get(n) not in (None, "")]
    return {
        **own,
        "inputs": [model for model in models if model],
        "output": str(given["output"]).strip(),
        "method": method,
        "alpha": share,
        "weights": weights,
        "align": way != "none",
        "maps": way == "maps",
        "learned": learned,
        "learn": learn,
    }


def plain_numbers(text: str | None) -> bool:
    """Whether weights are numbers for models alone, beside which --alpha says the same twice."""
    try:
        return bool(text) and [float(part) for part in str(text).split(",")] != []
    except ValueError:
        return False


RUNS = "runs"
"""The folder, in the first root, of what is measured."""

OBJECTIVES = {
    "agreement": "How far the outputs are from A's and B's, on random inputs",
    "distillation": "How far what is predicted is from what A and B predict, on prompts",
}
"""What the line between A and B may be measured by."""


def measuring(a: str, b: str, objective: str, samples: int, folder: str) -> list[str]:
    """The words behind `python -m rebasin.run` that measure the line from A to B.

    Args:
        samples: pictures in each row; 0 for none.
        folder: for the report.

    Raises:
        ConfigError: there is no such objective, or a path has what Hydra takes for a reference.
    """
    if objective not in OBJECTIVES:
        raise unknown(f"There is no objective {shown(objective)} here", objective, OBJECTIVES)
    if not isinstance(samples, int | float) or not 0 <= samples <= 16:
        raise ConfigError(f"The number of pictures is {shown(samples)}, but it is one from 0 to 16.")
    words = ["model=checkpoint", f"model.a={_quoted(a)}", f"model.b={_quoted(b)}", f"objective={objective}"]
    words += [f"model.samples={int(samples)}"] if samples else []
    return [*words, f"hydra.run.dir={_quoted(folder)}"]


def _quoted(path: str) -> str:
    """A path as Hydra reads it."""
    if "${" in path or ("\\" in path and os.name != "nt"):
        raise ConfigError(f"{shown(path)} has a name that Hydra would read as something else; rename it.")
    path = path.replace("\\", "/")
    plain = all(letter.isalnum() or letter in "/._-" for letter in path)
    return path if plain else "'" + path.replace("'", "\\'") + "'"
