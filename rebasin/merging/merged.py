"""`merge`: any of the methods on whole states, lazily, one tensor at a time."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..arguments import Seed, typed
from ..errors import ConfigError, RebasinError, shown
from ..tensors.modules import find_device
from ..types import Progress, State
from .inputs import check_companion, check_names, with_ties
from .lazy import MergedState
from .registry import METHODS, Method, Weights, plan_options


@typed
def merge(
    method: str | Method,
    states: Sequence[State],
    *,
    base: State | None = None,
    weights: Weights = None,
    seed: Seed = 0,
    companions: Sequence[State] | None = None,
    labels: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> MergedState:
    """Merge two or more states that stand in one basis; the result computes a tensor when it is read.

    Nothing is computed here but a check of names and shapes. Every tensor is computed in float32 (or wider, if
    a model is), stored in the first model's dtype and on its device, and depends on the models, the options,
    the seed and its own name only. Integer and boolean tensors must be equal in all models and are copied,
    except BatchNorm's `num_batches_tracked`, which follows the first. A tensor that is equal in all models and
    the base is copied bit for bit.

    Args:
        method: a name in METHODS, `mecha:NAME` for a method of the package sd-mecha, or a Method.
        states: the models, mappings name -> tensor; the first gives order, dtypes and devices.
        base: the common ancestor, for the methods that need one.
        weights: one number (share of B, or strength of what is added: the method's `weight` says which), a list
            with a number for each model, or a function of the tensor's name that gives either: block weights.
            None: the method's default.
        seed: of the methods that draw random numbers; each tensor has its own stream.
        companions: a further state for each model, for the methods that take one (a Fisher information).
        labels: what to call the models in errors; "A" and "B", or "model 1" and so on.
        device: where to compute; None: where the first model's tensors are.
        dtype: of the result's floating tensors; None: those of the first model.
        progress: called after each tensor with stage, step, total and name.
        options: those of the method.

    Raises:
        ConfigError: the method is unknown, or its models, base, weights or options do not fit it.
        CheckpointError: names or shapes differ; names the tensor. Reading a tensor of the result raises it for
            integers that differ, and for numbers that are not finite before or after merging.
    """
    chosen = find_method(method)
    numbered = (f"model {i + 1}" for i in range(len(states)))
    labels = tuple(labels or (("A", "B") if len(states) == 2 else numbered))
    _check_inputs(chosen, len(states), base is not None, companions, weights)
    filled = chosen.check_options(options)
    try_options(chosen, filled, len(states))

    device = None if device is None else find_device(device)
    states, companions = tuple(with_ties(states)), tuple(companions or ())
    others = [*zip(labels[1:], states[1:], strict=True), *([] if base is None else [("the base", base)])]
    for label, state in others:
        check_names(states[0], state, labels[0], label)
    for label, state in zip(labels, companions, strict=False):
        check_companion(states[0], state, label)

    if chosen.plan is not None:
        own = {key: filled.pop(key) for key in plan_options(chosen.plan)}
        weights = chosen.plan(states=states, progress=progress, **own)
    result = MergedState(
        chosen, states, base, weights, seed, companions, labels, device, dtype, progress, filled
    )
    if not callable(weights):
        result.weights_of("")  # complain now
    return result


def _check_inputs(
    method: Method, models: int, based: bool, companions: Sequence[State] | None, weights: Weights
) -> None:
    what = f"The merge method '{method.name}'"
    if isinstance(method.inputs, int) and models != method.inputs:
        raise ConfigError(f"{what} takes {method.inputs} models, but got {models}.")
    if models < method.least:
        raise ConfigError(f"{what} takes {method.least} models or more, but got {models}.")
    if method.needs_base and not based:
        raise ConfigError(
            f"{what} needs a base, the model that all were made from: give one, or choose a method without."
        )
    if based and not method.takes_base:
        raise ConfigError(f"{what} has no use for a base: leave it out.")
    if "companions" in method.takes and companions is None:
        raise ConfigError(f"{what} needs a companion state (Fisher information) for each model.")
    if "companions" not in method.takes and companions is not None:
        raise ConfigError(f"{what} takes no companions.")
    if companions is not None and len(companions) != models:
        raise ConfigError(f"There are {models} models but {len(companions)} companions: give one for each.")
    if weights is not None and (method.weight is None or method.plan is not None):
        reason = "has no weights" if method.plan is None else "finds the weights itself"
        raise ConfigError(f"{what} {reason}: leave them out.")


def try_options(method: Method, options: Mapping[str, Any], models: int) -> None:
    """Complain of an option's value before work starts: methods look at them when they merge, so let it merge a trifle.

    Raises:
        ConfigError: an option is out of range, or of another type.
    """
    if method.name.startswith("mecha:"):
        return  # these look at real tensors
    supplied = plan_options(method.plan)
    tensors = [torch.full((2, 2), 1.0 + i) + torch.eye(2) for i in range(models)]
    given = {
        "models": tensors,
        "a": tensors[0],
        "b": tensors[-1],
        "base": torch.eye(2),
        "companions": tensors,
        "generator": torch.Generator(),
        "name": "",
        method.weight: method.fit_weights(None, models),
    }
    own = {name: value for name, value in options.items() if name not in supplied}
    try:
        method.function(**{name: given[name] for name in method.takes}, **own)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        if isinstance(error, RebasinError):
            raise
        told = ", ".join(f"{name}={shown(value)}" for name, value in own.items())
        raise ConfigError(
            f"The merge method '{method.name}' can't work with the options {told}; `rebasin methods {method.name}`"
            " tells their defaults."
        ) from error


def find_method(method: str | Method) -> Method:
    """The method of this name.

    Raises:
        ConfigError: there is none; the sentence lists those there are.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):  # of a configuration
        raise ConfigError(
            f"A merge method is named by text, not by {shown(method)}; `rebasin methods` lists them."
        )
    if method.startswith("mecha:"):
        from .mecha import mecha_method

        return mecha_method(method.removeprefix("mecha:"))
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=3) or list(METHODS)[:3]
        raise ConfigError(
            f"There is no merge method {shown(method)}; there are {', '.join(near)} and others, which `rebasin methods`"
            " lists."
        )
    return METHODS[method]
