"""Products of A's and B's slices, kept from one update of a group to the next: the work follows what changed.

A site contributes A @ pi(B)^T to its cell's costs. When the group is looked at again, most of that still holds:

- B's own neurons have changed places: the columns change places.
- Neurons M of a neighbour, on another axis of the tensor, have: only these slices of the sums differ, and

      A @ new^T  =  A @ old^T  +  A[:, M] @ (new[:, M] - old[:, M])^T,

  a product of rank |M|. What stood at the places M before stands elsewhere now, so old tensors are not needed.
- Nothing that the product depends on has: it is taken as it is. That is so for layers that read the input.

An update adds the rounding of a product of rank |M| of differences, each at most twice as large as their terms.
As soon as the updates together are of full rank, the product is computed afresh, so its error stays within a
small multiple of the fresh product's own. Gains are measured on the weights in any case (pair.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..spec import Group, Indices, Leaf, Site, to_array
from .assignment import independent, leaves
from .pair import Pair
from .schedule import axes_met

BUDGET = 1 << 28
"""Bytes that kept products may take."""

WORTH = 32
"""Products of fewer terms are computed as fast as they are brought up to date."""

Compute = Callable[[Tensor, Tensor, Tensor, float], None]
"""(total, A's tensor, B's tensor, weight): adds weight * their product to total [count, k, k]."""


@dataclass
class _Kept:
    """A product [count, k, k], and by which indices of the cells that it depends on."""

    product: Tensor
    neurons: Indices
    index: dict[str, np.ndarray]
    drift: int = 0


class Products:
    """The products of a pair, those kept that save the most work for their memory.

    Which ones is settled from the shapes alone, so neither threads nor the order of updates change a result.
    """

    def __init__(self, pair: Pair, budget: int = BUDGET) -> None:
        self.pair = pair
        # Filled by costs.py; both by the neurons' numbers in B, and small.
        self.squares: dict[tuple[str, str, int], Tensor] = {}
        self.prices: dict[tuple[str, int], Tensor] = {}
        self._kept: dict[tuple[str, str, int, int], _Kept] = {}
        wanted = sorted(
            (_terms(pair, parameter, axis), number, cell, parameter, axis)
            for number, (cell, parameter, axis) in enumerate(
                (c.name, p, a) for g in pair.spec for c in g.cells for p, a in _sites(pair, g, c.sites)
            )
        )
        size = torch.empty((), dtype=pair.dtype).element_size()
        needed = {c.name: size * _entries(g, n) for g in pair.spec for n, c in enumerate(g.cells)}
        self._chosen: set[tuple[str, str, int]] = set()
        for terms, _, cell, parameter, axis in reversed(wanted):
            if terms >= WORTH and needed[cell] <= budget:
                budget -= needed[cell]
                self._chosen.add((cell, parameter, axis))

    def add(
        self,
        total: Tensor,
        cell: str,
        parameter: str,
        axis: int,
        neurons: Indices,
        compute: Compute,
    ) -> None:
        """total [count, k, k] += weight * the product at the sites of `cell` on `axis` of `parameter`.

        `compute` must take tensors that lack slices of other axes, too.
        """
        pair = self.pair
        a, b, weight = pair.a(parameter), pair.b(parameter), pair.weight[parameter]
        if (cell, parameter, axis) not in self._chosen:
            compute(total, a, b, weight)
            return
        index = {c: pair.index[c] for sites in pair.spec.axes[parameter].values() for c, _ in sites}
        key = (cell, parameter, axis, int(neurons[0]))
        kept = self._kept.get(key)
        if kept is None or not self._update(kept, cell, parameter, axis, neurons, index, compute):
            kept = _Kept(torch.zeros_like(total), neurons, {})
            compute(kept.product, a, b, 1.0)
        # Indices are replaced, never written to (pair.py), so that they need no copies.
        kept.index = index
        self._kept[key] = kept
        total.add_(kept.product, alpha=weight)

    def _update(
        self,
        kept: _Kept,
        cell: str,
        parameter: str,
        axis: int,
        neurons: Indices,
        index: dict[str, np.ndarray],
        compute: Compute,
    ) -> bool:
        """Bring a product up to date, or say that it is as well computed afresh."""
        if not np.array_equal(to_array(neurons), to_array(kept.neurons)):
            return False
        changed = _changed(self.pair, parameter, axis, kept.index, index)
        if len(changed) > 1:
            return False
        for other, (now, _) in changed.items():
            kept.drift += len(now)
            size = self.pair.spec.shapes[parameter][other]
            if 2 * len(now) > size or kept.drift > size:
                return False
        kept.product = _in_order(kept, cell, index)
        for other, (now, before) in changed.items():
            a, b = self.pair.a(parameter), self.pair.b(parameter)
            places, sources = (torch.from_numpy(p).to(b.device) for p in (now, before))
            difference = b.index_select(other, places).to(self.pair.dtype)
            difference -= b.index_select(other, sources).to(self.pair.dtype)
            compute(kept.product, a.index_select(other, places), difference, 1.0)
        return True


def _changed(
    pair: Pair, parameter: str, axis: int, then: dict[str, np.ndarray], index: dict[str, np.ndarray]
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


def _in_order(kept: _Kept, cell: str, index: dict[str, np.ndarray]) -> Tensor:
    """The product with the columns of each block where their neurons are now."""
    neurons, then, now = to_array(kept.neurons), kept.index[cell], index[cell]
    product = kept.product
    if now is then or np.array_equal(now[neurons], then[neurons]):
        return product
    count, k, _ = product.shape
    where = np.empty_like(then)
    where[then[neurons]] = np.arange(neurons.size)
    columns = torch.from_numpy(where[now[neurons]] % k).to(product.device)
    if count == 1:
        return product[0].index_select(1, columns)[None]
    return product.gather(2, columns.reshape(count, 1, k).expand_as(product))


def _sites(pair: Pair, group: Group, sites: Sequence[Site]) -> list[tuple[str, int]]:
    """The (parameter, axis) at which these sites count; none if the group meets a tensor on two axes."""
    if any(len(axes) > 1 for axes in axes_met(group).values()):
        return []
    return list(dict.fromkeys((s.parameter, s.axis) for s in sites if s.parameter not in pair.spec.buffers))


def _terms(pair: Pair, parameter: str, axis: int) -> int:
    shape = pair.spec.shapes[parameter]
    return int(np.prod(shape)) // shape[axis]


def _entries(group: Group, cell: int) -> int:
    """How many entries a cell's products have: the blocks that `assign` asks for."""
    sizes = [
        sum(
            len(leaf.neurons)
            for leaf in ([unit] if isinstance(unit, Leaf) else leaves(unit))
            if leaf.cell == cell
        )
        for unit in independent(group.tree)
    ]
    return sum(size * size for size in sizes)
