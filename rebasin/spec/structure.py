"""The symmetries of one group of neurons as data: cells, the sites where they act, and the tree of legal permutations.

See `rebasin.spec` for the words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Indices = range | np.ndarray
"""Positions or neuron numbers, int64 [n]; a `range` wherever they are regular, so that SDXL's spec stays small."""


def indices(values: Any) -> Indices:
    """`values` as a range if they are an arithmetic progression, else as an int64 array."""
    if isinstance(values, range):
        return values
    array = np.asarray(values, dtype=np.int64)
    if array.size == 0:
        return range(0)
    if array.size == 1:
        return range(int(array[0]), int(array[0]) + 1)
    step = int(array[1] - array[0])
    if step > 0 and np.array_equal(array, array[0] + step * np.arange(array.size)):
        return range(int(array[0]), int(array[-1]) + 1, step)
    return array


def to_array(values: Indices) -> np.ndarray:
    """int64 [n] of a range or an array."""
    return np.arange(values.start, values.stop, values.step) if isinstance(values, range) else values


def is_whole(values: Indices, size: int) -> bool:
    """Whether they are 0, 1, ... size - 1. Never compare `Indices` by ==, which an array answers number by number."""
    return isinstance(values, range) and values == range(size)


@dataclass(frozen=True, eq=False)
class Site:
    """Neuron i of a cell sits at `positions[i]` of axis `axis` of `parameter`."""

    parameter: str
    axis: int
    positions: Indices


@dataclass(frozen=True, eq=False)
class Cell:
    """Exchangeable neurons; one that occurs several times on an axis (conv, flatten, linear) has several sites."""

    name: str
    size: int
    sites: tuple[Site, ...]


@dataclass(frozen=True, eq=False)
class Leaf:
    """Every permutation of `neurons` (numbers within cell number `cell` of the group)."""

    cell: int
    neurons: Indices


@dataclass(frozen=True, eq=False)
class Branch:
    """`children` may be permuted as wholes; where they may, they are isomorphic, leaf by leaf, in order."""

    children: tuple[Node, ...]
    moves: Literal["fixed", "any"] | tuple[tuple[int, ...], ...]


Node = Leaf | Branch


@dataclass(frozen=True, eq=False)
class Group:
    """Cells that are permuted together, and the tree of their legal permutations."""

    name: str
    cells: tuple[Cell, ...]
    tree: Node

    @property
    def neurons(self) -> int:
        return sum(cell.size for cell in self.cells)

    @property
    def structure(self) -> str:
        """The group in the notation of algebra, for example `(S64 x S64) wr S8` for eight heads."""
        return _structure(self.tree)

    @property
    def log10_size(self) -> float:
        """log10 of the number of legal permutations."""
        return _log10_size(self.tree)


def first_leaf(node: Node) -> Leaf:
    while isinstance(node, Branch):
        node = node.children[0]
    return node


def draw(group: Group, dst: Node, src: Node, index: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    """Fill the neurons of `dst` from a random arrangement of those of `src`."""
    if isinstance(dst, Leaf):
        assert isinstance(src, Leaf)
        source = to_array(src.neurons)
        index[group.cells[dst.cell].name][to_array(dst.neurons)] = source[rng.permutation(source.size)]
        return
    assert isinstance(src, Branch)
    n = len(dst.children)
    if dst.moves == "any":
        order = rng.permutation(n)
    elif dst.moves == "fixed":
        order = np.arange(n)
    else:
        order = np.asarray(dst.moves[rng.integers(len(dst.moves))])
    for child, chosen in zip(dst.children, order, strict=True):
        draw(group, child, src.children[chosen], index, rng)


def admits(group: Group, index: Mapping[str, np.ndarray]) -> bool:
    """Whether the cells' `index`, cell name -> [size], is a legal permutation of `group`."""
    return _is_member(group, group.tree, group.tree, index)


def _is_member(group: Group, dst: Node, src: Node, index: Mapping[str, np.ndarray]) -> bool:
    """Whether `index` fills the neurons of `dst` from those of `src` by a legal arrangement."""
    if isinstance(dst, Leaf):
        if not isinstance(src, Leaf):
            return False
        image = index[group.cells[dst.cell].name][to_array(dst.neurons)]
        return bool(np.array_equal(np.sort(image), np.sort(to_array(src.neurons))))
    assert isinstance(src, Branch)
    owner = {(c, int(x)): j for j, child in enumerate(src.children) for c, x in _leading(child)}
    order: list[int] = []
    for child in dst.children:
        leaf = first_leaf(child)
        chosen = owner.get((leaf.cell, int(index[group.cells[leaf.cell].name][leaf.neurons[0]])))
        if chosen is None:
            return False
        order.append(chosen)
    if dst.moves == "fixed" and order != list(range(len(order))):
        return False
    if sorted(order) != list(range(len(order))) or (
        isinstance(dst.moves, tuple) and tuple(order) not in dst.moves
    ):
        return False
    return all(_is_member(group, c, src.children[j], index) for c, j in zip(dst.children, order, strict=True))


def _leading(node: Node) -> Iterator[tuple[int, int]]:
    """All (cell, neuron) that may stand first in the first leaf of `node`: its blocks may be permuted inside, too."""
    if isinstance(node, Leaf):
        for neuron in to_array(node.neurons):
            yield node.cell, int(neuron)
        return
    heads = {"fixed": [0], "any": range(len(node.children))}.get(str(node.moves)) or sorted(
        {m[0] for m in node.moves}
    )
    for j in heads:
        yield from _leading(node.children[int(j)])


def _structure(node: Node) -> str:
    if isinstance(node, Leaf):
        return f"S{len(node.neurons)}"
    inner = [_structure(child) for child in node.children]
    if node.moves == "any":
        one = inner[0] if inner[0].isalnum() else f"({inner[0]})"
        return f"{one} wr S{len(inner)}" if one != "(S1)" and one != "S1" else f"S{len(inner)}"
    counted: list[tuple[str, int]] = []
    for text in inner:
        text = text if text.isalnum() or (node.moves == "fixed" and " x " not in text) else f"({text})"
        if counted and counted[-1][0] == text:
            counted[-1] = (text, counted[-1][1] + 1)
        else:
            counted.append((text, 1))
    product = " x ".join(text if n == 1 else f"{text}^{n}" for text, n in counted if text != "S1") or "1"
    return product if node.moves == "fixed" else f"({product}) with {len(node.moves)} orders"


def _log10_size(node: Node) -> float:
    if isinstance(node, Leaf):
        return math.lgamma(len(node.neurons) + 1) / math.log(10)
    own = {"fixed": 0.0, "any": math.lgamma(len(node.children) + 1) / math.log(10)}
    outer = own[node.moves] if isinstance(node.moves, str) else math.log10(len(node.moves))
    return outer + sum(_log10_size(child) for child in node.children)
