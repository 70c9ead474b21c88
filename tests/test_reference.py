"""The paper's algorithms as printed are the oracle: the accelerated ones end where they end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_weight_matching import SPECS, chain, draw, objective, planted
from torch import Tensor, nn
from torch.func import functional_call

import rebasin
from rebasin.matching import match_to_mean, reference, weight_matching
from rebasin.objectives import CrossEntropy
from rebasin.spec import PermutationSpec

LINEAR = {name: SPECS[name] for name in ("mlp", "group_norm", "attention")} | {"chain": chain}
"""Specs whose groups meet no tensor on two axes, as the paper assumes."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("seed", range(4))
def test_weight_matching_takes_the_papers_path(name: str, seed: int) -> None:
    spec = LINEAR[name]()
    a, b = draw(spec, 2 * seed, torch.float64), draw(spec, 2 * seed + 1, torch.float64)  # nothing to find
    rng = np.random.default_rng(seed)
    orders: list[list[int]] = []

    def order(sweep: int, groups: int) -> list[int]:
        while len(orders) <= sweep:
            orders.append(rng.permutation(groups).tolist())
        return orders[sweep]

    found, sweeps = reference.weight_matching(spec, a, b, seed=seed)
    result = weight_matching(spec, a, b, init="identity", order=order, normalize="paper")
    assert result.permutation == found
    assert result.objective == pytest.approx(objective(spec, a, found.apply(b)), rel=1e-12)
    assert result.sweeps in (sweeps, sweeps - 1)  # its last sweep may be one that ours knows to be needless


@pytest.mark.parametrize("name", SPECS)
def test_the_paper_finds_what_is_planted(name: str) -> None:
    spec = SPECS[name]()
    a, b, back = planted(spec, 0.1)
    if name in LINEAR:
        assert reference.weight_matching(spec, a, b)[0] == back
    assert weight_matching(spec, a, b, normalize="paper").permutation == back


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(9, 14), nn.ReLU(), nn.Linear(14, 11), nn.ReLU(), nn.Linear(11, 4)).double()


@pytest.fixture(scope="module")
def spec() -> PermutationSpec:
    return rebasin.trace(network(), torch.zeros(2, 9, dtype=torch.float64))


@pytest.mark.parametrize("statistic", ["inner_product", "pearson"])
def test_activation_matching_is_the_papers(spec: PermutationSpec, statistic: str) -> None:
    x = torch.randn(200, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    models = network(1), network(2)

    def hidden(model: nn.Sequential) -> dict[str, Tensor]:
        after = {0: model[:2](x), 2: model[:4](x)}
        cells = {cell.name: next(s for s in cell.sites if s.axis == 0) for g in spec for cell in g.cells}
        return {name: after[int(site.parameter.split(".")[0])].detach() for name, site in cells.items()}

    found = reference.activation_matching(spec, *map(hidden, models), correlation=statistic == "pearson")
    result = rebasin.activation_matching(spec, *models, [x[:120], x[120:]], statistic=statistic)  # pyright: ignore
    assert result.permutation == found and result.moved


def test_the_straight_through_estimator_finds_what_the_papers_finds(spec: PermutationSpec) -> None:
    model, other = network(3), network(3)
    hidden = spec.random(7)
    other.load_state_dict(dict(hidden.apply(model.state_dict())))
    x = torch.randn(64, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    batch = x, model(x).argmax(dim=1)

    def loss(state: object) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, state, batch[0]), batch[1])  # pyright: ignore

    states = model.state_dict(), other.state_dict()
    assert reference.straight_through(spec, *states, loss, steps=20) == hidden.invert()
    result = rebasin.straight_through(
        spec,
        model,
        other,
        CrossEntropy(),
        [batch],
        init="identity",
        steps=20,
        optimizer="sgd",
        lr=1e-2,
        refine=0,
        evaluate_every=1,
    )
    assert result.permutation == hidden.invert()


@pytest.mark.parametrize("name", LINEAR)
def test_merging_many_is_the_papers(name: str) -> None:
    spec = LINEAR[name]()
    generator = torch.Generator().manual_seed(0)
    base = draw(spec, 1, torch.float64)
    states = []
    for k in range(4):
        noise = {
            n: t + 0.1 * torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in base.items()
        }
        states.append(spec.random(k).apply(noise))
    found, mean = reference.merge_many(spec, states)
    result = match_to_mean(spec, states)
    first = found[0].invert()
    assert [first.compose(p) for p in found] == list(
        result.permutations
    )  # ours are in the first one's arrangement
    for name, tensor in first.apply(mean).items():
        assert torch.allclose(tensor, result.merged[name], rtol=1e-12, atol=1e-12)
