"""Several models matched at once, by workers that need not be in this process: the rounds of MergeMany.

A round takes as many models of a pass as there are workers. Each worker gets the running mean as it is when the round
begins, takes its own model out, and matches the model to what remains. The moves are then made one after the other: the
first as it is; a later one only if it still brings its model nearer to the others as they are by now. So the distance
never rises, and with one worker every bit is that of one model at a time. A model whose round had an earlier move is
looked at again, so that the end is the same: no model can be brought closer to the mean of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from ...spec import Permutation, PermutationSpec
from ...types import State
from ..result import MatchResult
from ..weights.matching import weight_matching
from .models import Source, opened
from .running_mean import leave


@runtime_checkable
class Workers(Protocol):
    """What calls functions elsewhere, `count` at once."""

    @property
    def count(self) -> int: ...

    def call(self, function: Callable[[Any, Any], Any], common: Any, each: Sequence[Any]) -> Sequence[Any]:
        """[function(common, one) for one in each]; all is pickled. What a worker that ended had to do is done again."""
        ...


@dataclass(frozen=True, eq=False)
class Round:
    """What all models of a round have in common.

    Attributes:
        mean: name -> the running mean of all models; never written to.
        keys: the name in the spec of every tensor that it permutes -> the name in the states.
        options: of weight matching.
        threads: of torch, as where the round was made: sums depend on it.
    """

    spec: PermutationSpec
    mean: Mapping[str, np.ndarray]
    keys: Mapping[str, str]
    options: Mapping[str, Any]
    threads: int


@dataclass(frozen=True, eq=False)
class Turn:
    """A model of a round: where it is `before`, its share of what the others weigh, and how its matching starts."""

    source: Source
    before: Permutation
    share: float
    start: str | None
    seed: int


@dataclass(frozen=True, eq=False)
class Found:
    """What a worker sends back of a `MatchResult`."""

    permutation: Permutation
    converged: bool
    objective: float


def match_one(common: Round, turn: Turn) -> Found:
    """Match a model to the mean of the others. A worker's part: it may be in another process, on another machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(common.threads)
    try:
        state = opened(turn.source)
        mean = {name: torch.from_numpy(values.copy()) for name, values in common.mean.items()}
        leave(mean, state, common.keys, turn.before, turn.share)
        options = {**common.options, "seed": turn.seed}
        found = matched(common.spec, mean, state, turn.before, turn.start, options)
        return Found(found.permutation, found.converged, found.objective)
    finally:
        torch.set_num_threads(threads)


def matched(
    spec: PermutationSpec,
    mean: State,
    state: State,
    before: Permutation | None,
    start: str | None,
    options: Mapping[str, Any],
) -> MatchResult:
    """Match a model to the mean from `start`, unless that is for the worse, or from where it is `before`.

    By the paper's objective: what falls is the distance from the mean.
    """
    options = {**options, "normalize": "paper"}
    if start is not None:
        found = weight_matching(spec, mean, state, init=start, **options)  # pyright: ignore[reportArgumentType]
        if before is None or found.objective > found.initial_objective:
            return found
    assert before is not None
    return weight_matching(spec, mean, state, init=before, **options)


def gain(
    mean: State, state: State, keys: Mapping[str, str], before: Permutation, after: Permutation
) -> float:
    """By how much a move brings a model nearer to the mean of the others: <mean, after> - <mean, before>, float64."""
    spec, total = before.spec, 0.0
    for name, key in keys.items():
        if name in spec.buffers:
            continue
        own, there = state[key].detach().cpu(), mean[name].double()
        change = after.apply_to(name, own).double() - before.apply_to(name, own).double()
        total += float((there * change).sum())
    return total
