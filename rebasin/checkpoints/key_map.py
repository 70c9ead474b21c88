"""How a tensor of a component lies in a tensor of a file, and the lazy states that read and write it there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..tensors.writer import convert
from ..types import DerivedState, LazyTensor, State, dtype_of, passed, shape_of


@dataclass(frozen=True)
class Link:
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
        """The shape here of a tensor that has the shape `source` there."""
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


def write(links: Sequence[Link], tensors: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """The tensor there, of this shape, from those here: the inverse of `Link.read` for all links of one source."""
    first = links[0]
    if first.how == "rows":
        order = sorted(range(len(links)), key=lambda i: links[i].part)
        return torch.cat([tensors[i] for i in order])
    if first.how == "transposed":
        return tensors[0].t().contiguous()
    return tensors[0].reshape(shape)


def component_state(raw: State, links: Iterable[Link]) -> DerivedState:
    """A component of a checkpoint in diffusers' names; each tensor is read from the file when it is asked for."""

    def lazy(link: Link) -> LazyTensor:
        shape = link.shape(shape_of(raw, link.source))
        return LazyTensor(shape, dtype_of(raw, link.source), lambda: link.read(raw[link.source]))

    return DerivedState({link.name: lazy(link) for link in links})


def replaced(
    raw: State, links: Mapping[str, Sequence[Link]], states: Mapping[str, State], keep_dtype: bool = True
) -> DerivedState:
    """`raw` with components replaced; names and order stay, and with `keep_dtype` the types, too.

    Args:
        links: component -> its links into `raw`.
        states: component -> its new tensors; those that it lacks are taken from `raw`.
    """
    by_source: dict[str, tuple[State, list[Link]]] = {}
    for component, state in states.items():
        for link in links[component]:
            by_source.setdefault(link.source, (state, []))[1].append(link)

    def lazy(name: str) -> LazyTensor:
        state, own = by_source.get(name, (raw, []))
        if not any(link.name in state for link in own):
            return passed(raw, name)
        shape, stored = shape_of(raw, name), dtype_of(raw, name)
        dtype = stored if keep_dtype else dtype_of(state, next(x.name for x in own if x.name in state))

        def make() -> Tensor:
            if all(link.name in state for link in own):
                tensors = [state[link.name] for link in own]
            else:
                old = raw[name]
                tensors = [state[x.name] if x.name in state else x.read(old) for x in own]
            return convert(
                write(own, [t.to(tensors[0].dtype) for t in tensors], shape), dtype, name, "the result"
            )

        return LazyTensor(shape, dtype, make)

    return DerivedState({name: lazy(name) for name in raw})
