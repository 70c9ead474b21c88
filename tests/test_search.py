"""The search over merges: spaces, in-place evaluation, judging, and whole searches that are killed and go on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from optuna.trial import FixedTrial
from rich.console import Console as RichConsole
from torch import nn

from rebasin import report
from rebasin.checkpoints import load_metadata, load_safetensors
from rebasin.errors import CheckpointError, ConfigError, DataError
from rebasin.files import config_dir
from rebasin.jobs.worker import workers
from rebasin.merging import METHODS, interpolate, merge
from rebasin.merging.blocks import block_weights
from rebasin.objectives import CrossEntropy, Denoising
from rebasin.reporting.console import Console
from rebasin.reporting.results import load_results
from rebasin.reporting.search_figures import beats
from rebasin.search.assessment import bootstrap, difference
from rebasin.search.candidate import Candidate
from rebasin.search.evaluator import Evaluator
from rebasin.search.folder import key, locked
from rebasin.search.groups import group_tensors, interpolated
from rebasin.search.objectives import cut, deal, load_objectives
from rebasin.search.space import read_space, warm_starts
from rebasin.search.study import open_study
from rebasin.search.verdict import Finalist, references
from rebasin.tasks import load_task
from rebasin.tasks.prompted import ImageMaker

TINY = ["model=mlp", "model.width=16", "model.depth=2", "model.recipe.epochs=8", "logger=none"]
QUICK = ["search.minutes=0", "search.batch=100", "search.warm=6", "search.finalists=3"]
UNET = [
    "conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight",
    "mid_block.resnets.0.conv1.weight", "up_blocks.0.resnets.0.conv1.weight", "conv_out.weight",
]  # fmt: skip


def configured(*overrides: str, config: str = "search") -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose(config, overrides=list(overrides))


def execute(folder: Path, *overrides: str) -> tuple[dict[str, Any], str]:
    """Results and console text of a search in this process."""
    from rebasin.jobs.search import search

    console = RichConsole(record=True, file=open(os.devnull, "w"), width=150)  # noqa: SIM115
    results = search(configured(*overrides), folder, Console(console), "python -m rebasin.search ...")
    return results or {}, console.export_text()


class Drawn(FixedTrial):
    """A trial whose values come from a generator, or are given; it notes what was asked."""

    def __init__(self, given: dict[str, Any] | None = None, seed: int = 0) -> None:
        super().__init__(given or {})
        self.given, self.asked, self._random = given or {}, {}, np.random.default_rng(seed)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: Any = None, log: bool = False
    ) -> float:
        self.asked[name] = self.given.get(name, float(self._random.uniform(low, high)))
        return self.asked[name]

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        self.asked[name] = self.given.get(name, int(self._random.integers(low, high + 1)))
        return self.asked[name]

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        self.asked[name] = self.given.get(name, choices[int(self._random.integers(len(choices)))])
        return self.asked[name]


def two_states(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randn(4, 3, generator=generator) for name in UNET} for _ in range(2)]


# Spaces


def test_a_weight_for_each_block_is_a_setting_of_block_weights():
    space = read_space({"weights": {"by": "blocks"}}, UNET, 2, has_base=False)
    trial = Drawn()
    candidate = space.suggest(trial)
    assert isinstance(candidate.weight, dict)
    assert set(trial.asked) == {f"share.{block}" for block in candidate.weight}
    a, b = two_states()
    merged = candidate.merged([a, b], base=None, groups=space.groups)
    expected = merge("weighted_sum", [a, b], weights=block_weights(candidate.weight, UNET))
    for name in UNET:
        torch.testing.assert_close(merged[name], expected[name], rtol=0, atol=0)
    assert Candidate.from_dict(json.loads(json.dumps(candidate.to_dict()))) == candidate


def test_only_gives_the_other_blocks_one_weight():
    space = read_space({"weights": {"by": "blocks", "only": ["M00"]}}, UNET, 2, has_base=False)
    trial = Drawn()
    weight = space.suggest(trial).weight
    assert set(trial.asked) == {"share.M00", "share.default"}
    assert isinstance(weight, dict)
    assert len({value for block, value in weight.items() if block != "M00"}) == 1


def test_kinds_and_selectors():
    groups = group_tensors(UNET, "kinds")
    assert groups is not None
    assert set(groups.order) == {"default", "embedding", "resnet", "attn1", "attn2", "ff"}
    assert groups.of[UNET[3]] == "attn1"
    last = group_tensors(UNET, "selectors", ["IN", "attn2"])
    assert last is not None
    assert [last.of[UNET[i]] for i in (0, 4, 6)] == ["IN", "attn2", "default"]


def test_points_over_the_depth_are_interpolated():
    groups = group_tensors([f"layers.{i}.weight" for i in range(5)], "depth")
    assert groups is not None
    assert list(interpolated([0.0, 1.0, 0.0], groups).values()) == [0.0, 0.5, 1.0, 0.5, 0.0]


def test_methods_with_one_meaning_of_weights_share_parameters():
    space = read_space(
        {"method": ["weighted_sum", "slerp", "add_difference"], "options": {"add_difference": {"clamp": [True]}}},
        UNET, 2, has_base=True,
    )  # fmt: skip
    asked = {}
    for name in ("weighted_sum", "slerp", "add_difference"):
        trial = Drawn({"method": name})
        assert space.suggest(trial).method == name
        asked[name] = set(trial.asked) - {"method"}
    assert asked["weighted_sum"] == asked["slerp"] == {"share"}
    assert asked["add_difference"] == {"strength", "add_difference.clamp"}


def test_three_models_have_a_weight_each():
    space = read_space({}, UNET, 3, has_base=False)
    candidate = space.suggest(Drawn({"share.1": 0.0, "share.2": 0.0, "share.3": 0.0}))
    assert candidate.weight == (1.0, 1.0, 1.0), "all zero is no merge"
    assert space.suggest(Drawn({"share.1": 0.2, "share.2": 0.0, "share.3": 1.0})).weight == (0.2, 0.0, 1.0)


def test_all_are_the_methods_that_fit():
    without = {m.name for m in read_space({"method": ["all"]}, UNET, 2, has_base=False).methods}
    with_base = {m.name for m in read_space({"method": ["all"]}, UNET, 2, has_base=True).methods}
    assert "slerp" in without and "ties_sum" not in without
    assert "ties_sum" in with_base and without < with_base
    assert not {"fisher", "greedy_soup", "wise_ft"} & with_base


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"method": ["slurp"]}, "slurp"),
        ({"method": []}, "space.method"),
        ({"method": ["ties_sum"]}, "needs a base"),
        ({"weights": {"by": "colour"}}, "space.weights.by is 'colour'"),
        ({"weights": {"by": "selectors"}}, "space.weights.selectors"),
        ({"weights": {"by": "selectors", "selectors": ["attn7"]}}, "attn7"),
        ({"weights": {"by": "blocks", "only": ["IN77"]}}, "IN77"),
        ({"weights": {"low": 1.0, "high": 0.0}}, "space.weights goes from 1.0"),
        ({"weights": {"by": "depth", "points": 1}}, "space.weights.points"),
        ({"options": {"weighted_sum": {"k": 1}}}, "no option 'k'"),
        ({"options": {"slurp": {}}}, "slurp"),
        ({"method": ["crossover"], "options": {"crossover": {"tilt": {"from": 0}}}}, "'from'"),
    ],
)
def test_a_space_that_cannot_be_is_refused_in_one_sentence(space, words):
    with pytest.raises(ConfigError) as error:
        read_space(space, UNET, 2, has_base=False)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_warm_starts_are_known_merges_in_the_space():
    space = read_space(
        {"method": ["weighted_sum", "add_difference"], "weights": {"by": "blocks"}}, UNET, 2, True
    )
    starts = dict(warm_starts(space, UNET, [0.5, 0.0, {"default": 0.2, "M00": 0.9}]))
    assert list(starts) == [
        "weighted_sum 0.5", "weighted_sum 0.0", "weighted_sum {'default': 0.2, 'M00': 0.9}", "add_difference 1",
    ]  # fmt: skip
    assert starts["weighted_sum 0.5"]["share.M00"] == 0.5
    mixed = starts["weighted_sum {'default': 0.2, 'M00': 0.9}"]
    assert mixed["share.M00"] == pytest.approx(0.9) and mixed["share.IN00"] == pytest.approx(0.2)
    candidate = space.suggest(Drawn(starts["add_difference 1"]))
    assert candidate.method == "add_difference" and set(candidate.weight.values()) == {1.0}  # type: ignore[union-attr]
    narrow = read_space({"weights": {"low": 0.4, "high": 0.6}}, UNET, 2, False)
    assert [p["share"] for _, p in warm_starts(narrow, UNET, [0.5, 0.0, 0.3])] == [0.5, 0.4], (
        "clipped, and once"
    )


# Evaluation


def test_the_evaluator_computes_only_what_changes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    a = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    b = {name: torch.randn_like(tensor) for name, tensor in a.items()}
    b["3.bias"] = a["3.bias"].clone()
    space = read_space({"weights": {"by": "blocks"}}, list(a), 2, False)
    assert space.groups is not None
    evaluator = Evaluator(model, [a, b], groups=space.groups)
    first = Candidate("weighted_sum", {"0": 0.1, "2": 0.2, "3": 0.3})
    evaluator.load(first)
    assert evaluator.computed == 6
    second = Candidate("weighted_sum", {"0": 0.1, "2": 0.7, "3": 0.3})
    loaded = evaluator.load(second)
    assert evaluator.computed == 6 + 2
    for name, tensor in merge("weighted_sum", [a, b], weights=block_weights(second.weight, list(a))).items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    evaluator.load(Candidate("slerp", 0.5))
    assert evaluator.computed == 8 + 5, "the bias that is the same in both is written once"
    assert not torch.equal(model.state_dict()["0.weight"], loaded.state_dict()["0.weight"]), (
        "the model is copied"
    )


def test_a_merge_that_fails_leaves_nothing_that_counts_as_loaded():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    a = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    b = {name: 2 * tensor for name, tensor in a.items()}
    b["1.weight"][0, 0] = float("nan")
    evaluator = Evaluator(model, [a, b])
    with pytest.raises(CheckpointError, match=r"1\.weight"):
        evaluator.load(Candidate("weighted_sum", 0.5))
    loaded = evaluator.load(Candidate("weighted_sum", 0.0)).state_dict()
    assert all(torch.equal(loaded[name], a[name]) for name in a)


def test_batches_are_cut_and_dealt_without_losing_a_sample():
    batch = {
        "noise": torch.arange(7.0),
        "prompts": [str(i) for i in range(7)],
        "unconditional": torch.zeros(1, 2),
    }
    pieces = cut([batch, batch], 3)
    assert [len(piece["noise"]) for piece in pieces] == [3, 3, 1, 3, 3, 1]
    assert pieces[1]["prompts"] == ["3", "4", "5"] and pieces[1]["unconditional"].shape == (1, 2)
    assert cut([(torch.zeros(5, 2), torch.arange(5))], 4)[1][1].tolist() == [4]
    searched, choosing = deal(list(range(10)), 0.3)
    assert sorted(searched + choosing) == list(range(10)) and len(choosing) == 3
    with pytest.raises(DataError, match="two batches"):
        deal([batch], 0.5)


def test_bootstrap_intervals():
    random = np.random.default_rng(0)
    values = random.normal(1.0, 2.0, 400)
    found = bootstrap(values.tolist(), [1] * 400)
    error = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.03)
    # Pairing: a constant gap has no spread, however much the units differ.
    gap = difference((values - 0.5).tolist(), values.tolist(), [1] * 400)
    assert (gap.mean, gap.low, gap.high) == pytest.approx((-0.5, -0.5, -0.5))
    # Sizes weigh: two samples of 0, one of 3.
    assert bootstrap([0.0, 3.0], [2, 1]).mean == pytest.approx(1.0)
    # Units of one prompt are drawn together: two prompts leave only three possible means.
    together = bootstrap([0.0] * 50 + [1.0] * 50, [1] * 100, ["a"] * 50 + ["b"] * 50)
    assert (together.low, together.high, together.units) == (0.0, 1.0, 2)


def test_domination():
    assert (
        beats((1.0, 2.0), (1.0, 3.0))
        and not beats((1.0, 2.0), (1.0, 2.0))
        and not beats((0.0, 9.0), (1.0, 2.0))
    )


# Objectives


def test_objectives_of_a_search(monkeypatch):
    cfg = configured(
        *TINY, "search.objectives=[run,run.accuracy,'tests.test_search:squared']", "search.unit=7"
    )
    monkeypatch.setitem(sys.modules, "tests.test_search", sys.modules[__name__])
    task = load_task(cfg)
    loss, accuracy, own = load_objectives(cfg, task, cfg.search)
    assert [one.name for one in (loss, accuracy, own)] == ["cross_entropy", "accuracy", "squared"]
    model = task.model.eval()
    for split, batches in (("heldout", task.batches["heldout"]),):
        whole = task.objective.evaluate(model, batches)
        assert loss.mean(loss.losses(model, split), split) == pytest.approx(whole["loss"])
        assert accuracy.mean(accuracy.losses(model, split), split) == pytest.approx(-whole["accuracy"])
    x, y = task.batches["heldout"][0]
    with torch.no_grad():
        assert own.losses(model, "heldout")[0] == pytest.approx(float(squared(model, (x[:7], y[:7]))))
    samples = [sum(len(batch[1]) for batch in part) for part in (loss.search, loss.choose)]
    assert sum(samples) == sum(len(y) for _, y in task.batches["train"])
    cfg = configured(*TINY, "search.data=heldout")
    halves = load_objectives(cfg, task, cfg.search)[0]
    total = sum(len(batch[1]) for part in (halves.search, halves.choose, halves.heldout) for batch in part)
    assert total == sum(len(y) for _, y in task.batches["heldout"]), "every held-out sample has one use"


def squared(model: nn.Module, batch: Any) -> torch.Tensor:
    """A loss of a user's own."""
    return model(batch[0]).square().mean()


@pytest.mark.parametrize(
    ("objectives", "words"),
    [
        ("[]", "empty"), ("[run,run]", "twice"), ("[run.colour]", "run.colour"), ("[beauty]", "'beauty'"),
        ("['no_such:thing']", "can't be imported"), ("[{scorer: x}]", "no name"),
    ],
)  # fmt: skip
def test_objectives_that_there_are_not(objectives, words):
    cfg = configured(*TINY, f"search.objectives={objectives}")
    task = load_task(cfg)
    with pytest.raises(ConfigError) as error:
        for objective in load_objectives(cfg, task, cfg.search):
            objective.losses(task.model, "choose")
    assert words in str(error.value)


def test_the_judge_of_a_reward_has_prompts_of_its_own():
    from rebasin.search.objectives import _prompted

    maker = ImageMaker(
        problem=Denoising("epsilon", torch.linspace(0.99, 0.01, 10)),
        decode=lambda latents: latents,
        embed=lambda texts: torch.zeros(len(texts), 1, 1),
        shape=(1, 2, 2),
        prompts=[f"prompt {i}" for i in range(10)],
    )
    cfg = configured("objective=reward", "objective.train=21", "objective.heldout=6", "logger=none")
    import dataclasses

    task = dataclasses.replace(load_task(configured(*TINY)), maker=maker)
    batches = _prompted(cfg, task, cfg.search)
    seen, unseen = (
        {p for batch in batches[split] for p in batch["prompts"]} for split in ("train", "heldout")
    )
    assert len(seen) == 7 and len(unseen) == 3 and not seen & unseen


# Whole searches


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REBASIN_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict[str, Any], str]:
    pytest.importorskip("optuna")
    folder = tmp_path_factory.mktemp("search")
    return folder, *execute(folder, *TINY, *QUICK, "search.trials=14")


def test_a_search_leaves_everything(finished):
    folder, results, text = finished
    for name in ("report.html", "best.safetensors", "results.json", "study.db", "config.yaml"):
        assert (folder / name).stat().st_size > 100, name
        assert name in text
    for name in ("history", "importance", "slices"):
        assert (folder / f"{name}.png").stat().st_size > 1000, name
    assert load_results(folder) == results
    page = (folder / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') >= 3
    assert "http" not in page.split("</style>")[1], "the page must need nothing from outside"
    assert len(results["trials"]) == 14
    assert [t["start"] for t in results["trials"][:3]] == [
        "weighted_sum 0.5",
        "weighted_sum 0.0",
        "weighted_sum 1.0",
    ]
    drawn = (folder / "report.html").stat().st_mtime_ns
    assert report.main([str(folder)]) == 0
    assert (folder / "report.html").stat().st_mtime_ns > drawn


def test_the_winner_is_saved_with_its_recipe(finished):
    folder, results, _ = finished
    metadata = load_metadata(folder / "best.safetensors")
    recipe = json.loads(metadata["recipe"])
    assert recipe["method"] == results["winner"]["candidate"]["method"]
    cfg = configured(*TINY)
    task = load_task(cfg)
    a, b = task.endpoints(None)
    from rebasin import Permutation

    permutation = Permutation.load(next(folder.glob("permutation-*.safetensors")))
    weight = recipe["weight"]
    weights = block_weights(weight, list(a)) if isinstance(weight, dict) else weight
    expected = merge(recipe["method"], [a, permutation.apply(b)], weights=weights, **recipe["options"])
    saved = load_safetensors(folder / "best.safetensors")
    for name in a:
        torch.testing.assert_close(saved[name], expected[name], rtol=0, atol=0)
    # The figure of the page is that of the saved file.
    task.model.load_state_dict(dict(saved))
    loss = CrossEntropy().evaluate(task.model, task.batches["heldout"])["loss"]
    assert results["judged"][0]["models"]["winner"]["mean"] == pytest.approx(loss, rel=1e-5)


def test_the_winner_is_chosen_on_other_data_among_known_merges_too(finished):
    _, results, _ = finished
    labels = {finalist["label"] for finalist in results["finalists"]}
    assert {"plain average", *results["labels"]} <= labels
    chosen = [finalist["chosen"][0] for finalist in results["finalists"]]
    assert chosen == sorted(chosen)
    assert results["winner"]["label"] == results["finalists"][0]["label"]


def test_a_larger_budget_goes_on_from_where_the_search_ended(finished, cache, tmp_path):
    """To the same end after a kill, see test_kills."""
    folder = Path(shutil.copytree(finished[0], tmp_path / "more"))
    more, text = execute(folder, *TINY, *QUICK, "search.trials=16")
    assert len(more["trials"]) == 16 and more["resumed"] == 14 and "went on after 14 of them" in text
    told = ("values", "parameters", "start", "batches")
    assert [{k: t[k] for k in told} for t in more["trials"][:14]] == [
        {k: t[k] for k in told} for t in finished[1]["trials"]
    ]


@pytest.mark.usefixtures("real_pictures")
def test_several_objectives_have_a_front(tmp_path):
    pytest.importorskip("optuna")
    results, text = execute(
        tmp_path, *TINY, *QUICK, "search.trials=8", "search.objectives=[run,run.accuracy]", "space=model",
        "search.keep_front=true",
    )  # fmt: skip
    assert (tmp_path / "front.png").exists() and "accuracy" in text
    front = [
        Finalist(f["label"], Candidate("x"), tuple(f["chosen"])) for f in results["finalists"] if f["front"]
    ]
    assert front and not any(beats(one.chosen, other.chosen) for one in front for other in front)
    assert results["finalists"][0]["front"]
    assert all(len(trial["values"]) == 2 for trial in results["trials"])
    assert len(list(tmp_path.glob("front-*.safetensors"))) == len(front) - 1


def test_a_worker_goes_on_with_the_search_in_a_folder(finished, tmp_path, monkeypatch):
    folder, results, _ = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = OmegaConf.load(tmp_path / "config.yaml")
    config.search.trials = 17
    OmegaConf.save(config, tmp_path / "config.yaml")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    with workers(tmp_path, 1) as running:
        running[0].wait(timeout=300)
    assert running[0].returncode == 0, (tmp_path / "worker-1.log").read_text()
    more, _ = execute(tmp_path, *TINY, *QUICK, "search.trials=17")
    assert more["resumed"] == 17, "the worker has spent the whole budget"
    assert more["trials"][:14] == results["trials"]


def test_workers_end_with_the_search(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    with workers(tmp_path / "nothing", 0) as running:
        assert running == []
    (tmp_path / "config.yaml").write_text("broken: [")
    with workers(tmp_path, 2) as running:
        pass
    assert all(process.returncode not in (None, 0) for process in running)


def test_bad_merges_are_given_up_early(finished):
    _, results, _ = finished
    early = [trial for trial in results["trials"] if not trial["values"]]
    assert 0 < len(early) < 10
    assert all(trial["batches"] is None for trial in results["trials"] if trial["values"])
    assert all(0 < trial["batches"] < results["aims"][0]["batches"] for trial in early)
    assert not any(trial["start"] for trial in early), "known merges are measured in full"


def test_a_dry_run_tells_the_plan(tmp_path):
    pytest.importorskip("optuna")
    results, text = execute(tmp_path, *TINY, *QUICK, "search.trials=5", "dry_run=true")
    assert not results and "Would search weighted_sum, 3 weights by blocks" in text
    assert not (tmp_path / "study.db").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["search.trials=0"], "at least one must be above 0"),
        (["search.trials=3", "search.choose=1.5"], "search.choose"),
        (["search.trials=3", "search.workers=0"], "search.workers"),
        (["search.trials=3", "search.sampler=luck"], "search.sampler"),
        (["search.trials=3", "search.prune=1"], "search.prune"),
        (["search.trials=3", "search.data=some"], "search.data"),
    ],
)
def test_mistakes_cost_one_sentence(tmp_path, overrides, words):
    pytest.importorskip("optuna")
    with pytest.raises(ConfigError, match=words):
        execute(tmp_path, *TINY, *QUICK, *overrides)


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"git-rebasin\[search\]"):
        execute(tmp_path, *TINY, "search.trials=1")


def test_a_damaged_study_is_named(tmp_path):
    pytest.importorskip("optuna")
    (tmp_path / "study.db").write_bytes(b"no database " * 100)
    with pytest.raises(CheckpointError, match=r"study\.db"):
        execute(tmp_path, *TINY, *QUICK, "search.trials=3")


def test_a_study_that_draws_from_other_numbers_is_named(tmp_path):
    """A value of the database that is whole, but not what the search wrote."""
    pytest.importorskip("optuna")
    objectives: Any = [SimpleNamespace(name="loss")]
    study = open_study(tmp_path, objectives, 0.0)
    for number in range(2):
        trial = study.ask()
        trial.suggest_float("weight", 0.1, 1)
        trial.set_user_attr("candidate", {"method": "weighted_sum", "weight": 0.5, "options": {}})
        study.tell(trial, float(number))
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as database:
        change = "UPDATE trial_params SET distribution_json = replace(distribution_json, 'false', 'true')"
        database.execute(f"{change} WHERE trial_id = 2")
        database.commit()
    with pytest.raises(CheckpointError, match=r"study\.db can't be opened as an Optuna study"):
        open_study(tmp_path, objectives, 0.0)


def test_two_searches_do_not_share_a_folder(tmp_path):
    with locked(tmp_path), pytest.raises(ConfigError, match="Another search"), locked(tmp_path):
        pass
    assert not [*tmp_path.iterdir()], "the lock's file goes with the lock"
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    assert not [*tmp_path.iterdir()]


def test_the_folder_follows_from_what_is_searched():
    same = key(_plain(configured(*TINY, "search.trials=5", "search.workers=2")))
    assert same == key(_plain(configured(*TINY, "search.trials=9", "search.minutes=1")))
    others = (
        "space=model",
        "seed=1",
        "search.batch=7",
        "base=x",
        "merge.base=x",
        "algo=naive",
        "model.width=17",
    )
    assert (
        len({same, *(key(_plain(configured(*TINY, other))) for other in others if other != "merge.base=x")})
        == 7
    )


def _plain(cfg: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


# The comparison


@pytest.mark.usefixtures("real_pictures")
def test_methods_are_compared_on_held_out_data(tmp_path):
    from rebasin.compare_methods import compare_methods

    cfg = configured(
        *TINY,
        "methods.names=[slerp,fisher,greedy_soup]",
        "methods.objectives=[run,run.accuracy]",
        config="compare_methods",
    )
    console = RichConsole(record=True, file=open(os.devnull, "w"), width=150)  # noqa: SIM115
    results = compare_methods(cfg, tmp_path, Console(console), "python -m rebasin.compare_methods ...") or {}
    rows = {(row["name"], row["kind"]): row for row in results["rows"]}
    assert list(rows) == [
        ("seed 0", "endpoint"), ("seed 1", "endpoint"), ("weighted_sum", "naive"), ("weighted_sum", "aligned"),
        ("slerp", "naive"), ("slerp", "aligned"), ("fisher", "naive"), ("fisher", "aligned"),
        ("greedy_soup", "naive"), ("greedy_soup", "aligned"),
    ]  # fmt: skip
    assert not any(row["error"] for row in rows.values())
    task = load_task(cfg)
    a, b = task.endpoints(None)
    task.model.load_state_dict(interpolate(a, b, 0.5))
    expected = task.objective.evaluate(task.model, task.batches["heldout"])
    plain = rows["weighted_sum", "naive"]["aims"]
    assert plain["cross_entropy"]["mean"] == pytest.approx(expected["loss"], rel=1e-5)
    assert plain["accuracy"]["mean"] == pytest.approx(-expected["accuracy"])
    assert plain["cross_entropy"]["difference"] == 0
    aligned = rows["weighted_sum", "aligned"]["aims"]["cross_entropy"]
    assert aligned["mean"] < plain["cross_entropy"]["mean"] and aligned["difference_high"] < 0
    text = console.export_text()
    assert "fisher" in text and "Best by accuracy" in text
    for name in ("report.html", "table.md", "methods.png", "results.json", "config.yaml"):
        assert (tmp_path / name).stat().st_size > 100, name
    assert report.main([str(tmp_path)]) == 0


def test_a_comparison_says_why_a_method_does_not_fit(tmp_path):
    from rebasin.compare_methods import compare_methods

    def compare(*overrides: str) -> None:
        compare_methods(configured(*TINY, *overrides, config="compare_methods"), tmp_path, Console())

    with pytest.raises(ConfigError, match="needs a base"):
        compare("methods.names=[ties_sum]")
    for override, words in (
        ("methods.shares=[a]", "methods.shares has 'a', but it takes numbers."),
        ("methods.strengths=[nan]", "methods.strengths has nan, but"),
        ("methods.names=[1]", "named by text, not by 1"),
        ("+methods.options.nix.a=1", "There is no merge method 'nix'"),
        ("+methods.options.slerp=1", "methods.options.slerp is 1, but"),
        ("+methods.options.fisher.nix=1", "The merge method 'fisher' has no"),
        ("algo=merge_many", "algo=merge_many merges all models by itself"),
        ("model.seeds=[0]", "one network alone"),
    ):
        with pytest.raises(ConfigError, match=words):
            compare(override)


def test_every_method_of_the_registry_is_compared_or_left_out_for_a_reason():
    from rebasin.search.comparison import fitting
    from rebasin.search.space import UNFIT

    assert set(UNFIT) <= set(METHODS)
    names = {m.name for m in fitting(["all"], 2, True, True)}
    assert set(METHODS) - names == {"clip", "wise_ft", "uniform_soup", "ema", "polyak"}


def test_the_base_is_a_reference_of_its_own():
    a, b = two_states()
    base = two_states(1)[0]
    known = references(["A", "B"], has_base=True)
    assert list(known) == ["plain average", "A", "B", "base"]
    for label, expected in (("A", a), ("B", b), ("base", base)):
        merged = known[label].merged([a, b], base=base)
        assert all(torch.equal(merged[name], expected[name]) for name in UNET)


def test_a_merge_that_comes_again_is_not_measured_again(tmp_path):
    """A space of two merges: the sampler can only repeat itself."""
    pytest.importorskip("optuna")
    space = [
        "space=model",
        "space.weights.low=0.5",
        "space.weights.high=0.5",
        "space.method=[weighted_sum,slerp]",
    ]
    results, _ = execute(tmp_path, *TINY, *QUICK, *space, "search.trials=8", "algo=naive")
    by_method = {}
    for trial in results["trials"]:
        by_method.setdefault(trial["parameters"]["method"], set()).add((*trial["values"], trial["batches"]))
    assert set(by_method) == {"weighted_sum", "slerp"} and all(
        len(values) == 1 for values in by_method.values()
    )
    assert sum(trial["same_as"] is not None for trial in results["trials"]) == 6


def test_an_error_of_a_scorer_is_not_the_end_of_the_budget(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    errors = iter(
        [TimeoutError("the server does not answer"), TimeoutError("nor now"), AssertionError("still at it")]
    )

    def measure(self, *_: Any) -> float:
        raise next(errors)

    with monkeypatch.context() as broken:
        broken.setattr("rebasin.search.trials._twin", measure)
        with pytest.raises(TimeoutError, match="the server"):
            execute(tmp_path, *TINY, *QUICK, "search.trials=2", "space=model", "algo=naive")
    results, _ = execute(
        tmp_path, *TINY, *QUICK, "search.trials=0", "search.minutes=0.02", "space=model", "algo=naive"
    )
    assert results["trials"], "the trial that failed is none, and the search goes on"


def test_a_start_that_a_kill_interrupted_is_tried_again_in_its_place(tmp_path: Path) -> None:
    """Its number too: the trials are those of a search that was not interrupted, and in their order."""
    import optuna

    from rebasin.search.study import enqueue, take_over

    starts = [("A", {"x": 0.5}), ("B", {"x": 0.1})]
    place = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(storage=place)
    enqueue(study, starts)
    study.ask().suggest_float("x", 0, 1)  # and the process ends here
    again = optuna.load_study(study_name=study.study_name, storage=place)
    assert take_over(again) == 1
    enqueue(again, starts)
    again.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    told = [(trial.number, trial.user_attrs.get("start"), trial.state.name) for trial in again.trials]
    assert told == [(0, "A", "COMPLETE"), (1, "B", "COMPLETE"), (2, None, "COMPLETE")]
