"""How strongly the neurons of two models go together: cross moments of their activations, one batch at a time.

The three statistics of the literature are functions of the same sums, with a_i the activation of neuron i of A and
b_j that of neuron j of B on the same sample:

    inner product   E[a_i b_j]                                    the paper's choice for its MLPs
    covariance      E[(a_i - E a_i)(b_j - E b_j)]
    Pearson         covariance / (std a_i std b_j)                the paper's choice for VGG; REPAIR's

Sums are centred as they grow (Chan, Golub and LeVeque, 1979), so that nothing cancels and it does not matter how
the samples are cut into batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Statistic = Literal["inner_product", "covariance", "pearson"]

DEAD = 1e-6
"""A neuron whose standard deviation is below this share of its root mean square says nothing: rounding is larger."""


@dataclass(eq=False)
class Moments:
    """Sums over the samples seen so far; changed in place by `add`.

    count: their number. mean_a, mean_b [n] and square_a, square_b [n], the centred sums of squares: float64.
    cross [n, n]: the centred sums of a_i b_j, float64 or float32.
    """

    count: int
    mean_a: Tensor
    mean_b: Tensor
    square_a: Tensor
    square_b: Tensor
    cross: Tensor

    @classmethod
    def zeros(cls, n: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Moments:
        a, b, c, d = torch.zeros(4, n, dtype=torch.float64, device=device).unbind()
        return cls(0, a, b, c, d, torch.zeros(n, n, dtype=dtype, device=device))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in samples x of A and y of B, [samples, n] each, of any floating point type."""
        samples = len(x)
        if samples == 0:
            return
        total = self.count + samples
        share = samples / total
        x, mean_x, square_x = _centred(x)
        y, mean_y, square_y = _centred(y)
        delta_a, delta_b = mean_x - self.mean_a, mean_y - self.mean_b
        spread = self.count * share  # what the two means being apart adds: count * samples / total
        self.square_a += square_x + spread * delta_a.square()
        self.square_b += square_y + spread * delta_b.square()
        if self.cross.dtype == x.dtype == y.dtype:
            self.cross.addmm_(x.T, y)
        else:
            self.cross += x.T @ y.to(x.dtype)
        if spread:
            self.cross.addr_(delta_a.to(self.cross), delta_b.to(self.cross), alpha=spread)
        self.mean_a += share * delta_a
        self.mean_b += share * delta_b
        self.count = total

    def statistic(self, kind: Statistic) -> Tensor:
        """The matrix [n, n] of neurons i of A (rows) with neurons j of B (columns), float64; always finite.

        A neuron that never changes has no correlation: its row or column of "pearson" is 0.
        """
        count = max(self.count, 1)
        cross = self.cross.to(torch.float64, copy=True)
        if kind == "inner_product":
            return cross.div_(count).addr_(self.mean_a, self.mean_b)
        if kind == "covariance":
            return cross.div_(count)
        a = _inverse_root(self.square_a, self.mean_a, count)
        b = _inverse_root(self.square_b, self.mean_b, count)
        return cross.mul_(a[:, None]).mul_(b)

    def largest(self, kind: Statistic) -> float:
        """What no permutation can exceed, by Cauchy and Schwarz."""
        if kind == "pearson":
            return float(len(self.mean_a))
        a, b = self.square_a / self.count, self.square_b / self.count
        if kind == "inner_product":
            a, b = a + self.mean_a.square(), b + self.mean_b.square()
        return float((a.sum() * b.sum()).sqrt())

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        names = ("mean_a", "mean_b", "square_a", "square_b", "cross")
        return {name: getattr(self, name) for name in names}


def _centred(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x minus its mean, float32 (float64 if x is); the mean and the centred sum of squares, float64."""
    x = x if x.dtype == torch.float64 else x.float()
    mean = x.mean(dim=0)
    x = x - mean
    return x, mean.double(), x.square().sum(dim=0).double()


def _inverse_root(square: Tensor, mean: Tensor, count: int) -> Tensor:
    dead = square <= DEAD**2 * (square + count * mean.square())
    return torch.where(dead, 0.0, square.clamp(min=torch.finfo(torch.float64).tiny).rsqrt())
