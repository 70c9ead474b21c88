"""Straight lines: weighted means and added differences."""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ..registry import method


def average(models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean, shares of any sum. As a running lerp: equal tensors stay equal to the bit."""
    result, total = models[0], weights[0]
    for tensor, weight in zip(models[1:], weights[1:], strict=True):
        total += weight
        if weight:
            result = torch.lerp(
                result, tensor, weight if math.isclose(total, 1, rel_tol=1e-12) else weight / total
            )
    return result


@method("sum_i w_i m_i with sum_i w_i = 1; of two models (1 - alpha) a + alpha b", "Utans 1996", one="b")
def weighted_sum(models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean of the models, on the straight line between two of them.

    A single weight is the share of the second of two models; a list is divided by its sum, and without weights all
    models count the same. One weight outside [0, 1] extrapolates.
    """
    return average(models, weights)


@method(
    "a + sum_i alpha_i (b_i - c), clamped to [min(a, b_i), max(a, b_i)] with clamp",
    "Ilharco et al. 2023, Editing models with task arithmetic, 2212.04089",
    zero="a",
    default=1.0,
    self_any_base=False,
)
def add_difference(
    models: Sequence[Tensor], base: Tensor, scales: Sequence[float], clamp: bool = False
) -> Tensor:
    """Add to the first model what the others learned since the base.

    With the base as first model, too, this is task arithmetic.

    Options:
        clamp: keep every value between the smallest and the largest of the models', so that nothing is added twice.
    """
    result = models[0]
    for tensor, scale in zip(models[1:], scales, strict=True):
        result = result + scale * (tensor - base)
    if not clamp:
        return result
    low, high = reduce(torch.minimum, models), reduce(torch.maximum, models)
    return torch.minimum(torch.maximum(result, low), high)
