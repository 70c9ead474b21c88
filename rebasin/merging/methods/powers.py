"""Products and powers of weights, and the mask of train_difference. Signs are those of complex numbers' real parts."""

import math

import torch
from torch import Tensor

from ..registry import method


@method(
    "Re(a^(1 - alpha) b^alpha), elementwise, principal values",
    "sd-mecha, geometric_sum (ljleb 2023)",
    zero="a",
    one="b",
    default=0.5,
)
def geometric_sum(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """The weighted geometric mean, an AND of the models: small where either is small.

    Where the signs differ, the magnitude is multiplied by a cosine, which is 0 in the middle.
    """
    # The principal argument of a negative number is pi, so the powers have the arguments below.
    turn = math.pi * ((1 - alpha) * (a < 0).to(a.dtype) + alpha * (b < 0).to(a.dtype))
    return a.abs() ** (1 - alpha) * b.abs() ** alpha * torch.cos(turn)


@method(
    "Re(a (b / c)^(alpha m)), m = max(0, -p q / max(|p|, |q|)^2), p = log|a / c|, q = log|b / c|",
    "sd-mecha, multiply_quotient (ljleb 2023)",
    zero="a",
    default=1.0,
)
def multiply_quotient(a: Tensor, b: Tensor, base: Tensor, alpha: float) -> Tensor:
    """Multiply A by the factor that B's training applied to the base, where A's own went the other way.

    Values where a quotient is not defined (zeros) stay A's.
    """
    own = a.abs().log() - base.abs().log()
    other = b.abs().log() - base.abs().log()
    most = torch.maximum(own.abs(), other.abs())
    power = alpha * (-own * other / most**2).nan_to_num(nan=0.0).clamp(min=0)
    quotient = b / base
    factor = quotient.abs() ** power * torch.cos(math.pi * power * (quotient < 0))
    result = a * factor
    return torch.where(result.isfinite(), result, a)


@method(
    "a + 1.8 alpha |b - a| / (|b - a| + |b - c|) (b - c), elementwise",
    "supermerger, trainDifference (2023); the mask as in sd-mecha, train_difference_mask",
    zero="a",
    default=1.0,
)
def train_difference(a: Tensor, b: Tensor, base: Tensor, alpha: float) -> Tensor:
    """Add B's difference where A does not have it yet, as if A had been trained on it.

    A model that already is where B is does not move; plain add_difference would add the difference twice.
    """
    missing, difference = (b - a).abs(), b - base
    mask = (missing / (missing + difference.abs())).nan_to_num(nan=0.0)
    return a + 1.8 * alpha * mask * difference
