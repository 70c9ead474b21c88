"""What a method gets as weights for one tensor, from what the user gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ConfigError
from .registry import Method

Weights = float | Sequence[float] | Callable[[str], float | Sequence[float]] | None
"""One number, one for each model, or a function of the tensor's name that gives either: block weights."""


def fit_weights(method: Method, given: Any, models: int, name: str = "") -> float | list[float] | None:
    """What a method gets as its weight for one tensor, from what the user gave.

    Raises:
        ConfigError: the weights do not fit method and models, or are not finite.
    """
    where = f" for tensor '{name}'" if name else ""
    kind = method.weight
    if kind is None:
        return None
    if given is None:
        given = method.default_weight
    numbers = [float(x) for x in given] if isinstance(given, Sequence) else given
    for number in numbers if isinstance(numbers, list) else [numbers]:
        if number is not None and not math.isfinite(number):
            raise ConfigError(f"A weight{where} is {number}, but weights must be finite numbers.")
    if kind == "weights":
        if numbers is None:
            return [1 / models] * models
        if not isinstance(numbers, list):
            if models != 2:
                raise ConfigError(
                    f"'{method.name}' of {models} models got one weight{where}: give a list of {models}, or none for"
                    " equal shares."
                )
            return [1 - float(numbers), float(numbers)]
        if len(numbers) != models:
            raise ConfigError(
                f"There are {models} models but {len(numbers)} weights{where}: give one for each."
            )
        total = sum(numbers)
        if min(numbers) < 0 or total <= 0:
            raise ConfigError(f"The weights {numbers}{where} must not be negative, nor all be 0.")
        return [number / total for number in numbers]
    if kind == "scales":
        if not isinstance(numbers, list):
            return [float(numbers)] * (models - 1)
        if len(numbers) != models - 1:
            raise ConfigError(
                f"'{method.name}' got {len(numbers)} weights{where}: give one for each of the {models - 1} models after"
                " the first."
            )
        return numbers
    if isinstance(numbers, list):
        if len(numbers) != 1:
            raise ConfigError(f"'{method.name}' takes one weight{where}, but got {len(numbers)}.")
        numbers = numbers[0]
    return float(numbers)
