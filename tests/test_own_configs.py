"""What can be wrong with configs of the user's own (--config-dir): one sentence each, that names the config."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from test_run import TINY, configured

from rebasin import trace
from rebasin.errors import ConfigError, DataError, SpecMismatchError
from rebasin.integrations.functions import located
from rebasin.jobs import stages
from rebasin.jobs.algorithm import Algorithm, is_many, load_algorithm
from rebasin.jobs.commands import RUN
from rebasin.matching import MatchResult, naive, weight_matching
from rebasin.spec import PermutationSpec


def _net(width: int = 4) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))


@pytest.fixture(scope="module")
def spec() -> PermutationSpec:
    return trace(_net(), torch.randn(2, 3))


THREE = 3


def no_arguments() -> None: ...


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (
            "nopkg.nothing",
            "algo._target_ of algo=own is 'nopkg.nothing', which can't be imported (No module named",
        ),
        (f"{__name__}.nothing", "has no attribute 'nothing'); give the path of a function or class"),
        ("nothing", "which can't be imported"),
        ("rebasin..x", "which can't be imported"),
        (f"{__name__}.THREE", "which is of type int and can't be called; give the path"),
        (
            5,
            "algo._target_ of algo=own is 5, but it takes the path of a function or class, package.module.name.",
        ),
        (None, "algo._target_ of algo=own is not set, but it takes the path"),
        (f"{__name__}.no_arguments", "takes nothing that a run has, so it can't align"),
        ("builtins.dict", "has no signature"),
    ],
)
def test_a_target_that_is_no_function_is_one_sentence(target: Any, words: str) -> None:
    algo = OmegaConf.create({"name": "own", "_target_": target})
    with pytest.raises(ConfigError) as caught:
        load_algorithm(algo)
    told = str(caught.value)
    assert words in told and told.endswith(".") and len(told) <= 300 and "\n" not in told


def test_faults_of_the_module_itself_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_fault_a.py").write_text("1 / 0\n")
    (tmp_path / "own_fault_b.py").write_text("import own_missing_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    for path, words in (("own_fault_a.f", "ZeroDivisionError"), ("own_fault_b.f", "own_missing_dependency")):
        with pytest.raises(ImportError, match=words):
            located(path)
    assert located("rebasin.merging.interpolate.interpolate") is located("rebasin.merging:interpolate")
    assert located("rebasin.spec.Permutation.load") == located("rebasin.spec.permutation:Permutation.load")


class _Task(ModuleType):
    """As much of a task as an algorithm that looks at states needs."""

    model, pipeline, captions, objective = _net(), None, (), None


def _result(found: Any, spec: PermutationSpec) -> Any:
    def own(spec: Any, state_a: Any, state_b: Any) -> Any:
        return found

    states = _net().state_dict(), _net().state_dict()
    task: Any = _Task("task")
    return Algorithm("own", own, {})(task, spec, *states), states


def test_an_algorithm_may_return_a_permutation(spec: PermutationSpec) -> None:
    permutation = spec.random(0)
    found, (a, b) = _result(permutation, spec)
    assert isinstance(found, MatchResult) and found.permutation is permutation
    before, after = naive(spec, a, b), naive(spec, a, permutation.apply(b))
    assert found.initial_objective == before.objective and found.distance_before == before.distance_before
    assert found.objective == pytest.approx(after.objective)
    assert (
        found.distance_after == pytest.approx(after.distance_before)
        and found.to_dict()["moved"] == found.moved
    )
    whole = weight_matching(spec, a, b)
    assert _result(whole, spec)[0] is whole


@pytest.mark.parametrize("found", [None, 5, {"weight": torch.ones(1)}])
def test_what_else_an_algorithm_returns_is_one_sentence(found: Any, spec: PermutationSpec) -> None:
    with pytest.raises(ConfigError) as caught:
        _result(found, spec)
    told = str(caught.value)
    assert (
        f"own of algo=own returned a value of type {type(found).__name__}, but it must return a Perm" in told
    )
    assert told.startswith(__name__) and len(told) <= 300


def test_a_permutation_of_another_spec_is_one_sentence(spec: PermutationSpec) -> None:
    other = trace(_net(6), torch.randn(2, 3))
    for found in (other.random(0), naive(other, _net(6).state_dict(), _net(6).state_dict())):
        with pytest.raises(
            SpecMismatchError, match="own of algo=own returned a permutation that is none of this"
        ):
            _result(found, spec)


def test_one_network_is_too_few() -> None:
    for option, words in (
        ("+model.files=[a.pt]", r"model.files is \['a.pt'\], one"),
        ("model.seeds=[3]", "model.seeds"),
    ):
        with pytest.raises(ConfigError, match=words):
            is_many(configured(*TINY, option))


CONFIGS = {
    "empty": ("", "algo=empty ({}) has no name and no _target_; add the lines 'name: empty' and '_target_: "),
    "anon": ("_target_: rebasin.matching.naive\n", "algo=anon ({}) has no name; add the line 'name: anon'."),
    "aimless": ("name: aimless\n", "algo=aimless ({}) has no _target_; add the line '_target_: package."),
    "list": ("- 1\n- 2\n", "algo=list ({}) is a list, but a config is a mapping, lines of OPTION: VALUE."),
    "broken": ("_target_: [a\n", "{}, line 2, can't be read as YAML (expected ',' or ']', but got"),
    "lost": (
        "_target_: rebasin.matching.weight_matching\nname: lost\nseed: ${nothing}\n",
        "algo.seed of algo=lost ({}) refers to 'nothing', but there is no such option; give a value, or name",
    ),
    "away": (
        "_target_: rebasin.matching.naive\nname: ../../x\n",
        "algo.name of algo=away ({}) is '../../x', but it takes text that can be a part of a folder's name, such",
    ),
    "listed": ("_target_: rebasin.matching.naive\nname: [1, 2]\n", "algo.name of algo=listed ({}) is [1, 2], but it"),
    "stray": (
        "defaults: [/function/x.y@_here_]\nname: stray\n",
        "{} has a fault in its defaults: there is no function 'x.y' whose source can be read; the module 'x' is",
    ),
    "heir": (
        "defaults:\n  - /logger@own: nix\nname: heir\n",
        "{} has a fault in its defaults: there is no logger 'nix'; choose one of none, ",
    ),
    "wrong": ("_target_: no_package.f\nname: wrong\n", "algo._target_ of algo=wrong is 'no_package.f', which can't"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_faults_of_a_config_are_one_sentence_and_leave_no_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, words = CONFIGS[name]
    file = tmp_path / "conf" / "algo" / f"{name}.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(SystemExit) as caught:
        launched(tmp_path, monkeypatch, "--config-dir", str(tmp_path / "conf"), f"algo={name}")
    told = capsys.readouterr().err
    assert caught.value.code == 2
    assert told.startswith(f"Error: {words.format(file)}") and told.count("\n") == 1
    assert folders(tmp_path) <= {"conf", "algo", "a", "b", "outputs"}


def launched(place: Path, patch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The command in this process, its outputs in `place`."""
    patch.setenv("REBASIN_OUTPUTS", str(place / "a" / "b" / "outputs"))
    patch.setattr(sys, "argv", ["rebasin.run", *arguments, "model=mlp", "logger=none"])
    patch.chdir(place)
    GlobalHydra.instance().clear()
    try:
        RUN.main()
    finally:
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None


def folders(place: Path) -> set[str]:
    return {path.name for path in place.rglob("*") if path.is_dir()}


def test_a_dry_run_leaves_no_folder_and_a_refused_one_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched(tmp_path, monkeypatch, "model.width=8", "dry_run=true")
    assert "and leave the result in" in capsys.readouterr().out
    monkeypatch.setattr(stages, "verify_all", lambda *_: {})

    def lost(*_: Any) -> None:
        raise DataError("The file x is not there.")

    monkeypatch.setattr(stages, "endpoints", lost)
    with pytest.raises(SystemExit):
        launched(tmp_path, monkeypatch, "model.width=8", "merge.blocks=[0,1]")
    assert capsys.readouterr().err == "Error: The file x is not there.\n"
    assert folders(tmp_path) <= {"a", "b", "outputs"}
