"""Linear maps that leave a network's function as it is, as data: which groups, and where their matrices act.

A **continuous group** has `count` blocks of `size` neurons and a matrix M for each; what is mixed sits at **sites**,
axes of parameters. A matrix acts along a site's axis as

    W  <-  S G M G^-1 W        (power 1)        W  <-  S G M^-T G^-1 W        (power -1)

where G is the diagonal of a vector that the model multiplies by there (the gains of a norm), and S are scales: they are
groups of their own, at the same sites. Since G stays what it is, nothing need be folded away, and M can be undone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .structure import Indices

Kind = Literal["invertible", "rotations", "rotations that keep ones", "scales", "positive scales", "signs"]
"""GL(n); O(n), reflections included; those of O(n) with M 1 = 1; a factor for each neuron: any but 0, above 0, +-1."""

KINDS: tuple[str, ...] = get_args(Kind)
DIAGONAL = frozenset({"scales", "positive scales", "signs"})
"""Kinds whose matrices are diagonal: a number for each neuron."""


@dataclass(frozen=True, eq=False)
class GainSite:
    """G = diag((w[positions] + offset)^power) of parameter w, a number for each neuron of a `MapSite`."""

    parameter: str
    positions: Indices
    offset: float
    power: int


@dataclass(frozen=True, eq=False)
class MapSite:
    """Neuron i of block k sits at `positions[k * size + i]` of a parameter's axis; `power` and `gain`: see above."""

    parameter: str
    axis: int
    positions: Indices
    power: int
    gain: GainSite | None = None


@dataclass(frozen=True, eq=False)
class ContinuousGroup:
    """`count` blocks of `size` neurons, of which each may be moved by a matrix of `kind`.

    `limit` is the operator that leaves no more than this kind ("" for all invertible matrices).
    """

    name: str
    kind: Kind
    count: int
    size: int
    sites: tuple[MapSite, ...]
    limit: str = ""

    @property
    def neurons(self) -> int:
        return self.count * self.size

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its matrices as one tensor: [count, size, size], or [neurons] where they are diagonal."""
        return (self.neurons,) if self.kind in DIAGONAL else (self.count, self.size, self.size)

    @property
    def dimension(self) -> int:
        """Free real numbers."""
        n = self.size
        one = {
            "invertible": n * n,
            "rotations": n * (n - 1) // 2,
            "rotations that keep ones": (n - 1) * (n - 2) // 2,
            "signs": 0,
        }.get(self.kind, n)
        return self.count * one

    @property
    def structure(self) -> str:
        """The group in the notation of algebra, for example `GL(64)^8` for eight heads."""
        if self.kind in DIAGONAL:
            letter = {"scales": "R*", "positive scales": "R+", "signs": "{1,-1}"}[self.kind]
            return f"{letter}^{self.neurons}"
        n = self.size
        one = {"invertible": f"GL({n})", "rotations": f"O({n})"}.get(self.kind, f"O({n - 1})")
        return one if self.count == 1 else f"{one}^{self.count}"

    def identity(self) -> Tensor:
        """The matrices that move nothing, float64 of `shape`."""
        if self.kind in DIAGONAL:
            return torch.ones(self.neurons, dtype=torch.float64)
        return torch.eye(self.size, dtype=torch.float64).expand(self.shape).clone()

    def random(self, generator: torch.Generator) -> Tensor:
        """Matrices far from the identity, well conditioned (singular values e^{0.3 N(0, 1)}); float64 of `shape`."""
        numbers = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.kind in DIAGONAL:
            sign = torch.where(torch.rand(self.neurons, generator=generator) < 0.5, -1.0, 1.0).double()
            size = torch.ones_like(numbers) if self.kind == "signs" else torch.exp(0.3 * numbers)
            return size if self.kind == "positive scales" else size * sign
        if self.kind == "rotations that keep ones":
            basis = ones_complement(self.size)
            turned = torch.linalg.qr(numbers[:, 1:, 1:])[0]
            return basis @ turned @ basis.mT + 1 / self.size
        turned = torch.linalg.qr(numbers)[0]
        if self.kind == "rotations":
            return turned
        other = torch.linalg.qr(torch.randn(self.shape, generator=generator, dtype=torch.float64))[0]
        stretch = torch.exp(0.3 * torch.randn(self.shape[:2], generator=generator, dtype=torch.float64))
        return turned * stretch[:, None, :] @ other

    def distance(self, maps: Tensor) -> float:
        """How far matrices of `shape` are from being of this kind: 0 for members, infinite if they are none at all."""
        if maps.shape != self.shape or not bool(maps.isfinite().all()):
            return float("inf")
        if self.kind in DIAGONAL:
            if bool((maps == 0).any()) or (self.kind == "positive scales" and bool((maps < 0).any())):
                return float("inf")
            return float((maps.abs() - 1).abs().max()) if self.kind == "signs" else 0.0
        if self.kind == "invertible":
            worst = torch.linalg.cond(maps.double()).max()
            return 0.0 if bool(worst < 1e12) else float("inf")
        maps = maps.double()
        error = (maps @ maps.mT - torch.eye(self.size, dtype=torch.float64)).abs().max()
        if self.kind == "rotations that keep ones":
            error = torch.maximum(error, (maps.sum(-1) - 1).abs().max())
        return float(error)


def ones_complement(n: int) -> Tensor:
    """An orthonormal basis of what is orthogonal to the vector of ones, float64 [n, n - 1]."""
    basis = torch.eye(n, dtype=torch.float64)
    basis[:, 0] = 1.0
    return torch.linalg.qr(basis)[0][:, 1:]


def inverse(kind: str, maps: Tensor) -> Tensor:
    """M^-1 of matrices of a kind, [count, size, size], or of scales [neurons]."""
    if kind in DIAGONAL:
        return 1 / maps
    return torch.linalg.inv(maps) if kind == "invertible" else maps.mT


def power(kind: str, maps: Tensor, exponent: int) -> Tensor:
    """M or M^-T (`exponent` 1 or -1); scales to any whole power."""
    if kind in DIAGONAL:
        return maps**exponent
    if exponent == 1 or kind != "invertible":
        return maps
    return torch.linalg.inv(maps).mT
