"""The usage example of the PyPI package `rebasin`, and what it does wrong there and right here."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rebasin import MergeMany, PermutationCoordinateDescent, interpolation
from rebasin.compat import MisuseError
from rebasin.errors import CheckpointError, ConfigError


class Net(nn.Module):
    """Convolutions with BatchNorm, a parameter that is called neither weight nor bias, and heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Flatten(), nn.Linear(6 * 16, 12), nn.ReLU(), nn.Linear(12, 3),
        )  # fmt: skip
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.temperature


def layers(model: Any) -> Any:
    return model.body


def trained(seed: int) -> Net:
    """A network whose running statistics have seen data."""
    generator = torch.Generator().manual_seed(seed)
    net = Net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        net.temperature.fill_(seed + 1.0)
        for _ in range(3):
            net(torch.randn(16, 1, 6, 6, generator=generator) + seed)
    return net.eval()


@pytest.fixture
def train_dl() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(64, 1, 6, 6, generator=generator)
    x[32:] += 3  # the loader is sorted: its first batch is not like the others
    return DataLoader(TensorDataset(x, torch.arange(64) % 3), batch_size=16)


def test_the_usage_example(train_dl: DataLoader[Any], tmp_path: Path) -> None:
    model_a, model_b = trained(0), trained(1)
    original, input_data = copy.deepcopy(model_b), next(iter(train_dl))[0]

    def eval_fn(model: nn.Module, device: Any) -> float:
        with torch.no_grad():
            losses = [nn.functional.cross_entropy(model(x), y) for x, y in train_dl]
        return float(sum(losses) / len(losses))

    # Rebasin
    pcd = PermutationCoordinateDescent(model_a, model_b, input_data)  # weight-matching
    pcd.rebasin()  # Rebasin model_b towards model_a. Automatically updates model_b

    # Interpolate
    lerp = interpolation.LerpSimple(
        models=[model_a, model_b],
        devices=["cpu", "cpu"],
        eval_fn=eval_fn,
        eval_mode="min",
        train_dataloader=train_dl,
        savedir=str(tmp_path),
    )
    lerp.interpolate(steps=10)

    assert not torch.equal(layers(model_b)[0].weight, layers(original)[0].weight)
    torch.testing.assert_close(model_b(input_data), original(input_data))  # also in evaluation mode
    assert len(lerp.metrics_interpolated) == 10 and len(set(lerp.metrics_interpolated)) == 10
    assert lerp.best_metric == min(lerp.metrics_interpolated) == pytest.approx(eval_fn(lerp.best_model, None))
    assert len(list(tmp_path.glob("interp_models_0_1_perc_*.pt"))) == 10
    saved = torch.load(tmp_path / "interp_models_0_1_perc_0.091.pt", weights_only=True)
    Net().load_state_dict(saved)


def test_model_b_comes_nearer_and_stays_what_it_was(train_dl: DataLoader[Any]) -> None:
    model_a, model_b = trained(0), trained(1)
    x = next(iter(train_dl))[0]
    before, distance = (
        model_b(x),
        sum((p - q).norm() for p, q in zip(model_a.parameters(), model_b.parameters(), strict=True)),
    )
    weight = layers(model_b)[0].weight
    pcd = PermutationCoordinateDescent(model_a, model_b, x, logging_level="info")
    assert "groups" in str(pcd.pinit.model_graph)
    pcd.rebasin(max_iterations=5)
    torch.testing.assert_close(model_b(x), before)
    assert (
        sum((p - q).norm() for p, q in zip(model_a.parameters(), model_b.parameters(), strict=True))
        < distance
    )
    assert layers(model_b)[0].weight is weight, "the parameters must stay the same objects"
    assert not model_b.training and pcd.result is not None and pcd.result.moved > 0
    with pytest.raises(MisuseError, match="call calculate_permutations"):
        PermutationCoordinateDescent(model_a, model_b, x).apply_permutations()


def test_a_planted_permutation_is_found(train_dl: DataLoader[Any]) -> None:
    model_a, x = trained(0), next(iter(train_dl))[0]
    model_b = copy.deepcopy(model_a)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for tensor in (layers(model_b)[7].weight, layers(model_b)[7].bias):
            tensor.copy_(tensor[order])
        layers(model_b)[9].weight.copy_(layers(model_b)[9].weight[:, order])
    PermutationCoordinateDescent(model_a, model_b, x).rebasin()
    for p, q in zip(model_a.state_dict().values(), model_b.state_dict().values(), strict=True):
        assert torch.equal(p, q)


def test_every_parameter_and_the_whole_grid() -> None:
    shares: list[float] = []
    lerp = interpolation.LerpSimple(
        [trained(0), trained(1), trained(3)],
        eval_fn=lambda model, device: shares.append(float(model.temperature.detach())) or 0.0,  # type: ignore[attr-defined]
    )
    lerp.interpolate(steps=3)
    assert shares[:3] == [1, 2, 4], "the models themselves are measured, too"
    assert shares[3:] == pytest.approx([1.25, 2.5, 1.5, 3, 1.75, 3.5])
    assert len(lerp.metrics_interpolated) == 6 and lerp.metrics_models == [0, 0, 0]


def test_batch_norm_has_the_statistics_of_the_whole_loader(train_dl: DataLoader[Any]) -> None:
    models = [trained(0), trained(1)]
    lerp = interpolation.LerpSimple(models, train_dataloader=train_dl, eval_mode="max")
    lerp.interpolate(steps=1)
    best = lerp.best_model
    first = layers(best)[0]
    everything = torch.cat([x for x, _ in train_dl])
    expected = first(everything).mean((0, 2, 3))
    torch.testing.assert_close(layers(best)[1].running_mean, expected, rtol=1e-4, atol=1e-5)
    half = interpolation.LerpSimple(models, train_dataloader=train_dl, dataset_percentage=0.5)
    half.interpolate(steps=1)
    expected = first(everything[:32]).mean((0, 2, 3))
    torch.testing.assert_close(layers(half.best_model)[1].running_mean, expected, rtol=1e-4, atol=1e-5)
    plain = interpolation.LerpSimple(models)
    plain.interpolate(steps=1)
    mean = (layers(models[0])[1].running_mean + layers(models[1])[1].running_mean) / 2
    torch.testing.assert_close(layers(plain.best_model)[1].running_mean, mean)


def test_merge_many(train_dl: DataLoader[Any], tmp_path: Path) -> None:
    models, x = [trained(0), trained(1), trained(2)], next(iter(train_dl))[0]
    outputs = [model(x) for model in models]
    paths = [tmp_path / f"{i}.pt" for i in range(3)]
    for model, path in zip(models, paths, strict=True):
        torch.save(model.state_dict(), path)

    merge = MergeMany(models, working_model=Net(), input_data=x)
    with pytest.raises(AttributeError, match="run"):
        _ = merge.merged_model
    merged = merge.run()
    assert merged is merge.merged_model is merge.working_model
    for model, output in zip(models, outputs, strict=True):
        torch.testing.assert_close(model(x), output)  # changed in place, computes the same
    for name, tensor in merged.state_dict().items():
        if tensor.is_floating_point():
            mean = torch.stack([model.state_dict()[name] for model in models]).mean(0)
            torch.testing.assert_close(tensor, mean)
    fresh = trained(1).state_dict()
    assert any(not torch.equal(fresh[n], t) for n, t in models[1].state_dict().items())

    from_files = MergeMany([str(paths[0]), *paths[1:]], working_model=Net(), input_data=x).run()
    for p, q in zip(from_files.state_dict().values(), merged.state_dict().values(), strict=True):
        assert torch.equal(p, q)
    for path, model in zip(paths, models, strict=True):
        stored = torch.load(path, weights_only=True)
        assert all(torch.equal(stored[n], t) for n, t in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"missing\.pt can't be read"):
        MergeMany([tmp_path / "missing.pt", paths[0]], Net(), x).run()
    with pytest.raises(MisuseError, match="two or more"):
        MergeMany([paths[0]], Net(), x).run()


@pytest.mark.parametrize(
    "wrong",
    [
        {"models": "ab"},
        {"models": [nn.ReLU()]},
        {"models": [nn.ReLU(), 1]},
        {"eval_fn": 1},
        {"eval_mode": "best"},
        {"train_dataloader": 1},
        {"dataset_percentage": 2.0},
        {"dataset_percentage": 1},
        {"dataset_iterations": 0.5},
        {"devices": ["cpu"]},
        {"devices": [1, 2]},
        {"device_interp": 1},
        {"input_indices": "x"},
        {"savedir": 1},
        {"logging_level": "loud"},
        {"logging_level": 11},
    ],
)
def test_wrong_arguments_fail_an_assertion_as_there(wrong: dict[str, Any]) -> None:
    given: dict[str, Any] = {"models": [trained(0), trained(1)], **wrong}
    with pytest.raises(AssertionError, match=next(iter(wrong))) as caught:
        interpolation.LerpSimple(**given)
    assert isinstance(caught.value, ConfigError)


def test_logging_levels() -> None:
    for level in ("debug", "INFO", logging.WARNING, "error", 50):
        interpolation.LerpSimple([trained(0), trained(1)], logging_level=level)
    with pytest.raises(TypeError):
        interpolation.LerpSimple([trained(0), trained(1)], logging_level=None)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError):
        interpolation.Interpolation([trained(0), trained(1)]).interpolate()
