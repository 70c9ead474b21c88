"""Measurements other than the line from A to B, each a function in a file here; experiments name it in `study`.

A study is a function of (cfg, console) and options of its own, the other fields of `study`; it returns rows, flat
mappings from names to numbers, words and lists, which `python -m rebasin.report` tabulates and draws.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ...types import supply
from ..configuration import resolved

if TYPE_CHECKING:
    from ...reporting.console import Console
    from ...reporting.results import Results


def run_study(cfg: DictConfig, folder: Path, console: Console, command: str = "") -> Results | None:
    """Do the study that `cfg.study` names; leaves results.json and config.yaml in `folder`. None with `dry_run`.

    Raises:
        RebasinError: an input is missing or does not fit; one sentence says which and what to do.
    """
    from hydra.utils import get_method

    from ... import reporting
    from .. import stages as steps

    config = resolved(cfg)
    options = {key: value for key, value in config["study"].items() if key != "_target_"}
    function = get_method(config["study"]["_target_"])
    given = supply(function, {"cfg": cfg, "console": console}, options, what="The study")
    steps.settle(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.dry_run:
        console.say(f"would do the study {config['study']['_target_']} and leave its results in {folder}")
        return None
    with reporting.open_logger(cfg.logger, config, folder) as logger:
        rows = function(**given)
        results = reporting.collect(config, {"rows": rows}, console.seconds, command, "study")
        reporting.leave(results, folder)
        logger.results(results, folder)
    console.summary(results, folder)
    return results
