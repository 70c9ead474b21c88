"""Descent on the loss at the midpoint, one group at a time, each step verified.

The straight-through estimator moves many groups at once on the word of a gradient, which holds only nearby; its
losses jump. Here a step is small and is looked at before it is made. With g the gradient of the midpoint's loss by
its weights, a group's candidate is the projection of a gradient step from where B is now,

    the arrangement that maximises <pi(B) - rate g, pi'(B)>, all other groups being held fixed,

and it is taken if the loss gets lower. Every group has a rate of its own, which grows with success and shrinks
with failure, so that it finds out itself how far a gradient can be trusted. This is not part of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from torch import Tensor

from ...merging.interpolate import interpolate_tensor
from ...spec import Group, Permutation, PermutationSpec
from ..weights.costs import WeightCosts
from ..weights.endpoints import Pair
from ..weights.matching import improve
from .midpoint import Ends

GROW, SHRINK = 1.25, 0.5
DOUBLINGS = 8
"""If a gradient step is too short to move any neuron, it is made twice as long, so many times."""
LONGEST = 1e4
ENOUGH = 1e-6
"""A loss must fall by this share to be called lower."""
FRUITLESS = 3
"""So many passes in a row that change nothing end the search."""


@dataclass(frozen=True)
class Pass:
    """One pass over the groups: the permutation after it, the loss on its batches before and after, and how many
    groups' candidates were tried and taken; seconds by part: gradient, projection and scoring.
    """

    permutation: Permutation
    before: float
    after: float
    tried: int
    taken: int
    moved: int
    seconds: Mapping[str, float]


def descend(
    ends: Ends, permutation: Permutation, batches: Iterator[Sequence[Any]], passes: int, seed: int
) -> Iterator[Pass]:
    """Up to `passes` passes over the groups, in a random order each, from `permutation` on.

    A pass takes its gradient and its verdicts from one item of `batches`, a list of batches.
    """
    rng = np.random.default_rng(seed)
    parts = [_Part(ends, group) for group in permutation.spec]
    fruitless = 0
    for _ in range(passes):
        chosen = next(batches)
        index = {name: places.copy() for name, places in permutation.index.items()}
        aligned = {name: permutation.apply_to(name, ends.b[name]) for name in ends.moved}
        midpoint = ends.midpoint(permutation)
        began = perf_counter()
        before, slope = ends.gradient(midpoint, chosen)
        seconds = {"gradient": perf_counter() - began, "projection": 0.0, "scoring": 0.0}
        now, tried, taken = before, 0, 0
        for number in rng.permutation(len(parts)):
            began = perf_counter()
            part = parts[number]
            moves = part.candidate(aligned, slope)
            seconds["projection"] += perf_counter() - began
            if moves is None:
                continue
            began = perf_counter()
            changed = {name: moves.apply_to(name, aligned[name]) for name in part.names}
            halfway = {name: interpolate_tensor(name, ends.a[name], b, 0.5) for name, b in changed.items()}
            loss = ends.evaluate({**midpoint, **halfway}, chosen)
            seconds["scoring"] += perf_counter() - began
            tried += 1
            lower = loss < now - ENOUGH * abs(now)
            part.rate = min(part.rate * (GROW if lower else SHRINK), LONGEST)
            if lower:
                now, taken = loss, taken + 1
                aligned.update(changed)
                midpoint.update(halfway)
                for cell, relative in moves.index.items():
                    index[cell] = index[cell][relative]
        after = Permutation(permutation.spec, index)
        moved = sum(int(np.count_nonzero(index[name] != old)) for name, old in permutation.index.items())
        permutation = after
        yield Pass(after, before, now, tried, taken, moved, seconds)
        fruitless = 0 if taken else fruitless + 1
        if fruitless == FRUITLESS:
            return


class _Part:
    """One group with the tensors that it moves, and the length of its gradient steps in units of their norm."""

    def __init__(self, ends: Ends, group: Group) -> None:
        whole = ends.spec
        self.group = group
        self.spec = PermutationSpec((group,), whole.shapes, whole.buffers, whole.aliases)
        self.names = [name for name in ends.moved if whole.aliases.get(name, name) in self.spec.axes]
        self.rate = 1.0

    def candidate(self, aligned: dict[str, Tensor], slope: dict[str, Tensor]) -> Permutation | None:
        """How the group's neurons would move from where they are now; None if no step within reach moves any."""
        b = {name: aligned[name] for name in self.names}
        free = [name for name in self.names if name in slope]
        size, steepness = _norm([b[name] for name in free]), _norm([slope[name] for name in free])
        if not size > 0 or not 0 < steepness < math.inf:
            return None
        rate = self.rate
        for _ in range(DOUBLINGS):
            length = rate * size / steepness
            pair = Pair(self.spec, {**b, **{name: b[name] - length * slope[name] for name in free}}, b)
            if improve(WeightCosts(pair), self.group).moved:
                self.rate = rate
                return pair.permutation
            rate = min(2 * rate, LONGEST)
        return None


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
