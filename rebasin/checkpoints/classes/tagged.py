"""What a library's conversion of tensors does, found out by running it on numbers that tell where they are from.

In one run every row of every tensor is marked by a number of its own, in another every place in a row: whatever splits,
joins, stacks, reshapes or transposes tensors is then known exactly, both ways. Marked tensors are views of vectors, so
one of a hundred million numbers costs no memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from ..key_map import KeyMapping, Piece, Shape

Convert = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
"""From a file's tensors by name to a model's."""


def key_mappings(convert: Convert, shapes: Mapping[str, Shape]) -> list[KeyMapping]:
    """How the tensors that `convert` makes lie in those that it is given, which have these shapes.

    Raises:
        ValueError: one is no arrangement of whole rows of them, nor a matrix transposed; names it.
    """
    given = Given.of(shapes)
    rows = convert({name: given.rows(name) for name in shapes})
    places = convert({name: given.places(name) for name in shapes})
    if rows.keys() != places.keys():
        raise ValueError("the conversion depends on the numbers")
    return [given.mapping(name, rows[name], places[name]) for name in rows]


@dataclass(frozen=True)
class Given:
    """Tensors of a file by name and shape; the first row of each has the number in `starts`."""

    shapes: Mapping[str, Shape]
    names: tuple[str, ...]
    starts: tuple[int, ...]

    @staticmethod
    def of(shapes: Mapping[str, Shape]) -> Given:
        counts = [shape[0] if shape else 1 for shape in shapes.values()]
        return Given(shapes, tuple(shapes), tuple(accumulate(counts, initial=0))[:-1])

    def rows(self, name: str) -> Tensor:
        """Each number is that of its row."""
        shape, start = self.shapes[name], self.starts[self.names.index(name)]
        if not shape:
            return torch.tensor(start)
        return torch.arange(start, start + shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape)

    def places(self, name: str) -> Tensor:
        """Each number is its place in its row."""
        inner = self.shapes[name][1:]
        return torch.arange(prod(inner)).view(inner).expand(self.shapes[name])

    def piece(self, first: int, last: int) -> Piece:
        """Rows of one tensor, from the one with the number `first` to that with the number `last`."""
        at = bisect_right(self.starts, first) - 1
        shape, start = self.shapes[self.names[at]], self.starts[at]
        return Piece(self.names[at], first - start, last - start + 1, shape[0] if shape else 1)

    def mapping(self, name: str, rows: Tensor, places: Tensor) -> KeyMapping:
        shape = tuple(rows.shape)
        source = self.piece(*[int(rows[(0,) * rows.dim()])] * 2).source
        own = self.shapes[source]
        if len(own) == 2 and min(own) > 1 and shape == own[::-1] and _equal(rows.t(), self.rows(source)):
            if _equal(places.t(), self.places(source)):
                return KeyMapping(name, shape, (Piece(source, 0, own[0], own[0]),), transposed=True)
            raise ValueError(f"{name} is no arrangement of rows")
        length = prod(own[1:])
        if rows.numel() % length:
            raise ValueError(f"{name} joins rows of different lengths")
        lines, line = rows.reshape(-1, length), torch.arange(length)
        if not (_equal(lines, lines[:, :1].expand_as(lines)) and _equal(places.reshape(-1, length), line)):
            raise ValueError(f"{name} is no arrangement of rows")
        pieces = tuple(self.piece(*ends) for ends in _runs(lines[:, 0], self.starts))
        if {prod(self.shapes[piece.source][1:]) for piece in pieces} != {length}:
            raise ValueError(f"{name} joins rows of different lengths")
        return KeyMapping(name, shape, pieces)


def _runs(numbers: Tensor, starts: tuple[int, ...]) -> list[tuple[int, int]]:
    """The first and last of each run of numbers that follow each other and belong to one tensor."""
    new = numbers[1:] != numbers[:-1] + 1
    new |= torch.isin(numbers[1:], torch.tensor(starts))
    ends = [*(new.nonzero().flatten() + 1).tolist(), len(numbers)]
    return [(int(numbers[i]), int(numbers[j - 1])) for i, j in zip([0, *ends[:-1]], ends, strict=True)]


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two are equal; what views repeat is looked at once."""
    other = other.expand_as(one)
    repeated = [d for d in range(one.dim()) if one.stride(d) == other.stride(d) == 0]
    for d in repeated:
        one, other = one.narrow(d, 0, 1), other.narrow(d, 0, 1)
    step = max(1, (1 << 22) // max(1, prod(one.shape[1:])))
    if one.dim() == 0:
        return bool(one == other)
    return all(torch.equal(a, b) for a, b in zip(one.split(step), other.split(step), strict=True))
