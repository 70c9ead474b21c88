"""Learned maps: a planted rotation is undone by the loss between the ends, and the ends stay what they are."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from test_maps import C, Residual
from torch import Tensor, nn

import rebasin
from rebasin.errors import ConfigError
from rebasin.matching.maps.learned import LearnedResult, learned_matching
from rebasin.spec import PermutationSpec


@cache
def planted() -> tuple[PermutationSpec, nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """A, the same function in other weights, and inputs with what both compute."""
    torch.manual_seed(0)
    model = Residual().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(40, 5, C)
    spec = rebasin.trace(model, x[:2])
    other = copy.deepcopy(model)
    moved = spec.random_alignment(1)
    other.load_state_dict(
        moved.without(n for n in moved.maps if "0.q" in n or "0.v" in n).apply(model.state_dict())
    )
    with torch.no_grad():
        batches = [(part, model(part)) for part in x.split(10)]
    return spec, model, other, batches


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def learned(**options: object) -> LearnedResult:
    spec, a, b, batches = planted()
    given = {"steps": 60, "init": "weight_matching", "lr": 0.05, "lam_low": 0.5, "lam_high": 0.5, **options}
    return learned_matching(spec, a, b, loss, batches, **given)  # type: ignore[arg-type]


def test_the_loss_between_the_ends_falls_and_the_ends_stay() -> None:
    _, a, b, batches = planted()
    state_a, state_b = copy.deepcopy(a.state_dict()), copy.deepcopy(b.state_dict())
    found = learned()
    assert found.objective < 0.4 * found.start_objective and found.best_step > 0
    assert found.endpoints == pytest.approx((0, 0), abs=1e-8)
    scores = [step.best for step in found.history]
    assert scores == sorted(scores, reverse=True) and len(scores) == 61
    told = [step.heldout for step in found.history if step.heldout is not None]
    assert found.objective == min(told) and found.start_objective == told[0]
    moved_a, moved_b = found.apply(a.state_dict(), b.state_dict())
    for model, state in ((a, moved_a), (b, moved_b)):
        again = copy.deepcopy(model)
        again.load_state_dict(state)
        torch.testing.assert_close(again(batches[0][0]), model(batches[0][0]), rtol=1e-4, atol=1e-4)
    middle = copy.deepcopy(a)
    middle.load_state_dict({n: (t + moved_b[n]) / 2 for n, t in moved_a.items()})
    assert float(loss(middle, batches[-1])) == pytest.approx(found.objective, rel=1e-3)
    assert all(torch.equal(t, state_a[n]) for n, t in a.state_dict().items())
    assert all(torch.equal(t, state_b[n]) for n, t in b.state_dict().items())


def test_seeds_ends_and_kinds() -> None:
    few = {"steps": 4, "evaluate_every": 2}
    one, same, other = learned(**few), learned(**few), learned(**few, seed=1)
    assert one.alignment_b.is_close(same.alignment_b, 1e-12) and one.history == same.history
    assert not one.alignment_b.is_close(other.alignment_b)
    only = learned(**few, ends="b", kinds=["rotations that keep ones"])
    assert not only.alignment_a.maps and only.objective <= only.start_objective
    gains = {f"norms.{k}.weight[0]" for k in range(3)}
    assert set(only.alignment_b.maps) == {"enter.weight[0]", *gains}


def test_a_search_that_only_loses_returns_its_start() -> None:
    found = learned(steps=3, lr=30.0, evaluate_every=1)
    assert found.objective == found.start_objective and found.best_step == 0
    for name, maps in found.alignment_a.maps.items():
        torch.testing.assert_close(maps, found.alignment_a.groups[name].identity())


def test_what_can_not_be_learned_is_told() -> None:
    spec, a, b, batches = planted()
    with pytest.raises(ConfigError, match="kinds has 'rotation'; choose of invertible"):
        learned(kinds=["rotation"])
    with pytest.raises(ConfigError, match="lam_low is above lam_high"):
        learned(lam_low=0.7, lam_high=0.3)
    with pytest.raises(ConfigError, match="nothing to learn"):
        learned(kinds=["rotations"])
    assert learned_matching(spec, a, b, loss, batches, steps=1).left_out == {}
