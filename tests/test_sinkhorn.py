"""Sinkhorn re-basin: the operator, its implicit gradient, soft members of structured groups, planted permutations."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rebasin
from rebasin.errors import ConfigError
from rebasin.matching import SinkhornResult, SinkhornState, sinkhorn_matching
from rebasin.matching.assignment.blocks import assign
from rebasin.matching.sinkhorn import sinkhorn, soft_permutation
from rebasin.spec import Branch, Cell, Group, Leaf, Permutation, PermutationSpec


class Attends(nn.Module):
    """A stream, heads and a ReLU layer: neurons that move alone, as wholes, and in two cells at once."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.heads = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.leave = nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.heads(x, x, x, need_weights=False)[0]
        return self.leave(self.up(x).relu())


class Convolves(nn.Module):
    """Channels with a GroupNorm (groups move as wholes) and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.two, self.batch = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.leave = nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.one(x)).relu()
        return self.leave(self.batch(self.two(x)).relu().flatten(1))


class Pads(nn.Module):
    """A stream goes on in the middle of a wider one: what is new there stands on both sides, at no regular places."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.wider, self.leave = nn.Linear(6, 5), nn.Linear(5, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).relu()
        return self.leave((nn.functional.pad(x, (2, 2)) + self.wider(x)).relu())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))


MODELS = {
    "mlp": (mlp, (6,)),
    "attention": (Attends, (5, 6)),
    "convolutions": (Convolves, (2, 2, 2)),
    "pads": (Pads, (6,)),
}


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


@cache
def planted(
    name: str,
) -> tuple[PermutationSpec, nn.Module, nn.Module, Permutation, list[tuple[Tensor, Tensor]]]:
    """A, A with its neurons elsewhere, where they are, and inputs with what both compute."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    a = make().eval()
    with torch.no_grad():
        for p in a.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x = torch.randn(120, *shape)
    spec = rebasin.trace(a, x[:2])
    b, moved = copy.deepcopy(a), spec.random(3)
    b.load_state_dict(moved.apply(a.state_dict()))
    with torch.no_grad():
        return spec, a, b, moved.invert(), [(part, a(part)) for part in x.split(20)]


def found(name: str, **options: object) -> SinkhornResult:
    spec, a, b, _, batches = planted(name)
    return sinkhorn_matching(spec, a, b, loss, batches, **options)  # type: ignore[arg-type]


def test_a_soft_permutation_that_is_hard_has_a_slope() -> None:
    x = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]], requires_grad=True)
    hard = sinkhorn(x, tau=1e-6)
    assert hard.equal(torch.eye(3))
    (hard * torch.arange(9.0).reshape(3, 3)).sum().backward()
    assert x.grad is not None and float(x.grad.abs().max()) < 1e-6
    broken = torch.full((3, 3), math.inf, requires_grad=True)
    with pytest.raises(
        ConfigError, match="The soft permutation is not finite: lower lr or noise, or raise tau"
    ):
        sinkhorn(broken).sum().backward()


@pytest.mark.parametrize("cost", ["weights", "midpoint", "line"])
@pytest.mark.parametrize("name", MODELS)
def test_a_planted_permutation_is_found(name: str, cost: str) -> None:
    spec, _, b, there, _ = planted(name)
    state = {n: t.clone() for n, t in b.state_dict().items()}
    made = found(name, cost=cost, steps=60, **({"tau": 0.3, "decay": 0.0} if cost == "weights" else {}))
    assert spec.contains(made.permutation) and made.initial_objective > 1e-3
    assert made.objective < (1e-9 if cost == "weights" else 0.2 * made.initial_objective)
    if cost == "weights":
        assert made.permutation == there and made.distance_after < 1e-5 < made.distance_before
    assert made.objective == min(s.heldout for s in made.history if s.heldout is not None)
    assert all(0 < c <= 1 + 1e-6 for c in made.certainty.values())
    assert all(torch.equal(t, state[n]) for n, t in b.state_dict().items())


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_the_operator_scales_rows_and_columns_and_its_gradient_is_that_of_where_it_ends(tau: float) -> None:
    x = torch.randn(
        3, 5, 5, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0)
    )
    s = sinkhorn(x, tau, 400)
    for axis in (-1, -2):
        torch.testing.assert_close(s.sum(axis), torch.ones(3, 5).double(), atol=1e-5, rtol=0)
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, tau, 400), (x,), atol=1e-4)
    assert torch.equal(sinkhorn(x[:, :1, :1]), torch.ones(3, 1, 1))


def leaves(*counts: int) -> tuple[Leaf, ...]:
    ends = torch.tensor(counts).cumsum(0).tolist()
    return tuple(Leaf(0, range(end - n, end)) for n, end in zip(counts, ends, strict=True))


TREES = {
    "free": Leaf(0, range(12)),
    "fixed": Branch(leaves(5, 7), "fixed"),
    "blocks": Branch(leaves(3, 3, 3, 3), "any"),
    "turns": Branch(leaves(4, 4, 4), ((0, 1, 2), (1, 2, 0), (2, 0, 1))),
    "blocks of blocks": Branch(
        tuple(Branch(tuple(Leaf(0, range(k, k + 3)) for k in (n, n + 3)), "any") for n in (0, 6)), "any"
    ),
    "blocks of parts": Branch(
        tuple(Branch((Leaf(0, range(n, n + 2)), Leaf(0, range(n + 2, n + 6))), "fixed") for n in (0, 6)),
        "any",
    ),
}


@pytest.mark.parametrize("tree", TREES)
def test_a_soft_member_is_doubly_stochastic_and_hardens_to_the_exact_assignment(tree: str) -> None:
    group = Group("g", (Cell("c", 12, ()),), TREES[tree])
    for seed in range(2):
        x = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        x[torch.arange(12), _random(group, seed)] += 4  # no ties
        soft = soft_permutation(group, {"c": x}, 1.0, 400)["c"]
        for axis in (0, 1):
            torch.testing.assert_close(soft.sum(axis), torch.ones(12).double(), atol=1e-3, rtol=0)
        best = assign(group, {"c": x}).index["c"]
        hard = soft_permutation(group, {"c": x}, 0.02, 400)["c"]
        assert float((hard - torch.eye(12)[torch.from_numpy(best)]).abs().max()) < 0.05
        legal = torch.zeros(12, 12)
        for k in range(200):  # nothing is mixed that no legal permutation exchanges
            legal[torch.arange(12), _random(group, k)] = 1
        assert not bool((soft[legal == 0] > 1e-12).any())


def _random(group: Group, seed: int) -> Tensor:
    import numpy as np

    from rebasin.spec.structure import draw

    index = {"c": np.arange(12)}
    draw(group, group.tree, group.tree, index, np.random.default_rng(seed))
    return torch.from_numpy(index["c"])


def test_an_interrupted_search_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    states: list[Path] = []

    def keep(state: SinkhornState) -> None:
        states.append(tmp_path / f"{len(states)}.safetensors")
        state.save(states[-1])

    options = {"steps": 12, "evaluate_every": 3}
    whole = found("attention", **options, checkpoint=keep)
    state = SinkhornState.load(states[6])
    again = found("attention", **options, resume_from=state)
    assert again.permutation == whole.permutation and again.certainty == whole.certainty
    plain = [
        [replace(s, seconds_projection=0, seconds_gradient=0, seconds_scoring=0) for s in made.history]
        for made in (whole, again)
    ]
    assert plain[0] == plain[1]
    with pytest.raises(ConfigError, match="This Sinkhorn re-basin can't be continued: its tau differed"):
        found("attention", **options, tau=0.5, resume_from=state)


def test_never_worse_than_its_start_and_a_seed_reproduces() -> None:
    one, same, other = (found("mlp", steps=6, seed=seed) for seed in (0, 0, 1))
    assert one.permutation == same.permutation and one.objective == same.objective
    assert [s.train for s in one.history] != [s.train for s in other.history]
    best = planted("mlp")[3]
    kept = found("mlp", init=best, steps=4, lr=5.0, evaluate_every=1)
    assert kept.permutation == best and kept.best_step == 0 and kept.objective == kept.start_objective
    with pytest.raises(ConfigError, match="tau"):
        found("mlp", tau=0.0)
