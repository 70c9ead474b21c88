"""A proof that every neuron belongs where its nearest neighbour is, for a few percent of what a cost matrix costs.

Fine-tunes of one base differ so little that no neuron has to move, and to find that out takes no cost matrix; nor
does a permuted copy of one. With a_i and b_j the weights of neurons i of A and j of pi(B) at all sites of a cell,

    sum_i <a_i, b_p(i)>  =  (|A|^2 + |B|^2 - sum_i |a_i - b_p(i)|^2) / 2,

so nothing beats p if every a_i has b_p(i) for its nearest neighbour. Distances can only shrink when coordinates are
left out, so

    |a_i - b_j|^2  >=  |S (a_i - b_j)|^2  >  |a_i - b_p(i)|^2        for all j != p(i),

with S some of the coordinates, proves it. The right side costs one pass over the weights, the middle a product of rank
|S|. Where p comes from does not matter: it is the identity if that looks right, else what a few coordinates say. Where
the proof fails nothing is known, and the cost matrix decides. What is best for every cell by itself is best for the
group, whatever its structure, if that allows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ...spec import Group, admits, displaced
from ..assignment.blocks import assign
from .costs import WeightCosts
from .endpoints import CHUNK, Endpoints, touched

WORTH = 1e8
"""Groups whose cost matrices take fewer multiplications and additions are computed at once."""

SHARE = 32
"""One in so many coordinates is in S,"""

FEWEST = 64
"""but at least so many."""

MARGIN = 1.5
"""So many times as many coordinates as seem to be lacking are taken in a second try,"""

MOST = 4
"""unless that would be more than one in so many: then the cost matrix is computed."""

SAMPLE = 32
"""So many neurons are looked at before anything else is,"""

COLUMNS = 16
"""each by so many neighbouring coordinates of one tensor, and by so many others."""

PLAUSIBLE = 0.9
"""For so many of the sampled neurons two sets of coordinates must agree on the nearest, or the pair is not near."""

ROWS = 1024
"""Rows of distances that are held at a time."""

MATRIX = 0.5
"""With more chosen coordinates than so many for each neuron the matrix of distances is held, and not they."""

ROUNDING = 1e-3
"""No squared distance is wrong by this share: sums of 10^5 squares in float32."""


def arrangement(costs: WeightCosts, group: Group) -> Mapping[str, np.ndarray]:
    """The best legal arrangement of `group` by these costs, cell name -> int64 [size]: by proof, else by assignment."""
    proved = nearest(costs, group)
    return assign(group, costs).index if proved is None else proved


def nearest(costs: WeightCosts, group: Group) -> dict[str, np.ndarray] | None:
    """An arrangement, cell name -> int64 [size], that is proved to be the best legal one of `group` by these costs; or
    None.
    """
    work = sum(2.0 * costs.coordinates(cell.name) * cell.size**2 for cell in group.cells)
    if work < WORTH:
        return None
    unlike = {} if costs.accelerator is None else costs.accelerator.unlike
    key = group.cells[0].name  # groups may share a name, cells don't
    if key in unlike and not _others_moved(costs.pair, group, unlike[key]):
        return None
    found: dict[str, np.ndarray] = {}
    for cell in group.cells:
        guess = _guess(costs, cell.name)
        if guess is None:
            unlike[key] = dict(costs.pair.index)  # indices are replaced, never written to (endpoints.py)
            return None
        found[cell.name] = guess
    if displaced(found.values()) and not admits(group, found):
        return None
    return found if all(_proved(costs, name, index) for name, index in found.items()) else None


def _others_moved(pair: Endpoints, group: Group, then: Mapping[str, np.ndarray]) -> bool:
    """Whether most of the neurons that share tensors with `group` have moved since `then`: before, another look at it
    would tell the same.
    """
    axes = [pair.spec.axes[parameter] for parameter in touched(group, pair.spec)]
    met = {cell for sites in axes for on_axis in sites.values() for cell, _ in on_axis}
    met -= {cell.name for cell in group.cells}
    moved = [int(np.count_nonzero(pair.index[c] != then[c])) for c in met if pair.index[c] is not then[c]]
    return 2 * sum(moved) > sum(pair.index[cell].size for cell in met)


def _guess(costs: WeightCosts, cell: str) -> np.ndarray | None:
    """Where the neurons seem to belong, [n], by a few coordinates of one tensor, unless the networks are unlike.

    Networks trained apart are told by a few neurons: two sets of coordinates do not agree on which is the nearest.
    """
    n = costs.pair.index[cell].size
    for _, a, b in costs.slices(cell, widest=True):
        columns, x, y = _sample(a, b, costs.dtype)
        in_place = _in_place(x, y)
        if in_place is None:
            return None
        if in_place < 1:
            pieces = a.split(ROWS)
            index = torch.cat([_nearest(p.index_select(1, columns).to(costs.dtype), y) for p in pieces])
            index = index.cpu().numpy()
            if np.array_equal(np.sort(index), np.arange(n)):
                return index
            if in_place < PLAUSIBLE:
                return None
    return np.arange(n)


def in_place(a: Tensor, b: Tensor) -> bool:
    """Whether neurons with weights `a` and `b` [n, m] seem to be in the same order, by a few of both."""
    share = _in_place(*_sample(a, b, torch.float32)[1:])
    return share is not None and share >= PLAUSIBLE


def _sample(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Some columns, and these of some rows of `a` and of all rows of `b`."""
    m = a.shape[1]
    # Neighbours lie in the same lines of the cache, and away from the ends, where images have their empty borders.
    runs = (
        [range(k * m // 3, min(m, k * m // 3 + COLUMNS)) for k in (1, 2)] if m > 4 * COLUMNS else [range(m)]
    )
    columns = torch.tensor([c for run in runs for c in run], device=a.device)
    rows = torch.arange(0, len(a), max(1, len(a) // SAMPLE), device=a.device)
    return columns, a[rows[:, None], columns].to(dtype), b.index_select(1, columns).to(dtype)


def _in_place(x: Tensor, y: Tensor) -> float | None:
    """For which share of the rows that were sampled their own is the nearest; None if two halves of the columns do not
    agree on what is.
    """
    half = x.shape[1] // 2
    first, second = _nearest(x[:, :half], y[:, :half]), _nearest(x[:, half:], y[:, half:])
    if float((first == second).float().mean()) < PLAUSIBLE:
        return None
    rows = torch.arange(0, len(y), max(1, len(y) // SAMPLE), device=first.device)
    return float((first == rows).float().mean())


def _nearest(x: Tensor, y: Tensor) -> Tensor:
    """For each row of `x` the number of the nearest row of `y`."""
    distances = torch.addmm(y.square().sum(dim=1), x, y.T, alpha=-2)
    if distances.device.type == "cpu":  # there numpy is ten times as fast as torch
        return torch.from_numpy(distances.numpy().argmin(axis=1))
    return distances.argmin(dim=1)


def _proved(costs: WeightCosts, cell: str, index: np.ndarray) -> bool:
    """With few coordinates, and where these nearly do, with as many more as they seem to lack."""
    total = costs.coordinates(cell)
    if not total:
        return True
    order = torch.from_numpy(index).to(costs.pair.device) if displaced([index]) else slice(None)
    own = torch.zeros(index.size, dtype=costs.dtype, device=costs.pair.device)
    few = max(FEWEST, total // SHARE)
    lacking = _lacking(own, _chosen(costs, cell, few, order, own), few)
    if lacking <= 1:
        return True
    more = int(MARGIN * lacking * few) if lacking < SHARE else total
    return more <= total // MOST and _lacking(own, _chosen(costs, cell, more, order), more) <= 1


def _chosen(
    costs: WeightCosts, cell: str, count: int, order: Tensor | slice, own: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """About `count` of the coordinates, A's and, in this order, pi(B)'s, [n, some] of one site after the other; adds
    |a_i - b_i|^2 over all of them to `own`.
    """
    step = max(1, costs.coordinates(cell) // count)
    for weight, a, b in costs.slices(cell):
        if own is not None:
            own += weight * _squared_distances(a, b[order], costs.dtype)
        yield a[:, ::step].to(costs.dtype) * weight**0.5, b[:, ::step][order].to(costs.dtype) * weight**0.5


def _lacking(own: Tensor, chosen: Iterator[tuple[Tensor, Tensor]], count: int) -> float:
    """By which factor the distances to the nearest other neuron are too small for a proof; up to 1: it is proved.

    What is held is the smaller: all chosen coordinates, or (a stream meets every tensor) the matrix of distances.
    """
    n = len(own)
    whole = count > MATRIX * n
    pieces = chosen if whole else iter([_together(chosen)])
    products: Tensor | None = None
    xx, yy, columns = torch.zeros_like(own), torch.zeros_like(own), 0
    for x, y in pieces:
        xx += x.square().sum(dim=1)
        yy += y.square().sum(dim=1)
        columns += x.shape[1]
        if whole:
            products = own.new_zeros(n, n) if products is None else products
            products.addmm_(x, y.T)
    # The most by which rounding can enlarge xx + yy - 2 x y: a bound for any order of summation.
    slack = 4 * (columns + 4) * torch.finfo(own.dtype).eps * float(xx.max() + yy.max())
    limit = own * (1 + ROUNDING) + slack
    worst = 0.0
    for first in range(0, n, ROWS):
        rows = slice(first, min(first + ROWS, n))
        product = products[rows] if products is not None else x[rows] @ y.T
        distances = product.mul_(-2).add_(yy).add_(xx[rows, None])
        distances.diagonal(first).fill_(torch.inf)
        worst = max(worst, float((limit[rows] / distances.amin(dim=1).clamp_min_(0)).max()))
    return worst


def _together(chosen: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = zip(*chosen, strict=True)
    return torch.cat(x, dim=1), torch.cat(y, dim=1)


def _squared_distances(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """|a_i - b_i|^2 for every row, [n], some rows at a time."""
    rows = max(1, CHUNK // a.shape[1])
    pieces = zip(a.split(rows), b.split(rows), strict=True)
    return torch.cat([(x.to(dtype) - y.to(dtype)).square_().sum(dim=1) for x, y in pieces])
