"""Replacing a part of one model by the other's: rows, ranks, and values beyond bounds."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ...arguments import Share
from ...errors import ConfigError
from ..registry import method


@method(
    "rows round(offset n) to round((offset + alpha) n) of the first axis from b (around its end), the others from a",
    "supermerger, tensor (2023)",
    zero="a",
    one="b",
    default=0.5,
    bounded=True,
)
def tensor_sum(a: Tensor, b: Tensor, alpha: float, offset: Share = 0.0) -> Tensor:
    """Take the share alpha of each tensor's rows, its output neurons, from B.

    Options:
        offset: where these rows begin, a share of all.
    """
    if a.ndim == 0:
        return b if alpha > 0.5 else a
    rows = _region(len(a), alpha, offset, a.device).reshape(-1, *[1] * (a.ndim - 1))
    return torch.where(rows, b, a)


@method(
    "r = a's values in b's order of rank; r where |r| has a rank between offset n and (offset + alpha) n, else a",
    "supermerger, top-k tensor sum (ljleb 2023)",
    zero="a",
    default=0.5,
    bounded=True,
)
def top_k_tensor_sum(a: Tensor, b: Tensor, alpha: float, offset: Share = 0.0) -> Tensor:
    """Put A's values in the order that B's have: the distribution stays A's, the arrangement becomes B's.

    Options:
        offset: where the window of ranks by magnitude begins that is rearranged, a share; alpha is its width.
    """
    values = a.flatten().sort().values
    magnitude = torch.empty(a.numel(), dtype=torch.long, device=a.device)
    magnitude[values.abs().argsort(stable=True)] = torch.arange(a.numel(), device=a.device)
    moved = _region(a.numel(), alpha, offset, a.device)[magnitude]
    order = b.flatten().argsort(stable=True)
    result = a.flatten().clone()
    result[order[moved]] = values[moved]
    return result.reshape(a.shape)


@method(
    "min(max(m_1, low), high), low and high the smallest and largest of the other models; with stiffness s these move"
    " by s to the bounds next to the bounds' mean",
    "sd-mecha, clamp (ljleb 2023)",
    least=3,
)
def clip(models: Sequence[Tensor], stiffness: Share = 0.0) -> Tensor:
    """Keep the first model's values between those of the other models, element by element.

    The first model usually is a merge itself: give the result of another `merge`.

    Options:
        stiffness: 0 to 1, how far the bounds move inwards, to the next models. Two bounds can't move.
    """
    first, bounds = models[0], models[1:]
    low, high = reduce(torch.minimum, bounds), reduce(torch.maximum, bounds)
    if stiffness:
        mean = sum(bounds[1:], bounds[0]) / len(bounds)
        below = reduce(torch.maximum, [torch.where(bound <= mean, bound, low) for bound in bounds])
        above = reduce(torch.minimum, [torch.where(bound >= mean, bound, high) for bound in bounds])
        low, high = torch.lerp(low, below, stiffness), torch.lerp(high, above, stiffness)
    return torch.minimum(torch.maximum(first, low), high)


def _region(n: int, width: float, offset: float, device: torch.device) -> Tensor:
    """bool (n,): the positions from offset n on, width n of them, around the end."""
    if not (0 <= width <= 1 and 0 <= offset <= 1):
        raise ConfigError(f"A share of {width} from {offset} on: both must be between 0 and 1.")
    start, end = round(offset * n), round((offset + width) * n)
    return (torch.arange(n, device=device) - start) % n < end - start
