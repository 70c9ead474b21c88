"""The interface of every objective, and how its figures are averaged over batches."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError
from ..tensors.modules import eval_mode

Measure = Callable[[nn.Module, Any], tuple[Mapping[str, Tensor], int]]


class Objective(Protocol):
    """A loss of a model on a batch; lower is better. Batches live on the model's device."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss over the batch: a scalar, differentiable with respect to the model's parameters.

        The model's training flag is the caller's business.
        """
        ...

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """The mean over all samples of "loss" and other figures, in eval mode, without gradients."""
        ...


def mean_over_batches(model: nn.Module, batches: Iterable[Any], measure: Measure) -> dict[str, float]:
    """Average figures over batches, each weighted by its number of samples: a short last batch counts less.

    `measure(model, batch)` returns the batch's means (scalars, by name) and its number of samples; the sums
    are float64. Runs in eval mode without gradients and puts every module's training flag back.

    Raises:
        DataError: there is not one sample.
    """
    sums: dict[str, float] = {}
    total = 0
    with torch.no_grad(), eval_mode(model):
        for batch in batches:
            means, samples = measure(model, batch)
            total += samples
            for name, mean in means.items():
                sums[name] = sums.get(name, 0.0) + float(mean) * samples
    if total == 0:
        raise DataError("There is nothing to evaluate: the list of batches is empty.")
    return {name: value / total for name, value in sums.items()}


def imported(what: str, path: str) -> Any:
    """The callable at "package.module:name" (or "package.module.name"); a class is called without arguments.

    Args:
        what: what it is to users, a scorer say.

    Raises:
        ConfigError: there is none, or it can't be called.
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"The {what} {path!r} can't be imported ({error}); write it as package.module:function."
        ) from error
    made = found() if isinstance(found, type) else found
    if not callable(made):
        raise ConfigError(f"The {what} {path!r} is {type(made).__name__}, which can't be called.")
    return made
