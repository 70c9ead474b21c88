"""Where the descent starts: nowhere, at random, at a given permutation, or at a first guess from input to
output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Literal

import numpy as np

from ...errors import SpecMismatchError
from ...spec import Group, Permutation, displaced
from ...types import Progress, tell
from ..schedule import sharing
from .costs import WeightCosts
from .nearness import arrangement

Init = Literal["identity", "forward", "random"] | Permutation


EVERY = 1.0
"""Seconds between two calls of the progress callback within a sweep."""


class Visits:
    """Tells about once a second which group a long sweep has come to, and the seconds left to its end."""

    def __init__(self, groups: int, progress: Progress | None) -> None:
        self.groups, self.progress = groups, progress

    def begin(self, sweep: str) -> None:
        self.sweep, self.count, self.moved = sweep, 0, 0
        self.began = self.told = perf_counter()

    def done(self, moved: int) -> None:
        """A group was visited, and so many of its neurons have changed places."""
        self.count += 1
        self.moved += moved
        now = perf_counter()
        if now - self.told > EVERY:
            self.told = now
            left = (now - self.began) / self.count * (self.groups - self.count)
            stage, seconds = f"weight matching, {self.sweep}, group", now - self.began
            tell(self.progress, stage, self.count, self.groups, moved=self.moved, seconds=seconds, left=left)


def start(costs: WeightCosts, init: Init, seed: int, restart: int, visits: Visits) -> None:
    """Bring the costs' pair to its start.

    Raises:
        SpecMismatchError: a given permutation belongs to another spec, or its own does not allow it.
    """
    pair, spec = costs.pair, costs.pair.spec
    if isinstance(init, Permutation):
        if init.spec != spec:
            raise SpecMismatchError(
                "The initial permutation was made for another architecture than the spec's."
            )
        if not spec.contains(init):
            raise SpecMismatchError(
                "The initial permutation is illegal: it breaks a block structure of its spec."
            )
        pair.set(init)
    elif init == "identity":
        pair.set(spec.identity())
    elif init == "random":
        drawn = np.random.SeedSequence([seed, restart]).generate_state(1)[0]
        pair.set(spec.random(int(drawn) if restart else seed))
    else:
        pair.set(spec.identity())
        visits.begin("first guess")
        forward(costs, visits.done)


def forward(costs: WeightCosts, done: Callable[[int], None] = lambda moved: None) -> None:
    """Match group by group from the input to the output, each by what is settled already.

    A site tells something as soon as all other axes of its parameter are matched, or do not move at all.
    That is how layer after layer of B can be written in the order of A: first the neurons that read the
    input, which nothing permutes, then those that read these. The weights that read the group's own output
    are not settled yet and stay out. The next group is always the one of whose weights the largest share is
    settled.
    """
    pair, spec = costs.pair, costs.pair.spec
    matched: set[str] = set()
    near = sharing(spec)

    def settled(parameter: str, axis: int) -> bool:
        axes = spec.axes[parameter]
        return all(cell in matched for other, sites in axes.items() if other != axis for cell, _ in sites)

    def share(group: Group) -> float:
        known = total = 0
        for cell in group.cells:
            for site in cell.sites:
                shape = spec.shapes[site.parameter]
                if len(shape) > 1 and site.parameter not in spec.buffers:  # nobody is matched by a bias alone
                    weights = math.prod(shape) // shape[site.axis] * len(site.positions)
                    total += weights
                    known += weights * settled(site.parameter, site.axis)
        return known / total if total else 0.0

    waiting = {number: share(group) for number, group in enumerate(spec.groups)}
    while waiting:
        number = max(waiting, key=lambda g: (waiting[g], -g))
        group = spec.groups[number]
        choose = settled if waiting.pop(number) else None
        found = arrangement(WeightCosts(pair, costs.accelerator, choose), group)
        moved = displaced(found.values())
        if moved:
            pair.move(group, found)
        matched |= {cell.name for cell in group.cells}
        waiting |= {g: share(spec.groups[g]) for g in near[number] if g in waiting}
        done(moved)
