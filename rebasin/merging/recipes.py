"""What a merge did as a recipe of sd-mecha: a .mecha file that does it again there, from the aligned file.

Writing one needs no package. The recipe names files; B must be the aligned file (`aligned.safetensors` of a run), as
sd-mecha does not know our permutations. sd-mecha finds the architecture by the tensors' names, so its recipes work for
the Stable Diffusion files it knows; `mecha_model` takes states of any other architecture into recipes in Python.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import write_text
from .block_names import SD1, SDXL
from .blocks import BlockWeights
from .merged import find_method
from .registry import Method
from .weights import fit_weights

PathLike = str | os.PathLike[str]

CONFIGS = {"sd1-ldm": ("sd1", SD1), "sdxl-sgm": ("sdxl", SDXL)}
"""sd-mecha's architectures that it has block weights for: its name of the blocks' config, and the blocks."""


class _Recipe:
    """The lines of a recipe; a node is referred to by the number of its line."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.notes: list[str] = []

    def add(self, line: str) -> str:
        if line not in self.lines:
            self.lines.append(line)
        return f"&{self.lines.index(line)}"

    def model(self, path: PathLike, config: str | None) -> str:
        name = os.fspath(path).replace("\\", "\\\\").replace('"', '\\"')
        return self.add(f'model "{name}" model_config={_value(config)} merge_space="weight"')

    def merge(self, method: str, *inputs: str, **options: Any) -> str:
        words = [*inputs, *(f"{key}={_value(value)}" for key, value in options.items())]
        return self.add(f'merge "{method}" {" ".join(words)}')

    def text(self) -> str:
        return "\n".join(
            ["version 0.1.0", *(f"# {note}" for note in self.notes), *self.lines]
        )  # its reader takes no empty line


def save_recipe(
    path: PathLike,
    method: str | Method,
    models: Sequence[PathLike],
    *,
    base: PathLike | None = None,
    weights: float | Sequence[float] | BlockWeights | None = None,
    architecture: str | None = None,
    **options: Any,
) -> Path:
    """Write a recipe that merges these files as `merge` merges their states.

    Args:
        path: NAME.mecha.
        method: a name in METHODS, or `mecha:NAME`.
        models: files; B and all further ones aligned to the first.
        base, weights, options: as of `merge`. Block weights must be uniform within each block, and need `architecture`.
        architecture: sd-mecha's name of it, "sd1-ldm" or "sdxl-sgm" for files in the original layout; None: it looks.

    Raises:
        ConfigError: sd-mecha has no such method or can't take these options; the sentence says what it lacks.
    """
    return write_text(Path(path), recipe(method, models, base, weights, architecture, **options))


def recipe(
    method: str | Method,
    models: Sequence[PathLike],
    base: PathLike | None = None,
    weights: float | Sequence[float] | BlockWeights | None = None,
    architecture: str | None = None,
    **options: Any,
) -> str:
    """The text of `save_recipe`."""
    found = find_method(method)
    made = _Recipe()
    inputs = [made.model(model, architecture) for model in models]
    if found.needs_base and base is None:
        raise ConfigError(f"The merge method '{found.name}' needs a base: give its file.")
    origin = "" if base is None else made.model(base, architecture)
    if isinstance(weights, BlockWeights):
        if found.weight == "weights" and found.name != "weighted_sum":
            raise ConfigError(f"sd-mecha can't take block weights for '{found.name}'.")
        alpha: Any = _blocks(made, weights, architecture)
    else:
        alpha = fit_weights(found, weights, len(models))
    given = found.check_options(options)
    if found.name.startswith("mecha:"):
        strength = {} if found.weight is None else {"alpha": alpha}
        made.merge(
            found.name.removeprefix("mecha:"), *inputs, *([origin] if origin else []), **strength, **given
        )
        return made.text()
    if found.name not in RECIPES:
        raise ConfigError(
            f"sd-mecha has no method that does what '{found.name}' does, so there is no recipe for it; it can take the"
            " merged file as a model."
        )
    RECIPES[found.name](made, inputs, origin, alpha, given)
    return made.text()


def _blocks(made: _Recipe, weights: BlockWeights, architecture: str | None) -> str:
    if architecture not in CONFIGS:
        raise ConfigError(f"Block weights in a recipe need an architecture, one of {', '.join(CONFIGS)}.")
    name, order = CONFIGS[architecture]
    rows = {row.block: row for row in weights.rows()}
    uneven = [row.block for row in rows.values() if row.low != row.high]
    if uneven or not set(rows) <= set(order):
        where = uneven[0] if uneven else next(iter(set(rows) - set(order)))
        raise ConfigError(
            f"sd-mecha has one weight for each block of {architecture}, which does not fit '{where}'."
        )
    missing = [block for block in order if block not in rows]
    if missing:
        made.notes.append(f"not in these models, and 0 here: {', '.join(missing)}")
    values = made.add(
        "dict " + " ".join(f"{block}={rows[block].low if block in rows else 0.0}" for block in order)
    )
    literal = made.add(f'literal {values} model_config="{name}-supermerger_blocks" merge_space=null')
    return made.merge(f"convert_{name}_blocks_to_{architecture.split('-')[1]}", literal)


def _average(made: _Recipe, inputs: Sequence[str], shares: Sequence[float]) -> str:
    kept = [(node, share) for node, share in zip(inputs, shares, strict=True) if share]
    if len({share for _, share in kept}) == 1:
        return made.merge("n_average", *(node for node, _ in kept))
    result, total = kept[0]
    for node, share in kept[1:]:
        total += share
        result = made.merge("weighted_sum", result, node, alpha=share / total)
    return result


def _weighted_sum(made: _Recipe, inputs: list[str], base: str, alpha: Any, given: Mapping[str, Any]) -> None:
    if isinstance(alpha, str):
        made.merge("weighted_sum", *inputs, alpha=alpha)
    elif len(inputs) == 2:
        made.merge("weighted_sum", *inputs, alpha=alpha[1])
    else:
        _average(made, inputs, alpha)


def _add_difference(
    made: _Recipe, inputs: list[str], base: str, alpha: Any, given: Mapping[str, Any]
) -> None:
    result = inputs[0]
    scales = [alpha] * (len(inputs) - 1) if isinstance(alpha, str) else alpha
    for node, scale in zip(inputs[1:], scales, strict=True):
        result = made.merge("add_difference", result, made.merge("subtract", node, base), alpha=scale)
    if given["clamp"]:
        made.merge("clamp", result, *inputs)


def _perpendicular(made: _Recipe, inputs: list[str], base: str, alpha: Any, given: Mapping[str, Any]) -> None:
    own, other = (made.merge("subtract", node, base) for node in inputs)
    part = made.merge("perpendicular_component", own, other)
    made.merge("add_difference", inputs[0], part, alpha=alpha)


def _train_difference(
    made: _Recipe, inputs: list[str], base: str, alpha: Any, given: Mapping[str, Any]
) -> None:
    mask = made.merge("train_difference_mask", *inputs, base, alpha=alpha)
    made.merge("add_difference", inputs[0], made.merge("subtract", inputs[1], base), alpha=mask)


def _ties(made: _Recipe, inputs: list[str], base: str, alpha: Any, given: Mapping[str, Any]) -> None:
    deltas = [made.merge("subtract", node, base) for node in inputs]
    if given["k"] < 1:
        made.notes.append("sd-mecha's ties_sum keeps one value more of every tensor than k says")
    ties = made.merge("ties_sum", *deltas, k=float(given["k"]), vote_sgn=given["vote"] == "mass")
    made.merge("add_difference", base, ties, alpha=alpha)


def _model_stock(made: _Recipe, inputs: list[str], base: str, alpha: Any, given: Mapping[str, Any]) -> None:
    if not given["rows"] or len(inputs) != 2:
        raise ConfigError(
            "sd-mecha's model_stock is ours of two models with rows=true only, so there is no recipe."
        )
    deltas = [made.merge("subtract", node, base) for node in inputs]
    made.merge("add_difference", base, made.merge("model_stock", *deltas), alpha=1.0)


def _region(name: str) -> Callable[..., None]:
    def write(made: _Recipe, inputs: list[str], base: str, alpha: Any, given: Mapping[str, Any]) -> None:
        made.merge(name, *inputs, width=alpha, offset=float(given["offset"]))

    return write


def _rotate(made: _Recipe, inputs: list[str], base: str, alpha: Any, given: Mapping[str, Any]) -> None:
    made.notes.append("sd-mecha's rotate differs from ours for matrices with fewer rows than columns")
    nodes = [made.merge("subtract", node, base) for node in inputs] if base else inputs
    turned = made.merge("rotate", *nodes, alpha=alpha, **{k: float(v) for k, v in given.items()})
    if base:
        made.merge("add_difference", base, turned, alpha=1.0)


def _median(made: _Recipe, inputs: list[str], base: str, alpha: Any, given: Mapping[str, Any]) -> None:
    if len(set(alpha)) > 1:
        raise ConfigError("sd-mecha's geometric_median has no weights, so there is no recipe for these.")
    made.merge("geometric_median", *inputs, maxiter=given["iterations"])


def _ema(made: _Recipe, inputs: list[str], base: str, alpha: Any, given: Mapping[str, Any]) -> None:
    result = inputs[0]
    for node in inputs[1:]:
        result = made.merge("weighted_sum", result, node, alpha=1.0 - given["decay"])


def _same(name: str, *options: str, with_base: bool = False) -> Callable[..., None]:
    """A method that sd-mecha has with the same arguments."""

    def write(made: _Recipe, inputs: list[str], base: str, alpha: Any, given: Mapping[str, Any]) -> None:
        strength = {} if alpha is None else {"alpha": alpha}
        kept = {option: float(given[option]) for option in options}
        made.merge(name, *inputs, *([base] if with_base else []), **strength, **kept)

    return write


RECIPES: dict[str, Callable[..., object]] = {
    "weighted_sum": _weighted_sum,
    "wise_ft": _same("weighted_sum"),
    "add_difference": _add_difference,
    "slerp": _same("slerp"),
    "perpendicular_component": _perpendicular,
    "geometric_sum": _same("geometric_sum"),
    "add_cosine_a": _same("add_cosine_a"),
    "add_cosine_b": _same("add_cosine_b"),
    "ties_sum": _ties,
    "tensor_sum": _region("tensor_sum"),
    "top_k_tensor_sum": _region("top_k_tensor_sum"),
    "train_difference": _train_difference,
    "multiply_quotient": _same("multiply_quotient", with_base=True),
    "crossover": _same("crossover", "tilt"),
    "rotate": _rotate,
    "clip": _same("clamp", "stiffness"),
    "model_stock": _model_stock,
    "geometric_median": _median,
    "uniform_soup": lambda made, inputs, base, alpha, given: _average(made, inputs, [1.0] * len(inputs)),
    "greedy_soup": lambda made, inputs, base, alpha, given: _average(made, inputs, alpha),
    "ema": _ema,
    "polyak": lambda made, inputs, base, alpha, given: _average(
        made, inputs[-given["last"] :] if given["last"] else inputs, [1.0] * (given["last"] or len(inputs))
    ),
}
"""Those of our methods that sd-mecha can do. Not there: distribution_crossover, fisher, and dropout with our masks."""


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if value.startswith("&") else f'"{value}"'
    # Its reader takes a number with a point or an e for a float, and others for whole numbers.
    return repr(value)
