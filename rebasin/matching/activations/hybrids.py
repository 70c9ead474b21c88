"""Activations and weights together: one after the other, or as one objective.

Activation matching knows what neurons do but looks at each group by itself; weight matching sees how groups hang
together but ends in the nearest local optimum. So a descent on the weights that starts where the activations lead
(`activation_then_weight`) often ends better than either, and a weighted sum of both objectives can be climbed by the
same coordinate descent (`activation_and_weight`), since the activations' part does not depend on other groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import nn

from ...arguments import Count, NonNegativeInt, Seed, Share, typed
from ...objectives import LossFunction, Objective
from ...spec import PermutationSpec
from ...tensors.modules import Forward
from ...tensors.moments import Statistic
from ...types import Progress, tell
from ..result import MatchResult, Sweep
from ..schedule import Order
from ..weights.endpoints import Endpoints, Normalize
from ..weights.matching import weight_matching
from .joint import Joint
from .matching import activation_matching, match_statistics, require_seen
from .statistics import TOKENS, Reads, Sites, activation_statistics


@typed
def activation_then_weight(
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Iterable[Any],
    *,
    statistic: Statistic = "pearson",
    reads: Reads = "inputs",
    sites: Sites = None,
    tokens: NonNegativeInt | None = TOKENS,
    objective: Objective | LossFunction | None = None,
    forward: Forward | None = None,
    order: Order = "random",
    max_sweeps: Count = 100,
    normalize: Normalize = "repeats",
    seed: Seed = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> MatchResult:
    """Weight matching that starts from the activations' permutation.

    The options are those of `activation_matching` and of `weight_matching`; groups that no module shows start from
    the weights alone. The result is weight matching's: its history begins at the permutation found by activations,
    while `initial_objective` and `distance_before` are those without any permutation. The seconds are of both.

    Raises:
        What the two raise.
    """
    first = activation_matching(
        spec, model_a, model_b, batches, statistic=statistic, reads=reads, sites=sites, tokens=tokens,
        objective=objective, forward=forward, fallback_to_weights=True, seed=seed, device=device, progress=progress,
    )  # fmt: skip
    second = weight_matching(
        spec, model_a.state_dict(), model_b.state_dict(), init=first.permutation, order=order, seed=seed,
        max_sweeps=max_sweeps, normalize=normalize, device=device or "cpu", progress=progress,
    )  # fmt: skip
    return replace(second, seconds=first.seconds + second.seconds)


@typed
def activation_and_weight(
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Iterable[Any],
    *,
    weight: Share = 0.5,
    statistic: Statistic = "pearson",
    reads: Reads = "inputs",
    sites: Sites = None,
    tokens: NonNegativeInt | None = TOKENS,
    objective: Objective | LossFunction | None = None,
    forward: Forward | None = None,
    order: Order = "random",
    max_sweeps: Count = 100,
    seed: Seed = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> MatchResult:
    """Coordinate descent on `(1 - weight) * activations + weight * weights`.

    Both parts are divided by the largest value that they could have, so that each lies between -1 and 1 and 0.5
    counts them alike. What is not trained (buffers, and parameters with `requires_grad=False` beside others) has no
    part in the largest value of the weights, and a tensor of far larger numbers than most counts at most as much as
    all ordinary ones together: neither drowns the others. The descent starts from the activations' permutation.

    Args:
        weight: share of the weights: 0 is activation matching, 1 weight matching from its permutation.
        Others as in `activation_matching` and `weight_matching`.

    Returns:
        A `MatchResult` whose objectives are of the sum; distances are of the weights.

    Raises:
        ConfigError: `weight` is not between 0 and 1. Else what `activation_matching` raises.
    """
    began = perf_counter()
    statistics = activation_statistics(
        spec, model_a, model_b, batches, objective=objective, forward=forward, reads=reads, sites=sites, tokens=tokens,
        seed=seed, device=device, progress=progress,
    )  # fmt: skip
    require_seen(statistics, fallback=weight > 0)
    state_a, state_b = model_a.state_dict(), model_b.state_dict()
    start = match_statistics(statistics, state_a, state_b, statistic=statistic)
    activations = {cell: statistics.costs(cell, statistic) for cell in spec.cells}
    largest = sum(statistics.largest(cell, statistic) for cell in spec.cells)
    del statistics
    pair = Endpoints(spec, state_a, state_b)
    joint = Joint(pair, activations, largest, weight, _frozen(model_a) & _frozen(model_b))
    initial = joint.objective
    pair.set(start.permutation)
    history = [Sweep(0, joint.objective, pair.permutation.moved())]
    converged = False
    for sweep, converged in joint.descend(spec.groups, order, seed, max_sweeps):  # noqa: B007 (the last one counts)
        history.append(sweep)
        told = {"objective": sweep.objective, "moved": sweep.moved, "seconds": perf_counter() - began}
        tell(progress, "activations and weights", sweep.number, max_sweeps, **told)
    permutation = pair.permutation
    return MatchResult(
        permutation=permutation,
        objective=history[-1].objective,
        history=tuple(history),
        converged=converged,
        seconds=perf_counter() - began,
        initial_objective=initial,
        distance_before=start.distance_before,
        distance_after=pair.distance,
        restarts=(history[-1].objective,),
    )


def _frozen(model: nn.Module) -> set[str]:
    """What is not trained: buffers, and frozen parameters unless all are, as in a model that is only used."""
    named = dict(model.named_parameters(remove_duplicate=False))
    frozen = {name for name, parameter in named.items() if not parameter.requires_grad}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return buffers | (frozen if len(frozen) < len(named) else set())
