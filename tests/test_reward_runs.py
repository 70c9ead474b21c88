"""Runs with a reward: searched for, judged with intervals over seeds, and shown while the search goes on."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console as RichConsole
from scipy import stats
from test_run import configured, execute
from torch import Tensor
from wandb.sdk.wandb_run import Run

from rebasin.errors import ConfigError, DataError
from rebasin.evaluation.rewards import Estimate, score_models
from rebasin.jobs.scoring import load_scoring
from rebasin.jobs.skeleton import settle
from rebasin.objectives import Distillation, Reward
from rebasin.reporting.console import Console
from rebasin.reporting.kinds import draw
from rebasin.reporting.metrics import metrics
from rebasin.reporting.run import score_table
from rebasin.run import run
from rebasin.tasks import load_task

INK = "objective.scorer=test_reward_runs:ink"
SMALL = [
    "data.train=20", "data.heldout=20", "evaluate.points=3", "model.samples=2", "model.steps=2", "algo=ste",
    "algo.init=identity", "algo.steps=4", "algo.refine=1",
]  # fmt: skip
REWARD = [
    "objective=reward", INK, "objective.train=5", "objective.heldout=2", "objective.batch_size=2",
    "objective.steps=2", "evaluate=reward", "evaluate.seeds=3", "evaluate.steps=2",
]  # fmt: skip


def ink(images: Tensor, prompts: list[str]) -> Tensor:
    """A scorer: the share of ink."""
    assert all(prompt.startswith(("a ", "the ")) for prompt in prompts)
    return images.mean(dim=(1, 2, 3))


Searched = tuple[Path, dict, str, list[dict]]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """One run with everything: its folder, results.json, the terminal's text, and what wandb (offline) was told."""
    folder, logged = tmp_path_factory.mktemp("searched"), []
    log = Run.log

    def listen(self: Any, data: dict, *args: Any, **kwargs: Any) -> None:
        logged.append(data)
        log(self, data, *args, **kwargs)

    console = RichConsole(record=True, file=io.StringIO(), width=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", listen)
        results = run(configured(*SMALL, *REWARD, "sample_every=2"), folder, Console(console), "")
    assert results is not None
    return folder, results, console.export_text(), logged


def test_a_search_for_a_reward_leaves_its_curves_scores_and_pictures(searched: Searched):
    folder, results, text, _ = searched
    for name in ("curve.png", "search.png", "steps.png", "samples.png", "report.html"):
        assert (folder / name).stat().st_size > 1000, name
        assert name in text
    curve = results["curves"]["heldout"]["aligned"]
    assert curve["losses"] == [-reward for reward in curve["metrics"]["reward"]]
    search, history = results["match"]["search"], results["match"]["history"]
    assert search["best"] <= search["start"] == search["naive"]
    assert [step["step"] for step in history] == list(range(6))
    assert [step["kind"] for step in history] == ["start"] + 4 * ["step"] + ["pass"]
    assert all(math.isfinite(step["train"]) for step in history[1:])
    assert sum(search["seconds"].values()) <= results["seconds"]["align"]
    page = (folder / "report.html").read_text()
    for part in ("<h2>Scores</h2>", "<h2>The search</h2>", "<h2>Samples while it searched</h2>"):
        assert part in page
    assert page.count("data:image/png;base64,") == 4
    assert "aligned midpoint - mean of A and B" in page and "aligned midpoint - mean of A and B" in text


def test_scores_are_means_over_seeds_with_paired_differences(searched: Searched):
    _, results, _, _ = searched
    models, differences = results["rewards"]["models"], results["rewards"]["differences"]
    assert list(models) == ["A", "B", "naive midpoint", "aligned midpoint"]
    assert results["rewards"]["images"] == 30, "ten prompts, three seeds"
    values = {label: np.array(found["values"]) for label, found in models.items()}
    for label, found in models.items():
        assert len(found["values"]) == 3 and np.ptp(values[label]) > 0
        low, high = stats.t.interval(0.95, 2, loc=values[label].mean(), scale=stats.sem(values[label]))
        assert (found["mean"], found["low"], found["high"]) == pytest.approx(
            (values[label].mean(), low, high)
        )
    paired = values["aligned midpoint"] - (values["A"] + values["B"]) / 2
    assert differences["aligned midpoint - mean of A and B"]["values"] == pytest.approx(paired.tolist())
    found = metrics(results)
    assert found["reward/aligned_midpoint"] == models["aligned midpoint"]["mean"]
    assert found["reward_low/A"] < found["reward/A"] < found["reward_high/A"]


def test_the_scores_are_those_of_the_models(searched: Searched):
    _, results, _, _ = searched
    cfg = configured(*SMALL, *REWARD)
    task = load_task(cfg)
    scoring = load_scoring(cfg, task)
    assert scoring is not None
    state_a, state_b = task.endpoints(None)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    for label, state in (("A", state_a), ("B", state_b)):
        task.model.load_state_dict(dict(state))
        reward = scoring.objective.evaluate(task.model, scoring.batches[1])["reward"]
        assert results["rewards"]["models"][label]["values"][1] == pytest.approx(reward, rel=1e-5)
    task.model.load_state_dict(before)
    one = score_models(task.model, {"A": state_a}, scoring.objective, scoring.batches[:1])
    assert math.isnan(one.models["A"].low) and one.models["A"].mean == pytest.approx(
        results["rewards"]["models"]["A"]["values"][0], rel=1e-5
    )
    assert all((tensor == before[name]).all() for name, tensor in task.model.state_dict().items())


def test_one_seed_has_no_interval(searched: Searched, tmp_path: Path):
    _, results, _, _ = searched
    found: dict[str, Any] = {"mean": 0.5, "low": None, "high": None, "values": [0.5]}
    alone = {**results, "rewards": {"models": {"A": found}, "differences": {}, "images": 10, "seconds": 1.0}}
    assert score_table(alone).lines == (("A", "0.500", ""),)
    assert "<h2>Scores</h2>" in draw(alone, tmp_path)[-1].read_text()
    with pytest.raises(ConfigError, match="at least one seed"):
        score_models(None, {}, None, [])  # type: ignore[arg-type]
    assert Estimate.of([1.0, 3.0]).mean == 2.0


def test_mistakes_end_before_anything_is_searched(tmp_path: Path):
    for overrides, error, words in (
        (["objective=reward"], ConfigError, r"objective\.scorer is not set"),
        (["objective=reward", "objective.scorer=nowhere:nothing"], ConfigError, "can't be imported"),
        (["objective=image_reward"], ConfigError, r"download https://.*ImageReward\.pt"),
        (
            ["objective=reward", INK, "objective.prompts=nowhere.txt"],
            DataError,
            "no file or folder nowhere.txt",
        ),
        (["objective=distillation", "objective.samples=0"], ConfigError, "samples is 0"),
        (["model=mlp", "objective=reward"], ConfigError, "leave objective out"),
        (["evaluate=reward"], ConfigError, r"evaluate\.scorer is not set"),
        (["evaluate=image_reward"], ConfigError, r"download https://.*ImageReward\.pt"),
        (
            ["evaluate=reward", f"evaluate.{INK.partition('.')[2]}", "evaluate.seeds=0"],
            ConfigError,
            "seeds is 0",
        ),
        (["model=mlp", "evaluate=reward"], ConfigError, "model=mlp makes none"),
    ):
        with pytest.raises(error, match=words):
            cfg = configured(*overrides, "data.heldout=20" if "model=mlp" not in overrides else "seed=0")
            settle(cfg)
            load_scoring(cfg, load_task(cfg))
    with pytest.raises(ConfigError, match="sample_every=5 .* needs a model that makes images"):
        execute(tmp_path, "model=mlp", "model.width=8", "model.recipe.epochs=1", "sample_every=5")


def test_prompts_from_a_file_are_used(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("the digit five\nthe digit two\n")
    cfg = configured(
        *SMALL, *REWARD, f"objective.prompts={file}", f"evaluate.prompts={file}", "objective.batch_size=3"
    )
    task = load_task(cfg)
    assert isinstance(task.objective, Reward)
    five, two = file.read_text().splitlines()
    assert [batch["prompts"] for batch in task.batches["train"]] == [[five, two, five], [two, five]]
    scoring = load_scoring(cfg, task)
    assert scoring is not None
    assert [[batch["prompts"] for batch in seed] for seed in scoring.batches] == 3 * [[[five, two]]]


def test_without_data_the_search_has_teachers_and_the_curves_have_images():
    cfg = configured(
        "objective=distillation", "objective.samples=6", "objective.batch_size=4", "data.heldout=20"
    )
    task = load_task(cfg)
    assert isinstance(task.objective, Distillation)
    assert [len(batch["target"]) for batch in task.batches["train"]] == [4, 2]
    assert all("target" not in batch for batch in task.batches["heldout"])
    plain = load_task(configured("data.heldout=20", "data.train=20"))
    ours = task.objective.evaluate(task.model, task.batches["heldout"])
    assert ours == plain.objective.evaluate(plain.model, plain.batches["heldout"])


def test_an_offline_wandb_run_follows_the_search(searched: Searched):
    """Every step's losses, moves and seconds, and each picture, as wandb gets them."""
    folder, results, _, logged = searched
    steps = [data for data in logged if "straight-through/step" in data]
    assert [data["straight-through/step"] for data in steps] == [0, 1, 2, 3, 4]
    for data, step in zip(steps[1:], results["match"]["history"][1:5], strict=True):
        told = {name: data[f"straight-through/{name}"] for name in ("loss", "objective", "moved")}
        assert told == {"loss": step["train"], "objective": step["objective"], "moved": step["moved"]}
        for part in ("projection", "gradient"):
            assert data[f"straight-through/seconds_{part}"] == step[f"seconds_{part}"]
        assert data.get("straight-through/heldout") == step["heldout"]
    assert sum("steps" in data for data in logged) == 3, "at the steps 0, 2 and 4"
    assert {"curve", "search", "samples"} <= logged[-1].keys()
    assert list(folder.rglob("*.wandb"))
