"""Products of A's and B's slices, kept from one update of a group to the next: the work follows what changed.

The costs of a cell are a sum over its sites, each A @ pi(B)^T. When the group is looked at again, most of it still
holds:

- B's own neurons have changed places: so do the columns, those that moved.
- Neurons M of a neighbour, on another axis of a site's tensor, have: only these slices of the sums differ, and

      A @ new^T  =  A @ old^T  +  A[:, M] @ (new[:, M] - old[:, M])^T,

  a product of rank |M|. What stood at the places M before stands elsewhere now, so old tensors are not needed.
- Nothing that a site depends on has: its part is left as it is. That is so for layers that read the input, for biases
  and for norm affines.

So a cell costs one matrix, however many sites it has. An update adds the rounding of a product of rank |M| of
differences, each at most twice as large as their terms. As soon as the updates of a site together are DRIFT times of
full rank, the sum is computed afresh, so its error stays within a small multiple of a fresh one's. Gains are measured
on the weights in any case (endpoints.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...spec import Group, Indices, Site, to_array
from ..assignment.blocks import independent, leaves
from ..schedule import axes_met
from .endpoints import Endpoints

BUDGET = 1 << 28
"""Bytes that kept sums may take."""

WORTH = 32
"""Sums of fewer terms are computed as fast as they are brought up to date."""

DRIFT = 4
"""So many times of full rank may the updates of a site be before its cell's sum is computed afresh."""

GATHERING = 1.25
"""An update takes so many times as long as a fresh product of that rank: the differences have to be put together."""

Where = tuple[str, int]
"""A site's parameter and axis."""

Compute = Callable[[Tensor, Where, Tensor, Tensor], None]
"""(sum, site, A's tensor, B's): adds weight * their product to sum [count, k, k]."""


@dataclass
class _Kept:
    """A sum [count, k, k] for the neurons at `places`.

    It is as all indices were at last; `drift` has the sites that it holds, and the rank of their updates.
    """

    sum: Tensor
    places: np.ndarray
    index: dict[str, np.ndarray] = field(default_factory=dict)
    drift: dict[Where, int] = field(default_factory=dict)


class Products:
    """The cost matrices of a pair without what is cheap, those kept that save the most work for their memory.

    Which ones is settled from the shapes alone, so neither threads nor the order of updates change a result: the cells
    in `kept`.
    """

    def __init__(self, pair: Endpoints, budget: int = BUDGET) -> None:
        self.pair = pair
        self._kept: dict[tuple[str, int], _Kept] = {}
        wanted = sorted(
            (sum(_terms(pair, *where) for where in _sites(pair, group, cell.sites)), number, cell.name)
            for number, (group, cell) in enumerate((g, c) for g in pair.spec for c in g.cells)
        )
        size = torch.empty((), dtype=pair.dtype).element_size()
        needed = {c.name: size * _entries(g, n) for g in pair.spec for n, c in enumerate(g.cells)}
        self.kept: set[str] = set()
        for terms, _, cell in reversed(wanted):
            if terms >= WORTH and needed[cell] <= budget:
                budget -= needed[cell]
                self.kept.add(cell)

    def sum(
        self, cell: str, neurons: Indices, count: int, sites: Sequence[Where], compute: Compute
    ) -> Tensor:
        """The sum over `sites` of weight * product, [count, k, k]; not to be written to.

        `compute` must take tensors that lack slices of other axes, too.
        """
        pair, places = self.pair, to_array(neurons)
        key = (cell, int(places[0]))
        kept = self._kept.get(key)
        if kept is None or not self._update(kept, cell, places, sites, compute):
            k = len(places) // count
            zeros = torch.zeros(count, k, k, dtype=pair.dtype, device=pair.device)
            kept = self._kept[key] = _Kept(zeros, places)
        for where in sites:
            if where not in kept.drift:
                compute(kept.sum, where, pair.a(where[0]), pair.b(where[0]))
                kept.drift[where] = 0
        # Indices are replaced, never written to (endpoints.py), so that they need no copies.
        kept.index = dict(pair.index)
        return kept.sum

    def _update(
        self, kept: _Kept, cell: str, places: np.ndarray, sites: Sequence[Where], compute: Compute
    ) -> bool:
        """Bring a sum up to date, or say that it is as well computed afresh."""
        pair = self.pair
        if not set(kept.drift) <= set(sites) or not np.array_equal(places, kept.places):
            return False
        fresh = update = 0.0
        pieces = []
        for where in kept.drift:
            fresh += _terms(pair, *where)
            changed = _changed(pair, *where, kept.index, pair.index)
            if len(changed) > 1:
                return False
            for other, (now, before) in changed.items():
                size = pair.spec.shapes[where[0]][other]
                if kept.drift[where] + len(now) > DRIFT * size:
                    return False
                update += GATHERING * _terms(pair, *where) * len(now) / size
                pieces.append((where, other, now, before))
        if pieces and update >= fresh:
            return False
        columns = _order(places, pair.index[cell], kept.index[cell])
        if columns is not None:
            _rearrange(kept.sum, columns)
        for where, other, now, before in pieces:
            a, b = pair.a(where[0]), pair.b(where[0])
            here, there = (torch.from_numpy(p).to(b.device) for p in (now, before))
            difference = b.index_select(other, here).to(pair.dtype)
            difference -= b.index_select(other, there).to(pair.dtype)
            compute(kept.sum, where, a.index_select(other, here), difference)
            kept.drift[where] += len(now)
        return True


def _rearrange(blocks: Tensor, columns: np.ndarray) -> None:
    """Put the columns [count * k] of `blocks` [count, k, k] where they belong, each within its own block."""
    count, k, _ = blocks.shape
    moved = np.flatnonzero(columns != np.arange(columns.size))
    for block in range(count):
        here = moved[moved // k == block] if count > 1 else moved
        if here.size:
            to, by = (torch.from_numpy(c % k).to(blocks.device) for c in (here, columns[here]))
            blocks[block].index_copy_(1, to, blocks[block].index_select(1, by))


def _changed(
    pair: Endpoints, parameter: str, axis: int, then: dict[str, np.ndarray], index: dict[str, np.ndarray]
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """For each other axis on which neurons changed places since `then`: the positions that hold others now,
    and the positions where what they held is now.
    """
    found = {}
    for other, sites in pair.spec.axes[parameter].items():
        now, before = [], []
        for cell, site in sites if other != axis else ():
            if index[cell] is then[cell]:
                continue
            places = np.flatnonzero(index[cell] != then[cell])
            where = np.empty_like(index[cell])
            where[index[cell]] = np.arange(where.size)
            positions = to_array(site.positions)
            now.append(positions[places])
            before.append(positions[where[then[cell][places]]])
        if now and sum(map(len, now)):
            found[other] = np.concatenate(now), np.concatenate(before)
    return found


def _order(neurons: np.ndarray, wanted: np.ndarray, given: np.ndarray) -> np.ndarray | None:
    """Where the B's neurons that index `wanted` has at the places `neurons` are listed, if `given` has them there in
    another order; None if it is the same.
    """
    if wanted is given or np.array_equal(wanted[neurons], given[neurons]):
        return None
    where = np.empty_like(given)
    where[given[neurons]] = np.arange(neurons.size)
    return where[wanted[neurons]]


def _sites(pair: Endpoints, group: Group, sites: Sequence[Site]) -> list[tuple[str, int]]:
    """The (parameter, axis) at which these sites count; none if the group meets a tensor on two axes."""
    if any(len(axes) > 1 for axes in axes_met(group).values()):
        return []
    return list(dict.fromkeys((s.parameter, s.axis) for s in sites if s.parameter not in pair.spec.buffers))


def _terms(pair: Endpoints, parameter: str, axis: int) -> int:
    shape = pair.spec.shapes[parameter]
    return int(np.prod(shape)) // shape[axis]


def _entries(group: Group, cell: int) -> int:
    """How many entries a cell's products have: the blocks that `assign` asks for."""
    sizes = [
        sum(len(leaf.neurons) for leaf in leaves(unit) if leaf.cell == cell)
        for unit in independent(group.tree)
    ]
    return sum(size * size for size in sizes)
