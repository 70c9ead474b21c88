"""Exact assignment over a group's tree, against every legal permutation of small groups."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from rebasin.matching.assignment.blocks import assign, independent
from rebasin.matching.assignment.linear_assignment import linear_assignment
from rebasin.spec import Branch, Cell, Group, Indices, Leaf, Node, Permutation, PermutationSpec

Index = dict[str, np.ndarray]


def fillings(group: Group, dst: Node, src: Node) -> Iterator[Index]:
    """Every legal way to fill the neurons of `dst` from those of `src`."""
    if isinstance(dst, Leaf):
        assert isinstance(src, Leaf)
        for chosen in itertools.permutations(src.neurons):
            index = np.full(group.cells[dst.cell].size, -1)
            index[np.asarray(dst.neurons)] = chosen
            yield {group.cells[dst.cell].name: index}
        return
    assert isinstance(src, Branch)
    n = len(dst.children)
    if dst.moves == "any":
        orders = list(itertools.permutations(range(n)))
    else:
        orders = [tuple(range(n))] if dst.moves == "fixed" else list(dst.moves)
    for order in orders:
        each = [
            list(fillings(group, child, src.children[k]))
            for child, k in zip(dst.children, order, strict=True)
        ]
        for parts in itertools.product(*each):
            merged: Index = {}
            for part in parts:
                for name, index in part.items():
                    merged[name] = np.maximum(merged.get(name, index), index)
            yield merged


def value(costs: Index, index: Index) -> float:
    return sum(float(costs[name][np.arange(len(i)), i].sum(dtype=np.float64)) for name, i in index.items())


def leaves(cell: int, *neurons: object) -> tuple[Leaf, ...]:
    return tuple(Leaf(cell, n if isinstance(n, range) else np.asarray(n)) for n in neurons)


def group(tree: Node, **cells: int) -> Group:
    return Group("g", tuple(Cell(name, size, ()) for name, size in cells.items()), tree)


HEADS = group(
    Branch(
        tuple(
            Branch((Leaf(0, range(2 * h, 2 * h + 2)), Leaf(1, range(3 * h, 3 * h + 3))), "fixed")
            for h in range(3)
        ),
        "any",
    ),
    qk=6,
    vo=9,
)
GROUPS = {
    "free": group(Leaf(0, range(5)), c=5),
    "blocks in place": group(Branch(leaves(0, range(3), [3, 5, 7], [4, 6]), "fixed"), c=8),
    "group norm": group(Branch(leaves(0, range(3), range(3, 6), range(6, 9)), "any"), c=9),
    "scattered blocks": group(Branch(leaves(0, [0, 4], [1, 5], [2, 3]), "any"), c=6),
    "heads": HEADS,
    "nested wreath": group(
        Branch(
            (
                Branch(leaves(0, range(2), range(2, 4)), "any"),
                Branch(leaves(0, range(4, 6), range(6, 8)), "any"),
            ),
            "any",
        ),
        c=8,
    ),
    "wreath of pairs of wreaths": group(
        Branch(
            tuple(
                Branch(
                    (
                        Branch(leaves(0, [4 * h, 4 * h + 1], [4 * h + 2, 4 * h + 3]), "any"),
                        Leaf(1, range(2 * h, 2 * h + 2)),
                    ),
                    "fixed",
                )
                for h in range(2)
            ),
            "any",
        ),
        c=8,
        e=4,
    ),
    "mirror": group(Branch(leaves(0, [0, 1], [2, 3, 4], [5, 6], [7]), ((0, 1, 2, 3), (2, 1, 0, 3))), c=8),
    "cyclic": group(Branch(leaves(0, [0, 1], [2, 3], [4, 5]), ((0, 1, 2), (1, 2, 0), (2, 0, 1))), c=6),
    "cyclic orders under any": group(
        Branch(
            tuple(
                Branch(leaves(0, [4 * h, 4 * h + 1], [4 * h + 2, 4 * h + 3]), ((0, 1), (1, 0)))
                for h in range(2)
            ),
            "any",
        ),
        c=8,
    ),
    "different kinds side by side": group(
        Branch((Leaf(1, range(3)), Branch(leaves(0, range(2), range(2, 4)), "any")), "fixed"), c=4, e=3
    ),
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("kind", ["random", "signal", "integers", "same"])
def test_nothing_legal_is_better(name: str, kind: str) -> None:
    g = GROUPS[name]
    rng = np.random.default_rng(7)
    every = list(fillings(g, g.tree, g.tree))
    spec = PermutationSpec((g,), {})
    for _ in range(4):
        costs = {c.name: rng.standard_normal((c.size, c.size)).astype(np.float32) for c in g.cells}
        if kind == "signal":  # a planted legal permutation stands out: the shortcuts apply
            planted = every[rng.integers(len(every))]
            for cell, index in planted.items():
                costs[cell][np.arange(len(index)), index] += 6
        elif kind == "integers":  # many ties
            costs = {cell: np.round(c) for cell, c in costs.items()}
        elif kind == "same":
            costs = {cell: np.ones_like(c) for cell, c in costs.items()}
        best = max(value(costs, index) for index in every)
        stay = sum(float(np.trace(c.astype(np.float64))) for c in costs.values())
        found = assign(g, costs)
        assert value(costs, dict(found.index)) == pytest.approx(best, rel=1e-9, abs=1e-9)
        assert found.value == pytest.approx(best, rel=1e-9, abs=1e-9)
        assert found.gain == pytest.approx(best - stay, rel=1e-9, abs=1e-9)
        assert spec.contains(Permutation(spec, found.index))
        if best <= stay:
            assert Permutation(spec, found.index).is_identity
            assert found.gain == 0.0


def test_many_blocks_of_several_cells_reach_what_all_inner_problems_give() -> None:
    from scipy.optimize import linear_sum_assignment

    heads, d = 8, 12
    tree = Branch(
        tuple(
            Branch(leaves(0, range(d * h, d * h + d)) + leaves(1, range(d * h, d * h + d)), "fixed")
            for h in range(heads)
        ),
        "any",
    )
    g = group(tree, qk=heads * d, vo=heads * d)
    rng = np.random.default_rng(0)
    for noise in (0.0, 0.3, 3.0):
        planted = PermutationSpec((g,), {}).random(int(10 * noise)).index
        costs = {
            name: (np.eye(heads * d)[i] + noise * rng.standard_normal((heads * d,) * 2)).astype(np.float32)
            for name, i in planted.items()
        }
        inner = np.zeros((heads, heads))
        for c in costs.values():
            for i, j in np.ndindex(heads, heads):
                block = c[d * i : d * i + d, d * j : d * j + d]
                rows, columns = linear_sum_assignment(block, maximize=True)
                inner[i, j] += block[rows, columns].sum(dtype=np.float64)
        rows, columns = linear_sum_assignment(inner, maximize=True)
        found = assign(g, costs)
        assert found.value == pytest.approx(inner[rows, columns].sum(), rel=1e-9)
        assert value(costs, dict(found.index)) == pytest.approx(found.value, rel=1e-9)
        if noise == 0:
            assert all(np.array_equal(found.index[n], planted[n]) for n in planted)


def test_blocks_in_place_are_asked_for_one_by_one_and_others_never() -> None:
    asked: list[tuple[list[int], list[int]]] = []

    def costs(places: Indices, neurons: Indices) -> np.ndarray:
        asked.append((list(places), list(neurons)))
        return np.eye(len(asked[-1][0]))[::-1].copy()

    found = assign(GROUPS["blocks in place"], {"c": costs})
    assert asked == [([0, 1, 2], [0, 1, 2]), ([3, 5, 7], [3, 5, 7]), ([4, 6], [4, 6])]
    assert found.index["c"].tolist() == [2, 1, 0, 7, 6, 5, 4, 3]


def test_independent_subtrees_can_be_arranged_alone() -> None:
    g = GROUPS["different kinds side by side"]
    units = independent(g.tree)
    assert len(units) == 2
    costs = {"c": np.eye(4)[[1, 0, 3, 2]], "e": np.eye(3)[[1, 2, 0]]}
    alone = assign(g, costs, units=units[:1])
    assert alone.index["c"].tolist() == [0, 1, 2, 3]
    assert alone.index["e"].tolist() == [1, 2, 0]


def test_the_identity_wins_ties_inside_and_outside_of_blocks() -> None:
    g = GROUPS["group norm"]
    costs = np.zeros((9, 9), dtype=np.float32)
    costs[0:3, 3:6] = costs[3:6, 0:3] = 2.0  # the first two blocks gain by changing places
    index = assign(g, {"c": costs}).index["c"]
    assert sorted(index[:3]) == [3, 4, 5]
    assert index[6:].tolist() == [6, 7, 8]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_gain_within_rounding_moves_nothing(scale: float) -> None:
    costs = scale * np.ones((4, 4))
    costs[0, 1] += 1e-14 * scale
    assert assign(GROUPS["nested wreath"], {"c": np.tile(costs, (2, 2))}).gain == 0.0
    column, _, gain = linear_assignment(torch.from_numpy(costs))
    assert column.tolist() == [0, 1, 2, 3]
    assert gain == 0.0
