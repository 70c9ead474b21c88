"""REPAIR and the reset of statistics: goals are reached, from permuted members, and equal networks stay as they are."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rebasin
from rebasin import trace
from rebasin.errors import ConfigError, DataError
from rebasin.matching import weight_matching
from rebasin.merging.repair import repair, reset_statistics
from rebasin.merging.repair_closed_form import repair_closed_form
from rebasin.models import build
from rebasin.spec import PermutationSpec

State = dict[str, Tensor]
X = torch.randn(96, 2, 4, 4, generator=torch.Generator().manual_seed(0))
BATCHES = list(X.split(40))  # the last one is shorter


def network(norm: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    middle = [nn.BatchNorm2d(12)] if norm else []
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1, bias=not norm), *middle, nn.ReLU(), nn.Conv2d(12, 10, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 5),
    ).eval()  # fmt: skip


@cache
def spec_of(norm: bool = False) -> PermutationSpec:
    return trace(network(norm), torch.zeros(2, 2, 4, 4))


def state_of(seed: int, norm: bool = False) -> State:
    return {name: tensor.clone() for name, tensor in network(norm, seed).state_dict().items()}


def mean_of(states: list[State], weights=None) -> State:
    shares = torch.tensor(weights or [1.0] * len(states))
    return {
        n: torch.einsum("i,i...->...", shares / shares.sum(), torch.stack([s[n].float() for s in states])).to(
            states[0][n].dtype
        )
        for n in states[0]
    }


def moments(norm: bool, state: State, layer: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a layer's output, over everything at once."""
    model = network(norm)
    model.load_state_dict(state)
    model.eval()
    assert isinstance(model, nn.Sequential)
    with torch.no_grad():
        y = model[: layer + 1](X).double()
    y = y.movedim(1, -1).reshape(-1, y.shape[1])
    return y.mean(dim=0), y.std(dim=0, correction=0)


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5]])
def test_every_hidden_layer_gets_the_mean_of_the_members_mean_and_standard_deviation(weights) -> None:
    spec, states = spec_of(), [state_of(k) for k in range(3)]
    merged = mean_of(states, weights)
    before = {name: tensor.clone() for name, tensor in merged.items()}
    found = repair(spec, network(), merged, states, BATCHES, weights=weights)
    shares = torch.tensor(weights or [1.0] * 3, dtype=torch.float64)
    shares /= shares.sum()
    for layer, name in ((0, "0"), (2, "2"), (5, "5")):
        goals = [moments(False, s, layer) for s in states]
        mean, std = moments(False, found.state, layer)
        for k, reached in enumerate((mean, std)):
            goal = torch.stack([g[k] for g in goals])
            torch.testing.assert_close(reached, shares @ goal, rtol=1e-4, atol=1e-5)
        assert not torch.equal(found.state[f"{name}.weight"], merged[f"{name}.weight"])
        assert found.scales[name] > 1, "unrelated networks' mean varies less than they do"
    # The output layer has no hidden neurons, and nothing of the caller's is changed.
    assert torch.equal(found.state["7.weight"], merged["7.weight"]) and not found.left_out
    assert all(torch.equal(merged[name], before[name]) for name in before)


def test_a_merge_of_equal_networks_stays_as_it_is_to_the_bit() -> None:
    spec, state = spec_of(), state_of(1)
    found = repair(spec, network(), state, [state] * 3, BATCHES, weights=[0.1, 0.7, 0.3])
    assert all(torch.equal(found.state[name], state[name]) for name in state)
    assert set(found.scales.values()) == {1.0} and not found.reset
    # Copies that were brought into one arrangement, too.
    moved = spec.random(seed=3).apply(state)
    back = weight_matching(spec, state, moved).permutation
    again = repair(spec, network(), state, [state, back.view(moved)], BATCHES)
    assert all(torch.equal(again.state[name], state[name]) for name in state)


def test_goals_of_members_that_are_not_permuted_are_others() -> None:
    spec, state = spec_of(), state_of(1)
    wrong = repair(spec, network(), state, [state, spec.random(seed=3).apply(state)], BATCHES)
    assert not torch.equal(wrong.state["0.bias"], state["0.bias"])


def test_layers_without_bias_are_left_out_and_norms_are_rescaled() -> None:
    spec, states = spec_of(True), [state_of(k, True) for k in range(2)]
    trained = [reset_statistics(network(True), s, BATCHES) for s in states]
    found = repair(spec, network(True), mean_of(trained), trained, BATCHES)
    assert found.left_out == ("0",) and list(found.scales) == ["1", "3", "6"] and found.reset
    for layer in (1, 3, 6):
        goals = [moments(True, s, layer) for s in trained]
        for k, reached in enumerate(moments(True, found.state, layer)):
            goal = (goals[0][k] + goals[1][k]) / 2
            torch.testing.assert_close(reached, goal, rtol=1e-4, atol=1e-5)


def test_statistics_are_averages_over_all_batches() -> None:
    batches = list(X.split(48))
    state = state_of(0, True)
    state["1.num_batches_tracked"] += 7
    found = reset_statistics(network(True), state, batches)
    conv = network(True)
    assert isinstance(conv, nn.Sequential)
    with torch.no_grad():
        outputs = [conv[0](batch) for batch in batches]
    mean = torch.stack([y.mean(dim=(0, 2, 3)) for y in outputs]).mean(dim=0)
    variance = torch.stack([y.var(dim=(0, 2, 3)) for y in outputs]).mean(dim=0)
    torch.testing.assert_close(found["1.running_mean"], mean)
    torch.testing.assert_close(found["1.running_var"], variance)
    assert int(found["1.num_batches_tracked"]) == 2
    rest = [name for name in state if not name.startswith("1.running") and "tracked" not in name]
    assert all(found[name] is state[name] for name in rest)
    assert int(state["1.num_batches_tracked"]) == 7
    # Without BatchNorm there is nothing to reset.
    plain = state_of(0)
    assert all(reset_statistics(network(), plain, [])[name] is plain[name] for name in plain)


@pytest.mark.parametrize("size", [47, 32, 23])
def test_a_short_last_batch_counts_by_its_numbers(size: int) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).eval()
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
    batches = x.split(size)  # the last of 1, 16 and 2
    counted = torch.cat([batch for batch in batches if len(batch) > 1])
    found = reset_statistics(net, net.state_dict(), batches)
    with torch.no_grad():
        outputs = net[0](counted)
    torch.testing.assert_close(found["1.running_mean"], outputs.mean(0))
    spread = sum(len(b) * net[0](b).var(0) for b in batches if len(b) > 1) / len(counted)
    torch.testing.assert_close(found["1.running_var"], spread)


class Called(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.bn, self.b = how, nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, bn = self.a(x), self.bn
        if self.how == "functional":
            given = bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, 0.1, bn.eps
            h = nn.functional.batch_norm(h, *given)
        else:
            h = bn(input=h) if self.how == "by keyword" else bn.forward(h)
        return self.b(torch.relu(h))


@pytest.mark.parametrize("how", ["by keyword", "functional", "its forward"])
def test_statistics_are_collected_however_a_norm_is_called(how: str) -> None:
    net = Called(how).eval()
    found = reset_statistics(net, net.state_dict(), (3 * torch.randn(200, 4) + 1).split(50))
    assert not found["bn.running_mean"].equal(net.bn.running_mean)  # pyright: ignore[reportArgumentType]


def test_a_batch_norm_that_sees_one_number_is_told_and_one_that_sees_nothing_stays() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).eval()
    with pytest.raises(DataError, match="No batch gives '1' two numbers for each channel"):
        reset_statistics(net, net.state_dict(), torch.randn(3, 4).split(1))
    unused = nn.BatchNorm1d(3)
    assert unused.running_mean is not None
    unused.running_mean += 5
    net.unused = unused

    def call(model: nn.Module, batch: Tensor) -> Tensor:
        assert isinstance(model, nn.Sequential)
        return model[1](model[0](batch))

    found = reset_statistics(net, net.state_dict(), [torch.randn(3, 4)], forward=call)
    assert found["unused.running_mean"].tolist() == [5, 5, 5]


@pytest.mark.parametrize("how", ["rescale", "closed_form", "least_squares", "zipit"])
@pytest.mark.parametrize("norm", [False, True])
def test_empty_batches_are_told(how: Any, norm: bool) -> None:
    spec, states = spec_of(norm), [state_of(0, norm), state_of(1, norm)]
    with pytest.raises(DataError):
        rebasin.repair(spec, network(norm), states[0], states, [X[:0]], how=how)


def test_a_dead_neuron_is_not_blown_up() -> None:
    spec, a, b = spec_of(), state_of(0), state_of(1)
    merged = mean_of([a, b])
    merged["5.weight"][3] = 0
    found = repair(spec, network(), merged, [a, b], BATCHES)
    assert bool(torch.isfinite(found.state["5.weight"]).all())
    assert torch.equal(found.state["5.weight"][3], merged["5.weight"][3])


def test_half_precision_and_the_repaired_layernorm_net_keep_their_types() -> None:
    def make() -> nn.Module:
        return build("resnet", width=0.25, blocks=1, classes=3, norm="layer", channels=1).eval()

    model, x = make(), torch.randn(6, 1, 8, 8)
    spec = trace(model, x[:2])
    half = [{n: t.half() for n, t in make().state_dict().items()} for _ in range(2)]
    merged = {n: ((half[0][n].float() + half[1][n].float()) / 2).half() for n in half[0]}
    found = repair(spec, model, merged, half, [(x, torch.zeros(6).long())])
    assert {t.dtype for t in found.state.values()} == {torch.float16}
    assert found.scales and found.state.keys() == merged.keys()


def test_neurons_are_found_where_dimensions_have_the_same_size() -> None:
    # 8 channels of 8 x 8 pixels, 8 images: a LayerNorm over channels, which moves them, has four dimensions of 8.
    def make(norm: str) -> nn.Module:
        return build("resnet", width=0.5, blocks=1, classes=3, norm=norm, channels=1).eval()

    model, spec_x = make("layer"), torch.randn(8, 1, 8, 8)
    spec = trace(model, spec_x[:2])
    states = [{n: t.clone() for n, t in make("layer").state_dict().items()} for _ in range(2)]
    found = repair(spec, model, mean_of(states), states, [spec_x])
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) and m.weight.shape == (8,))
    reached = []
    for state in (found.state, *states):
        model.load_state_dict(state)
        out: list[Tensor] = []
        handle = model.get_submodule(name).register_forward_hook(lambda m, a, y, out=out: out.append(y))
        model(spec_x)
        handle.remove()
        reached.append(out[0].detach().double().mean(dim=(0, 2, 3)))
    assert out[0].shape == (8, 8, 8, 8)
    torch.testing.assert_close(reached[0], (reached[1] + reached[2]) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["reset", "rescale", "closed_form"])
@pytest.mark.parametrize("norm", [False, True])
def test_each_way_of_repairing_by_its_name(how: Any, norm: bool) -> None:
    spec, states = spec_of(norm), [state_of(k, norm) for k in range(2)]
    given = spec, network(norm), mean_of(states), states, BATCHES
    if how == "reset" and not norm:
        with pytest.raises(ConfigError, match="how='reset': it has no BatchNorm"):
            rebasin.repair(*given, how=how)
        return
    found = rebasin.repair(*given, how=how).state
    own = {
        "reset": lambda: reset_statistics(network(norm), given[2], BATCHES),
        "rescale": lambda: rebasin.repair(*given).state,
        "closed_form": lambda: repair_closed_form(*given).state,
    }[how]()
    assert all(torch.equal(found[name], own[name]) for name in own)
    assert any(not torch.equal(found[name], given[2][name]) for name in own)


def test_a_line_is_repaired_between_its_ends_only() -> None:
    a, b = (state_of(k) for k in range(2))
    asked: list[float] = []

    def repaired(merged: Any, lam: float) -> State:
        asked.append(lam)
        return {name: tensor * 0 for name, tensor in merged.items()}

    def size(model: nn.Module) -> float:
        return sum(float(tensor.abs().sum()) for tensor in model.state_dict().values())

    curve = rebasin.barrier(network(), a, b, size, points=5, repair=repaired)
    assert asked == [0.25, 0.5, 0.75] and curve.losses[1:-1] == (0, 0, 0) and min(curve.losses[::4]) > 1


def test_what_does_not_fit_is_told() -> None:
    spec, state = spec_of(), state_of(0)
    for weights, members in (([1.0], [state] * 2), ([1.0, 0.0], [state] * 2), (None, [])):
        with pytest.raises(ConfigError, match="weights"):
            repair(spec, network(), state, members, BATCHES, weights=weights)
    with pytest.raises(DataError, match="batches"):
        repair(spec, network(), state, [state], [])
    with pytest.raises(DataError, match="batches"):
        reset_statistics(network(True), state_of(0, True), [])
    with pytest.raises(DataError, match="finite"):
        repair(spec, network(), state, [state], [torch.full((4, 2, 4, 4), torch.inf)])
