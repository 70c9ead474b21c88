"""Turning one model's neurons towards the other's: an orthogonal matrix in place of a permutation."""

import numpy as np
import torch
from torch import Tensor

from ...arguments import Finite
from ..registry import method


@method(
    "A = a - mean_a, B = b - mean_b (rows are neurons); Q = argmin |A Q - B| over orthogonal matrices;"
    " ((1 - alpha) A + alpha B Q^T) Q^alignment + (1 - alignment) mean_a + alignment mean_b",
    "Schönemann 1966, orthogonal Procrustes; meh and sd-mecha, rotate (ljleb 2023)",
    default=0.0,
)
def rotate(
    a: Tensor,
    b: Tensor,
    alpha: float,
    base: Tensor | None = None,
    alignment: Finite = 1.0,
    centralization: Finite = 1.0,
) -> Tensor:
    """Rotate A's weights towards B's; with a base, its differences towards B's differences.

    alpha interpolates what rotations can't change. A convolution's kernels are rows, as in sd-mecha. This changes what
    the model computes, unlike a permutation. Vectors are interpolated by alpha. Costs a singular value decomposition
    for each tensor, and a Schur decomposition on the CPU where alignment is a fraction: slow for wide matrices.

    Options:
        alignment: how far to rotate, 0 (not at all) to 1 (as near as a rotation comes).
        centralization: how much of the mean row is taken off before.
    """
    if base is not None:
        return base + rotate(a - base, b - base, alpha, None, alignment, centralization)
    if a.ndim < 2:
        return torch.lerp(a, b, alpha)
    kernels = a.ndim > 2 and a.shape[2:].numel() > 1
    rows = a.shape[:2].numel() if kernels else a.shape[0]
    flat_a, flat_b = a.reshape(rows, -1).double(), b.reshape(rows, -1).double()
    mean_a, mean_b = flat_a.mean(0) * centralization, flat_b.mean(0) * centralization
    flat_a, flat_b = flat_a - mean_a, flat_b - mean_b

    basis = None
    if 2 * rows < flat_a.shape[1]:  # all happens in the space of A's and B's rows
        basis = torch.linalg.qr(torch.cat([flat_a, flat_b]).T).Q
        flat_a, flat_b = flat_a @ basis, flat_b @ basis
    turn = procrustes(flat_a, flat_b, proper=alignment != round(alignment))
    result = torch.lerp(flat_a, flat_b @ turn.T, alpha) @ power(turn, alignment)
    if basis is not None:
        result = result @ basis.T
    return (result + torch.lerp(mean_a, mean_b, alignment)).reshape(a.shape).to(a.dtype)


def procrustes(a: Tensor, b: Tensor, proper: bool = False) -> Tensor:
    """The orthogonal matrix Q (p, p) with the smallest |a Q - b|, for a and b (n, p).

    Where a and b leave Q open, it turns as little as it can. `proper`: a rotation, without a reflection.
    """
    u, s, vh = torch.linalg.svd(a.T @ b)
    rank = int((s > s[:1] * 1e-10).sum())
    fixed, free_u, free_v = u[:, :rank] @ vh[:rank], u[:, rank:], vh[rank:]
    x, _, yh = torch.linalg.svd(free_u.T @ free_v.T)
    turn = fixed + free_u @ (x @ yh) @ free_v
    if proper and torch.linalg.slogdet(turn).sign < 0:
        # Give up the direction that costs least: a free one, or that of the smallest singular value.
        if rank < len(s):
            x = torch.cat([x[:, :-1], -x[:, -1:]], dim=1)
            return fixed + free_u @ (x @ yh) @ free_v
        return turn - 2 * u[:, -1:] @ vh[-1:]
    return turn


def power(turn: Tensor, exponent: float) -> Tensor:
    """turn^exponent of an orthogonal matrix: each plane is turned by that share of its angle."""
    if exponent == round(exponent):
        return torch.linalg.matrix_power(turn, round(exponent))
    from scipy.linalg import schur

    # A normal matrix has a diagonal complex Schur form with a unitary basis, also where eigenvalues repeat.
    triangle, basis = schur(turn.cpu().numpy(), output="complex")[:2]
    angles = np.angle(np.diagonal(triangle))
    result = (basis * np.exp(1j * exponent * angles)) @ basis.conj().T
    return torch.from_numpy(result.real.copy()).to(turn)
