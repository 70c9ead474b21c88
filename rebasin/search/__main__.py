"""`python -m rebasin.search`."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ..jobs.configuration import launch
from ..jobs.search import search
from .folder import register


def job(cfg: DictConfig) -> None:
    """What Hydra calls."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    from ..reporting.console import Console
    from ..reporting.results import command_line

    hydra = HydraConfig.get()
    command = command_line(hydra.overrides.task).replace("rebasin.run", "rebasin.search")
    search(cfg, Path(hydra.runtime.output_dir), Console(), command)


def main() -> None:
    """`python -m rebasin.search`, `rebasin search`."""
    register()
    launch(job, "search")


if __name__ == "__main__":
    main()
