"""Merging by angle: great circles, what is perpendicular, and similarity of columns."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import method


@method(
    "t = angle(a, b): [sin((1 - alpha) t) a/|a| + sin(alpha t) b/|b|] / sin(t) * [(1 - alpha) |a| + alpha |b|]",
    "Shoemake 1985, Animating rotation with quaternion curves, SIGGRAPH",
    zero="a",
    one="b",
    default=0.5,
)
def slerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Walk from A to B on the great circle through both, each tensor as one vector; lengths are interpolated.

    The straight line is shorter in the middle than its ends; this is not. Parallel and opposite tensors, and zeros,
    have no such circle: they are interpolated on the line.
    """
    length_a, length_b = _norm(a), _norm(b)
    if length_a == 0 or length_b == 0:
        return torch.lerp(a, b, alpha)
    # The arc cosine of the inner product can't tell small angles apart; this can (Kahan).
    away, along = _norm(a / length_a - b / length_b), _norm(a / length_a + b / length_b)
    angle = 2 * math.atan2(away, along)
    if min(angle, math.pi - angle) < 1e-6:
        return torch.lerp(a, b, alpha)
    length = (1 - alpha) * length_a + alpha * length_b
    share_a = math.sin((1 - alpha) * angle) / math.sin(angle) * length / length_a
    share_b = math.sin(alpha * angle) / math.sin(angle) * length / length_b
    return share_a * a + share_b * b


@method(
    "a + alpha [(b - c) - p (a - c)], p = <a - c, b - c> / |a - c|^2",
    "sd-mecha, add_perpendicular (ljleb 2023)",
    zero="a",
    default=1.0,
)
def perpendicular_component(a: Tensor, b: Tensor, base: Tensor, alpha: float) -> Tensor:
    """Add to A that part of what B learned which A did not learn: what is perpendicular to A's own difference."""
    own, other = a - base, b - base
    square = _norm(own) ** 2
    share = 0.0 if square == 0 else float((own * other).sum(dtype=torch.float64)) / square
    return a + alpha * (other - share * own)


@method(
    "(1 - k) a + k b, k = 1 - clamp(s - alpha, 0, 1), s = cos(a, b) of each column (along the first axis)",
    "supermerger, cosineA (recoilme and hako-mikan 2023)",
    one="b",
    default=0.5,
    bounded=True,
)
def add_cosine_a(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Take more of B where the models' columns differ, and stay with A where they agree.

    alpha lowers the similarity that counts: at 1 all is B, at 0 only columns that are alike stay A.
    """
    return torch.lerp(a, b, 1 - (_columns(a, b) - alpha).clamp(0, 1))


@method(
    "as add_cosine_a with s = (cos(a, b) of each column + cos(a, b) of the whole tensor) / 2",
    "supermerger, cosineB (recoilme and hako-mikan 2023)",
    one="b",
    default=0.5,
    bounded=True,
)
def add_cosine_b(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """The same as add_cosine_a, but a column counts as similar only where the whole tensor is similar, too."""
    lengths = _norm(a) * _norm(b)
    whole = float((a * b).sum(dtype=torch.float64)) / lengths if lengths else 0.0
    return torch.lerp(a, b, 1 - ((_columns(a, b) + whole) / 2 - alpha).clamp(0, 1))


def _columns(a: Tensor, b: Tensor) -> Tensor:
    a, b = (a.reshape(1), b.reshape(1)) if a.ndim == 0 else (a, b)
    return F.cosine_similarity(a, b, dim=0)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))
