"""Where the descent starts: nowhere, at random, at a given permutation, or at a first guess from input to
output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from ...errors import ConfigError, SpecMismatchError
from ...spec import Group, Permutation, displaced
from ..assignment.blocks import assign
from ..schedule import sharing
from .costs import WeightCosts
from .endpoints import Pair
from .nearness import nearest

Init = Literal["identity", "forward", "random"] | Permutation


Visit = Callable[[str, int, int], None]
"""Called after each group with what is being done, how many groups are done, and how many neurons these moved."""


def start(pair: Pair, init: Init, seed: int, restart: int, visit: Visit) -> None:
    """Bring `pair` to its start.

    Raises:
        ConfigError: `init` is no start.
        SpecMismatchError: a given permutation belongs to another spec, or its own does not allow it.
    """
    spec = pair.spec
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
    elif init == "forward":
        pair.set(spec.identity())
        forward(pair, visit)
    else:
        raise ConfigError(
            f"The init {init!r} is unknown: give 'identity', 'forward', 'random' or a permutation."
        )


def forward(pair: Pair, visit: Visit = lambda *_: None) -> None:
    """Match group by group from the input to the output, each by what is settled already.

    A site tells something as soon as all other axes of its parameter are matched, or do not move at all.
    That is how layer after layer of B can be written in the order of A: first the neurons that read the
    input, which nothing permutes, then those that read these. The weights that read the group's own output
    are not settled yet and stay out. The next group is always the one of whose weights the largest share is
    settled.
    """
    spec = pair.spec
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
    moved = 0
    while waiting:
        number = max(waiting, key=lambda g: (waiting[g], -g))
        group = spec.groups[number]
        costs = WeightCosts(pair, settled if waiting.pop(number) else None)
        found = nearest(costs, group)
        if found is None:
            found = assign(group, costs).index
        if leave := displaced(found.values()):
            pair.move(group, found)
            moved += leave
        matched |= {cell.name for cell in group.cells}
        waiting |= {g: share(spec.groups[g]) for g in near[number] if g in waiting}
        visit("first guess", len(spec) - len(waiting), moved)
