"""What a user writes for weights and options, as the merge methods take them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint
    from ..merging import Method
    from ..merging.blocks import BlockWeights
    from .request import Request


FUNCTIONS = ("score",)
"""Options that are functions, given as package.module:function."""


def method_texts(given: Sequence[str]) -> dict[str, str]:
    """The values of NAME=VALUE pairs as they were written."""
    return {name: text for name, _, text in (pair.partition("=") for pair in given)}


def settled(weights: str | None) -> Any:
    """What --weights says, with the content of a YAML file in the place of its name.

    Raises:
        ConfigError: it can't be read.
    """
    from ..merging.block_settings import content

    return content(weights) if weights is not None and weights.strip()[:1] != "[" else weights


def require_method(request: Request, method: Method) -> None:
    """Whether the method can do with the models and the base that are given, before any work.

    Raises:
        ConfigError: it takes another number of models, lacks a base, or has no use for it.
    """
    what, models = f"--method {method.name}", len(request.inputs)
    if isinstance(method.inputs, int) and models != method.inputs:
        raise ConfigError(f"{what} takes {method.inputs} models, but got {models}; give so many.")
    if models < method.least:
        raise ConfigError(f"{what} takes {method.least} models or more, but got {models}; give so many.")
    if method.needs_base and request.base is None:
        raise ConfigError(
            f"{what} needs --base FILE, the model that all were made from; give it, or choose a method without."
        )
    if request.base is not None and not method.takes_base:
        raise ConfigError(f"{what} has no use for a base; leave --base out, or choose a method with one.")


def method_options(method: Method, given: Sequence[str], models: int) -> dict[str, Any]:
    """NAME=VALUE pairs; values as JSON has them, else text or the function that is meant.

    Raises:
        ConfigError: a pair is none, the method has no such option, lacks one that it needs, or can't use its value.
    """
    from ..merging.merged import try_options
    from ..merging.registry import plan_options
    from ..objectives.base import imported

    options: dict[str, Any] = {}
    for pair in given:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--option {pair} has no '='; write NAME=VALUE, e.g. --option k=0.2.")
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    for name in plan_options(method.plan):
        if name in FUNCTIONS and name not in options:
            raise ConfigError(
                f"--method {method.name} needs --option {name}=package.module:function, a function that takes the"
                " merged model's tensors by name and returns a number."
            )
    try_options(method, method.check_options(options), models)
    here = str(Path.cwd())  # as `python -m` has it, for the user's own functions
    if here not in sys.path:
        sys.path.append(here)
    return {n: imported(n, str(v)) if n in FUNCTIONS else v for n, v in options.items()}


@dataclass(frozen=True, eq=False)
class MergeWeights:
    """What `rebasin.merging.merge` gets as weights.

    Attributes:
        given: a number, one for each model, or None for the method's default.
        blocks: weights by block, for tensors named `component.name`; None without.
    """

    given: float | list[float] | None = None
    blocks: BlockWeights | None = None

    def of(self, component: str) -> Any:
        """The weights of a component's tensors."""
        blocks = self.blocks
        return self.given if blocks is None else lambda name: blocks(f"{component}.{name}")

    def remarks(self, method: Method) -> list[str]:
        """What is legal about them and maybe not meant."""
        given = self.given if isinstance(self.given, list) else [self.given]
        numbers = [x for x in given if x is not None] if self.blocks is None else self.blocks.weights.values()
        told = method.beyond(numbers)
        return [told] if told else []

    @property
    def shares(self) -> list[float] | None:
        """A number for each model, None if there is none."""
        return self.given if isinstance(self.given, list) else None


def merge_weights(
    request: Request, method: Method, models: int, checkpoint: Checkpoint, components: Sequence[str]
) -> MergeWeights:
    """The weights that --alpha and --weights mean.

    Raises:
        ConfigError: they can't be read, or do not fit the method, the models or their blocks.
    """
    from ..merging.block_names import SD1, find_blocks
    from ..merging.blocks import block_weights

    if (method.weight is None or method.plan is not None) and (request.alpha, request.weights) != (
        None,
        None,
    ):
        reason = "has no weights" if method.plan is None else "finds the weights itself"
        raise ConfigError(f"The method {method.name!r} {reason}; leave out --alpha and --weights.")
    numbers = _numbers(request.weights)
    if request.weights is None or (numbers is not None and len(numbers) in (1, models, models - 1)):
        if request.alpha is not None and numbers is not None:
            raise ConfigError("--alpha and --weights both say how much of each model; give one of them.")
        given = numbers if numbers is None or len(numbers) > 1 else numbers[0]
        given = request.alpha if given is None else given
        if models > 2 and isinstance(given, float) and method.weight == "weights":
            raise ConfigError(f"One weight is for two models; give --weights with {models} numbers.")
        method.fit_weights(given, models)
        return MergeWeights(given)
    if method.weight == "weights" and models > 2:
        raise ConfigError(f"Block weights are for two models; give --weights with {models} numbers.")
    if method.bounded and request.alpha is not None:
        method.fit_weights(request.alpha, models)
    names = [f"{component}.{name}" for component in components for name in checkpoint.shapes(component)]
    blocks = find_blocks(names)
    if numbers is not None and len(numbers) not in (len(SD1), len(blocks.order), len(blocks.depth)):
        raise ConfigError(
            f"--weights has {len(numbers)} numbers, but there are {models} models and {len(blocks.order)} blocks: give"
            f" one for each, or '*=[{request.weights}]' for numbers that are spread over the depth."
        )
    found = block_weights(request.weights, names, request.alpha)
    for weight in set(found.weights.values()):
        method.fit_weights(weight, models)
    return MergeWeights(blocks=found)


def _numbers(text: str | None) -> list[float] | None:
    """Numbers with commas between them, None for anything else."""
    try:
        return [float(part) for part in text.split(",")] if text is not None else None
    except ValueError:
        return None
