"""One source of defaults: what a config says without options is what the call from Python does without options."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_class, get_method
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import rebasin
from rebasin.errors import ConfigError
from rebasin.files import config_dir
from rebasin.integrations.signatures import NO_OPTIONS, composed, meanings, options
from rebasin.jobs.algorithm import SUPPLY, load_algorithm
from rebasin.jobs.combination import load_combination
from rebasin.merging import METHODS, diagonal_fisher, merge
from rebasin.merging.registry import plan_options
from rebasin.models import MLP
from rebasin.objectives import CrossEntropy, Denoising, Reward, teach

SPLIT_OFF = ("_target_", "name", "many", "repair", "reward", "maps", "with_maps")
"""Fields of algorithms that are no options of the function: the run itself reads them."""

PURPOSE: dict[str, dict[str, Any]] = {
    # Sweeps in minutes: one start, few steps, one pass of refinement.
    "ste_quick": {"init": "activation_and_weight", "steps": 20, "refine": 1},
    "learned_quick": {"steps": 150, "evaluate_every": 75},
    "ste_reward_quick": {"init": "activation_and_weight", "steps": 20, "refine": 1},
}
"""Where a config differs from the signature on purpose; everywhere else the two are one."""


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (config_dir() / group).glob("[!_]*.yaml"))


def plain(config: Any) -> Any:
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """What Python says, independently of how sources are read."""
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if p.default is not p.empty and p.name not in NO_OPTIONS}


# Signature and config -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("algo"))
def test_an_algorithms_options_are_its_signatures_defaults(name: str):
    algo = composed([f"algo={name}"]).algo
    found = {key: value for key, value in plain(algo).items() if key not in SPLIT_OFF}
    assert algo.name == name
    assert found == {**defaults(get_method(algo._target_)), **PURPOSE.get(name, {})}


@pytest.mark.parametrize("name", names("merge"))
def test_a_merge_methods_options_are_its_signatures_defaults(name: str):
    config = plain(composed([f"merge={name}"]).merge)
    known = {**METHODS[name].options, **plan_options(METHODS[name].plan)}
    assert config["options"] == {key: value for key, value in known.items() if key not in NO_OPTIONS}
    assert config["samples"] == defaults(diagonal_fisher)["max_samples"]
    assert config["weights"] is config["blocks"] is config["base"] is None


@pytest.mark.parametrize("name", names("objective"))
def test_an_objectives_options_are_its_constructors_defaults(name: str):
    config = plain(composed([f"objective={name}", "model=mlp"]).objective)
    if made := config.get("object"):
        assert {k: v for k, v in made.items() if k != "_target_"} == defaults(get_class(made["_target_"]))
    if name == "distillation":
        assert {key: config[key] for key in defaults(teach)} == defaults(teach)
    if config["kind"] == "reward":
        assert {key: config[key] for key in defaults(Reward)} == defaults(Reward)


def test_a_reward_is_the_same_as_algorithm_and_as_objective():
    searched = plain(composed(["algo=ste_reward"]).algo.reward)
    objective = plain(composed(["objective=reward"]).objective)
    assert {k: v for k, v in searched.items() if k != "scorer"} == {
        k: v for k, v in objective.items() if k in searched and k != "scorer"
    }


def test_what_a_run_supplies_is_no_option():
    assert set(SUPPLY) <= NO_OPTIONS


def test_every_option_says_what_it_means():
    for name in names("algo"):
        algo = composed([f"algo={name}"]).algo
        assert set(options(algo._target_)) <= set(meanings(algo._target_)), name


# The same computation -------------------------------------------------------------------------------------------


class Pair:
    """Two small classifiers and their data, as a task has them."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model, *ends = (MLP(inputs=6, width=5, depth=2, classes=3).eval() for _ in range(4))
        self.states = [{k: v.detach() for k, v in end.state_dict().items()} for end in ends]
        self.objective = CrossEntropy()
        self.batches = {"train": [(torch.randn(20, 6), torch.arange(20) % 3) for _ in range(5)]}
        self.spec = rebasin.trace(self.model, torch.randn(2, 6))
        self.pipeline, self.captions, self.maker = None, (), None
        self.labels, self.others = ("A", "B"), {}

    def load_other(self, name: str) -> dict[str, Tensor]:
        return self.states[2]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


def given(pair: Pair, function: Callable[..., Any]) -> dict[str, Any]:
    """What a user passes who passes no option."""
    models: list[nn.Module] = []
    for state in pair.states:
        models.append(MLP(inputs=6, width=5, depth=2, classes=3).eval())
        models[-1].load_state_dict(state)
    have = dict(
        spec=pair.spec, state_a=pair.states[0], state_b=pair.states[1], model_a=models[0], model_b=models[1],
        states=pair.states, model=pair.model, objective=pair.objective, batches=pair.batches["train"],
    )  # fmt: skip
    return {name: have[name] for name in inspect.signature(function).parameters if name in have}


@pytest.mark.parametrize(
    "name",
    [n for n in names("algo") if n not in PURPOSE and n not in ("activation_matching_prompts", "ste_reward")],
)
def test_a_call_without_options_is_a_run_without_options(pair: Pair, name: str):
    algo = composed([f"algo={name}"]).algo
    function = get_method(algo._target_)
    called = function(**given(pair, function))
    if name.startswith("merge_many"):
        configured = {key: value for key, value in plain(algo).items() if key not in SPLIT_OFF}
        run = function(**given(pair, function), **configured)
        assert called.permutations == run.permutations and called.distance == run.distance
        assert all(torch.equal(called.merged[key], run.merged[key]) for key in called.merged)
    else:
        task: Any = pair
        run = load_algorithm(algo)(task, pair.spec, pair.states[0], pair.states[1])
        assert called.permutation == run.permutation and called.objective == run.objective


@pytest.mark.parametrize("name", [n for n in names("merge") if n != "greedy_soup"])
def test_a_merge_without_options_is_a_run_without_options(pair: Pair, name: str):
    method, task = METHODS[name], pair
    cfg = composed([f"merge={name}", *(["merge.base=other"] if method.needs_base else [])])
    run = load_combination(cfg, task)(task, pair.states[:2])  # pyright: ignore[reportArgumentType]
    more: dict[str, Any] = {"base": pair.states[2]} if method.needs_base else {}
    if "companions" in method.takes:
        models = [MLP(inputs=6, width=5, depth=2, classes=3) for _ in range(2)]
        for model, state in zip(models, pair.states, strict=False):
            model.load_state_dict(state)
        more["companions"] = [diagonal_fisher(m, pair.objective, pair.batches["train"]) for m in models]
    called = merge(name, pair.states[:2], **more)
    assert all(torch.equal(called[key], run[key]) for key in called)


def test_the_options_of_many_matchings_are_filled_in_one_by_one(pair: Pair):
    whole = rebasin.merge_many(pair.spec, pair.states)
    for match in ({}, {"order": "random"}, {"init": "identity"}):
        assert rebasin.merge_many(pair.spec, pair.states, match=match).permutations == whole.permutations


# Reading sources --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["rebasin.straight_through", "rebasin.matching.match_to_mean", "rebasin.matching.prompt_activation_matching",
     "rebasin.merging.methods.ties.dropout", "rebasin.objectives.Distillation", "rebasin.models.MLP"],
)  # fmt: skip
def test_what_is_read_is_what_python_says(path: str):
    module, _, name = path.rpartition(".")
    found = getattr(__import__(module, fromlist=[name]), name)
    if path != "rebasin.models.MLP":  # no dataclass: its constructor is not read
        read = {key: value for key, value in options(path).items() if value != "???"}
        assert read == {k: dict(v) if isinstance(v, Mapping) else v for k, v in defaults(found).items()}


OWN = '''
from math import tau

FEW = (3, 4)

def guess(spec, state_a, state_b, *, strength: float, tries=FEW, kind: str = "coin", seed: int = 0):
    """Guess.

    Args:
        strength: of the guess.
        kind: of chance.
    """
    raise AssertionError("a configuration is composed without running this")

def odd(spec, *, angle: float = tau / 2):
    """Turn."""
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_guesses.py").write_text("import there_is_no_such_module\n" + OWN)
    (tmp_path / "algo").mkdir()
    (tmp_path / "space").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_functions_of_ones_own_are_read_without_importing_them(own: Path):
    assert options("own_guesses.guess") == {"strength": "???", "tries": [3, 4], "kind": "coin"}
    assert meanings("own_guesses.guess") == {"strength": "of the guess.", "kind": "of chance."}
    with pytest.raises(ConfigError, match="A default of own_guesses.odd is neither a literal nor a constant"):
        options("own_guesses.odd")
    with pytest.raises(ConfigError, match="no function 'own_guesses.gues' whose source"):
        options("own_guesses.gues")


def run(folder: Path, *arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    program = f"import sys; sys.argv[0] = 'run'\nfrom rebasin.run import main\ntry: main()\nfinally: {code or 'pass'}"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )


def test_configs_of_ones_own_work_with_and_without_a_signature(own: Path):
    (own / "algo" / "mine.yaml").write_text("name: mine\n_target_: own_guesses.guess\nstrength: 2\n")
    (own / "algo" / "read.yaml").write_text(
        "defaults: [/function/own_guesses.guess@_here_]\nname: read\nkind: die # thrown\n"
    )
    (own / "space" / "tiny.yaml").write_text("name: tiny\nmethod: [slerp]\n")
    shown = run(own, "--config-dir", ".", "algo=mine", "algo.strength=3", "--cfg", "job", "--package", "algo")
    assert OmegaConf.create(shown.stdout) == {"name": "mine", "_target_": "own_guesses.guess", "strength": 3}
    shown = run(own, "--config-dir", ".", "algo=read", "algo.tries=[1]", "--cfg", "job", "--package", "algo")
    assert OmegaConf.to_container(OmegaConf.create(shown.stdout)) == {
        "name": "read", "_target_": "own_guesses.guess", "strength": "???", "tries": [1], "kind": "die",
    }  # fmt: skip
    told = run(own, "--config-dir", ".", "algo=read", "--help").stdout
    assert "algo: activation_and_weight" in told and ", read, " in told and "space: blocks" in told
    assert "algo.strength=???                   of the guess." in told
    assert "algo.kind=die                       thrown" in told


# What the command line shows --------------------------------------------------------------------------------------


def test_help_teaches_what_options_mean_and_waits_for_no_torch(tmp_path: Path):
    no_torch = "assert 'torch' not in sys.modules"
    told = run(tmp_path, "algo=ste_reward", "merge=ties_sum", "data=mnist", "--help", code=no_torch)
    assert told.returncode == 0, told.stderr
    for line in (
        "OPTIONS of algo=ste_reward",
        "algo.steps=100                      gradient steps.",
        "algo.reward.train=40                images in the batches that give gradients",
        "algo.reward.grad_steps=1            the gradient flows through so many last steps.",
        "merge.options.k=0.2                 the share of each tensor's differences that is kept",
        "data.share=0.8                      of split=classes:",
    ):
        assert line in told.stdout
    made = re.sub("(ste|reward|learned)_quick", "", told.stdout)
    assert "_quick," not in made
    plain_help = run(tmp_path, "--help", code=no_torch)
    assert plain_help.returncode == 0 and "OPTIONS of" not in plain_help.stdout
    shown = run(tmp_path, "--cfg", "job", code=no_torch)
    assert shown.returncode == 0 and "samples: 4000" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["algo=ste", "algo.step=3"], "There is no option 'algo.step'; did you mean 'algo.steps'?"),
        (["merge=ties_sum", "merge.options.kk=1"], "did you mean 'merge.options.k'?"),
        (["algo=merge_many", "algo.match.ini=forward"], "did you mean 'algo.match.init'?"),
        (["algo=sta"], "There is no algo 'sta'; did you mean 'ste'? Choose one of activation_and_weight, "),
    ],
)
def test_mistakes_are_told_with_what_was_meant(tmp_path: Path, arguments: list[str], sentence: str):
    told = run(tmp_path, *arguments, "--cfg", "job")
    assert told.returncode == 2
    assert sentence in told.stderr.replace("Did", "did")


def test_options_of_every_depth_can_be_set():
    cfg = composed(["algo=merge_many", "algo.match.init=forward", "merge=ties_sum", "merge.options.k=.3"])
    assert (cfg.algo.match.init, cfg.algo.match.max_sweeps, cfg.merge.options.k) == ("forward", 100, 0.3)
    cfg: DictConfig = composed(["objective.object.min_snr_gamma=5", "algo=ste", "algo.steps=50"])
    assert (cfg.objective.object.min_snr_gamma, cfg.algo.steps) == (5, 50)
    assert cfg.objective.object._target_ == f"rebasin.objectives.{Denoising.__name__}"
