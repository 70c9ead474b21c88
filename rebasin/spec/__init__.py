"""The permutation symmetries of an architecture as data: what may move, together with what, and where it acts.

A **neuron** is an index along a permutable dimension. Neurons that are exchangeable form a **cell**; a cell acts at
**sites**, each an axis of a parameter. Cells whose permutations are coupled by block structure (attention heads,
GroupNorm) form a **group**; its tree says which permutations are legal:

    Leaf(cell, neurons)      every permutation of these neurons, S_k
    Branch(children, moves)  children in place ("fixed"), in any order ("any", a wreath product) or in one of the
                             listed orders (the automorphisms of overlapping partitions)

The semantics of a permutation is that of the paper's code: `new[i] = old[index[i]]` along every site.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, SpecMismatchError
from ..types import LazyState, State, dtype_of, shape_of

FORMAT = 1

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


@dataclass(frozen=True)
class Pin:
    """`count` positions of a parameter's axis that may not move, and the operator that forbids it."""

    parameter: str
    axis: int
    count: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Shares (0 to 1) of all parameters with at least one, and of the matrices' with both, axes permuted."""

    one: float
    both: float


@dataclass(frozen=True, eq=False)
class PermutationSpec:
    """All groups of an architecture and where they act.

    `shapes` has every floating point parameter and persistent buffer, `buffers` those that are moved but are no
    parameters (running statistics), `aliases` other names of the same tensor (tied weights), `pins` what stays.
    """

    groups: tuple[Group, ...]
    shapes: Mapping[str, tuple[int, ...]]
    buffers: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    pins: tuple[Pin, ...] = ()

    def __repr__(self) -> str:
        return f"PermutationSpec({self.neurons:,} neurons in {len(self.groups)} groups, {self.hash[:12]})"

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PermutationSpec) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    @cached_property
    def cells(self) -> dict[str, Cell]:
        """Every cell by name."""
        return {cell.name: cell for group in self.groups for cell in group.cells}

    @cached_property
    def axes(self) -> dict[str, dict[int, tuple[tuple[str, Site], ...]]]:
        """parameter -> axis -> the (cell name, site) pairs that act there."""
        found: dict[str, dict[int, list[tuple[str, Site]]]] = {}
        for cell in self.cells.values():
            for site in cell.sites:
                found.setdefault(site.parameter, {}).setdefault(site.axis, []).append((cell.name, site))
        return {name: {axis: tuple(s) for axis, s in sorted(by.items())} for name, by in found.items()}

    @property
    def neurons(self) -> int:
        return sum(group.neurons for group in self.groups)

    @cached_property
    def hash(self) -> str:
        """sha256 of what the spec permits (names, shapes, groups; not the prose of its pins)."""
        payload = self._payload()
        payload.pop("pins")
        return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()

    def identity(self) -> Permutation:
        return Permutation(self, {name: np.arange(cell.size) for name, cell in self.cells.items()})

    def random(self, seed: int = 0) -> Permutation:
        """A uniformly drawn member of the group."""
        rng = np.random.default_rng(seed)
        index = {name: np.arange(cell.size) for name, cell in self.cells.items()}
        for group in self.groups:
            _draw(group, group.tree, group.tree, index, rng)
        return Permutation(self, index)

    def contains(self, permutation: Permutation) -> bool:
        """Whether `permutation` is legal: a member of the group that the trees describe."""
        return permutation.spec == self and all(admits(group, permutation.index) for group in self.groups)

    def coverage(self) -> Coverage:
        total = one = matrices = both = 0.0
        for name, shape in self.shapes.items():
            if name in self.buffers or name in self.aliases:
                continue
            numel = math.prod(shape)
            share = [
                sum(len(site.positions) for _, site in self.axes.get(name, {}).get(axis, ())) / max(size, 1)
                for axis, size in enumerate(shape)
            ]
            total += numel
            one += numel * (1 - math.prod(1 - s for s in share))
            if len(shape) >= 2:
                matrices += numel
                both += numel * share[0] * share[1]
        return Coverage(one / total if total else 0.0, both / matrices if matrices else 0.0)

    def summary(self, max_rows: int | None = None) -> str:
        """The table a person reads: groups, sizes, structure, where they act, what is pinned and by what."""
        coverage = self.coverage()
        lines = [
            f"{self.neurons:,} neurons in {len(self.groups)} groups ({len(self.cells)} cells); parameters with at"
            f" least one axis permuted {coverage.one:.4%}, with both {coverage.both:.1%}"
            f" (of those that have two)",
            "",
            f"{'group':44}  {'neurons':>8}  {'structure':28}  acts on",
        ]
        for group in self.groups[:max_rows]:
            sites = [f"{s.parameter}[{s.axis}]" for cell in group.cells for s in cell.sites]
            sites = list(dict.fromkeys(sites))
            where = ", ".join(sites[:3]) + (f" and {len(sites) - 3} more" if len(sites) > 3 else "")
            lines.append(f"{group.name:44}  {group.neurons:>8,}  {group.structure:28}  {where}")
        if max_rows is not None and len(self.groups) > max_rows:
            lines.append(f"... and {len(self.groups) - max_rows} more groups")
        if self.pins:
            lines += ["", f"{'pinned axis':56}  {'count':>8}  by"]
            for pin in self.pins[:max_rows]:
                lines.append(f"{pin.parameter + f'[{pin.axis}]':56}  {pin.count:>8,}  {pin.reason}")
            if max_rows is not None and len(self.pins) > max_rows:
                lines.append(f"... and {len(self.pins) - max_rows} more pinned axes")
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "hash": self.hash, **self._payload()})

    @classmethod
    def from_json(cls, text: str) -> PermutationSpec:
        try:
            data = json.loads(text)
            version = data["format"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise SpecMismatchError(
                "This text is not a permutation spec: it is no JSON with a 'format'."
            ) from error
        if version != FORMAT:
            raise SpecMismatchError(
                f"The permutation spec has format {version}, but this version reads {FORMAT}; trace the model again."
            )
        spec = cls(
            groups=tuple(_group_from(g) for g in data["groups"]),
            shapes={name: tuple(shape) for name, shape in data["shapes"].items()},
            buffers=frozenset(data["buffers"]),
            aliases=data["aliases"],
            pins=tuple(Pin(*pin) for pin in data["pins"]),
        )
        if spec.hash != data["hash"]:
            raise SpecMismatchError(
                "The permutation spec is damaged: its hash does not fit; trace the model again."
            )
        return spec

    def _payload(self) -> dict[str, Any]:
        return {
            "groups": [_group_to(g) for g in self.groups],
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "buffers": sorted(self.buffers),
            "aliases": dict(self.aliases),
            "pins": [[p.parameter, p.axis, p.count, p.reason] for p in self.pins],
        }

    def check(self, state: State, what: str = "the state") -> None:
        """Raise `SpecMismatchError` if `state` misses a tensor that the spec moves or has another shape for it."""
        for name in self.axes:
            tensor = _get(state, name, self.aliases)
            if tensor is None:
                raise SpecMismatchError(f"{what} has no tensor {name!r}, which the spec permutes.")
            if shape_of(state, tensor) != tuple(self.shapes[name]):
                raise SpecMismatchError(
                    f"Tensor {name!r} of {what} has shape {shape_of(state, tensor)}, but the spec expects"
                    f" {tuple(self.shapes[name])}: it was traced for another architecture."
                )


@dataclass(frozen=True, eq=False)
class Permutation:
    """One member of a spec's symmetry group: cell name -> int64 [size], `new[i] = old[index[i]]`."""

    spec: PermutationSpec
    index: Mapping[str, np.ndarray]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Permutation)
            and self.spec == other.spec
            and all(np.array_equal(p, other.index[name]) for name, p in self.index.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Permutation({self.moved():,} of {self.spec.neurons:,} neurons moved)"

    def apply(self, state: State) -> dict[str, Tensor]:
        """`state` with its neurons permuted; tensors that do not move are passed on, nothing is changed in place.

        `state` is any mapping name -> tensor, lazy ones and ones with further keys included.

        Raises:
            SpecMismatchError: a tensor is missing or has another shape; it names the tensor and both shapes.
        """
        self.spec.check(state)
        return {name: self.apply_to(name, state[name]) for name in state}

    def view(self, state: State) -> PermutedState:
        """`state` with its neurons permuted when a tensor is read: what `apply` gives, without holding it.

        Raises:
            SpecMismatchError: a tensor is missing or has another shape; it names the tensor and both shapes.
        """
        self.spec.check(state)
        return PermutedState(self, state)

    def apply_to(self, name: str, tensor: Tensor) -> Tensor:
        """One tensor of a state, by its name: the streaming form of `apply`."""
        for axis, index in self.axes_of(name):
            if axis >= tensor.ndim or tensor.shape[axis] != len(index):
                raise SpecMismatchError(
                    f"Tensor {name!r} has shape {tuple(tensor.shape)}, but the spec expects"
                    f" {tuple(self.spec.shapes[self.spec.aliases.get(name, name)])}."
                )
            tensor = tensor.index_select(axis, torch.from_numpy(index).to(tensor.device))
        return tensor

    def axes_of(self, name: str, skip: str | None = None) -> list[tuple[int, np.ndarray]]:
        """The (axis, int64 index [axis size]) pairs that move tensor `name`; identities and cell `skip` left out."""
        name = self.spec.aliases.get(name, name)
        moves = []
        for axis, sites in self.spec.axes.get(name, {}).items():
            full = np.arange(self.spec.shapes[name][axis])
            moved = False
            for cell, site in sites:
                perm = self.index[cell]
                if cell != skip and not _is_identity(perm):
                    positions = to_array(site.positions)
                    full[positions] = positions[perm]
                    moved = True
            if moved:
                moves.append((axis, full))
        return moves

    def invert(self) -> Permutation:
        return Permutation(self.spec, {name: np.argsort(p) for name, p in self.index.items()})

    def compose(self, other: Permutation) -> Permutation:
        """The permutation that applies `other` first: `p.compose(q).apply(s) == p.apply(q.apply(s))`."""
        if self.spec != other.spec:
            raise SpecMismatchError("Permutations of two different specs can't be composed.")
        return Permutation(self.spec, {name: other.index[name][p] for name, p in self.index.items()})

    @property
    def is_identity(self) -> bool:
        return all(_is_identity(p) for p in self.index.values())

    def moved(self) -> int:
        """The number of neurons that do not stay where they are."""
        return displaced(self.index.values())

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """A safetensors file with one int32 tensor a cell; its header has the spec, so the file stands alone."""
        target = Path(path)
        tensors = {name: torch.from_numpy(p.astype(np.int32)) for name, p in self.index.items()}
        # One entry only: safetensors writes several in another order in each process, and files should be equal.
        header = {"spec": json.dumps({**json.loads(self.spec.to_json()), "metadata": dict(metadata or {})})}
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata=header)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Permutation:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is no permutation, is damaged, or holds an illegal permutation.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                if "spec" not in header:
                    raise CheckpointError(f"{path} holds no permutation: its header has no spec.")
                index = {name: file.get_tensor(name).numpy().astype(np.int64) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} can't be read as a permutation file: {error}.") from error
        spec = PermutationSpec.from_json(header["spec"])
        if set(index) != set(spec.cells):
            raise CheckpointError(f"{path} is damaged: its tensors are not the cells of its spec.")
        permutation = cls(spec, index)
        if not spec.contains(permutation):
            raise CheckpointError(f"{path} holds a permutation that its own spec does not allow.")
        return permutation


class PermutedState(LazyState):
    """A state seen through a permutation; each tensor is read and moved when it is asked for."""

    def __init__(self, permutation: Permutation, state: State) -> None:
        self.permutation = permutation
        self.state = state

    def __getitem__(self, name: str) -> Tensor:
        return self.permutation.apply_to(name, self.state[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return shape_of(self.state, name)

    def dtype_of(self, name: str) -> torch.dtype:
        return dtype_of(self.state, name)


def _is_identity(perm: np.ndarray) -> bool:
    return bool((perm == np.arange(perm.size)).all())


def _get(state: State, name: str, aliases: Mapping[str, str]) -> str | None:
    """The key under which `state` has tensor `name`: a tied weight may be there under any of its names."""
    if name in state:
        return name
    return next((alias for alias, target in aliases.items() if target == name and alias in state), None)


def _draw(group: Group, dst: Node, src: Node, index: dict[str, np.ndarray], rng: np.random.Generator) -> None:
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
        _draw(group, child, src.children[chosen], index, rng)


def first_leaf(node: Node) -> Leaf:
    while isinstance(node, Branch):
        node = node.children[0]
    return node


def displaced(indices: Iterable[np.ndarray]) -> int:
    """How many neurons are not where they were, under indices [size] of any number of cells."""
    return sum(int(np.count_nonzero(index != np.arange(index.size))) for index in indices)


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


def _pack(values: Indices) -> list[Any]:
    if isinstance(values, range):
        return ["r", values.start, values.stop, values.step]
    return ["a", *values.tolist()]


def _unpack(packed: list[Any]) -> Indices:
    return range(*packed[1:]) if packed[0] == "r" else np.asarray(packed[1:], dtype=np.int64)


def _node_to(node: Node) -> list[Any]:
    if isinstance(node, Leaf):
        return ["leaf", node.cell, _pack(node.neurons)]
    return ["branch", node.moves, [_node_to(child) for child in node.children]]


def _node_from(data: list[Any]) -> Node:
    if data[0] == "leaf":
        return Leaf(data[1], _unpack(data[2]))
    moves: Any = data[1] if isinstance(data[1], str) else tuple(tuple(m) for m in data[1])
    return Branch(tuple(_node_from(child) for child in data[2]), moves)


def _group_to(group: Group) -> dict[str, Any]:
    cells = [
        [cell.name, cell.size, [[s.parameter, s.axis, _pack(s.positions)] for s in cell.sites]]
        for cell in group.cells
    ]
    return {"name": group.name, "cells": cells, "tree": _node_to(group.tree)}


def _group_from(data: dict[str, Any]) -> Group:
    cells = tuple(
        Cell(name, size, tuple(Site(p, axis, _unpack(positions)) for p, axis, positions in sites))
        for name, size, sites in data["cells"]
    )
    return Group(data["name"], cells, _node_from(data["tree"]))
