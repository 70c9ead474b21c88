"""`python -m rebasin.run`, `rebasin.search`, `rebasin.compare_methods`: what Hydra calls, and where the work is."""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ..search import folder as _  # noqa: F401 - the configs name what it registers
from .configuration import ANEW, launch

if TYPE_CHECKING:
    from ..reporting.console import Console
    from ..reporting.results import Results


@dataclass(frozen=True)
class Command:
    """A job under a name that people type.

    Attributes:
        name: `python -m NAME`.
        module: has the job, a function (cfg, folder, console, command) of the name's last part.
        config: the configuration that Hydra begins with.
        kept: what Ctrl-C leaves, in words.
        each: another function of the module, for Hydra, which calls it once for each run of a sweep.
    """

    name: str
    module: str
    config: str = "config"
    each: str = ""
    kept: str = ANEW

    def __call__(self, cfg: DictConfig, folder: Path, console: Console, command: str = "") -> Results | None:
        """Do the job that `cfg` describes and leave everything in `folder`; returns the content of results.json.

        With `dry_run=true` it shows the plan, and returns None before any costly work.

        Raises:
            RebasinError: an input is missing or does not fit; one sentence says which and what to do.
        """
        return self._work(self.name.rpartition(".")[2])(cfg, folder, console, command)

    def job(self, cfg: DictConfig) -> Any:
        """What Hydra calls."""
        # No advice from the libraries about image processors and schedulers, which are as they should be.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
        from ..reporting.console import Console
        from ..reporting.results import command_line

        hydra = HydraConfig.get()
        command = command_line(hydra.overrides.task).replace("rebasin.run", self.name)
        work = self._work(self.each) if self.each else self
        return work(cfg, Path(hydra.runtime.output_dir), Console(), command)

    def main(self) -> None:
        """The command line."""
        launch(self.job, self.config, self.kept)

    def _work(self, function: str) -> Any:
        # Late: torch, diffusers and matplotlib take seconds to import, and --help and --cfg need none of them.
        return getattr(importlib.import_module(self.module), function)


RUN = Command("rebasin.run", "rebasin.jobs.run", each="run_once")
SEARCH = Command(
    "rebasin.search", "rebasin.jobs.search", "search",
    kept="what was aligned and tried is kept, and the same command goes on with it",
)  # fmt: skip
COMPARE_METHODS = Command("rebasin.compare_methods", "rebasin.jobs.compare_methods", "compare_methods")
