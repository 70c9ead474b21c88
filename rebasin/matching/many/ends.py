"""How methods for many models begin and end: at the arrangement of another method or a given one, and with the models
in the arrangement that was found, measured and averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...errors import ConfigError, SpecMismatchError
from ...spec import Permutation, PermutationSpec
from .models import Models
from .result import ManyResult, Pass, anchored
from .running_mean import RunningMean


def first_distance(models: Models) -> float:
    """Check the models' values; their distance from their mean as they come."""
    RunningMean(models).gather_first()
    return models.distance_before


def check_given(spec: PermutationSpec, given: Sequence[Permutation]) -> None:
    """Raise `SpecMismatchError` if one of the permutations, of models 0, 1, ..., is not legal."""
    for i, permutation in enumerate(given):
        if not spec.contains(permutation):
            raise SpecMismatchError(
                f"The permutation of states[{i}] to start from is none of this spec's: it was made for another"
                f" architecture, or breaks a block structure."
            )


def start_of(
    init: str | Sequence[Permutation],
    models: Models,
    seed: int,
    methods: Mapping[str, Callable[..., ManyResult]],
) -> Sequence[Permutation]:
    """Each model's permutation, in the arrangement of the first: none moves ("identity"), or as one of `methods` ends.

    Raises:
        ConfigError: there is no start of that name.
        SpecMismatchError: given permutations do not go with the models.
    """
    spec, n = models.spec, len(models)
    if init == "identity":
        return [spec.identity()] * n
    if isinstance(init, str):
        if init not in methods:
            names = ", ".join(map(repr, ("identity", *methods)))
            raise ConfigError(f"The init {init!r} is unknown: give {names} or permutations.")
        return methods[init](spec, models.sources, weights=models.weights, seed=seed).permutations
    if len(init) != n:
        raise SpecMismatchError(
            f"The start needs one permutation of this spec for each of the {n} models, not {len(init)}."
        )
    check_given(spec, init)
    return anchored(init, 0)


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
