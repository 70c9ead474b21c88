"""Activation matching for many models: each is brought to the others by what its neurons do on the same data.

For two models see activations.py. For N models, with C_ij the correlations (or another statistic) between the
neurons of models i and j, the objective is that of all pairs,

    sum_(i<j) w_i w_j sum_a C_ij[p_i(a), p_j(a)].

With all models but one held fixed it is a linear assignment for each group; and since the statistic is linear in
either model's activations, it is that of matching model i to the mean activations of the others: MergeMany with
another cost. The data is gone through once for each pair, and not again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ...arguments import Count, NonNegativeInt, Seed, typed
from ...objectives import LossFunction, Objective
from ...spec import Permutation, PermutationSpec
from ...tensors.modules import Forward, loaded
from ...tensors.moments import Statistic
from ...types import Progress, tell
from ..activations.matching import require_seen
from ..activations.statistics import TOKENS, Reads, Sites, activation_statistics
from ..assignment.blocks import assign_all
from ..descent import coordinate_descent
from ..result import moved_between
from ..schedule import Order, order_of
from .ends import conclude, first_distance
from .models import Models, Source
from .result import ManyResult, Pass, Step, anchored

Pairs = Mapping[tuple[int, int], Mapping[str, Tensor]]
"""(i, j), i < j -> cell name -> how alike neuron [a] of model i and neuron [b] of model j are."""


@typed
def match_many_activations(
    spec: PermutationSpec,
    states: Sequence[Source],
    model: nn.Module,
    batches: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    statistic: Statistic = "pearson",
    reads: Reads = "inputs",
    sites: Sites = None,
    tokens: NonNegativeInt | None = TOKENS,
    objective: Objective | LossFunction | None = None,
    forward: Forward | None = None,
    order: Order = "random",
    anchor: int | None = 0,
    max_passes: Count = 100,
    seed: Seed = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> ManyResult:
    """Bring N models to each other by their activations, and average them.

    In the first pass the models join one by one; then each is matched to all others, again and again, until none
    moves. The statistics of all pairs are held in float32: N (N - 1) / 2 times the square of each group's size.
    Neurons that no statistic tells apart stay where they are.

    Args:
        spec, states, weights, seed, progress: see `merge_many`.
        model: the architecture; its weights are left as they are.
        batches, statistic, reads, sites, tokens, objective, forward, device: see `activation_matching`.
        order, anchor, max_passes: see `match_to_mean`.

    Raises:
        SpecMismatchError, CheckpointError: see `match_to_mean`.
        DataError: there are no batches, or one gives NaN or infinite activations.
        ConfigError: an option does not fit, or a group can't be seen at any module.
    """
    models = Models(spec, states, weights)
    models.check_anchor(anchor)
    n, before = len(models), first_distance(models)
    batches = list(batches)
    pairs: dict[tuple[int, int], Mapping[str, Tensor]] = {}
    numbers = list(combinations(range(n), 2))
    look: Any = {"reads": reads, "sites": sites, "tokens": tokens}
    for i, j in numbers:
        a, b = (loaded(model, models.open(k)) for k in (i, j))
        found = activation_statistics(
            spec, a, b, batches, objective=objective, forward=forward, **look, seed=seed, device=device
        )
        require_seen(found, False)
        pairs[i, j] = {cell: found.costs(cell, statistic).float() for cell in spec.cells}
        tell(progress, "statistics", len(pairs), len(numbers), model=j, seconds=models.seconds)
    inside: dict[int, Permutation] = {}
    dirty = set(range(n)) if n > 1 else set[int]()
    history, steps = [Pass(0, before)], list[Step]()

    def begin(number: int) -> Sequence[int]:
        steps.clear()
        return range(n) if n == 2 else order_of(order, n, seed, 0, number - 1)

    def improve(i: int) -> bool:
        started, old = perf_counter(), inside.get(i)
        inside[i] = _matched(models, pairs, inside, i)
        if len(inside) < n:  # one matched to some of the others only is to be looked at again
            dirty.add(i)
        steps.append(Step(i, moved_between(old, inside[i]), perf_counter() - started))
        return steps[-1].moved > 0 or old is None

    others = [set(range(n)) - {i} for i in range(n)]
    for number in coordinate_descent(improve, others, begin, dirty, max_passes, clean=True):
        moved, seconds = sum(step.moved for step in steps), sum(step.seconds for step in steps)
        # Only the last one's distance is measured.
        history.append(Pass(number, math.nan, moved, tuple(steps), seconds))
    current = [inside.get(i, spec.identity()) for i in range(n)]
    details = {"statistic": statistic, "statistic_objective": _value(models.weights, pairs, current)}
    found = anchored(current, anchor)
    return conclude("activations", models, found, history, converged=not dirty, details=details)


def _matched(models: Models, pairs: Pairs, inside: Mapping[int, Permutation], i: int) -> Permutation:
    """Model i in its best arrangement given those that are inside."""
    spec = models.spec
    others = [j for j in inside if j != i]
    own = inside.get(i, spec.identity())
    if not others:
        return own
    costs: dict[str, Tensor] = {}
    for cell, index in own.index.items():
        total = torch.zeros(len(index), len(index))
        for j in others:
            matrix = pairs[j, i][cell] if j < i else pairs[i, j][cell].T
            total.add_(matrix[torch.from_numpy(inside[j].index[cell])], alpha=models.weights[j])
        costs[cell] = total[:, torch.from_numpy(index)]
    return assign_all(spec, costs).compose(own)


def _value(weights: Sequence[float], pairs: Pairs, current: Sequence[Permutation]) -> float:
    """The objective."""
    total = 0.0
    for (i, j), matrices in pairs.items():
        for cell, matrix in matrices.items():
            p, q = (torch.from_numpy(current[k].index[cell]) for k in (i, j))
            total += weights[i] * weights[j] * float(matrix[p, q].double().sum())
    return total
