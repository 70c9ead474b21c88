"""The best legal permutation of one group for a linear objective, exactly, for every block structure.

Given what it gains to put neuron j at place i, for each cell of a group (`costs[i, j]`, so that `new[i] =
old[index[i]]`), find the member of the group with the largest total. The group's tree says how to divide
that:

    Leaf              a linear assignment
    Branch, "fixed"   its children one by one: they do not compete for anything
    Branch, "any"     the value of child j at place i is an assignment of its own; an outer assignment over
                      these values orders the children (attention heads: the inner value is that of q/k plus
                      that of v/out)
    Branch, listed    the best of the listed orders, by the same inner values

A leaf whose neurons a linear map mixes has nothing to be arranged inside: what it gains in another's place is given.

This is exact at any depth, since the best arrangement inside child j at place i depends on nothing outside
of it. The same code serves weights and activations: it only sees cost matrices.

Under an "any" branch of n children there are n^2 inner problems, nearly all of them irrelevant. `_Table`
therefore holds an upper bound for each, exact where a shortcut proved it. The outer problem is solved over
the bounds; if it chose exact values only, no other order can be better, since it falls short even by its
bounds. Otherwise the chosen ones are solved exactly, and the outer problem once more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...spec import Branch, Group, Indices, Leaf, Node, Permutation, PermutationSpec, indices, to_array
from ...spec.structure import is_whole
from ...types import brief
from .linear_assignment import TOLERANCE, linear_assignment, solved

Matrix = Tensor | np.ndarray
CostFunction = Callable[[Indices, Indices], Matrix]
"""(places [r], neurons [c]) -> that block of the cost matrix, [r, c]."""


class Costs(ABC):
    """Where the cost matrices come from; blocks that the tree rules out are never asked for."""

    @abstractmethod
    def block(self, cell: str, neurons: Indices) -> Tensor:
        """The costs [k, k] of `neurons` at each other's places."""

    def diagonal(self, cell: str, blocks: Sequence[Indices]) -> list[Tensor]:
        """`block` for each of `blocks`, which may be computed together."""
        return [self.block(cell, neurons) for neurons in blocks]

    def mixed(self, cell: str, leaves: Sequence[Indices]) -> tuple[list[np.ndarray], np.ndarray] | None:
        """Of leaves whose neurons are mixed by maps: their neurons, each in the order in which they correspond, and the
        value of each in the place of each, float64 [n, n]. None for leaves whose neurons are exchanged.
        """
        return None

    def duals(self, cell: str, neurons: Indices) -> Tensor | None:
        """What `learn` was told when these neurons were last assigned, [k], as they are ordered now, or None."""
        return None

    def learn(self, cell: str, neurons: Indices, duals: Tensor) -> None:  # noqa: B027 (optional)
        """Take note of the dual variables, float64 [k] on the CPU, that proved a solution (see `linear_assignment`)."""


@dataclass(frozen=True)
class GivenCosts(Costs):
    """Costs from outside: for each cell a matrix [size, size] or a function that gives a block of it."""

    costs: Mapping[str, Matrix | CostFunction]

    def block(self, cell: str, neurons: Indices) -> Tensor:
        given = self.costs[cell]
        if isinstance(given, Tensor | np.ndarray):
            matrix = torch.as_tensor(given)
            chosen = torch.from_numpy(to_array(neurons)).to(matrix.device)
            whole = is_whole(neurons, len(matrix))
            return matrix if whole else matrix[chosen[:, None], chosen]
        return torch.as_tensor(given(neurons, neurons))


@brief
@dataclass(frozen=True)
class Assignment:
    """The best arrangement, cell name -> int64 [size], its value, and its gain over moving nothing."""

    index: Mapping[str, np.ndarray]
    value: float
    gain: float


def assign(
    group: Group, costs: Costs | Mapping[str, Matrix | CostFunction], *, units: Sequence[Node] | None = None
) -> Assignment:
    """The legal permutation of `group` that maximises `sum over cells of sum_i costs[cell][i, index[i]]`.

    Neurons stay in place where moving them gains nothing, or less than the share TOLERANCE of the values compared. To
    prefer another permutation p, give the costs relative to it, `costs[:, p]`, and compose: `p[index]`.

    Args:
        group: the cells and the tree of their legal permutations.
        costs: for each cell a matrix [size, size], a function of (places, neurons) that gives a block of it,
            or anything that answers `Costs`. Finite.
        units: arrange only these subtrees (from `independent`) and leave the rest in place.
    """
    source: Costs = GivenCosts(costs) if isinstance(costs, Mapping) else costs
    index = {cell.name: np.arange(cell.size) for cell in group.cells}
    value = gain = 0.0
    free: dict[int, list[Indices]] = {}
    for unit in independent(group.tree) if units is None else units:
        if isinstance(unit, Leaf):
            if source.mixed(group.cells[unit.cell].name, [unit.neurons]) is None:
                free.setdefault(unit.cell, []).append(unit.neurons)
            continue
        table = _table(group, [unit], source)
        reached = table.arrange(0, 0, index)
        value += reached
        gain += reached - table.in_place(0)
    for cell, blocks in free.items():
        name = group.cells[cell].name
        for neurons, matrix in zip(blocks, source.diagonal(name, blocks), strict=True):
            known, learn = source.duals(name, neurons), partial(source.learn, name, neurons)
            column, reached, gained = linear_assignment(matrix, known, learn)
            index[name][to_array(neurons)] = to_array(neurons)[column]
            value += reached
            gain += gained
    return Assignment(index, value, gain)


def assign_all(spec: PermutationSpec, costs: Mapping[str, Matrix | CostFunction]) -> Permutation:
    """The best arrangement of every group, whose costs depend on no other group."""
    index: dict[str, np.ndarray] = {}
    for group in spec:
        index |= assign(group, costs).index
    return Permutation(spec, index)


def independent(tree: Node) -> list[Node]:
    """The subtrees that may be arranged one by one: what is left when the "fixed" branches at the top are
    opened.
    """
    if isinstance(tree, Branch) and tree.moves == "fixed":
        return [unit for child in tree.children for unit in independent(child)]
    return [tree]


def leaves(node: Node) -> list[Leaf]:
    """All leaves of a tree, in order."""
    return [node] if isinstance(node, Leaf) else [leaf for child in node.children for leaf in leaves(child)]


def _table(group: Group, nodes: Sequence[Node], costs: Costs) -> _Table:
    """The inner problems of isomorphic nodes: entry [i, j] is about filling the places of node i from node j.

    All tables have

        upper     float64 [n, n], no less than the best value of each problem
        exact     bool [n, n], whether `upper` is the best value itself
        tighten   lowers the bounds that are not exact, at the price of a few passes over the costs
        solve     makes entry [i, j] exact
        in_place  the value of leaving everything in node i where it is
        arrange   writes the best arrangement of problem [i, j] to `index`, in place if that is as good; its value
    """
    first = nodes[0]
    if isinstance(first, Leaf):
        leaves = [n for n in nodes if isinstance(n, Leaf)]
        cell = group.cells[first.cell].name
        mixed = costs.mixed(cell, [leaf.neurons for leaf in leaves])
        return _LeafTable(group, leaves, costs) if mixed is None else _MixedTable(cell, *mixed)
    return _OrderTable(group, [n for n in nodes if isinstance(n, Branch)], costs)


class _LeafTable:
    """Linear assignments between blocks of d neurons each, the shortcut tried for all n^2 pairs at once."""

    def __init__(self, group: Group, leaves: Sequence[Leaf], costs: Costs) -> None:
        self.cell = group.cells[leaves[0].cell].name
        self.neurons = np.stack([to_array(leaf.neurons) for leaf in leaves])
        n, d = self.neurons.shape
        block = costs.block(self.cell, indices(self.neurons.reshape(-1)))
        self.costs = block.reshape(n, d, n, d).transpose(1, 2).contiguous()
        best, column = self.costs.max(dim=3)
        hit = torch.zeros(column.shape, dtype=torch.bool, device=column.device)
        hit.scatter_(2, column, True)
        self.upper = best.double().sum(dim=2).cpu().numpy()
        self.exact = hit.all(dim=2).cpu().numpy()
        self._stay = self.costs.diagonal(dim1=2, dim2=3).double().sum(dim=2).diagonal().cpu().numpy()
        self._column = column.cpu().numpy()
        self._tight = False

    @cached_property
    def host(self) -> np.ndarray:
        """The costs [n, n, d, d] where scipy can have them."""
        return self.costs.cpu().numpy()

    def tighten(self) -> None:
        # Row maxima u and what is then left in each column, v = max_i(c_ij - u_i) <= 0, are dual feasible:
        # u_i + v_j >= c_ij. So sum(u) + sum(v) bounds every assignment; the same with rows and columns
        # exchanged.
        open_ = ~self.exact
        if self._tight or not open_.any():
            return
        self._tight = True
        costs = self.costs[torch.from_numpy(open_).to(self.costs.device)].double()
        for axis in (1, 2):
            first = costs.amax(axis, keepdim=True)
            bound = first.sum(dim=(1, 2)) + (costs - first).amax(3 - axis).sum(dim=1)
            self.upper[open_] = np.minimum(self.upper[open_], bound.cpu().numpy())

    def solve(self, i: int, j: int) -> None:
        if self.exact[i, j]:
            return
        column, _ = solved(self.host[i, j])
        self._column[i, j] = column
        self.upper[i, j] = self.host[i, j][np.arange(len(column)), column].sum(dtype=np.float64)
        self.exact[i, j] = True

    def in_place(self, i: int) -> float:
        return float(self._stay[i])

    def arrange(self, i: int, j: int, index: dict[str, np.ndarray]) -> float:
        self.solve(i, j)
        value = float(self.upper[i, j])
        if i == j and _as_good(self._stay[i], value):
            return float(self._stay[i])
        index[self.cell][self.neurons[i]] = self.neurons[j][self._column[i, j]]
        return value


class _MixedTable:
    """Blocks that move as wholes, of which all values are known."""

    def __init__(self, cell: str, neurons: Sequence[np.ndarray], values: np.ndarray) -> None:
        self.cell, self.neurons, self.upper = cell, neurons, values
        self.exact = np.ones(values.shape, dtype=bool)

    def tighten(self) -> None: ...

    def solve(self, i: int, j: int) -> None: ...

    def in_place(self, i: int) -> float:
        return float(self.upper[i, i])

    def arrange(self, i: int, j: int, index: dict[str, np.ndarray]) -> float:
        index[self.cell][self.neurons[i]] = self.neurons[j]
        return float(self.upper[i, j])


class _OrderTable:
    """Nodes with k children, which may be reordered unless they are "fixed": entry [i, j] is an assignment of the
    children of j to those of i.

    Children that no legal order exchanges may be of different kinds, so each orbit has a table of its own,
    whose rows are the orbit's members in node 0, then those in node 1, and so on.
    """

    def __init__(self, group: Group, branches: Sequence[Branch], costs: Costs) -> None:
        first = branches[0]
        self.count = len(first.children)
        listed = [range(self.count)] if first.moves == "fixed" else first.moves
        self.moves = None if listed == "any" else [np.asarray(move) for move in listed]
        self.place, self.orbits = _orbits(self.count, self.moves)
        self.tables = [
            _table(group, [b.children[k] for b in branches for k in o], costs) for o in self.orbits
        ]
        n = len(branches)
        self.order: dict[tuple[int, int], np.ndarray] = {}
        self.exact = np.zeros((n, n), dtype=bool)
        if first.moves == "fixed":  # there is nothing to solve but the children
            self.exact = np.all([table.exact for table in self.tables], axis=0)
        self.upper = self._bounds(n)

    def _bounds(self, n: int) -> np.ndarray:
        upper = np.zeros((n, n))
        for table, orbit in zip(self.tables, self.orbits, strict=True):
            inner = table.upper.reshape(n, len(orbit), n, len(orbit))
            upper += np.minimum(inner.max(axis=3).sum(axis=1), inner.max(axis=1).sum(axis=2))
        return upper

    def _at(self, i: int, j: int, k: int, chosen: int) -> tuple[_Table, int, int]:
        """The table, row and column of putting child `chosen` of node j at child k's place in node i."""
        orbit, rank = self.place[k]
        size = len(self.orbits[orbit])
        return self.tables[orbit], i * size + rank, j * size + self.place[chosen][1]

    def tighten(self) -> None:
        for table in self.tables:
            table.tighten()
        bounds = self._bounds(len(self.upper))
        self.upper[~self.exact] = np.minimum(self.upper, bounds)[~self.exact]

    def _inner(self, i: int, j: int) -> np.ndarray:
        """float64 [k, k]: bounds on the values of the children of j at the places of those of i, -inf if
        illegal.
        """
        values = np.full((self.count, self.count), -np.inf)
        for table, orbit in zip(self.tables, self.orbits, strict=True):
            size = len(orbit)
            rows, columns = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
            values[np.ix_(orbit, orbit)] = table.upper[rows, columns]
        return values

    def solve(self, i: int, j: int) -> None:
        if self.exact[i, j]:
            return
        places = np.arange(self.count)
        tightened = False
        while True:
            values = self._inner(i, j)
            if self.moves is None:
                order = linear_sum_assignment(values, maximize=True)[1]
            else:
                order = max(self.moves, key=lambda move: values[places, move].sum())
            chosen = [self._at(i, j, k, int(order[k])) for k in range(self.count)]
            guessed = [(table, a, b) for table, a, b in chosen if not table.exact[a, b]]
            if not guessed:
                break
            if tightened:
                for table, a, b in guessed:
                    table.solve(a, b)
            else:
                for table in self.tables:
                    table.tighten()
                tightened = True
        self.order[i, j] = order
        self.upper[i, j] = values[places, order].sum()
        self.exact[i, j] = True

    def in_place(self, i: int) -> float:
        return sum(table.in_place(a) for table, a, _ in (self._at(i, i, k, k) for k in range(self.count)))

    def arrange(self, i: int, j: int, index: dict[str, np.ndarray]) -> float:
        self.solve(i, j)
        stay = np.arange(self.count)
        order = self.order.get((i, j), stay)
        listed = any(np.array_equal(stay, move) for move in self.moves or [stay])
        if i == j and listed and not np.array_equal(order, stay):
            for k in range(self.count):
                table, a, b = self._at(i, j, k, k)
                table.solve(a, b)
            if _as_good(float(self._inner(i, i).trace()), float(self.upper[i, i])):
                order = stay
        value = 0.0
        for k in range(self.count):
            table, a, b = self._at(i, j, k, int(order[k]))
            value += table.arrange(a, b, index)
        return value


def _orbits(
    count: int, moves: Sequence[np.ndarray] | None
) -> tuple[dict[int, tuple[int, int]], list[list[int]]]:
    """For children 0 to count-1: the orbit of each and its rank in it, and the members of every orbit."""
    orbit = list(range(count)) if moves is not None else [0] * count
    for move in moves or ():
        for place, child in enumerate(move):
            low, high = sorted((orbit[place], orbit[child]))
            orbit = [low if o == high else o for o in orbit]
    members = [[k for k in range(count) if orbit[k] == o] for o in sorted(set(orbit))]
    return {k: (number, rank) for number, m in enumerate(members) for rank, k in enumerate(m)}, members


def _as_good(stay: float, value: float) -> bool:
    return value - stay <= TOLERANCE * (abs(value) + abs(stay))


_Table = _LeafTable | _MixedTable | _OrderTable
