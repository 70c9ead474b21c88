"""Whether a spec that was read makes sense: every neuron has its places, and every tree moves what may be moved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from ..errors import shown
from ..files import SchemaError
from .continuous import DIAGONAL, ContinuousGroup
from .structure import Branch, Group, Indices, Leaf, Node, to_array

SHORT = 60
"""Characters of a name where a sentence has two."""

LARGEST = 1 << 25
"""Positions of a whole spec; SDXL has two million. More would be a file that wants memory, not a model."""


def require_sound(groups: Iterable[Group], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Cells have names of their own and places that exist, no two neurons share one, and trees have all neurons once.

    Raises:
        SchemaError: names what does not.
    """
    names: set[str] = set()
    taken: dict[tuple[str, int], list[Indices]] = {}
    total = 0
    for group in groups:
        for cell in group.cells:
            if cell.name in names or cell.size < 1:
                raise SchemaError(f"its cell {shown(cell.name, SHORT)} is there twice or empty")
            names.add(cell.name)
            total += cell.size * max(1, len(cell.sites))
            if total > LARGEST:
                raise SchemaError(f"it has more than {LARGEST:,} places of neurons")
            for site in cell.sites:
                shape = shapes.get(site.parameter, ())
                size = shape[site.axis] if 0 <= site.axis < len(shape) else 0
                # Ends first: a range of any length costs nothing.
                if len(site.positions) != cell.size or not _within(site.positions, size):
                    raise SchemaError(
                        f"its cell {shown(cell.name, SHORT)} of {cell.size:,} neurons has no such places in"
                        f" {shown(site.parameter, SHORT)}"
                    )
                taken.setdefault((site.parameter, site.axis), []).append(site.positions)
        _require_tree(group)
    for (parameter, _), positions in taken.items():
        if not _distinct(positions):
            raise SchemaError(f"two neurons share a place in {shown(parameter)}")


def require_sound_maps(groups: Iterable[ContinuousGroup], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Continuous groups have names of their own and places that exist, each of them once at a site.

    Raises:
        SchemaError: names what does not.
    """
    names: set[str] = set()
    total = 0
    for group in groups:
        if group.name in names or min(group.count, group.size) < 1 or not group.sites:
            raise SchemaError(f"its continuous group {shown(group.name, SHORT)} is there twice or empty")
        names.add(group.name)
        total += group.count * group.size * len(group.sites)
        if total > LARGEST:
            raise SchemaError(f"its continuous groups have more than {LARGEST:,} places")
        for site in group.sites:
            places = [(site.parameter, site.axis, site.positions)]
            if site.gain is not None:
                places.append((site.gain.parameter, 0, site.gain.positions))
            power_fits = site.power and (group.kind in DIAGONAL or abs(site.power) == 1)
            for parameter, axis, positions in places:
                shape = shapes.get(parameter, ())
                size = shape[axis] if 0 <= axis < len(shape) else 0
                fits = len(positions) == group.neurons and _within(positions, size) and _distinct([positions])
                if not (fits and power_fits):
                    raise SchemaError(
                        f"its continuous group {shown(group.name, SHORT)} of {group.neurons:,} neurons has no such"
                        f" places in {shown(parameter, SHORT)}"
                    )


def _within(positions: Indices, size: int) -> bool:
    return min(positions[0], positions[-1]) >= 0 and max(positions[0], positions[-1]) < size and (
        isinstance(positions, range) or (bool((positions >= 0).all()) and bool((positions < size).all()))
    )  # fmt: skip


def _distinct(positions: list[Indices]) -> bool:
    if len(positions) == 1 and isinstance(positions[0], range):
        return True
    joined = np.concatenate([to_array(one) for one in positions])
    return np.unique(joined).size == joined.size


def _require_tree(group: Group) -> None:
    leaves: dict[int, list[Indices]] = {number: [] for number in range(len(group.cells))}
    for leaf in _leaves(group.tree):
        if leaf.cell not in leaves or not len(leaf.neurons):
            raise SchemaError(f"the tree of its group {shown(group.name)} has an empty leaf or no such cell")
        leaves[leaf.cell].append(leaf.neurons)
    for number, parts in leaves.items():
        size = group.cells[number].size
        whole = sum(map(len, parts)) == size and all(_within(part, size) for part in parts)
        if not whole or not _distinct(parts):
            raise SchemaError(f"the tree of its group {shown(group.name)} has not every neuron once")
    _signature(group.tree)


def _leaves(node: Node) -> Iterator[Leaf]:
    if isinstance(node, Leaf):
        yield node
    else:
        for child in node.children:
            yield from _leaves(child)


def _signature(node: Node) -> object:
    """The same for parts that can stand in for each other; what may change places must be such parts."""
    if isinstance(node, Leaf):
        return node.cell, len(node.neurons)
    assert isinstance(node, Branch)
    own = [_signature(child) for child in node.children]
    n = len(own)
    orders = node.moves if isinstance(node.moves, tuple) else ()
    free = node.moves == "any" and any(other != own[0] for other in own)
    if free or any(
        sorted(o) != list(range(n)) or any(own[i] != own[j] for i, j in enumerate(o)) for o in orders
    ):
        raise SchemaError("a tree moves parts that are not alike")
    return node.moves, tuple(own)
