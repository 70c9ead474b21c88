"""What was set and has no effect on a job is refused in one sentence: each option has a rule, or always an effect."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_files import rebasin
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from test_run import TINY, configured, execute
from test_search import configured as searched

from rebasin.arguments import Kind, kinds_of
from rebasin.compare_methods import compare_methods
from rebasin.errors import ConfigError
from rebasin.files import config_dir
from rebasin.integrations.signatures import composed
from rebasin.jobs.commands import RUN
from rebasin.jobs.refusals import ALWAYS, RULES
from rebasin.jobs.search import search
from rebasin.jobs.skeleton import LIMITS
from rebasin.jobs.studies import run_study
from rebasin.merging.merged import find_method
from rebasin.models import tiny_sd_training, train
from rebasin.reporting.console import Console
from rebasin.tasks import Task, load_task

STUDY = ["+study._target_=rebasin.jobs.studies.counterexample.study"]
MANY = ["algo=merge_many", "model.seeds=[0,1,2]"]
NO_PICTURES = ["model=checkpoint", "model.a=nowhere", "model.b=nowhere"]  # which are not looked at
FILES = ["+model.files=[a.safetensors,b.safetensors]"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["resume=true", "algo=naive"], "resume=true has no effect here: algo=naive can't be continued"),
        (["sample_every=5"], "it needs a model that makes images"),
        (["sample_every=5", "model=tiny_sd", "algo=weight_matching"], "algo=weight_matching has no steps to show"),
        (["repair=reset"], "repair=reset has no effect here: it has no BatchNorm whose statistics could be collected"),
        (["repair=rescale", "lam=1.5"], "repair=rescale has no effect here: lam is 1.5"),
        (["repair=zipit", "lam=0"], "repair=zipit has no effect here: lam is 0"),
        (["repair=least_squares", "merge.weights=-0.5"], "here: merge.weights is -0.5, and the goals are"),
        (["repair=reset", *MANY], "repair=reset has no effect here: algo.repair says it for many models"),
        (["lam=0.3", "merge.weights=0.4"], "lam=0.3 has no effect here: merge.weights says it"),
        (["lam=0.3", "merge=uniform_soup"], "has no share of B"),
        (["lam=0.3", *MANY], "lam=0.3 has no effect here: a run on many models has no use for it"),
        (["target=match/moved", *MANY], "target=match/moved"),
        (["size=small"], "size=small has no effect here: there is no experiment"),
        (["merge.samples=5"], "merge.samples=5 has no effect here: merge.method=weighted_sum looks at no data"),
        (["data.share=0.6"], "data.share=0.6 has no effect here: data.split is not classes"),
        (["model.steps=3", *NO_PICTURES], "model.steps=3 has no effect here: without model.samples there are no pict"),
        (["model.guidance=3", *NO_PICTURES], "model.guidance=3 has no effect here"),
        (["model.seeds_shown=2", *NO_PICTURES], "model.seeds_shown=2 has no effect here"),
        (["model.samples=2", "algo=merge_many", *NO_PICTURES], "model.samples=2 has .*: a run on many models"),
        (["model.seeds=[0,1]", *FILES], "model.seeds=.* model.files are trained already"),
        (["model.recipe.epochs=3", *FILES], "model.recipe.epochs=3 .*model.files are trained already"),
        (["model.epoch=2", *FILES], "model.recipe.epochs=8 .*model.files are trained already"),
    ],
)  # fmt: skip
def test_what_has_no_effect_on_a_run_is_refused(overrides: list[str], words: str, tmp_path: Path) -> None:
    tiny = [] if {"model=tiny_sd", "model=checkpoint"} & set(overrides) else TINY
    with pytest.raises(ConfigError, match=words) as caught:
        execute(tmp_path, *tiny, *overrides, "dry_run=true")
    assert str(caught.value).endswith("; leave it out.")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["resume=true"], "resume=true has no effect here: the same command goes on with a search"),
        (["tensors=false"], "tensors=false has no effect here: a search has no use for it"),
        (["merge=slerp"], "merge=slerp has no effect here: a search has no use for it"),
        (["evaluate.points=7"], "evaluate.points=7 has no effect"),
        (["merge.weights=0.3"], "merge.weights=0.3 has no effect"),
        (["study={}"], "study="),
    ],
)
def test_what_has_no_effect_on_a_search_is_refused(overrides: list[str], words: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(ConfigError, match=words):
        search(searched(*TINY, *overrides, "dry_run=true"), tmp_path, Console())
    if "resume=true" not in overrides:
        cfg = searched(*TINY, *overrides, "dry_run=true", config="compare_methods")
        with pytest.raises(ConfigError, match="has no effect here: a comparison has no use for it"):
            compare_methods(cfg, tmp_path, Console())


def own_task(cfg: Any) -> Task:
    """A task that brings data and objective of its own, and does not look where to compute."""
    return load_task(configured(*TINY, f"seed={cfg.seed}"))


def test_a_group_that_is_appended_where_it_has_no_effect_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["rebasin", *TINY, "+space=blocks", "dry_run=true", f"hydra.run.dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as stop:
        RUN.main()
    told = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and told.startswith("Error: The group 'space' has no effect here")


@pytest.mark.parametrize("name", ["threads", "seed"])
def test_numbers_that_torch_can_not_take_are_refused_alike_by_runs_and_commands(
    name: str, tmp_path: Path
) -> None:
    for value in (-1, 99999999999, 10**30):
        with pytest.raises(
            ConfigError, match=rf"^{name} is {value}, but it must be at least 0 and at most \d+\.$"
        ):
            execute(tmp_path, *TINY, f"{name}={value}", "dry_run=true")
        for command in ("merge", "align", "compare", "verify"):
            told = rebasin(command, "a.safetensors", "b.safetensors", f"--{name}", value, expect=2)
            assert f"Invalid value for '--{name}'" in told and "Traceback" not in told
    execute(tmp_path, *TINY, f"{name}=0", "dry_run=true")


GROUPS = ("algo", "model", "data", "objective", "evaluate", "merge")
ANY_NUMBER = {"algo.anchor", "algo.pivot"}  # models, which are counted when they are there


def numbers(config: Any, prefix: str) -> Iterator[tuple[str, int | float]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def declared(option: str, config: DictConfig) -> Kind | None:
    """The kind that the signature with this option gives it."""
    where, _, name = option.rpartition(".")
    functions: list[Any] = [train.Recipe, tiny_sd_training.Recipe] if where.endswith("recipe") else []
    if option.startswith("merge."):
        method = find_method(str(config.merge.method))
        functions = [method.function, method.plan]
    for key in ("_target_", "many", "with_maps"):
        path = OmegaConf.select(config, f"{where}.{key}")
        functions += [get_object(path)] if isinstance(path, str) else []
    return next((kinds_of(f)[name] for f in functions if f is not None and name in kinds_of(f)), None)


@pytest.mark.parametrize(
    ("group", "choice"),
    [(group, file.stem) for group in GROUPS for file in sorted((config_dir() / group).glob("[!_]*.yaml"))],
)
def test_every_number_has_its_limits(group: str, choice: str) -> None:
    config = composed([f"{group}={choice}"])
    for option, value in numbers(OmegaConf.to_container(config[group]), f"{group}."):
        bad = math.nan if isinstance(value, float) else -(2**62)
        if limit := LIMITS.get(option):
            assert limit.complaint(option, bad), option
        elif option not in ANY_NUMBER:
            kind = declared(option, config)
            assert kind is not None and not kind.fits(bad), option


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["algo=learned", "algo.lam_draw=best"], "algo.lam_draw is 'best'; choose one of uniform, worst."),
        (["algo=ste", "algo.steps=-1"], "algo.steps is -1, but it must be at least 1."),
        (["algo=weight_matching", "algo.init=best"],
         "algo=weight_matching takes one of identity, forward, random or a Permutation as algo.init, not 'best'."),
        (["lam=nan"], "lam is nan, but it must be a finite number."),
        (["evaluate.points=1"], "evaluate.points is 1, but it must be at least 2."),
        (["data.batch_size=0"], "data.batch_size is 0, but it must be at least 1."),
        (["data.batch_size=100000000000000000000"],
         "data.batch_size is a number so large that nothing can take it; give a smaller one."),
        (["algo=learned", "algo.lam_low=0.7"], "algo.lam_low is 0.7, above algo.lam_high, 0.6."),
        ([*MANY, "+algo.match.restart=2"],
         "The matching of many models has no option 'restart'; did you mean 'restarts'? It has init, order, max_sweeps,"
         " restarts, device, workers."),
        (["algo=merge_many_learned", "model.seeds=[0,1,2]", "+algo.match.lr=-1"],
         "match.lr is -1.0, but it must be above 0."),
        ([*MANY, "algo.weights=[1,1]"],
         "algo.weights is [1, 1], but it takes 3 positive numbers, one for each model."),
        ([*MANY, "algo.anchor=7"], "algo.anchor is 7, but the models are 0 to 2."),
        (["algo=merge_many_pivot", "model.seeds=[0,1,2]", "algo.pivot=9"],
         "algo.pivot is 9, but the models are 0 to 2."),
        (["merge.weights=x"], "merge.weights is 'x', but it takes a number, a list of numbers, or null."),
        (["merge.weights=true"], "merge.weights is True, but it takes a number, a list of numbers, or null."),
        (["model.epoch=2.5"], "model.epoch is 2.5, but it takes an epoch from 0 to 8."),
        (["model.kept=[99]"], "model.kept is [99], but it takes a list of epochs from 0 to 8."),
        (["evaluate.splits=[train,train]"],
         "evaluate.splits is ['train', 'train']; it takes some of train, heldout, each once."),
        (["model.recipe.weight_decay=nan"],
         "model.recipe.weight_decay is nan, but it must be a finite number, at least 0."),
        (["model.recipe.optimizer=lion"], "model.recipe.optimizer is 'lion'; choose one of adam, sgd."),
        (["merge=geometric_median", "merge.options.iterations=-4"], "iterations is -4, but it must be at least 1."),
    ],
)  # fmt: skip
def test_an_impossible_value_is_refused_by_a_dry_run(overrides: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        execute(tmp_path, *TINY, *overrides, "dry_run=true")
    assert str(caught.value) == told


@pytest.mark.parametrize("override", ["objective=distillation", "data=mnist", "device=meta"])
def test_what_a_task_does_not_ask_for_is_refused(override: str, tmp_path: Path) -> None:
    own = f"model.task={__name__}.own_task"
    assert load_task(configured("model=mlp", own)).reads == {"seed"}
    with pytest.raises(ConfigError, match=f"{override} has no effect here"):
        execute(tmp_path, "model=mlp", own, "algo=naive", override, "dry_run=true")


def test_a_study_needs_its_function(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"study is 'plane'; choose one by \+experiment=NAME"):
        run_study(configured("model=mlp", "study=plane"), tmp_path, Console())


def test_a_device_that_is_not_there_is_told(tmp_path: Path) -> None:
    for device in ("cuda:7", "mps:3", "gpu"):
        with pytest.raises(ConfigError, match=f"device is '{device}', but torch finds no such device"):
            execute(tmp_path, *TINY, f"device={device}", "dry_run=true")


def test_defaults_are_never_refused(tmp_path: Path) -> None:
    execute(tmp_path / "pair", *TINY, "dry_run=true")
    execute(tmp_path / "many", *TINY, *MANY, "dry_run=true")


def test_every_option_has_a_rule_or_always_an_effect() -> None:
    config = OmegaConf.load(config_dir() / "config.yaml")
    options = {str(key) for key in config if key != "defaults"}
    groups = {"algo", "data", "objective", "merge", "evaluate", "logger", "path", "hydra", "model"}
    assert options <= {*RULES, *ALWAYS}
    assert {rule.partition(".")[0] for rule in RULES} <= options | groups
    assert not set(ALWAYS) & set(RULES)


def test_nothing_can_be_continued_without_a_cache(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"resume=true has no effect here: without a cache \(path\.cache=off\)"
    ):
        execute(tmp_path, *TINY, "resume=true", "path.cache=off", "dry_run=true")
    execute(tmp_path, *TINY, "resume=true", f"path.cache={tmp_path / 'cache'}", "dry_run=true")
