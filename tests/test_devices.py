"""`device` reaches everything: jobs run whole on a device that is not there, where mixing devices is an error.

torch can't take back a device that was registered, so one test here runs those in a process of their own
(`pytest tests/test_devices.py -m pretend_device`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from aside import ROOT
from test_run import configured, execute
from torch import Tensor, nn

import rebasin
from experiments.check_gpu_parts import PARTS, Setting
from rebasin.errors import ConfigError
from rebasin.matching.weights import estimate
from rebasin.tasks import load_task
from rebasin.tensors.modules import OnDevice, device_of, find_device, loaded, visiting

MLP = ["model=mlp", "model.width=16", "model.depth=2", "model.recipe.epochs=1", "evaluate.points=3"]


there = pytest.mark.pretend_device


def test_a_device_that_is_not_there_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-m", "pretend_device", "-p", "no:cacheprovider"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.fixture(scope="module")
def pretend() -> Any:
    import pretend_device

    return pretend_device


def test_auto_is_the_first_cuda_device_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device(None) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda n, device: empty(n, device="cpu" if device == "cuda" else "meta")
    )
    assert find_device("auto") == find_device("cuda")
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"device is 'cuda', but torch finds no such device"):
            find_device("cuda")


@there
def test_mixing_devices_is_an_error(pretend: Any) -> None:
    """The tests below can fail."""
    there = torch.ones(2, 2, device=pretend.DEVICE)
    assert there.device == pretend.DEVICE and there.cpu().device.type == "cpu" and float(there.sum()) == 4
    with pytest.raises(RuntimeError, match="on pretend:0 and on the CPU"):
        _ = there @ torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="on pretend:0 and on the CPU"):
        nn.Linear(2, 2).to(pretend.DEVICE)(torch.ones(1, 2))


@there
def test_modules_visit_a_device_and_come_back(pretend: Any) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="wrong"), visiting(pretend.DEVICE, model):
        assert device_of(model) == pretend.DEVICE
        raise ValueError("wrong")
    assert device_of(model).type == "cpu"
    batches = OnDevice([(torch.ones(1), "text")], pretend.DEVICE)
    assert (
        len(batches) == 1
        and batches[0][0].device == pretend.DEVICE
        and [text for _, text in batches] == ["text"]
    )


def losses(results: Any) -> list[float]:
    """All of them, whatever the kind of the run."""
    if isinstance(results, dict):
        own = results.get("losses")
        return own if isinstance(own, list) else [x for value in results.values() for x in losses(value)]
    return []


@there
@pytest.mark.parametrize(
    "options", [["algo=ste", "algo.steps=1", "algo.refine=0"], ["algo=activation_and_weight"]]
)
def test_a_run_computes_on_its_device_what_it_computes_on_the_cpu(
    pretend: Any, tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, tracing, verification, matching, STE, activations, merging and evaluation."""
    monkeypatch.setattr(estimate, "matmul_rate", lambda *_: 1.0)  # else these groups belong on the CPU
    with pretend.Watch() as watch:
        ours, _ = execute(tmp_path / "there", *MLP, *options, f"device={pretend.DEVICE}")
    theirs, _ = execute(tmp_path / "here", *MLP, *options)
    assert not watch.beside, "products and convolutions beside the device"
    assert watch.on_device["addmm"] > 10
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-6)


@there
@pytest.mark.parametrize(("width", "large"), [(8, False), (2048, True)])
def test_small_groups_are_matched_on_the_cpu(pretend: Any, width: int, large: bool) -> None:
    model = nn.Sequential(
        nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
    )
    spec = rebasin.trace(model, torch.ones(1, 4))
    found = estimate.where_quicker(spec, pretend.DEVICE)
    assert found.type == (pretend.NAME if large else "cpu")
    if not large:
        b = spec.random(0).apply(model.state_dict())
        moved = {name: tensor.to(pretend.DEVICE) for name, tensor in b.items()}  # B is there, A is not
        match = rebasin.weight_matching(spec, model.state_dict(), moved, device=pretend.DEVICE)
        assert match.permutation.apply(b)["0.weight"].equal(model.state_dict()["0.weight"])


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean(dim=(1, 2, 3))


@there
def test_pictures_and_rewards_are_made_on_the_device(pretend: Any) -> None:
    options = [
        "model=tiny_sd", "objective=reward", "objective.scorer=test_devices:brightness", "objective.train=1",
        "objective.heldout=1", "objective.batch_size=1", "objective.steps=1", "model.samples=1", "model.steps=1",
    ]  # fmt: skip
    with pretend.Watch() as watch:
        task = load_task(configured(*options, f"device={pretend.DEVICE}"))
        a, _ = task.endpoints(None)
        objective, (batch,) = task.objective, task.batches["train"]
        loss = objective.loss(loaded(task.model, a), batch)
        loss.backward()
        assert task.sampler is not None
        made = task.sampler({"A": a}, 0)
    assert loss.device == pretend.DEVICE and not watch.beside and len(made.rows["A"]) == 1
    plain = load_task(configured(*options))
    assert float(loss.detach()) == pytest.approx(
        float(plain.objective.loss(loaded(plain.model, a), plain.batches["train"][0]).detach()), rel=1e-4
    )


@there
@pytest.mark.parametrize("name", ["weights", "activations", "step", "evaluation"])
def test_parts_of_the_check_of_a_gpu_compute_on_the_device(
    pretend: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each computes the same on the device and beside it, and compares."""
    monkeypatch.setattr(estimate, "matmul_rate", lambda *_: 1.0)
    (part,) = [part for part in PARTS if part.name == name]
    with pretend.Watch() as watch:
        figures = part.run(Setting(pretend.DEVICE, True, tmp_path))
    if name == "weights":  # whose products are none of those that are counted (addmm_)
        assert figures["where"] == str(pretend.DEVICE)
    else:
        assert watch.on_device["addmm"] and watch.on_device.keys() >= watch.beside.keys() & {
            "mm",
            "convolution",
        }
