"""Differences from a base that agree in sign, and random subsets of them."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ...arguments import Finite, Share, ShareBelowOne
from ..registry import method

Vote = Literal["mass", "count"]


@method(
    "d_i = m_i - c, all but the k largest set to 0; s = sgn(sum d_i) or, by count, sgn(sum sgn d_i);"
    " c + alpha mean{d_i : sgn d_i = s}",
    "Yadav et al. 2023, TIES-Merging, 2306.01708; vote=count: sd-mecha's default",
    zero="base",
    default=1.0,
    self_any_base=False,
)
def ties_sum(
    models: Sequence[Tensor], base: Tensor, alpha: float, k: Share = 0.2, vote: Vote = "mass"
) -> Tensor:
    """Trim small differences, elect a sign for each value, and average the differences that have it.

    Options:
        k: the share of each tensor's differences that is kept, the largest.
        vote: how the sign is elected, by "mass" (sum of the differences: the paper's, and what sd-mecha's users call
            TIES-SOUP) or "count" (majority, sd-mecha's default).
    """
    # In place and model by model: tensors of embeddings are large, and beside the inputs there are at most four.
    votes = torch.zeros_like(base)
    for model in models:
        delta = largest(model - base, k)
        votes += delta if vote == "mass" else delta.sign_()
    votes.sign_()
    total, count = torch.zeros_like(base), torch.zeros_like(base, dtype=torch.int16)
    for model in models:
        delta = largest(model - base, k)
        agrees = (delta.sign() == votes) & (delta != 0)
        total += delta.mul_(agrees)
        count += agrees
    return total.mul_(alpha).div_(count.clamp_(min=1)).add_(base)


def largest(delta: Tensor, k: float) -> Tensor:
    """Set all but the share k of the values to 0, in place: the largest magnitudes stay (ties all do)."""
    kept = round(k * delta.numel())
    if kept == 0:
        return delta.zero_()
    if kept == delta.numel():
        return delta
    return delta.mul_(delta.abs() >= _threshold(delta.abs().flatten(), kept))


def _threshold(magnitudes: Tensor, kept: int) -> Tensor:
    """The `kept`-th largest of these values, which are put into another order."""
    place = magnitudes.numel() - kept
    if magnitudes.device.type != "cpu":
        return magnitudes.kthvalue(place + 1).values
    values = magnitudes.numpy()
    values.partition(place)  # torch's takes four times the memory, for indices
    return magnitudes[place]


@method(
    "d_i = m_i - c, each value kept with probability q and divided by it; c + alpha mean_i d_i;"
    " q = 1 - p + window (rank |d| / n - (n + 1) / 2n)",
    "Yu et al. 2023 (DARE), 2311.03099; the window: Deep et al. 2024 (DELLA), 2406.11617",
    zero="base",
    default=1.0,
    self_any_base=False,
)
def dropout(
    models: Sequence[Tensor],
    base: Tensor,
    alpha: float,
    generator: torch.Generator,
    probability: ShareBelowOne = 0.9,
    window: Finite = 0.0,
    rescale: bool = True,
) -> Tensor:
    """Drop most differences from the base at random and enlarge the others, so that the mean stays.

    Options:
        probability: of dropping a value.
        window: makes large differences likelier to stay (DELLA): they are dropped with probability - window / 2, the
            smallest with probability + window / 2.
        rescale: enlarge what stays; false leaves it as it is.
    """
    total = torch.zeros_like(base)
    for model in models:
        delta = model - base
        keep = _keep(delta, probability, window)
        drawn = torch.rand(delta.shape, generator=generator, dtype=torch.float32).to(delta.device) < keep
        total += (delta.div_(keep) if rescale else delta).mul_(drawn)
    return total.mul_(alpha / len(models)).add_(base)


def _keep(delta: Tensor, probability: float, window: float) -> Tensor | float:
    """The probability of each value to stay: one for all, or of delta's shape."""
    if window == 0:
        return 1 - probability
    n = delta.numel()
    rank = torch.empty(n, dtype=delta.dtype, device=delta.device)
    order = delta.abs().flatten().argsort(stable=True)
    rank[order] = torch.arange(1, n + 1, dtype=delta.dtype, device=delta.device)
    # Never 0: what can't stay can't be made up for.
    return (1 - probability + window * (rank / n - (n + 1) / (2 * n))).clamp(1e-3, 1).reshape(delta.shape)
