"""ZipIt: exact where it must be (pairs of both, repeated neurons); more than permuting where members repeat theirs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import rebasin
from rebasin.errors import ConfigError, DataError
from rebasin.merging.zipit import pairs, repair_zipit, zippable


@cache
def data() -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return tuple(torch.randn(25, 2, 6, 6) for _ in range(8))


class Residual(nn.Module):
    """A stream with two blocks, a norm, a flattened end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.first, self.second = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.second(self.first(x).relu())
        return self.head(x.relu().flatten(1))


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 4)
    )  # fmt: skip


KINDS = {"residual": Residual, "plain": plain}


def network(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = KINDS[kind]()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model.eval()


def repeated(hidden: int, seed: int) -> nn.Sequential:
    """An MLP each of whose neurons is there twice."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(5, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 3)
    )
    with torch.no_grad():
        for layer in (model[0], model[2]):
            assert isinstance(layer, nn.Linear)
            layer.weight[hidden // 2 :] = layer.weight[: hidden // 2]
            layer.bias[hidden // 2 :] = layer.bias[: hidden // 2]
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_members_that_are_the_same_stay_as_they_are(kind: str) -> None:
    model = network(kind, 0)
    state = model.state_dict()
    spec = rebasin.trace(model, data()[0])
    moved = spec.random(3).apply(state)
    for other in (state, moved):  # pairs find the counterpart wherever it lies
        found = repair_zipit(spec, model, rebasin.interpolate(state, other, 0.5), [state, other], data())
        assert found.left_out == ()
        for name, tensor in state.items():
            torch.testing.assert_close(found.state[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0)])
def test_repeated_neurons_make_room_for_both_members(weights: tuple[float, float]) -> None:
    """Two networks in half of the width each: their zip answers with the mean of both, layer by layer apart."""
    a, b = repeated(12, 0), repeated(12, 1)
    torch.manual_seed(2)
    batches = [torch.randn(50, 5) for _ in range(4)]
    spec = rebasin.trace(a, batches[0])
    ends = [a.state_dict(), b.state_dict()]
    shares = [w / sum(weights) for w in weights]
    mean = rebasin.interpolate(ends[0], ends[1], shares[1])
    found = rebasin.repair(spec, a, mean, ends, batches, how="zipit", weights=weights)
    x = torch.randn(40, 5)
    wanted = shares[0] * a(x) + shares[1] * b(x)
    made = torch.func.functional_call(a, found.state, (x,))
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    aligned = rebasin.weight_matching(spec, *ends).permutation.apply(ends[1])
    permuted = torch.func.functional_call(a, rebasin.interpolate(ends[0], aligned, shares[1]), (x,))
    assert float((permuted - wanted).detach().square().mean()) > 1e-3  # what no permutation can do


def test_dead_neurons_are_paired_with_each_other() -> None:
    """Where the rest is told apart, the order of the members' neurons makes no difference."""
    torch.manual_seed(3)
    a, b = (nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in "ab")
    for model in (a, b):
        with torch.no_grad():
            first = model[0]
            assert isinstance(first, nn.Linear)
            first.weight[2:4], first.bias[2:4] = 0, -1
    batches = [torch.randn(100, 5)]
    spec = rebasin.trace(a, batches[0])
    made = []
    for end in (b.state_dict(), spec.random(1).apply(b.state_dict())):
        ends = [a.state_dict(), end]
        found = repair_zipit(spec, a, rebasin.interpolate(ends[0], ends[1], 0.5), ends, batches).state
        made.append(torch.func.functional_call(a, found, (batches[0],)))
        assert int((found["0.weight"].abs().sum(1) == 0).sum()) == 2
    torch.testing.assert_close(*made)


def test_groups_of_one_name_are_zipped_each_by_itself() -> None:
    a, b = network("plain", 0), network("plain", 1)
    spec = rebasin.trace(a, data()[0])
    alike = replace(spec, groups=tuple(replace(group, name="same") for group in spec.groups))
    ends = [a.state_dict(), b.state_dict()]
    mean = rebasin.interpolate(ends[0], ends[1], 0.5)
    found = [repair_zipit(one, a, mean, ends, data()).state for one in (spec, alike)]
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_pairs_are_greedy_and_disjoint() -> None:
    matrix = torch.tensor([[1, 0.9, 0.8, 0.1], [0.9, 1, 0.7, 0.2], [0.8, 0.7, 1, 0.95], [0.1, 0.2, 0.95, 1]])
    assert pairs(matrix).tolist() == [[2, 3], [0, 1]]
    torch.manual_seed(0)
    found = pairs(torch.rand(20, 20))
    assert sorted(found.flatten().tolist()) == list(range(20))


def test_what_is_left_and_what_is_refused() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Linear(3, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.Linear(8, 2)
            self.wide = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.into(x)
            return self.wide(self.out(self.attention(x, x, x, need_weights=False)[0]))

    torch.manual_seed(0)
    model, x = Heads().eval(), torch.randn(6, 4, 3)
    spec = rebasin.trace(model, x)
    zips, left = zippable(spec, model)
    assert set(zips) == {"out", "wide.0"} and len(left) == len(spec) - 2
    state, other = model.state_dict(), Heads().state_dict()
    mean = rebasin.interpolate(state, other, 0.5)
    found = repair_zipit(spec, model, mean, [state, other], [x])
    assert set(found.left_out) == set(left)
    assert all(torch.equal(found.state[n], t) for n, t in mean.items() if not n.startswith(("wide", "out.")))
    with pytest.raises(ConfigError, match="two models, not of 3"):
        repair_zipit(spec, model, mean, [state, other, state], [x])
    with pytest.raises(DataError, match="no batches"):
        repair_zipit(spec, model, mean, [state, other], [])
    with pytest.raises(DataError, match="not finite"):
        repair_zipit(spec, model, mean, [state, other], [x / 0])
    bare = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ConfigError, match="heads, blocks or modules"):
        still = rebasin.trace(bare, x)
        rebasin.repair(still, bare, bare.state_dict(), [bare.state_dict()] * 2, [x], how="zipit")
