"""What was set and has no effect on this job is refused, never ignored.

`RULES` says of each option when it has none; the options in `ALWAYS` always have one. Options of algorithms, merge
methods and studies need no rules: their functions refuse what they do not know (`types.supply`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError
from ..files import cache_folder
from ..integrations.signatures import composed
from ..merging.merged import find_method
from ..tasks import Task
from .algorithm import Algorithm
from .configuration import exists
from .skeleton import Session

RUN, MANY, STUDY, SEARCH, METHODS = None, "many", "study", "search", "methods"
WORDS = {
    RUN: "a run on two models",
    MANY: "a run on many models",
    STUDY: "a study",
    SEARCH: "a search",
    METHODS: "a comparison",
}
CONFIGS = {SEARCH: "search", METHODS: "compare_methods"}


@dataclass(frozen=True)
class Case:
    """A job of a kind; of a study that does not align, task and algorithm are not known."""

    kind: str | None
    cfg: DictConfig
    task: Task | None
    algorithm: Algorithm | None

    def is_no(self, *kinds: str | None) -> str | None:
        """The reason for an option that only jobs of these kinds have."""
        return None if self.kind in kinds else f"{WORDS[self.kind]} has no use for it"

    def brings(self, group: str) -> str | None:
        """The reason where the task does not read this group."""
        own = self.task is not None and group not in self.task.reads
        return f"model={self.cfg.model.name} brings its own" if own else None


def _resume(case: Case) -> str | None:
    if case.kind == SEARCH:
        return "the same command goes on with a search"
    if case.algorithm is not None and not case.algorithm.continues:
        return f"algo={case.algorithm.name} can't be continued"
    if case.kind in (RUN, MANY, STUDY) and cache_folder(case.cfg.path.cache) is None:
        return "without a cache (path.cache=off) no state is kept to go on from"
    return case.is_no(RUN, MANY, STUDY)


def _sample_every(case: Case) -> str | None:
    if case.task is not None and case.task.sampler is None:
        return "it needs a model that makes images, and model.samples above 0"
    if case.algorithm is not None and "objective" not in case.algorithm.takes:
        return f"algo={case.algorithm.name} has no steps to show"
    return case.is_no(RUN)


def _device(case: Case) -> str | None:
    if case.kind in CONFIGS or case.task is None or case.algorithm is None:
        return None
    if "device" in case.task.reads or "device" in case.algorithm.takes:
        return None
    return f"neither model={case.cfg.model.name} nor algo={case.algorithm.name} computes there"


def _lam(case: Case) -> str | None:
    merge = case.cfg.merge
    method = find_method(str(merge.method))
    if merge.weights is not None:
        return "merge.weights says it"
    if method.one != "b" or method.plan is not None:
        return f"merge.method={method.name} has no share of B"
    return case.is_no(RUN)


def _repair(case: Case) -> str | None:
    if case.kind == MANY:
        return "algo.repair says it for many models"
    if case.task is not None and not case.task.batches:
        return "there is no data to collect statistics on"
    return case.is_no(RUN)


def _samples(case: Case) -> str | None:
    method = find_method(str(case.cfg.merge.method))
    return None if "companions" in method.takes else f"merge.method={method.name} looks at no data"


def _grid(case: Case) -> str | None:
    """Of options of the pictures that a run makes at its end; those of an experiment come with all of its runs."""
    if case.cfg.get("experiment"):
        return None
    return case.is_no(RUN) if case.cfg.model.get("samples") else "without model.samples there are no pictures"


def _with_files(case: Case) -> str | None:
    return "model.files are trained already" if case.cfg.model.get("files") else None


RULES: Mapping[str, Callable[[Case], str | None]] = {
    "resume": _resume,
    "sample_every": _sample_every,
    "device": _device,
    "lam": _lam,
    "repair": _repair,
    "data": lambda case: case.brings("data"),
    "objective": lambda case: case.brings("objective"),
    "tensors": lambda case: case.is_no(RUN, MANY),
    "target": lambda case: case.is_no(RUN),
    "study": lambda case: case.is_no(RUN, MANY, STUDY),
    "size": lambda case: None if case.cfg.get("experiment") else "there is no experiment",
    "merge": lambda case: case.is_no(RUN, MANY),
    # A run on many models has no line, but sweeps over algorithms set evaluate.points for those that have one.
    "evaluate": lambda case: case.is_no(RUN, STUDY, *([] if "scorer" in case.cfg.evaluate else [MANY])),
    "merge.samples": _samples,
    "data.share": lambda c: None if c.cfg.data.get("split") == "classes" else "data.split is not classes",
    "model.samples": lambda case: _grid(case) if case.cfg.model.samples else None,
    **dict.fromkeys(("model.steps", "model.guidance", "model.seeds_shown"), _grid),
    **dict.fromkeys(("model.seeds", "model.recipe", "model.epoch", "model.kept"), _with_files),
}
"""Option -> why it has no effect, None where it has one."""

ALWAYS = ("seed", "threads", "structure", "again", "dry_run")
"""Options at the top of config.yaml that have an effect on every job."""


def refuse(job: Session, task: Task | None = None, algorithm: Algorithm | None = None) -> None:
    """Complain of an option that differs from its default and has no effect.

    Raises:
        ConfigError: names it, and says why it has none.
    """
    case = Case(job.kind, job.cfg, task, algorithm)
    for option, rule in RULES.items():
        value = _plain(OmegaConf.select(job.cfg, option))
        if value is None:
            continue  # there is none, or nothing was set
        reason = rule(case)
        told = None if reason is None else _set(case, option, value)
        if told is not None:
            raise ConfigError(f"{told} has no effect here: {reason}; leave it out.")


def brought(cfg: DictConfig, task: Task) -> dict[str, str]:
    """Group -> what the model has in its place, where it does not read the group and no config of the user's own says
    what it is.
    """
    own = {"data": task.data, "objective": "own"}
    paths = {"data": task.data, "objective": cfg.objective.get("function")}
    return {
        group: str(paths[group] if cfg[group].get("kind") == "own" else name)
        for group, name in own.items()
        if exists(group, cfg[group].name) and (group not in task.reads or cfg[group].get("kind") == "own")
    }


def _set(case: Case, option: str, value: Any) -> str | None:
    """OPTION=VALUE, if it differs from its default, which may come with the model; of a model of the user's own, and
    within an experiment, only the command line tells of a group.
    """
    cfg, (group, _, field) = case.cfg, option.partition(".")
    config = CONFIGS.get(case.kind or "", "config")
    model = [f"model={cfg.model.name}"] if exists("model", cfg.model.name) else []
    if field and group != "model":
        if not exists(group, cfg[group].name):
            return None
        model = [*model, f"{group}={cfg[group].name}"]
    elif isinstance(value, dict) and "name" in value and (not model or cfg.get("experiment")):
        asked = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
        given = (str(entry).lstrip("+") for entry in asked)
        return next((entry for entry in given if entry.startswith((f"{group}=", f"{group}."))), None)
    default = _plain(OmegaConf.select(_defaults(config, tuple(model)), option))
    if option == "merge" and case.kind in CONFIGS:
        value["base"] = default["base"]  # which they use
    return _difference(option, value, default)


def _difference(option: str, value: Any, default: Any) -> str | None:
    """The first field that differs, GROUP=CHOICE where that is another."""
    if value == default:
        return None
    if isinstance(value, dict) and isinstance(default, dict) and value.get("name") == default.get("name"):
        fields = (_difference(f"{option}.{key}", own, default.get(key)) for key, own in value.items())
        return next((told for told in fields if told), None)
    told = value.get("name", value) if isinstance(value, dict) else value
    return f"{option}={str(told).lower() if isinstance(told, bool) else told}"


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


@cache
def _defaults(config: str, choices: tuple[str, ...]) -> DictConfig:
    return composed(list(choices), config)
