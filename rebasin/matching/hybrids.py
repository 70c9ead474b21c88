"""Activations and weights together: one after the other, or as one objective.

Activation matching knows what neurons do but looks at each group by itself; weight matching sees how groups hang
together but ends in the nearest local optimum. So a descent on the weights that starts where the activations lead
(`activation_then_weight`) often ends better than either, and a weighted sum of both objectives can be climbed by the
same coordinate descent (`activation_and_weight`), since the activations' part does not depend on other groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..objectives import Objective
from ..spec import Group, Indices, PermutationSpec, to_array
from .activations import activation_matching, check_statistic, moved, moved_per_group, require_seen
from .assignment import assign
from .costs import WeightCosts
from .linear import TOLERANCE
from .moments import Statistic
from .pair import Pair
from .result import MatchResult, Sweep, Update
from .schedule import Order, neighbours, order_of
from .statistics import ActivationStatistics, Forward, Progress, Reads, Sites, activation_statistics
from .weights import weight_matching


def activation_then_weight(
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Iterable[Any],
    *,
    statistic: Statistic = "pearson",
    reads: Reads = "inputs",
    sites: Sites = "all",
    tokens: int | None = None,
    objective: Objective | None = None,
    forward: Forward | None = None,
    order: Order = "random",
    max_sweeps: int = 100,
    normalize: Literal["tensor"] | None = None,
    seed: int = 0,
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


def activation_and_weight(
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Iterable[Any],
    *,
    weight: float = 0.5,
    statistic: Statistic = "pearson",
    reads: Reads = "inputs",
    sites: Sites = "all",
    tokens: int | None = None,
    objective: Objective | None = None,
    forward: Forward | None = None,
    order: Order = "random",
    max_sweeps: int = 100,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> MatchResult:
    """Coordinate descent on `(1 - weight) * activations + weight * weights`.

    Both parts are divided by the largest value that they could have (Cauchy and Schwarz), so that each lies between
    -1 and 1 and 0.5 counts them alike; 0 is activation matching. The descent starts from the activations' permutation.
    Other options as in `activation_matching` and `weight_matching`.

    Returns:
        A `MatchResult` whose objectives are of the sum; distances are of the weights.

    Raises:
        ConfigError: `weight` is not between 0 and 1. Else what `activation_matching` raises.
    """
    began = perf_counter()
    check_statistic(statistic)
    if not 0 <= weight <= 1:
        raise ConfigError(f"weight is {weight}, but the share of the weights must be between 0 and 1.")
    statistics = activation_statistics(
        spec, model_a, model_b, batches, objective=objective, forward=forward, reads=reads, sites=sites, tokens=tokens,
        seed=seed, device=device, progress=progress,
    )  # fmt: skip
    require_seen(statistics, fallback=weight > 0)
    pair = Pair(spec, model_a.state_dict(), model_b.state_dict())
    sum_ = _Sum(pair, statistics, statistic, weight)
    unseen = statistics.unseen
    del statistics
    initial, distance = sum_.objective, pair.distance
    for group in spec:  # where the activations lead
        if group not in unseen:
            found = assign(group, sum_.activations)
            pair.make(pair.propose(group, found.index), found.index)
    history = [Sweep(0, sum_.objective, pair.permutation.moved())]
    near, dirty = neighbours(spec), set(range(len(spec)))
    while dirty and len(history) <= max_sweeps:
        updates, sweep_began = [], perf_counter()
        for g in order_of(order, len(spec), seed, 0, len(history) - 1):
            if g in dirty:
                dirty.discard(g)
                updates.append(sum_.improve(spec.groups[g]))
                if updates[-1].moved:
                    dirty |= near[g]
        sweep = pair.permutation.moved(), tuple(updates), perf_counter() - sweep_began
        history.append(Sweep(len(history), sum_.objective, *sweep))
        if progress is not None:
            progress(
                {
                    "stage": "activations and weights",
                    "step": len(history) - 1,
                    "total": max_sweeps,
                    "objective": history[-1].objective,
                    "moved": history[-1].moved,
                    "seconds": perf_counter() - began,
                }
            )
    permutation = pair.permutation
    return MatchResult(
        permutation=permutation,
        objective=history[-1].objective,
        history=tuple(history),
        converged=not dirty,
        moved=permutation.moved(),
        seconds=perf_counter() - began,
        initial_objective=initial,
        distance_before=distance,
        distance_after=pair.distance,
        sweeps=len(history) - 1,
        restarts=(history[-1].objective,),
        moved_per_group=moved_per_group(permutation),
    )


class _Sum:
    """The common objective at `pair`'s present permutation."""

    def __init__(
        self, pair: Pair, statistics: ActivationStatistics, statistic: Statistic, weight: float
    ) -> None:
        self.pair = pair
        self.weights = WeightCosts(pair)
        cells = list(pair.spec.cells)
        largest = sum(statistics.largest(cell, statistic) for cell in cells)
        self.share = weight / pair.scale if pair.scale else 0.0
        self.scale = (1 - weight) / largest if largest else 0.0
        self.activations = {cell: statistics.costs(cell, statistic) for cell in cells}

    @property
    def objective(self) -> float:
        return self.share * self.pair.objective + math.fsum(
            self._value(cell, np.arange(len(index))) for cell, index in self.pair.index.items()
        )

    def _value(self, cell: str, relative: np.ndarray) -> float:
        """The activations' part of a cell if its neurons moved by `relative` from where they are."""
        index = torch.from_numpy(self.pair.index[cell][relative])
        return self.scale * float(self.activations[cell].gather(1, index[:, None]).sum())

    def improve(self, group: Group) -> Update:
        """Bring a group to its best arrangement given all others, if that gains."""
        found = assign(group, _Costs(self))
        count = sum(moved(index) for index in found.index.values())
        if not count:
            return Update(group.name, 0.0, 0)
        move = self.pair.propose(group, found.index)
        gain = self.share * move.gain + math.fsum(
            self._value(cell, index) - self._value(cell, np.arange(index.size))
            for cell, index in found.index.items()
        )
        if gain <= TOLERANCE:  # of a sum that is at most 1
            return Update(group.name, 0.0, 0)
        self.pair.make(move, found.index)
        return Update(group.name, gain, count)


@dataclass(frozen=True)
class _Costs:
    """Answers `assignment.Costs`: what neuron j, where it is now, gains at place i."""

    sum_: _Sum

    def block(self, cell: str, neurons: Indices) -> Tensor:
        return self._with_activations(cell, neurons, self.sum_.weights.block(cell, neurons))

    def diagonal(self, cell: str, blocks: Any) -> list[Tensor]:
        made = self.sum_.weights.diagonal(cell, blocks)
        return [self._with_activations(cell, n, block) for n, block in zip(blocks, made, strict=True)]

    def potentials(self, cell: str, neurons: Indices) -> Tensor | None:
        return None

    def _with_activations(self, cell: str, neurons: Indices, block: Tensor) -> Tensor:
        total = block.double() * self.sum_.share
        rows = torch.from_numpy(to_array(neurons))
        columns = torch.from_numpy(self.sum_.pair.index[cell])[rows]
        activations = self.sum_.activations[cell][rows[:, None], columns]
        return total.add_(activations.to(total.device), alpha=self.sum_.scale)
