"""From solved parts over neurons to a `PermutationSpec` over parameters and positions."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from ..spec import UNREAD, Branch, Cell, Group, Leaf, Node, PermutationSpec, Pin, Site, indices
from .constraints import Constraints
from .maps import solve_maps
from .solve import Part, Solution


class _Builder:
    def __init__(self, constraints: Constraints, solution: Solution):
        size = constraints.size
        self.axes = constraints.axes
        self.rank = {(axis.parameter, axis.axis): k for k, axis in reversed([*enumerate(constraints.axes)])}
        self.axis = np.full(size, -1, dtype=np.int64)
        for number, axis in enumerate(constraints.axes):
            self.axis[axis.start : axis.start + axis.size] = number
        self.start = np.array([axis.start for axis in constraints.axes], dtype=np.int64)
        # The parameters' elements sorted by neuron, and within one neuron by slot: alike for all of a cell.
        own = np.flatnonzero(self.axis >= 0)
        self.elements = own[np.lexsort((solution.slot[own], solution.neuron[own]))]
        classes = int(solution.neuron.max()) + 1 if size else 0
        # Rows that these inputs never reach (a table of positions cut to their length) are not free: they are unknown.
        self.used = np.zeros(classes, dtype=bool)
        for a, b in (*constraints.ties, *constraints.members):
            self.used[solution.neuron[a]] = self.used[solution.neuron[b]] = True
        for elements in (*constraints.used, *(elements for elements, _, _ in constraints.marks)):
            self.used[solution.neuron[elements]] = True
        self.first = np.searchsorted(solution.neuron[self.elements], np.arange(classes + 1))
        self.names: set[str] = set()

    def has_sites(self, classes: np.ndarray) -> bool:
        return bool(self.used[classes[0]] and self.first[classes[0] + 1] > self.first[classes[0]])

    def prune(self, part: Part, moving: bool) -> Part | None:
        """Without what has no place in any parameter and, where nothing around moves, without single neurons."""
        if part.classes is not None:
            keep = self.has_sites(part.classes) and (moving or len(part.classes) > 1)
            return part if keep else None
        inner = [self.prune(child, moving or part.moves != "fixed") for child in part.children]
        kept = [k for k, child in enumerate(inner) if child is not None]
        if not kept:
            return None
        children = tuple(child for child in inner if child is not None)
        moves = part.moves
        if isinstance(moves, tuple):
            number = {k: i for i, k in enumerate(kept)}
            moves = tuple(sorted({tuple(number[m[k]] for k in kept) for m in moves}))
            moves = moves if len(moves) > 1 else "fixed"
            if moves == "fixed" and not moving:
                return self.prune(Part(part.key, children), moving)
        if len(children) == 1 and (moves == "fixed" or moves == "any"):
            return children[0]
        return Part(part.key, children, moves)

    def groups(self, parts: tuple[Part, ...]) -> list[Group]:
        pruned = [p for p in (self.prune(part, False) for part in parts) if p is not None]
        independent: list[Part] = []
        while pruned:
            part = pruned.pop()
            if part.classes is None and part.moves == "fixed":
                pruned.extend(part.children)
            else:
                independent.append(part)
        return [self.group(part) for part in sorted(independent, key=lambda p: p.first)]

    def group(self, part: Part) -> Group:
        by_kind: dict[tuple[int, ...], list[np.ndarray]] = {}

        def gather(node: Part, path: tuple[int, ...]) -> None:
            if node.classes is not None:
                by_kind.setdefault((node.colour, *path), []).append(node.classes)
            else:
                for k, child in enumerate(node.children):
                    # Children that change places share their cells; others have their own.
                    gather(child, path if node.moves == "any" else (*path, self.orbit(node, k)))

        gather(part, ())
        kinds = sorted(by_kind, key=lambda kind: min(int(c[0]) for c in by_kind[kind]))
        members = [np.sort(np.concatenate(by_kind[kind])) for kind in kinds]
        cells = tuple(self.cell(classes) for classes in members)

        def convert(node: Part, path: tuple[int, ...]) -> Node:
            if node.classes is not None:
                cell = kinds.index((node.colour, *path))
                return Leaf(cell, indices(np.searchsorted(members[cell], node.classes)))
            children = [
                convert(c, path if node.moves == "any" else (*path, self.orbit(node, k)))
                for k, c in enumerate(node.children)
            ]
            return Branch(tuple(children), node.moves)  # type: ignore[arg-type]

        return Group(cells[0].name, cells, convert(part, ()))

    @staticmethod
    def orbit(node: Part, child: int) -> int:
        return min(m[child] for m in node.moves) if isinstance(node.moves, tuple) else child

    def cell(self, classes: np.ndarray) -> Cell:
        width = int(self.first[classes[0] + 1] - self.first[classes[0]])
        table = self.elements[
            self.first[classes][:, None] + np.arange(width)
        ]  # [neurons, places of one neuron]
        axes = self.axis[table]
        if (axes != axes[0]).any():
            raise AssertionError("the neurons of a cell sit on different axes")
        sites = tuple(
            Site(self.axes[a].parameter, self.axes[a].axis, indices(table[:, k] - self.start[a]))
            for k, a in enumerate(axes[0])
        )
        sites = tuple(sorted(sites, key=lambda s: (self.rank[s.parameter, s.axis], s.positions[0])))
        return Cell(self.name(sites), len(classes), sites)

    def name(self, sites: tuple[Site, ...]) -> str:
        site = next((s for s in sites if s.axis == 0), sites[0])
        stem = site.parameter.removesuffix(".weight")
        name = stem if site.axis == 0 else f"{stem}[{site.axis}]"
        if name in self.names:
            name = f"{name}[{site.positions[0]}:]"
        while name in self.names:
            name += "'"
        self.names.add(name)
        return name


def build(
    constraints: Constraints,
    solution: Solution,
    shapes: Mapping[str, tuple[int, ...]],
    buffers: frozenset[str],
    aliases: Mapping[str, str],
    unread: Collection[str] = (),
) -> PermutationSpec:
    groups = tuple(_Builder(constraints, solution).groups(solution.parts))
    spec = PermutationSpec(groups, dict(shapes), buffers, dict(aliases))
    pins = _pins(constraints, solution, spec, unread)
    return PermutationSpec(groups, spec.shapes, buffers, spec.aliases, pins, solve_maps(constraints))


def _pins(
    constraints: Constraints, solution: Solution, spec: PermutationSpec, unread: Collection[str]
) -> tuple[Pin, ...]:
    """For each axis that does not move as a whole, who forbade it first."""
    reasons = ["is tied to neurons that differ in what else is done with them", "is used by no operator"]
    blame = np.zeros(int(solution.neuron.max()) + 1 if solution.neuron.size else 0, dtype=np.int64)
    hidden = np.zeros(blame.size, dtype=bool)
    for elements, _, reason in reversed(constraints.marks):
        if reason is None:
            hidden[solution.neuron[elements]] = True
        else:
            reasons.append(reason)
            blame[solution.neuron[elements]] = len(reasons) - 1
    pins = []
    for axis in constraints.axes:
        if axis.parameter in unread:
            pins.append(Pin(axis.parameter, axis.axis, axis.size, UNREAD))
            continue
        moved = np.zeros(axis.size, dtype=bool)
        for _, site in spec.axes.get(axis.parameter, {}).get(axis.axis, ()):
            moved[np.asarray(site.positions)] = True
        classes = solution.neuron[axis.start : axis.start + axis.size][~moved]
        if classes.size and not (hidden[classes] & (blame[classes] == 0)).all():
            values, counts = np.unique(blame[classes], return_counts=True)
            pins.append(Pin(axis.parameter, axis.axis, classes.size, reasons[values[np.argmax(counts)]]))
    return tuple(pins)
