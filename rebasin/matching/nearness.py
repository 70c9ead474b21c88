"""A proof that the neurons of a group stay where they are, for a few percent of what their cost matrix costs.

Fine-tunes of one base differ so little that no neuron has to move, and to find that out takes no cost matrix. With
a_i and b_j the weights of neurons i of A and j of pi(B) at all sites of a cell,

    sum_i <a_i, b_p(i)>  =  (|A|^2 + |B|^2 - sum_i |a_i - b_p(i)|^2) / 2,

so nothing beats staying (p = identity) if every a_i has b_i for its nearest neighbour. Distances can only shrink when
coordinates are left out, so

    |a_i - b_j|^2  >=  |S (a_i - b_j)|^2  >  |a_i - b_i|^2        for all i != j,

with S some of the coordinates, proves it. The right side costs one pass over the weights, the middle a product of rank
|S|. Where it fails nothing is known, and the cost matrix decides. What is best for every cell by itself is best for the
group, whatever its structure.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import Group
from .costs import WeightCosts
from .pair import CHUNK

WORTH = 1e9
"""Groups whose cost matrices take fewer multiplications and additions are computed at once."""

SHARE = 32
"""One in so many coordinates is in S,"""

FEWEST = 64
"""but at least so many."""

MARGIN = 1.5
"""So many times as many coordinates as seem to be lacking are taken in a second try,"""

MOST = 4
"""unless that would be more than one in so many: then the cost matrix is computed."""

SAMPLE = 64
"""Neurons, and coordinates of one tensor, that are looked at before anything else is."""

PLAUSIBLE = 0.9
"""Of the sampled neurons so many must have their own place's neuron nearest, or the pair is not near."""

ROWS = 1024
"""Rows of distances that are held at a time."""

ROUNDING = 1e-3
"""No squared distance is wrong by this share: sums of 10^5 squares in float32."""


def stays(costs: WeightCosts, group: Group) -> bool:
    """Whether it is proved that no legal arrangement of `group` beats the present one by these costs."""
    work = sum(2.0 * costs.coordinates(cell.name) * cell.size**2 for cell in group.cells)
    if work < WORTH:
        return False
    names = [cell.name for cell in group.cells]
    return all(_plausible(costs, name) for name in names) and all(_proved(costs, name) for name in names)


def _plausible(costs: WeightCosts, cell: str) -> bool:
    """A look at a few neurons and coordinates, which tells unlike networks apart from near ones at once."""
    for _, a, b in costs.slices(cell, widest=True):
        n, m = a.shape
        rows = torch.arange(0, n, max(1, n // SAMPLE), device=a.device)
        columns = slice(None, None, max(1, m // SAMPLE))
        x, y = a[rows][:, columns].to(costs.dtype), b[:, columns].to(costs.dtype)
        nearest = (y.square().sum(dim=1) - 2 * x @ y.T).argmin(dim=1)
        if float((nearest == rows).float().mean()) < PLAUSIBLE:
            return False
    return True


def _proved(costs: WeightCosts, cell: str) -> bool:
    """With few coordinates, and where these nearly do, with as many more as they seem to lack."""
    total = costs.coordinates(cell)
    if not total:
        return True
    own = torch.zeros(costs.pair.index[cell].size, dtype=costs.dtype, device=costs.pair.device)
    few = max(FEWEST, total // SHARE)
    lacking = _lacking(costs, own, *_chosen(costs, cell, few, own))
    if lacking <= 1:
        return True
    more = int(MARGIN * lacking * few) if lacking < SHARE else total
    return more <= total // MOST and _lacking(costs, own, *_chosen(costs, cell, more)) <= 1


def _chosen(costs: WeightCosts, cell: str, count: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """About `count` of the coordinates, A's and pi(B)'s, [n, count]; adds |a_i - b_i|^2 over all of them to `own`."""
    step = max(1, costs.coordinates(cell) // count)
    x, y = [], []
    for weight, a, b in costs.slices(cell):
        if own is not None:
            own += weight * _squared_distances(a, b, costs.dtype)
        x.append(a[:, ::step].to(costs.dtype) * weight**0.5)
        y.append(b[:, ::step].to(costs.dtype) * weight**0.5)
    return torch.cat(x, dim=1), torch.cat(y, dim=1)


def _lacking(costs: WeightCosts, own: Tensor, x: Tensor, y: Tensor) -> float:
    """By which factor the distances to the nearest other neuron are too small for a proof; up to 1: it is proved."""
    xx, yy = x.square().sum(dim=1), y.square().sum(dim=1)
    # The most by which rounding can enlarge xx + yy - 2 x y: a bound for any order of summation.
    slack = 4 * (x.shape[1] + 4) * torch.finfo(costs.dtype).eps * float(xx.max() + yy.max())
    limit = own * (1 + ROUNDING) + slack
    worst = 0.0
    for first in range(0, len(x), ROWS):
        rows = slice(first, min(first + ROWS, len(x)))
        distances = torch.addmm(yy.expand(rows.stop - first, -1), x[rows], y.T, alpha=-2).add_(xx[rows, None])
        distances.diagonal(first).fill_(torch.inf)
        worst = max(worst, float((limit[rows] / distances.amin(dim=1).clamp_min_(0)).max()))
    return worst


def _squared_distances(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """|a_i - b_i|^2 for every row, [n], some rows at a time."""
    rows = max(1, CHUNK // a.shape[1])
    pieces = zip(a.split(rows), b.split(rows), strict=True)
    return torch.cat([(x.to(dtype) - y.to(dtype)).square_().sum(dim=1) for x, y in pieces])
