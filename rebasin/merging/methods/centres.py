"""Centres of several models other than their mean."""

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...arguments import Count, NonNegative, Positive
from ..registry import method
from .linear import average


@method(
    "d_i = m_i - c; c + t mean_i d_i, t = n cos / (1 + (n - 1) cos), cos = mean over pairs of cos(d_i, d_j), 0 to 1",
    "Jang et al. 2024, Model Stock, 2403.19522",
)
def model_stock(models: Sequence[Tensor], base: Tensor, rows: bool = False) -> Tensor:
    """The mean of the models, drawn back to the base the more their differences disagree.

    Needs no tuning: t comes from the angle between the differences, one for each tensor.

    Options:
        rows: one angle for each row of the last axis, as in sd-mecha.
    """
    deltas = [model - base for model in models]
    flat = [delta if rows and delta.ndim else delta.reshape(-1) for delta in deltas]
    # The smallest float as eps: differences of fine-tunes are small, and must not be taken for zero.
    eps = torch.finfo(base.dtype).tiny
    pairs = [F.cosine_similarity(x, y, dim=-1, eps=eps) for x, y in combinations(flat, 2)]
    cos = (sum(pairs[1:], pairs[0]) / len(pairs)).clamp(0, 1)
    n = len(models)
    t = n * cos / (1 + (n - 1) * cos)
    if rows and base.ndim:
        t = t.unsqueeze(-1)
    return base + t * sum(deltas[1:], deltas[0]) / n


@method(
    "argmin_x sum_i w_i |x - m_i|, each tensor as one vector, by Weiszfeld's iteration",
    "Weiszfeld 1937; Pillutla et al. 2022, Robust aggregation, 1912.13445",
    one="b",
    bounded=True,
)
def geometric_median(
    models: Sequence[Tensor],
    weights: Sequence[float],
    iterations: Count = 100,
    tolerance: NonNegative = 1e-8,
    eps: Positive = 1e-12,
) -> Tensor:
    """The point with the smallest sum of distances to the models: one outlier among many can't pull it far.

    Two models have no single one; equal weights give their mean.

    Options:
        iterations: at most so many.
        tolerance: they end when the median moves by less than this times the largest distance.
        eps: the smallest distance that is divided by.
    """
    median = average(models, weights)
    for _ in range(iterations):
        distances = [float(torch.linalg.vector_norm(m - median, dtype=torch.float64)) for m in models]
        before = median
        median = average(models, [w / max(d, eps) for w, d in zip(weights, distances, strict=True)])
        moved = float(torch.linalg.vector_norm(median - before, dtype=torch.float64))
        if moved <= tolerance * max(distances):
            break
    return median


@method(
    "sum_i w_i F_i m_i / sum_i w_i F_i, elementwise; F_i plus floor times the tensor's mean F",
    "Matena and Raffel 2022, Merging models with Fisher-weighted averaging, 2111.09832",
    one="b",
    bounded=True,
)
def fisher(
    models: Sequence[Tensor],
    weights: Sequence[float],
    companions: Sequence[Tensor],
    floor: NonNegative = 1e-6,
) -> Tensor:
    """Average the models, each value weighted by how much its model's loss depends on it (its Fisher information).

    The information is `rebasin.merging.diagonal_fisher`'s.

    Options:
        floor: share of the tensor's mean information that every value has at least, so that values no model depends
            on are averaged plainly.
    """
    mean = sum(float(c.mean(dtype=torch.float64)) for c in companions) / len(companions)
    if mean == 0:
        return average(models, weights)
    result, total = models[0], weights[0] * (companions[0] / mean + floor)
    for model, weight, companion in zip(models[1:], weights[1:], companions[1:], strict=True):
        own = weight * (companion / mean + floor)
        total = total + own
        result = torch.lerp(result, model, torch.where(total > 0, own / total, torch.zeros_like(own)))
    return result
