"""The interface of every objective, and how its figures are averaged over batches."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ConfigError, DataError
from ..integrations.functions import located
from ..tensors.modules import computing, eval_mode

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
            with computing(batch):
                means, samples = measure(model, batch)
            total += samples
            for name, mean in means.items():
                sums[name] = sums.get(name, 0.0) + float(mean) * samples
    if total == 0:
        raise DataError("There is nothing to evaluate: the list of batches is empty.")
    return {name: value / total for name, value in sums.items()}


LossFunction = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> loss, as `Objective.loss`: enough of an objective wherever one is taken."""


class Checked:
    """An objective of a user's own, whose answers are looked at before they are used.

    Attributes:
        given: an object with `loss` or `evaluate`, or a function (model, batch) -> loss. Without an `evaluate` of its
            own it is evaluated by the mean of its losses; other attributes are those of `given`.
    """

    def __init__(self, given: Any) -> None:
        self.given = given

    def __getattr__(self, name: str) -> Any:
        if name == "given":  # a copy that is under way
            raise AttributeError(name)
        return getattr(self.given, name)

    @property
    def loss(self) -> Callable[[nn.Module, Any], Tensor]:
        """See `Objective.loss`; there is none where only `evaluate` was given."""
        function = getattr(self.given, "loss", self.given)
        if not callable(function):
            raise AttributeError("loss")
        return lambda model, batch: _scalar(function(model, batch))

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """See `Objective.evaluate`."""
        if hasattr(self.given, "evaluate"):
            return figures_of(self.given.evaluate(model, batches), "The objective's evaluate")
        return mean_over_batches(
            model, batches, lambda m, batch: ({"loss": self.loss(m, batch)}, _samples(batch))
        )


def checked(objective: Any, *needs: str) -> Any:
    """An objective that keeps to the interface: the project's own as they are, others as `Checked`.

    Args:
        objective: an object with `loss` and `evaluate`, with `loss` alone, or a function (model, batch) -> loss.
        needs: "loss", if its gradient is wanted.

    Raises:
        ConfigError: it is something else; says what to give.
    """
    if isinstance(objective, Checked):
        found = objective
    elif hasattr(objective, "loss") and any(
        t is not Objective and t.__module__.startswith("rebasin.") for t in type(objective).__mro__
    ):
        return objective
    else:
        found = Checked(objective)
        if problem := _problem(objective):
            raise ConfigError(
                f"objective is {problem}; give an object with loss(model, batch) and evaluate(model, batches), or a"
                " function (model, batch) -> loss."
            )
    for name in needs:
        if not hasattr(found, name):
            raise ConfigError(
                f"objective is of type {type(found.given).__name__}, which has no {name}(model, batch): its gradient"
                " is needed here."
            )
    return found


def _problem(given: Any) -> str | None:
    """What is wrong with it, as a part of a sentence."""
    if isinstance(given, type):
        return f"the class {given.__name__}, not an object of it"
    if hasattr(given, "loss") or hasattr(given, "evaluate"):
        wrong = [n for n in ("loss", "evaluate") if not callable(getattr(given, n, given.__init__))]
        return f"of type {type(given).__name__}, whose {wrong[0]} can't be called" if wrong else None
    if isinstance(given, nn.Module) or not callable(given):  # a loss of torch takes outputs and targets
        return f"of type {type(given).__name__}"
    try:
        inspect.signature(given).bind(None, None)
    except TypeError as error:
        return f"a function that does not take (model, batch): {error}"
    except ValueError:  # it has no signature to look at
        return None
    return None


def _scalar(loss: Any) -> Tensor:
    """The loss, if it is one.

    Raises:
        ConfigError: it is no number, several, or without a gradient where one is asked for.
    """
    if not isinstance(loss, Tensor) and (not isinstance(loss, Real) or isinstance(loss, bool)):
        raise ConfigError(
            f"The objective's loss is of type {type(loss).__name__}, but it must be a tensor, a scalar."
        )
    if isinstance(loss, Tensor) and (loss.numel() != 1 or loss.is_complex() or loss.dtype == torch.bool):
        kind = f"a {str(loss.dtype).removeprefix('torch.')} tensor of shape {tuple(loss.shape)}"
        raise ConfigError(f"The objective's loss is {kind}, but it must be one real number: take the mean.")
    if torch.is_grad_enabled() and not (isinstance(loss, Tensor) and loss.requires_grad):
        raise ConfigError(
            "The objective's loss has no gradient; compute it by torch from the model's outputs, without item(),"
            " detach() or no_grad()."
        )
    return torch.as_tensor(loss).reshape(())


def figures_of(result: Any, what: str) -> dict[str, float]:
    """What an evaluation returned, a number (the loss) or a mapping of numbers with "loss", as a mapping.

    Raises:
        ConfigError: it is something else; `what` was it?
    """
    if isinstance(result, Mapping):
        if "loss" not in result:
            raise ConfigError(
                f"{what} must return a number or a mapping with 'loss', but got {sorted(map(str, result))}."
            )
        return {str(name): _number(value, f"{what} returned {name!r}:") for name, value in result.items()}
    return {"loss": _number(result, f"{what} returned")}


def _number(value: Any, told: str) -> float:
    kind = f"a value of type {type(value).__name__}"
    if isinstance(value, Tensor) or hasattr(value, "item"):  # of torch or numpy
        value = value.detach().cpu() if isinstance(value, Tensor) else value
        if getattr(value, "size", None) == 1 or (isinstance(value, Tensor) and value.numel() == 1):
            value = value.item()
        else:
            kind = f"values of shape {tuple(getattr(value, 'shape', ()))}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"{told} {kind}, but a number is wanted, or a mapping with the number 'loss'.")
    return float(value)


def _samples(batch: Any) -> int:
    """How many samples a batch has, as far as its first tensor tells."""
    return next((len(t) for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.ndim), 1)


def imported(what: str, path: str) -> Any:
    """The callable at "package.module:name" (or "package.module.name"); a class is called without arguments.

    Args:
        what: what it is to users, a scorer say.

    Raises:
        ConfigError: there is none, or it can't be called.
    """
    try:
        found = located(path)
    except ImportError as error:
        raise ConfigError(
            f"The {what} {path!r} can't be imported ({error}); write it as package.module:function."
        ) from error
    made = found() if isinstance(found, type) else found
    if not callable(made):
        raise ConfigError(f"The {what} {path!r} is {type(made).__name__}, which can't be called.")
    return made
