"""The experiments on learned maps run, in miniature, and keep what they measure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from torch import nn
from torch.nn import functional as F

from experiments import learned_scales, learned_transformers


def test_a_gpt_is_trained_and_measured_row_by_row(tmp_path: Path) -> None:
    rows = "learned rotation;STE behind the maps"
    learned_transformers.main(
        "gpt", width=8, train_steps=2, steps=2, batches=2, points=3, held=1, keep=tmp_path, rows=rows,
        json_file=tmp_path / "all.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert list(found) == ["naive", *rows.split(";")]
    ends = {tuple(round(x, 4) for x in (*row["ends"], *row["accuracies"])) for row in found.values()}
    assert len(ends) == 1  # maps leave B as it is
    assert all(len(row["losses"]) == 3 for row in found.values())
    assert len(list(tmp_path.glob("gpt-*.safetensors"))) == 2


def test_what_was_trained_is_not_trained_again(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    first = learned_transformers.kept(file, nn.Linear(2, 3), lambda: nn.Linear(2, 3)).state_dict()
    again = learned_transformers.kept(file, nn.Linear(2, 3), lambda: nn.Linear(0, 0)).state_dict()
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


def test_two_padded_resnets_are_read_and_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name in "ab":
        state = learned_scales.PaddedResNet20(4).state_dict()
        wrapped = {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}
        torch.save(wrapped, tmp_path / f"{name}.th")
    random = np.random.default_rng(0)
    pixels, labels = random.integers(0, 256, (300, 32, 32, 3), dtype=np.uint8), random.integers(0, 10, 300)
    np.savez(
        tmp_path / "cifar10.npz",
        x_train=pixels, y_train=labels, x_test=pixels[:20], y_test=labels[:20],
    )  # fmt: skip
    learned_scales.main(
        tmp_path / "a.th", tmp_path / "b.th", tmp_path / "cifar10.npz", steps=2, size=90, batches=2, select=1, test=20,
        fresh=20, points=3, rows="naive,weights+filters", json_file=tmp_path / "found.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())["rows"]
    rows = ["naive", "naive, scales", "weights+filters", "weights+filters, scales"]
    assert list(found) == rows
    for row in rows:
        assert found[row]["ends"] == pytest.approx(found["naive"]["ends"], rel=1e-3)


def test_batch_statistics_leave_no_trace() -> None:
    model = learned_scales.PaddedResNet20(4).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = torch.randn(6, 3, 8, 8), torch.arange(6)
    loss = learned_scales.classified(model, (x, y)).item()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert loss == pytest.approx(F.cross_entropy(model.train()(x), y).item()) and model.eval()(x).shape == (
        6,
        10,
    )


def test_what_is_no_row_is_told() -> None:
    with pytest.raises(typer.BadParameter, match="has 'wieghts'"):
        learned_transformers.main("gpt", width=8, train_steps=1, rows="wieghts", batches=1, points=2)
