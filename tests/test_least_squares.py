"""Least squares after permuting: exact where it must be, nearest in each layer, and its convolutions are torch's."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import rebasin
from rebasin.errors import ConfigError, DataError
from rebasin.merging.least_squares import repair_least_squares, solvable

CONVOLUTIONS = {
    "plain": nn.Conv2d(3, 6, 3),
    "stride and padding": nn.Conv2d(3, 6, 3, stride=2, padding=1),
    "gaps": nn.Conv2d(3, 6, (3, 2), dilation=(2, 1), padding=(2, 0), bias=False),
    "same": nn.Conv2d(3, 6, (4, 3), padding="same"),
    "valid": nn.Conv2d(3, 6, 3, padding="valid"),
    "one axis": nn.Conv1d(3, 6, 3, stride=2, padding=2),
    "three axes": nn.Conv3d(3, 6, 2, padding=1),
    "linear": nn.Linear(5, 6),
    "linear without bias": nn.Linear(5, 6, bias=False),
}


def shape(layer: nn.Module) -> tuple[int, ...]:
    axes = {nn.Conv1d: (3, 9), nn.Conv2d: (3, 8, 9), nn.Conv3d: (3, 5, 4, 6), nn.Linear: (5,)}
    return axes[type(layer)]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_one_layer_becomes_the_weighted_mean(kind: str) -> None:
    """All members read the same, so the mean of the weights answers with the mean of the answers."""
    layer = CONVOLUTIONS[kind]
    model = nn.Sequential(layer)
    torch.manual_seed(0)
    members = [{n: torch.randn_like(t) for n, t in model.state_dict().items()} for _ in range(3)]
    wrong = {n: torch.zeros_like(t) for n, t in members[0].items()}
    batches = [torch.randn(20, *shape(layer)) for _ in range(3)]
    spec = rebasin.trace(model, batches[0])
    found = repair_least_squares(spec, model, wrong, members, batches, weights=[1, 2, 1], ridge=0)
    for name, tensor in found.state.items():
        wanted = sum(w * m[name] for w, m in zip((0.25, 0.5, 0.25), members, strict=True))
        torch.testing.assert_close(tensor, wanted, rtol=1e-4, atol=1e-5)
    assert found.left_out == () and not found.reset


def network(seed: int, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), *([nn.BatchNorm2d(8)] if norm else []), nn.ReLU(),
        nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4),
    )  # fmt: skip
    made.eval()
    return made


@cache
def data() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(25, 1, 6, 6) for _ in range(12)]


@pytest.mark.parametrize("norm", [True, False])
def test_members_that_are_the_same_stay_as_they_are(norm: bool) -> None:
    model = network(0, norm)
    state = model.state_dict()
    spec = rebasin.trace(model, data()[0])
    found = rebasin.repair(spec, model, state, [state, state], data(), how="least_squares")
    for name, tensor in found.state.items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(tensor, state[name], rtol=1e-4, atol=1e-5)
    assert found.reset is norm


def test_each_layer_answers_nearer_than_that_of_the_mean() -> None:
    a, b = network(0, False), network(1, False)
    spec = rebasin.trace(a, data()[0])
    ends = [
        a.state_dict(),
        rebasin.weight_matching(spec, a.state_dict(), b.state_dict()).permutation.apply(b.state_dict()),
    ]
    merged = rebasin.interpolate(ends[0], ends[1], 0.5)
    found = repair_least_squares(spec, a, merged, ends, data())
    b.load_state_dict(ends[1])
    x = torch.cat(data())
    inputs = [[net[:cut](x) for net in (a, b)] for cut in (2, 5)]
    outputs = [[net[:cut](x) for net in (a, b)] for cut in (3, 6)]
    for place, before, after in zip(("2", "5"), inputs, outputs, strict=True):
        layer = a[int(place)]
        mean, goal = sum(before) / 2, sum(after) / 2
        errors = []
        for state in (merged, found.state):
            tensors = {n: state[f"{place}.{n}"] for n in ("weight", "bias")}
            made = torch.func.functional_call(layer, tensors, mean)
            errors.append(float((made - goal).detach().square().mean()))
        assert errors[1] < 0.9 * errors[0], place
    torch.testing.assert_close(found.state["0.weight"], merged["0.weight"], rtol=1e-3, atol=1e-4)


def test_what_is_left_and_what_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 3))
    assert solvable(model)[1] == ["0"]
    x = torch.randn(5, 4, 3, 3)
    spec = rebasin.trace(model, x)
    state = model.state_dict()
    found = repair_least_squares(spec, model, state, [state, state], [x])
    assert found.left_out == ("0",) and torch.equal(found.state["0.weight"], state["0.weight"])
    with pytest.raises(DataError, match="no batches"):
        repair_least_squares(spec, model, state, [state, state], [])
    with pytest.raises(DataError, match="not finite"):
        repair_least_squares(spec, model, state, [state, state], [x / 0])
    norm = nn.Sequential(nn.LayerNorm(3))
    with pytest.raises(ConfigError, match="no linear layer and no convolution"):
        rebasin.repair(
            rebasin.trace(norm, torch.randn(2, 3)),
            norm,
            norm.state_dict(),
            [norm.state_dict()],
            [x],
            how="least_squares",
        )
