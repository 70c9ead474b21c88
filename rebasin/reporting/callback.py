"""At the end of a sweep: its figures, tables and page, from the results that its runs left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepReport(Callback):
    """Hydra calls it; `hydra.callbacks` of an experiment names it."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        # Late: Hydra makes this object in every worker of a sweep.
        from ..errors import CheckpointError
        from .sweep import collect
        from .sweep_page import leave

        folder = Path(config.hydra.sweep.dir)
        try:
            sweep = collect(folder)
        except CheckpointError as error:  # dry_run=true leaves nothing to report on
            print(error)
            return
        leave(sweep, folder, folder)
        print(f"{len(sweep.runs)} runs in {folder}; read {folder / 'report.html'} first.")
