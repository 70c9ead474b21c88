"""Proofs by nearest neighbours: they are never at odds with the exact assignment, and they spare the cost matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from test_weight_matching import SPECS, draw, free, noisy, planted

from rebasin.matching import weight_matching
from rebasin.matching.assignment.blocks import assign
from rebasin.matching.schedule import axes_met
from rebasin.matching.weights import nearness
from rebasin.matching.weights.accelerator import Accelerator
from rebasin.matching.weights.costs import WeightCosts
from rebasin.matching.weights.endpoints import Endpoints
from rebasin.matching.weights.nearness import nearest
from rebasin.spec import Branch, Permutation, PermutationSpec, admits

WIDE = PermutationSpec(
    (free("h", 48, ("in", 0), ("b", 0), ("out", 1)),), {"in": (48, 4000), "b": (48,), "out": (3000, 48)}
)


@pytest.fixture(autouse=True)
def _always_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(nearness, "WORTH", 0.0)


@pytest.mark.parametrize("normalize", ["repeats", "noise", "tensor", "paper"])
@pytest.mark.parametrize("name", [n for n in SPECS if n not in ("recurrent", "bilinear")])
@pytest.mark.parametrize("permuted", [False, True])
def test_what_is_proved_is_the_exact_assignment(name: str, normalize, permuted: bool, monkeypatch) -> None:
    monkeypatch.setattr(nearness, "PLAUSIBLE", 0.0)  # the first look must not hide a wrong proof
    spec = SPECS[name]()
    outcomes = []
    for noise in (0.0, 0.1, 0.3, 0.6, 0.8, 1.0, 1.2, 1.5, 3.0, 10.0):
        for seed in range(4):
            a = draw(spec, seed)
            b = noisy(a, noise, seed + 50)
            for group in spec:
                if any(len(axes) > 1 for axes in axes_met(group).values()):
                    continue
                other = b
                if permuted:  # this group alone
                    drawn, index = spec.random(seed), dict(spec.identity().index)
                    index |= {cell.name: drawn.index[cell.name] for cell in group.cells}
                    other = Permutation(spec, index).apply(b)
                pair = Endpoints(spec, a, other, normalize=normalize)
                proved = nearest(WeightCosts(pair), group)
                found = assign(group, WeightCosts(pair)).index
                if proved is not None:
                    assert all(np.array_equal(i, proved[c]) for c, i in found.items()), (
                        noise,
                        seed,
                        group.name,
                    )
                still = all(np.array_equal(i, np.arange(i.size)) for i in found.values())
                outcomes.append((noise, proved is not None, still))
    # A guess from few coordinates may be no legal permutation; if nothing has moved, the identity is a good one.
    least = 0.5 if permuted else 1.0
    near_ones = [proved for noise, proved, _ in outcomes if noise <= 0.1]
    assert np.mean(near_ones) >= least
    assert not all(proved for _, proved, _ in outcomes)
    assert not all(still for _, _, still in outcomes)


def stays(found: Mapping[str, np.ndarray] | None) -> bool:
    return found is not None and all(np.array_equal(i, np.arange(i.size)) for i in found.values())


def near(noise: float = 0.1) -> tuple[dict, dict]:
    a = draw(WIDE, 3)
    return a, noisy(a, noise)


@pytest.fixture(params=[0.0, 1e9], ids=["matrix held", "coordinates held"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearness, "MATRIX", request.param)


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("rows", [7, 1024])
def test_few_coordinates_are_enough_for_a_wide_cell(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearness, "ROWS", rows)
    widths: list[int] = []
    chosen = nearness._chosen

    def watched(*args: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for x, y in chosen(*args):
            widths.append(x.shape[1])
            yield x, y

    monkeypatch.setattr(nearness, "_chosen", watched)
    assert stays(nearest(WeightCosts(Endpoints(WIDE, *near())), WIDE.groups[0]))
    assert len(widths) == 3 and sum(widths) < 7001 / 20


@pytest.mark.parametrize("noise, tries", [(0.1, 1), (0.35, 2)])
def test_what_few_coordinates_do_not_prove_more_may(noise: float, tries: int, monkeypatch) -> None:
    counts = []
    chosen = nearness._chosen
    monkeypatch.setattr(nearness, "_chosen", lambda *args: counts.append(args[2]) or chosen(*args))
    assert stays(nearest(WeightCosts(Endpoints(WIDE, *near(noise))), WIDE.groups[0]))
    assert len(counts) == tries and max(counts) <= 7001 // nearness.MOST


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("damage", ["swapped", "twin", "copied", "far", "opposite"])
def test_one_neuron_that_may_move_is_enough_to_prove_nothing(damage: str) -> None:
    a, b = near()
    for name, axis in (("in", 0), ("b", 0), ("out", 1)):
        x, y = a[name].movedim(axis, 0), b[name].movedim(axis, 0)
        if damage == "swapped":
            y[[10, 20]] = y[[20, 10]]
        elif damage == "twin":  # in both networks, so either arrangement is best
            x[20], y[20], y[10] = x[10], x[10], x[10]
        elif damage == "copied":
            y[10] = x[20]
        elif damage == "far":
            y[10] *= 30
        else:
            y[10] *= -1
    found = nearest(WeightCosts(Endpoints(WIDE, a, b)), WIDE.groups[0])
    if damage == "swapped":
        assert found is not None and list(np.flatnonzero(found["h"] != np.arange(48))) == [10, 20]
    else:
        assert found is None


def test_unlike_networks_are_told_apart_by_the_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearness, "_proved", lambda *_: pytest.fail("looked at everything"))
    assert nearest(WeightCosts(Endpoints(WIDE, draw(WIDE, 1), draw(WIDE, 2))), WIDE.groups[0]) is None


def test_unlike_networks_are_not_looked_at_again_before_most_neighbours_moved(monkeypatch) -> None:
    spec = PermutationSpec(
        (free("h", 40, ("first", 0), ("second", 1)), free("g", 60, ("second", 0), ("third", 1))),
        {"first": (40, 500), "second": (60, 40), "third": (10, 60)},
    )
    pair = Endpoints(spec, draw(spec, 1), draw(spec, 2))
    accelerator: Accelerator | None = Accelerator(pair)
    looked: list[str] = []
    guess = nearness._guess
    monkeypatch.setattr(nearness, "_guess", lambda costs, cell: looked.append(cell) or guess(costs, cell))

    def look(number: int = 0) -> int:
        looked.clear()
        assert nearest(WeightCosts(pair, accelerator), spec.groups[number]) is None
        return len(looked)

    def move(count: int) -> None:
        pair.move(spec.groups[1], {"g": np.roll(np.arange(60), 1) if count == 60 else swapped(60, count)})

    assert look() == 1
    assert look(1) == 1  # each for itself
    assert look() == 0
    move(30)
    assert look() == 0
    move(60)
    assert look() == 1
    assert look() == 0
    accelerator = None
    assert look() == 1  # nothing is kept, nothing is known


def swapped(n: int, count: int) -> np.ndarray:
    """The first `count` neurons in reverse order."""
    return np.concatenate([np.arange(count)[::-1], np.arange(count, n)])


@pytest.mark.parametrize("init", ["identity", "forward"])
@pytest.mark.parametrize("name", SPECS)
def test_the_descent_is_the_same_without_it(name: str, init, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS[name]()
    for noise in (0.1, 0.5, 1.0):
        a, b, _ = planted(spec, noise)
        for other in (b, noisy(a, noise)):
            monkeypatch.setattr(nearness, "WORTH", 0.0)
            with_it = weight_matching(spec, a, other, init=init)
            monkeypatch.setattr(nearness, "WORTH", float("inf"))
            without = weight_matching(spec, a, other, init=init)
            assert with_it.permutation == without.permutation
            assert with_it.objective == without.objective
            assert [s.updates for s in with_it.history] == [s.updates for s in without.history]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_near_pair_takes_no_cost_matrix(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["attention"]()
    a = {n: t.to(dtype) for n, t in draw(spec, 1, torch.float64).items()}
    b = {n: t.to(dtype) for n, t in noisy(draw(spec, 1, torch.float64), 0.05).items()}
    monkeypatch.setattr(WeightCosts, "_products", lambda *_: pytest.fail("a product was computed"))
    result = weight_matching(spec, a, b, init="forward")
    assert result.converged and not result.moved and result.sweeps == 1


def test_a_cell_without_weights_at_these_sites_stays() -> None:
    a, b = near()
    assert stays(
        nearest(WeightCosts(Endpoints(WIDE, a, b), choose=lambda parameter, axis: False), WIDE.groups[0])
    )


def test_only_large_groups_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearness, "WORTH", 1e9)
    assert nearest(WeightCosts(Endpoints(WIDE, *near())), WIDE.groups[0]) is None


def test_a_permuted_copy_is_found_without_a_cost_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = near()
    drawn = WIDE.random(4)
    monkeypatch.setattr(WeightCosts, "_products", lambda *_: pytest.fail("a product was computed"))
    result = weight_matching(WIDE, a, drawn.apply(b))
    assert result.converged and result.moved
    assert result.permutation.compose(drawn) == WIDE.identity()


def test_an_arrangement_that_the_structure_forbids_is_not_taken() -> None:
    spec = SPECS["attention"]()
    group = next(g for g in spec if isinstance(g.tree, Branch))
    index = dict(spec.identity().index)
    index |= {c.name: np.random.default_rng(0).permutation(c.size) for c in group.cells}
    assert not admits(group, index)
    a = draw(spec, 1)
    pair = Endpoints(spec, a, Permutation(spec, index).apply(noisy(a, 0.01)))
    assert all(nearness._proved(WeightCosts(pair), c.name, np.argsort(index[c.name])) for c in group.cells)
    assert nearest(WeightCosts(pair), group) is None
