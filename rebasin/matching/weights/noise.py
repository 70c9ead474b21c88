"""How much a parameter should count when neurons are matched by their weights, by what its numbers say of them.

The paper counts all numbers alike. Numbers that rise and fall together then count as often as they are written down:
the gains of a LayerNorm over all pixels of a channel are 784 numbers that say one thing, how large the channel is, and
channels are matched by that. With S the covariance of the slices of a tensor (of its neurons, each with all its
numbers), the coordinates that its slices truly have, as a share of those that are written down, are

    share  =  (tr S)^2 / tr S^2 / coordinates,

1 for independent numbers and 1 / coordinates for one number that is repeated.

repeats  w = share where it is below `REPEATED` and the tensor meets permuted neurons on one axis alone; else 1, as the
         paper has it. What is repeated counts as if it were written down once.
noise    w = tr S / tr S^2. Two neurons with nothing in common have a product of variance tr S^2, two that are the same
         gain in proportion to tr S, and of a sum of such terms the one with the largest ratio of signal to noise weighs
         each by signal over variance. One over the variance for independent numbers: units do not matter.

Both traces are of A and of B alone, so that no permutation of B changes w but by which slices of a wide tensor are
looked at.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

SLICES = 64
"""Of more slices so many are looked at, evenly spaced."""

FLAT = 1e-4
"""Slices that vary by less than this share of their mean square count as if they varied by it: their mean, which is in
every product, would drown what they differ by, and all other tensors, in rounding.
"""


REPEATED = 0.1
"""Numbers are taken to repeat each other where a tensor has fewer than this share of independent coordinates. Of pairs
looked at, gains and shifts for every pixel had .003 to .03, matrices and kernels more than .1 but for those that write
what is not permuted (adaLN, .003) or read pixels (.03).
"""


def noise_weight(a: Tensor, b: Tensor, axes: Iterable[int]) -> float:
    """w of a parameter, `a` in A and `b` in B: the geometric mean of both, the least over the permuted `axes`."""
    found = ([_traces(tensor, axis) for tensor in (a, b)] for axis in axes)
    return min(
        math.sqrt(math.prod(one.independent / one.spread if one.spread else 0.0 for one in ends))
        for ends in found
    )


def repeats_weight(a: Tensor, b: Tensor, axes: Collection[int]) -> float:
    """The same of what counts its repeated numbers once."""
    if len(axes) > 1:
        return 1.0
    ends = [_traces(tensor, axis) for axis in axes for tensor in (a, b)]
    share = math.sqrt(math.prod(one.independent / one.coordinates for one in ends))
    return share if share < REPEATED else 1.0


@dataclass(frozen=True)
class _Slices:
    """What the slices of a tensor along an axis are like.

    Attributes:
        coordinates: numbers in a slice.
        independent: so many of them are worth, (tr S)^2 / tr S^2; all where slices do not differ.
        spread: tr S, but not less than `FLAT` of the mean square, unless there is nothing.
    """

    coordinates: int
    independent: float
    spread: float


def _traces(tensor: Tensor, axis: int) -> _Slices:
    """tr S^2 is estimated without bias where there are far more coordinates than slices (Himeno and Yamada 2014)."""
    size = tensor.shape[axis]
    if size > SLICES:
        chosen = torch.arange(SLICES, device=tensor.device) * size // SLICES
        tensor = tensor.index_select(axis, chosen)
    rows = tensor.movedim(axis, 0).reshape(min(size, SLICES), -1).double()
    n, coordinates = rows.shape
    level = float(rows.square().sum()) / n
    rows = rows - rows.mean(dim=0)
    gram = rows @ rows.T
    trace = float(gram.trace()) / max(1, n - 1)
    if trace == 0:
        return _Slices(coordinates, float(coordinates), 0.0)
    square = float(gram.square().sum()) / (n - 1) ** 2
    fourth = float(gram.diagonal().square().sum()) / (n - 1)
    least = trace**2 / coordinates  # as if all coordinates were independent
    found = least
    if n > 3:
        found = (n - 1) / (n * (n - 2) * (n - 3)) * ((n - 1) * (n - 2) * square + trace**2 - n * fourth)
    return _Slices(coordinates, trace**2 / min(max(found, least), trace**2), max(trace, FLAT * level))
