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
from ..files import PathLike, write_text
from .block_names import SD1, SDXL
from .blocks import BlockWeights
from .merged import find_method
from .registry import Method

CONFIGS = {"sd1-ldm": ("sd1", SD1), "sdxl-sgm": ("sdxl", SDXL)}
"""sd-mecha's architectures that it has block weights for: its name of the blocks' config, and the blocks."""


class _Recipe:
    """The lines of a recipe, in which a node is referred to by the number of its line, and what it is to merge.

    Attributes:
        inputs: the nodes of the models; `base` is that of the base, empty if there is none.
        alpha: the weight; a node, too, if it is by block.
        options: of the method.
    """

    def __init__(self, models: Sequence[PathLike], base: PathLike | None, architecture: str | None) -> None:
        self.lines: list[str] = []
        self.notes: list[str] = []
        self.inputs = [self._model(model, architecture) for model in models]
        self.base = "" if base is None else self._model(base, architecture)
        self.alpha: Any = None
        self.options: Mapping[str, Any] = {}

    def add(self, line: str) -> str:
        if line not in self.lines:
            self.lines.append(line)
        return f"&{self.lines.index(line)}"

    def _model(self, path: PathLike, config: str | None) -> str:
        name = os.fspath(path).replace("\\", "\\\\").replace('"', '\\"')
        return self.add(f'model "{name}" model_config={_value(config)} merge_space="weight"')

    def write(self, method: str, *inputs: str, **options: Any) -> str:
        words = [*inputs, *(f"{key}={_value(value)}" for key, value in options.items())]
        return self.add(f'merge "{method}" {" ".join(words)}')

    def delta(self, node: str) -> str:
        return self.write("subtract", node, self.base)

    def added(self, node: str, delta: str, alpha: Any) -> str:
        return self.write("add_difference", node, delta, alpha=alpha)

    def average(self, inputs: Sequence[str], shares: Sequence[float] | None = None) -> None:
        shares = [1.0] * len(inputs) if shares is None else shares
        kept = [(node, share) for node, share in zip(inputs, shares, strict=True) if share]
        if len({share for _, share in kept}) == 1:
            self.write("n_average", *(node for node, _ in kept))
            return
        result, total = kept[0]
        for node, share in kept[1:]:
            total += share
            result = self.write("weighted_sum", result, node, alpha=share / total)

    def text(self) -> str:
        notes = (f"# {note}" for note in self.notes)
        return "\n".join(["version 0.1.0", *notes, *self.lines])  # its reader takes no empty line


def save_recipe(path: PathLike, method: str | Method, models: Sequence[PathLike], **more: Any) -> Path:
    """Write a recipe that merges these files as `merge` merges their states.

    Args:
        path: NAME.mecha.
        method: a name in METHODS, or `mecha:NAME`.
        models: files; B and all further ones aligned to the first.
        more: see `recipe`.

    Raises:
        ConfigError: sd-mecha has no such method or can't take these options; the sentence says what it lacks.
    """
    return write_text(Path(path), recipe(method, models, **more))


def recipe(
    method: str | Method,
    models: Sequence[PathLike],
    base: PathLike | None = None,
    weights: float | Sequence[float] | BlockWeights | None = None,
    architecture: str | None = None,
    **options: Any,
) -> str:
    """The text of `save_recipe`.

    Args:
        method, models: see there.
        base, weights, options: as of `merge`. Block weights must be uniform within each block, and need `architecture`.
        architecture: sd-mecha's name of it, "sd1-ldm" or "sdxl-sgm" for files in the original layout; None: it looks.
    """
    found = find_method(method)
    if found.needs_base and base is None:
        raise ConfigError(f"The merge method '{found.name}' needs a base: give its file.")
    made = _Recipe(models, base, architecture)
    if not isinstance(weights, BlockWeights):
        made.alpha = found.fit_weights(weights, len(models))
    elif found.weight == "weights" and found.name != "weighted_sum":
        raise ConfigError(f"sd-mecha can't take block weights for '{found.name}'.")
    else:
        made.alpha = _blocks(made, weights, architecture)
    made.options = found.check_options(options)
    if found.name.startswith("mecha:"):
        strength = {} if found.weight is None else {"alpha": made.alpha}
        nodes = [*made.inputs, *([made.base] if made.base else [])]
        made.write(found.name.removeprefix("mecha:"), *nodes, **strength, **made.options)
    elif found.name in RECIPES:
        RECIPES[found.name](made)
    else:
        raise ConfigError(
            f"sd-mecha has no method that does what '{found.name}' does, so there is no recipe for it; it can take the"
            " merged file as a model."
        )
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
    return made.write(f"convert_{name}_blocks_to_{architecture.split('-')[1]}", literal)


def _weighted_sum(made: _Recipe) -> None:
    if isinstance(made.alpha, str) or len(made.inputs) == 2:
        made.write(
            "weighted_sum", *made.inputs, alpha=made.alpha if isinstance(made.alpha, str) else made.alpha[1]
        )
    else:
        made.average(made.inputs, made.alpha)


def _add_difference(made: _Recipe) -> None:
    result = made.inputs[0]
    scales = [made.alpha] * (len(made.inputs) - 1) if isinstance(made.alpha, str) else made.alpha
    for node, scale in zip(made.inputs[1:], scales, strict=True):
        result = made.added(result, made.delta(node), scale)
    if made.options["clamp"]:
        made.write("clamp", result, *made.inputs)


def _perpendicular(made: _Recipe) -> None:
    part = made.write("perpendicular_component", *(made.delta(node) for node in made.inputs))
    made.added(made.inputs[0], part, made.alpha)


def _train_difference(made: _Recipe) -> None:
    mask = made.write("train_difference_mask", *made.inputs, made.base, alpha=made.alpha)
    made.added(made.inputs[0], made.delta(made.inputs[1]), mask)


def _ties(made: _Recipe) -> None:
    deltas = [made.delta(node) for node in made.inputs]
    if made.options["k"] < 1:
        made.notes.append("sd-mecha's ties_sum keeps one value more of every tensor than k says")
    k, by_mass = float(made.options["k"]), made.options["vote"] == "mass"
    made.added(made.base, made.write("ties_sum", *deltas, k=k, vote_sgn=by_mass), made.alpha)


def _model_stock(made: _Recipe) -> None:
    if not made.options["rows"] or len(made.inputs) != 2:
        raise ConfigError(
            "sd-mecha's model_stock is ours of two models with rows=true only, so there is no recipe."
        )
    made.added(made.base, made.write("model_stock", *(made.delta(node) for node in made.inputs)), 1.0)


def _rotate(made: _Recipe) -> None:
    made.notes.append("sd-mecha's rotate differs from ours for matrices with fewer rows than columns")
    nodes = [made.delta(node) for node in made.inputs] if made.base else made.inputs
    turned = made.write("rotate", *nodes, alpha=made.alpha, **{k: float(v) for k, v in made.options.items()})
    if made.base:
        made.added(made.base, turned, 1.0)


def _median(made: _Recipe) -> None:
    if len(set(made.alpha)) > 1:
        raise ConfigError("sd-mecha's geometric_median has no weights, so there is no recipe for these.")
    made.write("geometric_median", *made.inputs, maxiter=made.options["iterations"])


def _ema(made: _Recipe) -> None:
    result = made.inputs[0]
    for node in made.inputs[1:]:
        result = made.write("weighted_sum", result, node, alpha=1.0 - made.options["decay"])


def _same(
    name: str, *options: str, with_base: bool = False, weight: str = "alpha"
) -> Callable[[_Recipe], None]:
    """A method that sd-mecha has with the same arguments."""

    def write(made: _Recipe) -> None:
        strength = {} if made.alpha is None else {weight: made.alpha}
        kept = {option: float(made.options[option]) for option in options}
        made.write(name, *made.inputs, *([made.base] if with_base else []), **strength, **kept)

    return write


RECIPES: dict[str, Callable[[_Recipe], object]] = {
    "weighted_sum": _weighted_sum,
    "wise_ft": _same("weighted_sum"),
    "add_difference": _add_difference,
    "slerp": _same("slerp"),
    "perpendicular_component": _perpendicular,
    "geometric_sum": _same("geometric_sum"),
    "add_cosine_a": _same("add_cosine_a"),
    "add_cosine_b": _same("add_cosine_b"),
    "ties_sum": _ties,
    "tensor_sum": _same("tensor_sum", "offset", weight="width"),
    "top_k_tensor_sum": _same("top_k_tensor_sum", "offset", weight="width"),
    "train_difference": _train_difference,
    "multiply_quotient": _same("multiply_quotient", with_base=True),
    "crossover": _same("crossover", "tilt"),
    "rotate": _rotate,
    "clip": _same("clamp", "stiffness"),
    "model_stock": _model_stock,
    "geometric_median": _median,
    "uniform_soup": lambda made: made.average(made.inputs),
    "greedy_soup": lambda made: made.average(made.inputs, made.alpha),
    "ema": _ema,
    "polyak": lambda made: made.average(made.inputs[-made.options["last"] :]),
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
