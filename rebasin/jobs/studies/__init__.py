"""Measurements other than the line from A to B, each a function in a file here; experiments name it in `study`.

A study is a function of (cfg, console) and options of its own, the other fields of `study`; it returns rows, flat
mappings from names to numbers, words and lists, which `python -m rebasin.report` tabulates and draws.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ...errors import ConfigError
from ...integrations.hydra import function_of
from ...reporting import study as report
from ...types import supply
from ..refusals import refuse
from ..skeleton import Job, Session


def _prepare(job: Session) -> Callable[[], list[dict[str, Any]]]:
    """The study that `cfg.study` names, with its options."""
    refuse(job)
    options = job.config["study"]
    if not isinstance(options, dict) or "_target_" not in options:
        raise ConfigError(
            f"study is {options!r}; choose one by +experiment=NAME, or give study._target_=PATH."
        )
    options = dict(options)
    # Configurations of people's own may still name studies where they were.
    path = str(options["_target_"]).replace("rebasin.studies.", "rebasin.jobs.studies.")
    function = function_of({**options, "_target_": path}, "study._target_")
    options.pop("_target_")
    offered = {"cfg": job.cfg, "console": job.console}
    return partial(function, **supply(function, offered, options, what="The study"))


def _plan(job: Session, study: Callable[[], list[dict[str, Any]]]) -> str:
    return f"Would do the study {job.config['study']['_target_']} and leave its results in {job.folder}."


run_study = Job(report.KIND, _prepare, _plan, lambda job, study: job.leave({"rows": study()}))
