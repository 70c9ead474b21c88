"""How much a parameter should count when neurons are matched by their weights: what it tells, over the noise it makes.

The paper counts all numbers alike. So a tensor of large numbers decides what all others are for, and numbers that rise
and fall together count as often as they are written down: the gains of a LayerNorm over all pixels of a channel are
784 numbers that say one thing, how large the channel is, and channels are matched by that.

Take two neurons i, j with nothing in common. With S the covariance of the slices of a tensor (of its neurons, each with
all its numbers), their product is noise of variance tr S^2; two that are the same gain an amount in proportion to tr S.
Of a sum of such terms the one with the largest ratio of signal to noise weighs each by signal over variance,

    w  =  tr S / tr S^2  =  (tr S)^2 / tr S^2  /  tr S.

(tr S)^2 / tr S^2 is how many coordinates the slices truly have. If they are independent, w is one over their variance:
the unit of a tensor does not matter. Both traces are of A and of B alone, so that no permutation of B changes w but by
which slices of a wide tensor are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

SLICES = 64
"""Of more slices so many are looked at, evenly spaced."""

FLAT = 1e-4
"""Slices that vary by less than this share of their mean square count as if they varied by it: their mean, which is in
every product, would drown what they differ by, and all other tensors, in rounding.
"""


def noise_weight(a: Tensor, b: Tensor, axes: Iterable[int]) -> float:
    """w of a parameter, `a` in A and `b` in B: the geometric mean of both, the least over the permuted `axes`."""
    return min(math.sqrt(_weight(a, axis) * _weight(b, axis)) for axis in axes)


def _weight(tensor: Tensor, axis: int) -> float:
    """tr S / tr S^2 along an axis; 0 where all slices are alike.

    tr S^2 is estimated without bias where there are far more coordinates than slices (Himeno and Yamada 2014).
    """
    size = tensor.shape[axis]
    if size > SLICES:
        chosen = torch.arange(SLICES, device=tensor.device) * size // SLICES
        tensor = tensor.index_select(axis, chosen)
    rows = tensor.movedim(axis, 0).reshape(min(size, SLICES), -1).double()
    n, coordinates = rows.shape
    if n < 2:
        return 0.0
    level = float(rows.square().sum()) / n
    rows = rows - rows.mean(dim=0)
    gram = rows @ rows.T
    trace = float(gram.trace()) / (n - 1)
    if trace == 0:
        return 0.0
    square = float(gram.square().sum()) / (n - 1) ** 2
    fourth = float(gram.diagonal().square().sum()) / (n - 1)
    least = trace**2 / coordinates  # as if all coordinates were independent
    found = least
    if n > 3:
        found = (n - 1) / (n * (n - 2) * (n - 3)) * ((n - 1) * (n - 2) * square + trace**2 - n * fourth)
    return trace**2 / min(max(found, least), trace**2) / max(trace, FLAT * level)
