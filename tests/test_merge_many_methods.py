"""The other ways to many models: copies merge back, two models are the pair's method, figures are what they say."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rebasin import trace
from rebasin.errors import CheckpointError, ConfigError, DataError, SpecMismatchError
from rebasin.evaluation.many import compare
from rebasin.matching import (
    activation_matching,
    cycle_error,
    match_cycle_consistently,
    merge_many,
    weight_matching,
)
from rebasin.matching.many.cycle_consistent import _applied, _matrices, _Search
from rebasin.matching.many.methods import METHODS
from rebasin.matching.many.models import Models
from rebasin.merging import interpolate
from rebasin.models.train import Recipe, train
from rebasin.objectives import CrossEntropy
from rebasin.spec import PermutationSpec

State = dict[str, Tensor]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(160, 2, 4, 4, generator=GENERATOR)
Y = (X.mean(dim=(2, 3)) @ torch.randn(2, 5, generator=GENERATOR)).argmax(dim=1)
BATCHES = list(zip(X.split(40), Y.split(40), strict=True))
DATA: dict[str, Any] = {"batches": BATCHES}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 5),
    ).eval()  # fmt: skip


@cache
def spec_of() -> PermutationSpec:
    return trace(network(), X[:2])


@cache
def trained_state(seed: int) -> State:
    model = network(seed)
    train(model, X, Y, Recipe(epochs=25, batch_size=40, learning_rate=5e-3), seed)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def options_of(method: str) -> dict[str, Any]:
    given = {
        "activations": {"model": network(), "reads": "outputs", **DATA},  # behind a ReLU some are dead
        "straight_through": {"model": network(), "objective": CrossEntropy(), "steps": 4, **DATA},
        "cycle_consistent": {"init": "pivot"},
        "maps": {"by": "weights"},
    }
    return given.get(method, {})


def alike(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["tree", "cycle_consistent", "activations", "straight_through"])
@pytest.mark.parametrize("n", [2, 5, 20])
def test_permuted_copies_merge_back_to_the_bit(n: int, method: str) -> None:
    if n == 20 and method == "activations":
        n = 8  # the statistics of 190 pairs take a while
    spec, state = spec_of(), trained_state(0)
    copies = [spec.random(seed).apply(state) for seed in range(n)]
    result = merge_many(spec, copies, method=method, **options_of(method))
    assert result.method == method and alike(result.merged, copies[0])
    assert result.permutations[0].is_identity and result.distance == 0
    assert all(spec.contains(p) for p in result.permutations)


@pytest.mark.parametrize("method", list(METHODS))
def test_one_model_stays_and_bad_ones_are_told(method: str) -> None:
    spec, state = spec_of(), trained_state(0)
    result = merge_many(spec, [state], method=method, **options_of(method))
    assert alike(result.merged, state) and result.converged and result.moved == 0
    assert result.to_dict()["method"] == method
    with pytest.raises(CheckpointError, match=r"3\.bias.*\[1\].*NaN"):
        bad = {**state, "3.bias": torch.full((10,), torch.nan)}
        merge_many(spec, [state, bad], method=method, **options_of(method))
    with pytest.raises(SpecMismatchError, match=r"\[1\]"):
        merge_many(spec, [state, {"3.bias": state["3.bias"]}], method=method, **options_of(method))


def test_naive_is_the_weighted_mean() -> None:
    spec, states = spec_of(), [trained_state(k) for k in range(3)]
    result = merge_many(spec, states, method="naive", weights=[1, 2, 1])
    for name, tensor in result.merged.items():
        expected = (states[0][name] + 2 * states[1][name] + states[2][name]) / 4
        torch.testing.assert_close(tensor, expected)
    assert result.distance == result.distance_before and result.moved == 0


@pytest.mark.parametrize("method", ["pivot", "tree", "cycle_consistent"])
def test_two_models_are_weight_matching(method: str) -> None:
    spec, a, b = spec_of(), trained_state(0), trained_state(1)
    pair = weight_matching(spec, a, b, init="identity", seed=3)
    result = merge_many(spec, [a, b], method=method, seed=3, **options_of(method))
    assert result.permutations[1] == pair.permutation
    assert alike(result.merged, interpolate(a, pair.permutation.apply(b), 0.5))
    assert result.objective == pytest.approx(pair.objective, rel=1e-6)


def test_two_models_are_activation_matching() -> None:
    spec, models = spec_of(), [network(), network()]
    for k, model in enumerate(models):
        model.load_state_dict(trained_state(k))
    pair = activation_matching(spec, models[0], models[1], BATCHES, reads="outputs")
    result = merge_many(
        spec, [trained_state(0), trained_state(1)], method="activations", **options_of("activations")
    )
    assert result.details["statistic_objective"] == pytest.approx(pair.objective, rel=1e-5)
    assert result.permutations[1] == pair.permutation


def test_activations_never_fall_behind_the_pivots() -> None:
    spec, states = spec_of(), [trained_state(k) for k in range(4)]
    result = merge_many(spec, states, method="activations", model=network(), **DATA)
    again = merge_many(spec, states, method="activations", model=network(), max_passes=1, **DATA)
    assert (
        result.converged
        and result.details["statistic_objective"] >= again.details["statistic_objective"] - 1e-3
    )


class TestCycleConsistent:
    def test_the_relaxed_objective_never_falls_and_the_end_is_no_worse_than_the_start(self) -> None:
        spec, states = spec_of(), [trained_state(k) for k in range(4)]
        events: list[dict] = []
        result = match_cycle_consistently(spec, states, weights=[1, 2, 0.5, 1], progress=events.append)
        values = [event["objective"] for event in events]
        assert len(values) > 2 and all(b >= a - 1e-6 * abs(a) for a, b in pairwise(values))
        assert result.distance < result.distance_before and result.permutations[0].is_identity
        pivot = merge_many(spec, states, method="pivot")
        better = match_cycle_consistently(spec, states, init=pivot.permutations)
        assert better.objective >= pivot.objective * (1 - 1e-7)

    def test_a_bad_end_is_not_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spec, states = spec_of(), [trained_state(k) for k in range(3)]
        pivot = merge_many(spec, states, method="pivot")
        monkeypatch.setattr(_Search, "rounded", lambda self: [spec.random(k) for k in range(3)])
        result = match_cycle_consistently(spec, states, init=pivot.permutations)
        assert result.permutations == pivot.permutations
        assert result.objective == pytest.approx(pivot.objective)

    def test_polish_ends_where_no_model_can_be_improved(self) -> None:
        spec, states = spec_of(), [trained_state(k) for k in range(4)]
        plain = match_cycle_consistently(spec, states)
        better = match_cycle_consistently(spec, states, polish=True)
        assert better.converged and better.objective >= plain.objective * (1 - 1e-7)
        assert merge_many(spec, states, init=better.permutations).permutations == better.permutations

    def test_a_matrix_of_a_permutation_does_what_the_permutation_does(self) -> None:
        spec, state = spec_of(), trained_state(0)
        permutation = spec.random(seed=4)
        soft = _matrices(permutation)
        for name in spec.axes:
            torch.testing.assert_close(
                _applied(spec, soft, name, state[name]), permutation.apply(state)[name]
            )

    def test_the_step_is_the_best_on_its_line_and_the_gradient_is_right(self) -> None:
        spec, states = spec_of(), [trained_state(k) for k in range(3)]
        models = Models(spec, states, [1.0, 2.0, 0.5])
        models.read_all()
        search = _Search(models, [spec.identity()] * 3)
        before = search.soft
        ends = [before[0], search._vertex(1), search._vertex(2)]

        def value(soft: list[dict[str, Tensor]]) -> float:
            return float(search._sums([soft])[1][0, 0]) / 2

        length, gain = search.step()
        reached = value(search.soft)
        assert reached == pytest.approx(search.objective, rel=1e-5)
        assert reached - value(before) == pytest.approx(gain, rel=1e-3)
        search.soft = before
        for t in np.linspace(0, 1, 21):
            assert value(search._between(ends, float(t))) <= reached + 1e-4 * abs(reached)
        assert 0 < length <= 1

    def test_cycle_error(self) -> None:
        spec = spec_of()
        ps = [spec.random(seed) for seed in range(3)]
        pairs = {(i, j): ps[i].invert().compose(ps[j]) for i in range(3) for j in range(3) if i != j}
        assert cycle_error(pairs) == 0 and cycle_error({}) == 0
        pairs[0, 1] = spec.random(9)
        assert 0.1 < cycle_error(pairs) <= 1


class TestStraightThrough:
    def test_it_lowers_the_loss_of_the_mean(self) -> None:
        spec, states = spec_of(), [trained_state(k) for k in range(4)]
        events: list[dict] = []
        result = merge_many(
            spec, states, method="straight_through", model=network(), objective=CrossEntropy(), batches=BATCHES,
            heldout=BATCHES, steps=60, lr=5e-3, progress=events.append,
        )  # fmt: skip
        details = result.details
        assert details["loss"] < details["start_loss"] and details["best_step"] > 0
        # What is told is the loss of what is returned.
        rows = {r.name: r for r in compare(network(), CrossEntropy(), BATCHES, states, {"it": result.merged})}
        assert rows["it"].loss == pytest.approx(details["loss"], rel=1e-5)
        assert rows["members"].loss == pytest.approx(details["members_loss"], rel=1e-5)
        assert rows["it"].barrier == pytest.approx(details["loss"] - details["members_loss"], abs=1e-5)
        assert len(events) == 60 and events[-1]["objective"] == pytest.approx(details["loss"])

    def test_deterministic_and_nothing_is_changed(self) -> None:
        spec, states, model = spec_of(), [trained_state(k) for k in range(3)], network()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for lambdas in ("random", "fixed"):
            one, other = (
                merge_many(
                    spec, states, method="straight_through", model=model, objective=CrossEntropy(), steps=6,
                    lr=1e-2, lambdas=lambdas, seed=5, **DATA,
                )
                for _ in range(2)
            )  # fmt: skip
            assert one.permutations == other.permutations and alike(one.merged, other.merged)
        assert alike(model.state_dict(), before)

    def test_bad_options(self) -> None:
        spec, states = spec_of(), [trained_state(k) for k in range(2)]
        given = {"model": network(), "objective": CrossEntropy()}
        cases: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
            ({"steps": 0}, ConfigError, "steps"),
            ({"lambdas": "often"}, ConfigError, "lambdas"),
            ({"init": "best"}, ConfigError, "init"),
            ({"init": [spec.identity()]}, SpecMismatchError, "each of the 2"),
            ({"batches": []}, DataError, "batch"),
        )
        for options, error, told in cases:
            with pytest.raises(error, match=told):
                merge_many(
                    spec, states, method="straight_through", **given, **{"batches": BATCHES, **options}
                )


def test_methods_and_options_are_checked_by_name() -> None:
    spec, states = spec_of(), [trained_state(k) for k in range(2)]
    with pytest.raises(ConfigError, match="no method 'average'.*pivot"):
        merge_many(spec, states, method="average")
    with pytest.raises(ConfigError, match="'pivot' has no option 'init'.*pivot"):
        merge_many(spec, states, method="pivot", init="identity")
    with pytest.raises(ConfigError, match="needs the option 'model'"):
        merge_many(spec, states, method="activations")
