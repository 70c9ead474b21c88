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
from typing import Any

import numpy as np
from torch import Tensor

from ...merging.interpolate import interpolate_tensor
from ...spec import Group, Permutation, PermutationSpec
from ..descent import coordinate_descent
from ..result import moved_between
from ..weights.costs import WeightCosts
from ..weights.endpoints import Endpoints
from ..weights.matching import improve
from .best_seen import timed
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
    """One pass over the groups: the permutation after it, the loss on its batches before and after, how many groups'
    candidates were tried and taken, and seconds by part: gradient, projection and scoring.

    For the next one there are the groups' `rates` and how many passes in a row changed nothing, `fruitless`.
    """

    number: int
    permutation: Permutation
    before: float
    after: float
    tried: int
    taken: int
    moved: int
    seconds: Mapping[str, float]
    rates: tuple[float, ...]
    fruitless: int


def descend(
    ends: Ends,
    permutation: Permutation,
    batches: Iterator[Sequence[Any]],
    passes: int,
    seed: int,
    last: Pass | None = None,
) -> Iterator[Pass]:
    """Up to `passes` passes over the groups, in a random order each, from `permutation` on, or from the `last` pass of
    an interrupted descent.

    A pass takes its gradient and its verdicts from one item of `batches`, a list of batches.
    """
    descent = _Descent(ends, permutation, batches, seed)
    first, fruitless = 1, 0
    if last is not None:
        descent.restore(last)
        first, fruitless = last.number + 1, last.fruitless
    groups = range(len(ends.spec))
    dirty = set(groups) if fruitless < FRUITLESS else set[int]()
    # No group is looked at twice in a pass, and all are in the next one, which has other batches.
    alone = [()] * len(groups)
    for number in coordinate_descent(descent.improve, alone, descent.begin, dirty, passes, first=first):
        fruitless = 0 if descent.taken else fruitless + 1
        yield descent.made(number, fruitless)
        if fruitless < FRUITLESS:
            dirty.update(groups)


class _Descent:
    """A pass under way: pi(B), the midpoint and its loss as they are by now, and the gradient at its beginning."""

    def __init__(
        self, ends: Ends, permutation: Permutation, batches: Iterator[Sequence[Any]], seed: int
    ) -> None:
        self.ends, self.batches = ends, batches
        self.permutation = permutation
        self.parts = [_Part(ends, group) for group in ends.spec]
        self.rng = np.random.default_rng(seed)

    def restore(self, last: Pass) -> None:
        self.permutation = last.permutation
        for part, rate in zip(self.parts, last.rates, strict=True):
            part.rate = rate
        for _ in range(last.number):
            self.rng.permutation(len(self.parts))

    def begin(self, number: int) -> list[int]:
        """Take the gradient; the order of the groups."""
        ends, old = self.ends, self.permutation
        self.chosen = next(self.batches)
        self.index = {name: places.copy() for name, places in old.index.items()}
        self.aligned = {name: old.apply_to(name, ends.b[name]) for name in ends.moved}
        self.midpoint = ends.midpoint(old)
        self.seconds = {"gradient": 0.0, "projection": 0.0, "scoring": 0.0}
        with timed(self.seconds, "gradient"):
            self.before, self.slope = ends.gradient(self.midpoint, self.chosen)
        self.loss, self.tried, self.taken = self.before, 0, 0
        return self.rng.permutation(len(self.parts)).tolist()

    def improve(self, number: int) -> bool:
        """Make the group's step if it lowers the loss."""
        part = self.parts[number]
        with timed(self.seconds, "projection"):
            moves = part.candidate(self.aligned, self.slope)
        if moves is None:
            return False
        with timed(self.seconds, "scoring"):
            a = self.ends.a
            changed = {name: moves.apply_to(name, self.aligned[name]) for name in part.names}
            halfway = {name: interpolate_tensor(name, a[name], b, 0.5) for name, b in changed.items()}
            loss = self.ends.evaluate({**self.midpoint, **halfway}, self.chosen)
        self.tried += 1
        lower = loss < self.loss - ENOUGH * abs(self.loss)
        part.rate = min(part.rate * (GROW if lower else SHRINK), LONGEST)
        if lower:
            self.loss, self.taken = loss, self.taken + 1
            self.aligned.update(changed)
            self.midpoint.update(halfway)
            self.index |= {cell: self.index[cell][relative] for cell, relative in moves.index.items()}
        return lower

    def made(self, number: int, fruitless: int) -> Pass:
        """The pass that is over."""
        old, self.permutation = self.permutation, Permutation.trusted(self.ends.spec, self.index)
        return Pass(
            number,
            self.permutation,
            self.before,
            self.loss,
            self.tried,
            self.taken,
            moved_between(old, self.permutation),
            self.seconds,
            tuple(part.rate for part in self.parts),
            fruitless,
        )


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
            pair = Endpoints(self.spec, {**b, **{name: b[name] - length * slope[name] for name in free}}, b)
            if improve(WeightCosts(pair), self.group).moved:
                self.rate = rate
                return pair.permutation
            rate = min(2 * rate, LONGEST)
        return None


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
