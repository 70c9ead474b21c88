"""How a tensor of a component lies in a tensor of a file, and the lazy states that read and write it there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..tensors.writer import convert
from ..types import DerivedState, LazyTensor, State, dtype_of, origin_of, passed, shape_of


@dataclass(frozen=True)
class KeyMapping:
    """Tensor `name` of a component is tensor `source` of a file, or a part or another shape of it.

    how: "same"; "matrix", a 1x1 convolution [m, n, 1, 1] there and a matrix [m, n] here (or a matrix there, too);
    "transposed"; "rows", rows `part` of `parts` equal ones.
    """

    name: str
    source: str
    how: Literal["same", "matrix", "transposed", "rows"] = "same"
    part: int = 0
    parts: int = 1

    def shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """The shape here of a tensor that has the shape `source` there.

        Raises:
            IndexError: a tensor of that shape can't be it.
        """
        if (self.how == "transposed" and len(source) != 2) or (self.how == "rows" and source[0] % self.parts):
            raise IndexError(self.source)
        if self.how == "matrix":
            return source[:2]
        if self.how == "transposed":
            return source[::-1]
        return (source[0] // self.parts, *source[1:]) if self.how == "rows" else source

    def read(self, tensor: Tensor) -> Tensor:
        """The tensor here, from the one there."""
        if self.how == "matrix":
            return tensor.reshape(self.shape(tuple(tensor.shape)))
        if self.how == "transposed":
            return tensor.t().contiguous()
        return tensor.chunk(self.parts)[self.part].clone() if self.how == "rows" else tensor


def write(keys: Sequence[KeyMapping], tensors: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """The tensor there, of this shape, from those here: the inverse of `KeyMapping.read` for all of one source."""
    first = keys[0]
    if first.how == "rows":
        order = sorted(range(len(keys)), key=lambda i: keys[i].part)
        return torch.cat([tensors[i] for i in order])
    if first.how == "transposed":
        return tensors[0].t().contiguous()
    return tensors[0].reshape(shape)


def component_state(raw: State, keys: Iterable[KeyMapping]) -> DerivedState:
    """A component of a checkpoint in diffusers' names; each tensor is read from the file when it is asked for."""

    def lazy(key: KeyMapping) -> LazyTensor:
        shape = key.shape(shape_of(raw, key.source))
        origin = origin_of(raw, key.source)
        return LazyTensor(shape, dtype_of(raw, key.source), lambda: key.read(raw[key.source]), origin)

    return DerivedState({key.name: lazy(key) for key in keys})


def shapes_of(state: State) -> dict[str, tuple[int, ...]]:
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
    by_source: dict[str, tuple[State, list[KeyMapping]]] = {}
    for component, state in states.items():
        for key in keys[component]:
            by_source.setdefault(key.source, (state, []))[1].append(key)

    def lazy(name: str) -> LazyTensor:
        state, own = by_source.get(name, (raw, []))
        if not any(key.name in state for key in own):
            return passed(raw, name)
        shape, stored = shape_of(raw, name), dtype_of(raw, name)
        dtype = stored if keep_dtype else dtype_of(state, next(x.name for x in own if x.name in state))

        def make() -> Tensor:
            if all(key.name in state for key in own):
                tensors = [state[key.name] for key in own]
            else:
                old = raw[name]
                tensors = [state[x.name] if x.name in state else x.read(old) for x in own]
            return convert(
                write(own, [t.to(tensors[0].dtype) for t in tensors], shape), dtype, name, "the result"
            )

        from_file = next((origin_of(state, x.name) for x in own if x.name in state), None)
        return LazyTensor(shape, dtype, make, from_file)

    return DerivedState({name: lazy(name) for name in raw})
