"""Products kept between updates: the costs are those computed afresh, for less work."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from test_weight_matching import SPECS, State, chain, draw, free, mlp, noisy
from torch import Tensor

from rebasin.matching import weight_matching
from rebasin.matching.assignment.blocks import Costs, assign
from rebasin.matching.weights import matching, products
from rebasin.matching.weights.accelerator import Accelerator
from rebasin.matching.weights.costs import WeightCosts
from rebasin.matching.weights.endpoints import Endpoints, inner
from rebasin.spec import Group, Indices, Permutation, PermutationSpec


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(products, "WORTH", 2)  # the networks here are small


def cube() -> PermutationSpec:
    """Three groups on the three axes of one tensor."""
    groups = tuple(free(f"g{k}", 6 + k, ("w", k), (f"v{k}", 0)) for k in range(3))
    return PermutationSpec(groups, {"w": (6, 7, 8), "v0": (6, 4), "v1": (7, 4), "v2": (8, 4)})


ALL = SPECS | {"cube": cube}


def remembering(spec: PermutationSpec, dtype: torch.dtype = torch.float64) -> WeightCosts:
    pair = Endpoints(spec, draw(spec, 1, dtype), draw(spec, 2, dtype))
    return WeightCosts(pair, Accelerator(pair))


def rearranged(group: Group, rng: np.random.Generator, few: bool) -> dict[str, np.ndarray]:
    """A legal arrangement of one group, relative to where its neurons are; `few`: of hardly any of them."""
    bonus = {c.name: (100.0 if few else 0.0) * np.eye(c.size) for c in group.cells}
    for cell in group.cells:
        for i, j in rng.integers(cell.size, size=(3, 2)) if few else ():
            bonus[cell.name][i, j] += 250
    costs = {name: rng.standard_normal(b.shape) + b for name, b in bonus.items()}
    return dict(assign(group, costs).index)


def everything(costs: WeightCosts, group: Group) -> list[Tensor]:
    """All blocks that matching the group asks for."""
    asked: list[Tensor] = []

    class Asking(Costs):
        def block(self, cell: str, neurons: Indices) -> Tensor:
            asked.append(costs.block(cell, neurons))
            return asked[-1]

        def diagonal(self, cell: str, blocks: Sequence[Indices]) -> list[Tensor]:
            asked.extend(found := costs.diagonal(cell, blocks))
            return found

    assign(group, Asking())
    return asked


@pytest.mark.parametrize("name", ALL)
def test_kept_products_are_those_computed_afresh(name: str) -> None:
    spec = ALL[name]()
    costs = remembering(spec)
    pair = costs.pair
    rng = np.random.default_rng(0)
    for step in range(40):
        group = spec.groups[rng.integers(len(spec))]
        kept = everything(costs, group)
        afresh = everything(WeightCosts(pair), group)
        for x, y in zip(kept, afresh, strict=True):
            assert torch.allclose(x, y, rtol=1e-10, atol=1e-10)
        other = spec.groups[rng.integers(len(spec))]
        pair.move(other, rearranged(other, rng, few=step % 3 > 0))
        if step == 20:
            pair.set(spec.random(7))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of A's tensors of every product that is computed from now on."""
    shapes: list[tuple[int, ...]] = []
    inside: Callable[..., None] = WeightCosts._product

    def product(self: WeightCosts, sites, neurons, total, where, a, b) -> None:
        if a.dim() > 1:
            shapes.append(tuple(a.shape))
        inside(self, sites, neurons, total, where, a, b)

    monkeypatch.setattr(WeightCosts, "_product", product)
    return shapes


def test_the_work_follows_what_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = mlp()
    costs, shapes = remembering(spec), counted(monkeypatch)
    pair = costs.pair
    h0, h1 = spec.groups
    costs.block("h1", range(24))
    assert sorted(shapes) == [(5, 24), (24, 32)]
    shapes.clear()
    costs.block("h1", range(24))  # nothing moved
    assert not shapes
    swap = np.arange(32)
    swap[[3, 9]] = [9, 3]
    pair.move(h0, {"h0": swap})
    costs.block("h1", range(24))
    assert shapes == [(24, 2)]
    shapes.clear()
    pair.move(h1, {"h1": np.roll(np.arange(24), 1)})  # its own neurons: the columns change places
    costs.block("h1", range(24))
    assert not shapes
    pair.move(h0, {"h0": np.roll(np.arange(32), 1)})  # all of a neighbour, and next to nothing is left
    costs.block("h1", range(24))
    assert sorted(shapes) == [(5, 24), (24, 32)]
    costs.block("h0", range(32))
    shapes.clear()
    pair.move(h1, {"h1": np.roll(np.arange(24), 1)})  # all of a neighbour, but much is left
    costs.block("h0", range(32))
    assert shapes == [(24, 32)]


def test_what_was_settled_first_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = mlp()
    costs, shapes = remembering(spec), counted(monkeypatch)
    inputs = WeightCosts(costs.pair, costs.accelerator, lambda parameter, axis: axis == 0)
    part = inputs.block("h0", range(32)).clone()
    assert shapes == [(32, 12)]
    whole = costs.block("h0", range(32)).clone()
    assert shapes == [(32, 12), (24, 32)]
    assert torch.equal(inputs.block("h0", range(32)), part)  # fewer sites than are held: afresh
    assert torch.allclose(WeightCosts(costs.pair).block("h0", range(32)), whole, rtol=1e-12)


def test_after_updates_of_full_rank_a_product_is_computed_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = mlp()
    costs = remembering(spec, torch.float32)
    pair = costs.pair
    costs.block("h1", range(24))
    shapes = counted(monkeypatch)
    rng = np.random.default_rng(0)
    for _ in range(200):
        pair.move(spec.groups[0], rearranged(spec.groups[0], rng, few=True))
        kept = costs.block("h1", range(24))
    ranks = [shape[1] for shape in shapes if shape[0] == 24]
    assert ranks.count(32) > 4
    between = 0
    for rank in ranks:
        between = 0 if rank == 32 else between + rank
        assert between <= products.DRIFT * 32
    exact = Endpoints(spec, draw(spec, 1, torch.float64), draw(spec, 2, torch.float64))
    exact.set(pair.permutation)
    true = WeightCosts(exact).block("h1", range(24))
    fresh = float((WeightCosts(pair).block("h1", range(24)) - true).abs().max())
    assert float((kept - true).abs().max()) < 8 * fresh  # pyright: ignore[reportPossiblyUnboundVariable]


def test_memory_goes_to_the_products_that_save_most(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = mlp()
    bytes_of = {"h0": 8 * 32 * 32, "h1": 8 * 24 * 24}
    for budget, expected in ((0, ""), (bytes_of["h1"], "h1"), (bytes_of["h0"], "h1"), (1 << 20, "h0 h1")):
        monkeypatch.setattr(products.Products.__init__, "__defaults__", (budget,))
        costs = remembering(spec)  # a neuron of h1 has 38 weights, one of h0 37
        for cell, size in (("h0", 32), ("h1", 24)):
            costs.block(cell, range(size))
        assert costs.accelerator is not None
        assert [cell for cell, _ in costs.accelerator.products._kept] == expected.split()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("init", ["identity", "forward"])
def test_matching_ends_as_without_them(name: str, init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS[name]()
    a, b = draw(spec, 1), noisy(draw(spec, 1), 1.5)
    results = []
    for accelerator in (Accelerator, lambda *_: None):
        monkeypatch.setattr(matching, "Accelerator", accelerator)
        results.append(weight_matching(spec, a, b, init=init))  # pyright: ignore[reportArgumentType]
    assert results[0].permutation == results[1].permutation
    assert results[0].converged


@pytest.mark.parametrize("pending", [None, 0, 500], ids=["held", "made anew", "some of each"])
@pytest.mark.parametrize("name", SPECS)
def test_a_pair_depends_on_the_permutation_not_on_the_way_to_it(
    name: str, pending: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pending is not None:
        monkeypatch.setattr("rebasin.matching.weights.endpoints.PENDING", pending)
    spec = SPECS[name]()
    a, b = draw(spec, 1), draw(spec, 2)
    before: State = {n: t.clone() for n, t in b.items()}
    pair = Endpoints(spec, a, b)
    rng = np.random.default_rng(1)
    objective = pair.objective
    for step in range(12):
        group = spec.groups[step % len(spec)]
        index = rearranged(group, rng, few=step % 2 > 0)
        move = pair.propose(group, index)
        pair.make(move, index)
        objective += move.gain
        assert pair.objective == pytest.approx(objective, rel=1e-12, abs=1e-9)
    other = Endpoints(spec, a, b)
    other.set(pair.permutation)
    assert dict(pair.dots) == pytest.approx(dict(other.dots), rel=1e-12, abs=1e-12)  # it added gains
    assert pair.distance == pytest.approx(other.distance, rel=1e-12)
    moved = Permutation(spec, pair.index).apply(b)
    for name_, dot in pair.dots.items():
        assert torch.equal(pair.b(name_), moved[name_])
        assert dot == pytest.approx(inner(a[name_], moved[name_]), rel=1e-12, abs=1e-12)
        assert other.dots[name_] == inner(a[name_], moved[name_])
    assert all(torch.equal(b[n], t) for n, t in before.items())


def test_gains_add_up_to_the_objective() -> None:
    spec = chain()
    result = weight_matching(spec, draw(spec, 1), draw(spec, 2))
    pair = Endpoints(spec, draw(spec, 1), draw(spec, 2), normalize="repeats")
    pair.set(result.permutation)
    assert result.objective == pytest.approx(pair.objective, rel=1e-13)
