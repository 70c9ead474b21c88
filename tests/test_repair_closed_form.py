"""REPAIR in closed form: exact where its assumption holds, a no-op for equal networks, and better than nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rebasin import trace
from rebasin.errors import ConfigError, DataError
from rebasin.merging.repair import repair, reset_statistics
from rebasin.merging.repair_closed_form import repair_closed_form

State = dict[str, Tensor]


def mlp(seed: int, norm: type[nn.Module] | None = None, bias: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    middle = [] if norm is None else [norm(12)]
    return nn.Sequential(
        nn.Linear(6, 12, bias=bias), *middle, nn.ReLU(inplace=True), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)
    ).eval()  # fmt: skip


def state_of(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def mean_of(states: list[State], weights: list[float]) -> State:
    shares = [w / sum(weights) for w in weights]
    return {
        n: sum((w * s[n] for w, s in zip(shares, states, strict=True)), torch.zeros_like(t))
        if t.is_floating_point()
        else t
        for n, t in states[0].items()
    }


def gaussian(samples: int = 400, features: int = 6) -> tuple[Tensor, Tensor]:
    """Samples whose mean is 0 and whose covariance is `covariance`, both exactly; and the covariance."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(samples, features, generator=generator, dtype=torch.float64)
    white = torch.linalg.qr(raw - raw.mean(dim=0)).Q * samples**0.5
    root = torch.randn(features, features, generator=generator, dtype=torch.float64)
    return (white @ root.T).float(), root @ root.T


def test_one_layer_on_gaussian_input_has_the_statistics_that_algebra_and_measuring_give() -> None:
    x, covariance = gaussian()
    weights = [1.0, 2.0, 0.5]
    states = [state_of(mlp(k)) for k in range(3)]
    merged = mean_of(states, weights)
    spec = trace(mlp(0), x[:2])
    found = repair_closed_form(spec, mlp(0), merged, states, list(x.split(150)), weights=weights)

    def std(weight: Tensor) -> Tensor:  # of w x, for x with this covariance
        return torch.einsum("ni,ij,nj->n", weight.double(), covariance, weight.double()).sqrt()

    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    goal = sum((w * std(s["0.weight"]) for w, s in zip(shares, states, strict=True)), torch.zeros(12))
    scale = (goal / std(merged["0.weight"])).float()
    assert float(scale.min()) > 1, "the mean of unrelated neurons varies less than they do"
    torch.testing.assert_close(
        found.state["0.weight"], merged["0.weight"] * scale[:, None], rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        found.state["0.bias"], merged["0.bias"], rtol=1e-5, atol=1e-6
    )  # inputs have mean 0
    # The first layer's members share their input: there the closed form is REPAIR itself.
    exact = repair(spec, mlp(0), merged, states, list(x.split(150)), weights=weights)
    for name in ("0.weight", "0.bias"):
        torch.testing.assert_close(found.state[name], exact.state[name], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found.state["2.weight"], exact.state["2.weight"], rtol=1e-3)
    assert torch.equal(found.state["4.weight"], merged["4.weight"]) and not found.left_out


def test_the_mean_stays_where_inputs_have_one() -> None:
    x = gaussian()[0] + 3
    states = [state_of(mlp(k)) for k in range(2)]
    merged = mean_of(states, [1, 1])
    spec = trace(mlp(0), x[:2])
    found = repair_closed_form(spec, mlp(0), merged, states, [x])
    exact = repair(spec, mlp(0), merged, states, [x])
    for name in ("0.weight", "0.bias"):
        torch.testing.assert_close(found.state[name], exact.state[name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found.state["0.bias"], merged["0.bias"], atol=1e-3)


@pytest.mark.parametrize("norm", [None, nn.LayerNorm, nn.BatchNorm1d])
def test_a_merge_of_equal_networks_stays_as_it_is_to_the_bit(norm) -> None:
    x, _ = gaussian()
    spec = trace(mlp(1, norm), x[:2])
    state = dict(reset_statistics(mlp(1, norm), state_of(mlp(1, norm)), [x]))
    found = repair_closed_form(spec, mlp(0, norm), state, [state] * 3, [x, x[:50]], weights=[0.1, 0.7, 0.3])
    assert all(torch.equal(found.state[name], state[name]) for name in state)
    assert set(found.scales.values()) == {1.0}


def test_batchnorm_gets_the_variance_that_a_reset_measures() -> None:
    x, _ = gaussian()
    states = []
    for k in range(2):
        model = mlp(k, nn.BatchNorm1d, bias=False)
        states.append(dict(reset_statistics(model, state_of(model), [x])))
    merged = mean_of(states, [1, 3])
    model = mlp(0, nn.BatchNorm1d, bias=False)
    spec = trace(model, x[:2])
    found = repair_closed_form(spec, model, merged, states, [x], weights=[1, 3])
    measured = reset_statistics(model, merged, [x])
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(found.state[name], measured[name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged["1.running_var"], measured["1.running_var"], rtol=0.05)
    assert found.left_out == ("0",) and list(found.scales) == ["3"] and found.reset
    # With a bias the layer could be scaled, and is not: BatchNorm takes its scale away.
    model = mlp(0, nn.BatchNorm1d)
    states = [state_of(mlp(k, nn.BatchNorm1d)) for k in range(2)]
    found = repair_closed_form(trace(model, x[:2]), model, mean_of(states, [1, 1]), states, [x])
    assert list(found.scales) == ["3"] and found.left_out == ("0",)


def test_a_layernorm_undoes_the_loss_of_variance_itself() -> None:
    """Its answer to the mean of the inputs is exact in the first layer; its scale is REPAIR's."""
    x, _ = gaussian()
    states = [state_of(mlp(k, nn.LayerNorm, bias=False)) for k in range(2)]
    for state in states:
        state["1.weight"] += 0.3 * torch.rand(12)
    merged = mean_of(states, [1, 1])
    model = mlp(0, nn.LayerNorm, bias=False)
    spec = trace(model, x[:2])
    found = repair_closed_form(spec, model, merged, states, [x])
    exact = repair(spec, model, merged, states, [x])
    torch.testing.assert_close(found.state["1.weight"], exact.state["1.weight"], rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_told() -> None:
    x, _ = gaussian()
    state = state_of(mlp(0))
    spec = trace(mlp(0), x[:2])
    with pytest.raises(ConfigError, match="weights"):
        repair_closed_form(spec, mlp(0), state, [state] * 2, [x], weights=[1.0])
    with pytest.raises(DataError, match="batches"):
        repair_closed_form(spec, mlp(0), state, [state], [])
    with pytest.raises(DataError, match="finite"):
        repair_closed_form(spec, mlp(0), state, [state], [x / 0])
