"""What a user writes for weights and options, as the merge methods take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint
    from ..merging import Method
    from .jobs import Request


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


def weights_of(
    request: Request, method: Method | None, models: int, checkpoint: Checkpoint, component: str
) -> Any:
    """What `rebasin.merging.merge` gets as weights of a component: a number, one for each model, or None.

    Raises:
        ConfigError: --alpha and --weights are both given, can't be read, or do not fit the models.
    """
    if request.alpha is not None and request.weights is not None:
        raise ConfigError("Give either --alpha, for two models, or --weights.")
    if request.weights is None:
        if request.alpha is None:
            return None
        if method is not None and method.weight is None:
            raise ConfigError(f"The method {method.name!r} has no weight; leave out --alpha.")
        if models > 2 and (method is None or method.weight == "weights"):
            raise ConfigError(f"--alpha is for two models; give --weights with {models} numbers.")
        return request.alpha
    try:
        numbers = [float(text) for text in request.weights.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--weights {request.weights} can't be read; write a number for each model, e.g. --weights 0.5,0.3,0.2."
        ) from error
    if method is not None:
        from ..merging.weights import fit_weights

        fit_weights(method, numbers, models)
    return numbers
