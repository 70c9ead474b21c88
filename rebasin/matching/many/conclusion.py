"""How every method ends: the models in the arrangement that it found, measured and averaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...spec import Permutation
from .models import Models
from .result import ManyResult, Pass
from .running_mean import RunningMean


def first_distance(models: Models) -> float:
    """Check the models' values; their distance from their mean as they come."""
    RunningMean(models).gather_first()
    return models.distance_before


def conclude(
    method: str,
    models: Models,
    permutations: Sequence[Permutation],
    history: Sequence[Pass],
    *,
    converged: bool,
    measured: RunningMean | ManyResult | None = None,
    **more: Any,
) -> ManyResult:
    """The result of `method`. A last pass whose distance is not known (NaN) has that of the end.

    Args:
        measured: what knows objective and distance at the end, if anything does.
        more: what else the result tells.
    """
    if measured is None:
        measured = RunningMean(models)
        measured.gather(permutations)
    *earlier, last = history
    if math.isnan(last.distance):
        last = replace(last, distance=measured.distance)
    return ManyResult(
        method=method,
        permutations=tuple(permutations),
        merged=models.average(permutations),
        objective=measured.objective,
        distance=measured.distance,
        distance_before=models.distance_before,
        history=(*earlier, last),
        converged=converged,
        moved=sum(p.moved() for p in permutations),
        weights=models.shares,
        seconds=models.seconds,
        **more,
    )
