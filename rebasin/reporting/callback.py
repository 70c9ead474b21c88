"""At the end of a sweep: its figures, tables and page, from the results that its runs left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepReport(Callback):
    """Hydra calls it; `hydra.callbacks` of an experiment names it."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        print("END", Path(config.hydra.sweep.dir))
