"""The simple ways to many models: every one to a pivot, two by two up a tree, or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from itertools import combinations
from math import nan
from time import perf_counter
from typing import Any, Literal

import numpy as np

from ...arguments import Seed, typed
from ...errors import ConfigError
from ...spec import Permutation, PermutationSpec
from ...types import Progress, tell
from ..weights.matching import weight_matching
from .ends import conclude, first_distance
from .mean import MATCH, match_options
from .models import Models, Source
from .result import ManyResult, Pass, Step


@typed
def match_to_pivot(
    spec: PermutationSpec,
    states: Sequence[Source],
    *,
    pivot: int | Literal["best"] = 0,
    weights: Sequence[float] | None = None,
    seed: Seed = 0,
    match: Mapping[str, Any] = MATCH,
    progress: Progress | None = None,
) -> ManyResult:
    """Match every model to one of them, the pivot, by weight matching, and average all.

    One matching a model, but what two others have in common and the pivot has not is lost. Arguments and
    errors are those of `match_to_mean`; two models are open at a time.

    Args:
        pivot: the model that stays, or "best": every pair is matched, and the pivot is the one with the
            smallest (weighted) sum of squared distances to all others, N (N - 1) / 2 matchings.
    """
    run = _Run(spec, states, weights, match, seed, "match to pivot", progress)
    models, n = run.models, len(run.models)
    if pivot != "best" and (isinstance(pivot, str) or not 0 <= pivot < n):
        raise ConfigError(f"The pivot {pivot!r} is none of the models 0 to {n - 1}, nor 'best'.")
    first_distance(models)  # checks them before anything is matched
    pairs = (
        list(combinations(range(n), 2)) if pivot == "best" else [(pivot, i) for i in range(n) if i != pivot]
    )
    to: dict[tuple[int, int], Permutation] = {}  # (i, j): brings j to i
    apart = np.zeros((n, n))
    for i, j in pairs:
        to[i, j], apart[i, j] = run.bring(models.open(i), models.open(j), j, len(pairs))
        to[j, i], apart[j, i] = to[i, j].invert(), apart[i, j]
    chosen = int(np.argmin(apart @ np.asarray(models.weights))) if pivot == "best" else pivot
    permutations = [spec.identity() if i == chosen else to[chosen, i] for i in range(n)]
    return run.result("pivot", permutations, pivot=chosen)


@typed
def match_by_tree(
    spec: PermutationSpec,
    states: Sequence[Source],
    *,
    weights: Sequence[float] | None = None,
    seed: Seed = 0,
    match: Mapping[str, Any] = MATCH,
    progress: Progress | None = None,
) -> ManyResult:
    """Match and average the models two by two, then these means two by two, up to a single one.

    N - 1 matchings. The first model's arrangement is kept. A mean is averaged from its models when it is needed;
    two of them (float32) are in memory at a time. Arguments and errors are those of `match_to_mean`.
    """
    run = _Run(spec, states, weights, match, seed, "match by tree", progress)
    models, n = run.models, len(run.models)
    first_distance(models)
    current = [spec.identity()] * n
    teams = [[i] for i in range(n)]

    def mean_of(team: list[int]) -> dict[str, Any]:
        mean = models.average([current[i] if i in team else None for i in range(n)], wide=True)
        return {name: mean[key] for name, key in models.keys.items()}

    while len(teams) > 1:
        joined = []
        for left, right in zip(teams[::2], teams[1::2], strict=False):
            found, _ = run.bring(mean_of(left), mean_of(right), right[0], n - 1)
            for i in right:
                current[i] = found.compose(current[i])
            joined.append(left + right)
        teams = joined + teams[len(teams) // 2 * 2 :]
    return run.result("tree", current)


@typed
def naive_mean(
    spec: PermutationSpec, states: Sequence[Source], *, weights: Sequence[float] | None = None
) -> ManyResult:
    """The plain weighted mean of N models, the baseline: no neuron moves. Errors are those of `match_to_mean`."""
    run = _Run(spec, states, weights)
    first_distance(run.models)
    return run.result("naive", [spec.identity()] * len(run.models))


@dataclass
class _Run:
    """What these methods share: the models, the matchings made so far, and the figures at the end."""

    spec: PermutationSpec
    states: Sequence[Source]
    weights: Sequence[float] | None
    match: InitVar[Mapping[str, Any]] = MATCH
    seed: int = 0
    stage: str = ""
    progress: Progress | None = None
    steps: list[Step] = field(default_factory=list)
    converged: bool = True

    def __post_init__(self, match: Mapping[str, Any]) -> None:
        self.options = {**match_options(match), "normalize": "paper"}
        self.models = Models(self.spec, self.states, self.weights)

    def bring(self, a: Any, b: Any, model: int, total: int) -> tuple[Permutation, float]:
        """The permutation that brings b to a, and their squared distance then."""
        started = perf_counter()
        found = weight_matching(self.spec, a, b, seed=self.seed + len(self.steps), **self.options)
        self.converged &= found.converged
        self.steps.append(Step(model, found.moved, perf_counter() - started))
        told = {"model": model, "objective": found.objective, "moved": found.moved}
        tell(self.progress, self.stage, len(self.steps), total, **told, seconds=self.models.seconds)
        return found.permutation, found.distance_after**2

    def result(self, method: str, permutations: Sequence[Permutation], **more: Any) -> ManyResult:
        models, moved = self.models, sum(p.moved() for p in permutations)
        history = Pass(0, models.distance_before), Pass(1, nan, moved, tuple(self.steps), models.seconds)
        return conclude(method, models, permutations, history, converged=self.converged, **more)
