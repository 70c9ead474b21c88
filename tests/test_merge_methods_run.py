"""The merge step of a run: every method's config, block weights, base; what is recorded and shown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console as RichConsole

from rebasin.checkpoints import load_safetensors, save_safetensors
from rebasin.errors import ConfigError
from rebasin.files import config_dir
from rebasin.jobs.combination import load_combination
from rebasin.merging import METHODS, merge
from rebasin.reporting.console import Console
from rebasin.run import run
from rebasin.tasks import load_task

TINY = [
    "model=mlp",
    "model.width=8",
    "model.depth=2",
    "model.recipe.epochs=2",
    "evaluate.points=3",
    "logger=none",
]


def configured(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=[*TINY, *overrides])


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REBASIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base for two trainings of a network: the mean of A and B, which is in the same basis."""
    task = load_task(configured())
    a, b = task.endpoints(None)
    return save_safetensors(
        tmp_path_factory.mktemp("base") / "base.safetensors", merge("uniform_soup", [a, b])
    )


def execute(folder: Path, *overrides: str) -> tuple[dict[str, Any], str]:
    console = RichConsole(record=True, file=open(os.devnull, "w"), width=200)  # noqa: SIM115
    results = run(configured(*overrides), folder, Console(console), "again")
    return results or {}, console.export_text()


def test_every_method_has_a_config_with_its_own_options() -> None:
    names = [path.stem for path in (config_dir() / "merge").glob("[!_]*.yaml")]
    files = {name: configured(f"merge={name}").merge for name in names}
    assert set(files) == set(METHODS) - {"clip"}  # which needs a third model
    for name, config in files.items():
        assert isinstance(config, DictConfig)
        assert config.name == config.method == name and config.weights is None and config.blocks is None
        assert dict(config.options) == dict(METHODS[name].options) | (
            {"mode": "min"} if name == "greedy_soup" else {}
        )


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"clip"}))
def test_every_method_merges_in_a_run(name: str, base: Path) -> None:
    overrides = [f"merge={name}", *([f"merge.base='{base}'"] if METHODS[name].needs_base else [])]
    cfg = configured(*overrides)
    task = load_task(cfg)
    a, b = task.endpoints(None)
    combination = load_combination(cfg, task)
    merged = dict(combination(task, [a, b]))
    assert list(merged) == list(a) and all(t.isfinite().all() for t in merged.values())
    if METHODS[name].one == "b" and METHODS[name].plan is None:
        assert combination.weights == 0.5 and "0.5" in combination.words
    assert combination.record()["method"] == name


@pytest.mark.usefixtures("real_pictures")
def test_a_run_uses_records_and_shows_its_merge(tmp_path: Path) -> None:
    task = load_task(configured())
    layer = next(iter(task.model.state_dict())).rpartition(".")[0]
    blocks = f"merge.blocks={{{layer}: 0, default: 1.0}}"
    results, text = execute(tmp_path, "merge=slerp", blocks)
    aligned, merged = (load_safetensors(tmp_path / f"{name}.safetensors") for name in ("aligned", "merged"))
    state_a, _ = task.endpoints(None)
    for name in merged:
        assert torch.equal(merged[name], (state_a if name.startswith(f"{layer}.") else aligned)[name])
    found = results["merge"]
    assert found["method"] == "slerp" and found["blocks"][0] == {
        "block": layer, "low": 0.0, "high": 0.0, "mean": 0.0, "set_by": [layer],
    }  # fmt: skip
    task.model.load_state_dict(dict(merged))
    assert found["figures"]["heldout"] == pytest.approx(
        task.objective.evaluate(task.model, task.batches["heldout"])
    )
    assert "slerp with weights by block" in text and "blocks.png" in text
    page = (tmp_path / "report.html").read_text()
    assert "slerp with weights by block" in page and "The weight of B by block" in page
    assert (tmp_path / "blocks.png").stat().st_size > 1000


def test_a_dry_run_shows_the_weight_of_every_block(tmp_path: Path) -> None:
    results, text = execute(tmp_path, "dry_run=true", "merge.blocks=[0,1]")
    assert not results and "merge by weighted_sum with weights by block" in text
    assert "tensors  set by" in text and "the list of 2 was spread over" in text
    assert (tmp_path / "blocks.png").exists() and not (tmp_path / "merged.safetensors").exists()


def test_lam_is_the_share_of_b_unless_weights_are_given() -> None:
    task = load_task(configured())
    a, b = task.endpoints(None)
    for overrides, weight in ((["lam=0.3"], 0.3), (["lam=0.3", "merge.weights=0.9"], 0.9)):
        merged = load_combination(configured(*overrides), task)(task, [a, b])
        expected = merge("weighted_sum", [a, b], weights=weight)
        assert all(torch.equal(merged[k], expected[k]) for k in expected)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["merge.method=slrp"], "no merge method 'slrp'"),
        (["merge.method=clip"], "takes 3 or more models, but this run has 2"),
        (["merge=ties_sum"], "needs merge.base"),
        (["merge=slerp", "+merge.options.k=1"], "no option 'k'"),
        (["merge=uniform_soup", "merge.blocks=0.3"], "leave out merge.blocks"),
        (["merge.blocks={nowhere: 1}"], "'nowhere' is no block"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(overrides: list[str], sentence: str) -> None:
    cfg = configured(*overrides)
    with pytest.raises(ConfigError, match=sentence):
        load_combination(cfg, load_task(cfg))


def test_a_base_that_is_not_there() -> None:
    task = load_task(configured())
    a, b = task.endpoints(None)
    with pytest.raises(ConfigError, match="no model or file 'nowhere'"):
        load_combination(configured("merge=ties_sum", "merge.base=nowhere"), task)(task, [a, b])


def test_more_than_two_models(tmp_path: Path) -> None:
    """After aligning many, their merge by the method stands beside the plain mean, and is what is saved."""
    seeds = ["algo=merge_many", "model.seeds=[0,1,2]"]
    mean, _ = execute(tmp_path / "mean", *seeds)
    results, _ = execute(tmp_path / "median", *seeds, "merge=geometric_median")
    names = [row["name"] for row in results["splits"]["heldout"]] if "splits" in results else str(results)
    assert "geometric_median" in names and "geometric_median" not in str(mean)
    plain, median = (load_safetensors(tmp_path / name / "merged.safetensors") for name in ("mean", "median"))
    assert any(not torch.equal(plain[name], median[name]) for name in plain)
    with pytest.raises(ConfigError, match="takes 2 models, but this run has 3"):
        execute(tmp_path / "slerp", *seeds, "merge=slerp")
