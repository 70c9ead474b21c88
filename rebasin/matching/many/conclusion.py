"""How every method ends: the models in the arrangement that it found, measured and averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

from ...spec import Permutation
from .models import Models
from .result import ManyResult, Pass
from .running_mean import RunningMean


def first_distance(models: Models) -> float:
    """Check the models' values; their distance from their mean as they come."""
    mean = RunningMean(models)
    mean.gather_first()
    return mean.distance


def conclude(
    method: str,
    models: Models,
    permutations: Sequence[Permutation],
    history: Sequence[Pass],
    *,
    began: float,
    before: float,
    converged: bool,
    measured: RunningMean | ManyResult | None = None,
    pivot: int | None = None,
    details: Mapping[str, Any] | None = None,
) -> ManyResult:
    """The result of `method`. A last pass whose distance is not known (NaN) has that of the end.

    Args:
        began: by `perf_counter`.
        before: the distance without a permutation.
        measured: what knows objective and distance at the end, if anything does.
    """
    if measured is None:
        measured = RunningMean(models)
        measured.gather(permutations)
    *earlier, last = history
    return ManyResult(
        method=method,
        permutations=tuple(permutations),
        merged=models.average(permutations),
        objective=measured.objective,
        distance=measured.distance,
        distance_before=before,
        history=(*earlier, replace(last, distance=measured.distance) if math.isnan(last.distance) else last),
        converged=converged,
        moved=sum(p.moved() for p in permutations),
        weights=models.shares,
        seconds=perf_counter() - began,
        pivot=pivot,
        details=details or {},
    )
