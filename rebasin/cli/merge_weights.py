"""What a user writes for weights and options, as the merge methods take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint
    from ..merging import Method
    from ..merging.blocks import BlockWeights
    from .request import Request


def method_options(method: Method, given: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; values as JSON has them, else text.

    Raises:
        ConfigError: a pair is none, or the method has no such option.
    """
    options: dict[str, Any] = {}
    for pair in given:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--option {pair} has no '='; write NAME=VALUE, e.g. --option k=0.2.")
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    method.check_options(options)
    return options


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
    from ..merging.blocks import block_weights

    if method.weight is None and (request.alpha is not None or request.weights is not None):
        raise ConfigError(f"The method {method.name!r} has no weights; leave out --alpha and --weights.")
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
    names = [f"{component}.{name}" for component in components for name in checkpoint.shapes(component)]
    return MergeWeights(blocks=block_weights(request.weights, names, request.alpha))


def _numbers(text: str | None) -> list[float] | None:
    """Numbers with commas between them, None for anything else."""
    try:
        return [float(part) for part in text.split(",")] if text is not None else None
    except ValueError:
        return None
