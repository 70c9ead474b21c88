"""What all jobs have in common: the configuration is settled, a dry run tells the plan, results are left and told.

A job is three functions: `prepare` looks at everything that could be wrong and loads, `plan` says what will be done,
`work` does it and returns the results, with `Session.leave` as its last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf

from ..arguments import Within
from ..errors import ConfigError, RebasinError
from ..evaluation.samples import Samples
from ..files import LARGEST_SEED, MOST_THREADS, prepare_folder
from ..integrations.hydra import resolved
from ..merging.repair import REPAIRS
from ..reporting.console import Console
from ..reporting.kinds import leave
from ..reporting.loggers import Logger, both, open_logger
from ..reporting.results import NAME, Results, collect, effective, load_results, plain, relevant
from ..tensors.modules import find_device
from ..types import Progress

SPLITS = ("train", "heldout")

NONE = "none"
"""The merge is not repaired."""

LIMITS: Mapping[str, Within] = {
    option: limit
    for limit, options in {
        Within(0, LARGEST_SEED): "seed",
        Within(0, MOST_THREADS): "threads",
        Within(-math.inf): "lam algo.reward.guidance evaluate.guidance model.guidance objective.guidance",
        Within(2): "evaluate.points",  # the ends
        Within(0, 1): "data.share",
        Within(0, above=True): "model.width",
        Within(0): "model.batches model.samples sample_every",
        Within(1): (
            "data.batch_size data.draws data.heldout data.train data.matching_samples merge.samples"
            " evaluate.batch_size evaluate.seeds evaluate.steps"
            " model.blocks model.depth model.groups model.seeds_shown model.steps"
            " objective.batch_size objective.grad_steps objective.heldout objective.samples objective.steps"
            " objective.train algo.reward.batch_size algo.reward.grad_steps algo.reward.steps algo.reward.train"
            " algo.points algo.match.max_sweeps algo.match.restarts algo.match.steps"
        ),
    }.items()
    for option in options.split()
}
"""Numbers of the configuration that no signature declares; those of algorithms, merges and recipes stand there."""

Prepared = TypeVar("Prepared")


@dataclass
class Session:
    """A job at work: what it was asked for, where its results go, and who listens.

    Attributes:
        kind: of the results, see `reporting.kinds`.
        command: that does it again.
        own: group of the configuration -> what the model has in its place (see `refusals.brought`).
        files: the names of what it has written into its folder.
    """

    cfg: DictConfig
    console: Console
    folder: Path = Path()
    command: str = ""
    kind: str | None = None
    logger: Logger = field(default_factory=Logger)
    own: dict[str, str] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration as plain data."""
        return resolved(self.cfg)

    def stage(self, name: str) -> AbstractContextManager[None]:
        """A line of the terminal, and an entry of the seconds."""
        return self.console.stage(name)

    def say(self, text: str) -> None:
        """What the stage has found."""
        self.console.say(text)

    def remark(self, sentences: Iterable[str]) -> None:
        """What a user should know, on lines of their own."""
        for sentence in sentences:
            self.console.console.print(sentence, markup=False)

    @property
    def progress(self) -> Progress:
        """Shows progress."""
        return self.console.progress

    @property
    def logged(self) -> Progress:
        """Shows and logs progress."""
        return both(self.console.progress, self.logger.event)

    @property
    def given(self) -> dict[str, Any]:
        """What algorithms and merges take of the configuration: seed and device."""
        return {"seed": self.cfg.seed, "device": self.cfg.device}

    def wrote(self, *paths: Path) -> None:
        """These are files of this job: others in its folder may be of an earlier one."""
        self.files.update(path.name for path in paths)

    def leave(self, figures: dict[str, Any], samples: Samples | None = None) -> Results:
        """Write and log what was measured."""
        results = collect(self.config, figures, self.console.seconds, self.command, self.kind, self.own)
        self.wrote(*leave(results, self.folder, samples))
        self.logger.results(results, self.folder, self.files)
        return results


@dataclass(frozen=True)
class Job(Generic[Prepared]):
    """A kind of job; calling it does one."""

    kind: str | None
    prepare: Callable[[Session], Prepared]
    plan: Callable[[Session, Prepared], str]
    work: Callable[[Session, Prepared], Results]

    def __call__(self, cfg: DictConfig, folder: Path, console: Console, command: str = "") -> Results | None:
        """See `commands.Command`, through which people call it."""
        settle(cfg)
        prepare_folder(folder)
        session = Session(cfg, console, folder, command, self.kind)
        if not cfg.dry_run:
            console.expect(*expected(folder, session.config))
        prepared = self.prepare(session)
        if cfg.dry_run:
            console.console.print(self.plan(session, prepared), markup=False)
            return None
        with open_logger(cfg.logger, effective(session.config, session.own), folder) as session.logger:
            results = self.work(session, prepared)
        if cfg.logger.name != "none":
            session.wrote(folder / "wandb")
        console.summary(results, folder, session.files)
        return results


EARLIER = 10
"""So many earlier runs are looked at."""


def expected(folder: Path, config: dict[str, Any]) -> tuple[float | None, str]:
    """How long a run will take, and how that is known: by the newest run beside it that did the same, else by the
    newest of the same model and algorithm; None where there is none.
    """
    found: list[tuple[float, bool]] = []
    try:
        files = sorted(folder.parent.glob(f"*/{NAME}"), key=lambda file: -file.stat().st_mtime)
    except OSError:
        files = []
    for file in files[:EARLIER]:
        with suppress(RebasinError, OSError, KeyError, TypeError, ValueError):
            results = load_results(file.parent)
            same = plain(relevant(config)) == relevant(results["config"])
            names = (results["config"]["model"]["name"], results["config"]["algo"]["name"])
            if names == (config["model"]["name"], config["algo"]["name"]):
                found.append((float(results["seconds"]["total"]), same))
    chosen = next((one for one in found if one[1]), found[0] if found else None)
    if chosen is None:
        return None, ""
    return chosen[0], f"as the last such run{'' if chosen[1] else ', with other options,'} took"


def settle(cfg: DictConfig) -> None:
    """Seed torch, set its threads, and refuse impossible settings before anything is loaded.

    Raises:
        ConfigError: names the option and what it takes.
    """
    chosen = [*cfg.evaluate.splits]
    if not chosen or set(chosen) - set(SPLITS) or len(set(chosen)) < len(chosen):
        raise ConfigError(f"evaluate.splits is {chosen}; it takes some of {', '.join(SPLITS)}, each once.")
    if cfg.repair not in (NONE, *REPAIRS):
        raise ConfigError(f"repair is {cfg.repair!r}; it takes {NONE}, {', '.join(REPAIRS)}.")
    for option, limit in LIMITS.items():
        value = OmegaConf.select(cfg, option)
        if isinstance(value, int | float) and (complaint := limit.complaint(option, value)):
            raise ConfigError(complaint)
    for option in ("device", "algo.device"):
        if (device := OmegaConf.select(cfg, option)) is not None:
            find_device(device, option)
    torch.manual_seed(cfg.seed)
    if cfg.threads > 0:
        torch.set_num_threads(cfg.threads)
