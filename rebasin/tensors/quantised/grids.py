"""The numbers that a code can be, with the scale left out: eight-bit floats, int8, and e2m1 in pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""What the four bits sign, exponent (two) and mantissa stand for."""


@dataclass(frozen=True)
class Grid:
    """Codes of one type, one in each element.

    Attributes:
        dtype: of the codes.
        largest: what the largest number of a tile is scaled to.
    """

    dtype: torch.dtype
    largest: float

    def numbers(self, codes: Tensor) -> Tensor:
        """What codes stand for, in float32."""
        return codes.to(torch.float32)

    def codes(self, numbers: Tensor) -> Tensor:
        """The closest codes, ties to the even one; what lies beyond the last is the last."""
        if self.dtype == torch.int8:
            return numbers.round().clamp_(-128, 127).to(torch.int8)
        limit = torch.finfo(self.dtype).max
        return numbers.clamp(-limit, limit).to(self.dtype)


@dataclass(frozen=True)
class Pairs(Grid):
    """Four-bit floats (e2m1), two in a byte, the first in its upper half; the last dimension has half the length."""

    dtype: torch.dtype = torch.uint8
    largest: float = 6.0

    def numbers(self, codes: Tensor) -> Tensor:
        both = torch.stack([codes >> 4, codes & 15], -1)
        return E2M1[both.reshape(*codes.shape[:-1], -1).long()]

    def codes(self, numbers: Tensor) -> Tensor:
        size = numbers.abs()
        one = torch.zeros(numbers.shape, dtype=torch.uint8)
        for code, bound in enumerate(((E2M1[:7] + E2M1[1:8]) / 2).tolist()):
            one += size >= bound if code % 2 else size > bound  # a tie goes to the even code
        one |= torch.signbit(numbers).to(torch.uint8) << 3
        return (one[..., ::2] << 4) | one[..., 1::2]


GRIDS = {
    torch.float8_e4m3fn: Grid(torch.float8_e4m3fn, 448.0),
    torch.float8_e5m2: Grid(torch.float8_e5m2, 57344.0),
    torch.int8: Grid(torch.int8, 127.0),
}

PAIRS = Pairs()
