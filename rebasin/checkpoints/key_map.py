"""How a tensor of a component lies in the tensors of a file, and the lazy states that read and write it there.

A component's tensor is made of rows of one tensor or several: all of one, a third of a fused one, halves in another
order, or the matrices of all experts, one below the other. That is exact both ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..tensors.writer import convert
from ..types import DerivedState, LazyTensor, State, dtype_of, origin_of, passed, shape_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of tensor `source` of a file, which has `rows` of them."""

    source: str
    start: int
    stop: int
    rows: int

    @property
    def whole(self) -> bool:
        return self.stop - self.start == self.rows


@dataclass(frozen=True)
class KeyMapping:
    """Tensor `name` of a component, of this `shape`, is these pieces of tensors of a file, one below the other.

    `transposed`: a matrix here is that of the file, its only piece, transposed.
    """

    name: str
    shape: Shape
    pieces: tuple[Piece, ...]
    transposed: bool = False

    @property
    def source(self) -> str:
        """The tensor of the file that has its first row."""
        return self.pieces[0].source

    def read(self, raw: Mapping[str, Tensor]) -> Tensor:
        """The tensor here, from those of the file."""
        if self.transposed:
            return raw[self.source].t().contiguous()
        found = [
            raw[piece.source] if piece.whole else raw[piece.source][piece.start : piece.stop].clone()
            for piece in self.pieces
        ]
        return (found[0] if len(found) == 1 else torch.cat(found)).reshape(self.shape)

    def rows_of(self, source: str, tensor: Tensor) -> list[tuple[int, Tensor]]:
        """What rows of `source` become, from the tensor here: the first row's number, and the rows."""
        if self.transposed:
            return [(0, tensor.t())]
        counts = [piece.stop - piece.start for piece in self.pieces]
        parts = tensor.reshape(sum(counts), -1).split(counts)
        return [(p.start, part) for p, part in zip(self.pieces, parts, strict=True) if p.source == source]


def same(name: str, source: str, shape: Shape, as_shape: Shape | None = None) -> KeyMapping:
    """Tensor `name` is all of `source`, which has this shape, maybe under another one with as many numbers."""
    rows = shape[0] if shape else 1
    return KeyMapping(name, shape if as_shape is None else as_shape, (Piece(source, 0, rows, rows),))


def matrix(name: str, source: str, shape: Shape) -> KeyMapping:
    """Tensor `name` is a matrix, and `source` that matrix or a 1x1 convolution."""
    return same(name, source, shape, shape[:2])


def transposed(name: str, source: str, shape: Shape) -> KeyMapping:
    """Tensor `name` is the matrix `source` transposed.

    Raises:
        IndexError: a tensor of this shape is none.
    """
    if len(shape) != 2:
        raise IndexError(source)
    return KeyMapping(name, shape[::-1], (Piece(source, 0, shape[0], shape[0]),), transposed=True)


def rows(name: str, source: str, shape: Shape, part: int, parts: int) -> KeyMapping:
    """Tensor `name` is one of `parts` equal parts of the rows of `source`.

    Raises:
        IndexError: a tensor of this shape can't be divided so.
    """
    if not shape or shape[0] % parts:
        raise IndexError(source)
    size = shape[0] // parts
    return KeyMapping(name, (size, *shape[1:]), (Piece(source, part * size, (part + 1) * size, shape[0]),))


def write(
    source: str,
    keys: Sequence[KeyMapping],
    tensors: Sequence[Tensor],
    shape: Shape,
    old: Tensor | None = None,
) -> Tensor:
    """Tensor `source` of a file, of this shape, from those here: the inverse of `KeyMapping.read`.

    `old`: gives the rows that none of these have.
    """
    found = [part for key, tensor in zip(keys, tensors, strict=True) for part in key.rows_of(source, tensor)]
    if len(found) == 1 and found[0][1].numel() == prod(shape):
        return found[0][1].reshape(shape).contiguous()
    dtype = found[0][1].dtype
    made = torch.empty(shape, dtype=dtype) if old is None else old.to(dtype, copy=True)
    flat = made.view(shape[0], -1)
    for start, part in found:
        flat[start : start + len(part)] = part
    return made


def component_state(raw: State, keys: Iterable[KeyMapping]) -> DerivedState:
    """A component of a checkpoint in its library's names; each tensor is read from the file when it is asked for."""

    def lazy(key: KeyMapping) -> LazyTensor:
        origin = origin_of(raw, key.source)
        return LazyTensor(key.shape, dtype_of(raw, key.source), lambda: key.read(raw), origin)

    return DerivedState({key.name: lazy(key) for key in keys})


def sources(keys: Mapping[str, Iterable[KeyMapping]]) -> set[str]:
    """The tensors of a file that these components are made of."""
    return {piece.source for own in keys.values() for key in own for piece in key.pieces}


def shapes_of(state: State) -> dict[str, Shape]:
    """Name -> shape of every tensor; none is read where the state is lazy."""
    return {name: shape_of(state, name) for name in state}


def replaced(
    raw: State, keys: Mapping[str, Sequence[KeyMapping]], states: Mapping[str, State], keep_dtype: bool = True
) -> DerivedState:
    """`raw` with components replaced; names and order stay, and with `keep_dtype` the types, too.

    Args:
        keys: component -> its keys into `raw`.
        states: component -> its new tensors; those that it lacks are taken from `raw`.
    """
    by_source: dict[str, tuple[State, dict[str, KeyMapping]]] = {}
    for component, state in states.items():
        for key in keys[component]:
            for piece in key.pieces if key.name in state else ():
                by_source.setdefault(piece.source, (state, {}))[1][key.name] = key

    def lazy(name: str) -> LazyTensor:
        if name not in by_source:
            return passed(raw, name)
        state, own = by_source[name]
        shape, stored, first = shape_of(raw, name), dtype_of(raw, name), next(iter(own))
        dtype = stored if keep_dtype else dtype_of(state, first)

        def make() -> Tensor:
            tensors = [state[key] for key in own]
            keys = list(own.values())
            covered = sum(p.stop - p.start for key in keys for p in key.pieces if p.source == name)
            old = None if not shape or covered == shape[0] else raw[name]
            wide = [tensor.to(tensors[0].dtype) for tensor in tensors]
            return convert(write(name, keys, wide, shape, old), dtype, name, "the result")

        return LazyTensor(shape, dtype, make, origin_of(state, first))

    return DerivedState({name: lazy(name) for name in raw})
