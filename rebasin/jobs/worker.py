"""A further process of a search, `python -m rebasin.search.worker FOLDER NUMBER`: started by the search itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError


@contextmanager
def workers(folder: Path, number: int) -> Iterator[list[subprocess.Popen]]:
    """`number` processes that work on the search in `folder`; they are ended at the end of the block.

    Each writes to worker-NUMBER.log there, and ends by itself once this process is gone.
    """
    running = []
    try:
        for i in range(1, number + 1):
            log = open(folder / f"worker-{i}.log", "ab")  # noqa: SIM115 - the process has it
            command = [sys.executable, "-m", "rebasin.search.worker", str(folder), str(i)]
            running.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
            log.close()
        yield running
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def main() -> None:
    """Work on the search in a folder until its budget is spent or its main process is gone."""
    if len(sys.argv) != 3 or not sys.argv[2].isdigit():
        raise ConfigError("The worker is called as python -m rebasin.search.worker FOLDER NUMBER.")
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    parent = os.getppid()
    from ..integrations.hydra import resolved
    from ..search.study import open_study
    from ..search.trials import work
    from ..tasks import load_task
    from .materials import load_inputs, prepare, read_permutations
    from .skeleton import settle

    cfg = OmegaConf.load(folder / "config.yaml")
    assert isinstance(cfg, DictConfig)
    settle(cfg)
    task = load_task(cfg)
    inputs = load_inputs(cfg, task)
    setup = prepare(cfg, task, inputs.moved(read_permutations(folder, inputs, resolved(cfg))))
    study = open_study(folder, setup.evaluator.objectives, cfg.search.prune)
    work(study, setup, cfg.search, seed=cfg.seed, worker=number, alive=lambda: os.getppid() == parent)
