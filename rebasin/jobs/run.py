"""The main job, `python -m rebasin.run`: load -> spec -> verify -> align -> merge -> evaluate -> report.

This file reads like the method; the stages themselves are in the modules that it calls.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..errors import ConfigError
from ..integrations.hydra import resolved
from ..matching.weights.estimate import about, matching_seconds
from ..merging.neuron_moments import batch_norms
from ..reporting import run as report
from ..reporting.console import Console
from ..reporting.metrics import metrics
from ..reporting.results import Results, effective, load_results
from ..reporting.samples import XYZ, save_xyz
from ..reporting.snapshots import Snapshots
from . import stages
from .algorithm import is_many
from .experiments import finished
from .many import run_many
from .scoring import in_words, load_scoring
from .skeleton import NONE, Job, Session
from .studies import run_study


def run(cfg: DictConfig, folder: Path, console: Console, command: str = "") -> Results | None:
    """Two models, or as many as there are."""
    return (run_many if is_many(cfg) else run_pair)(cfg, folder, console, command)


def run_once(cfg: DictConfig, folder: Path, console: Console, command: str = "") -> float | None:
    """A run of a sweep, or a study, unless it is finished; the figure that an optimising sweeper is to lower."""
    if not cfg.again and finished(resolved(cfg), folder):
        console.console.print(f"{folder} is finished; again=true does it again.", markup=False)
        return target(load_results(folder), cfg.target)
    work = run if cfg.study is None else run_study
    return target(work(cfg, folder, console, command), cfg.target)


def target(results: Results | None, name: str) -> float | None:
    """The figure `name` of a run that aligned two models; None for other runs, and after a dry run.

    Raises:
        ConfigError: the run has no such figure; names some that it has.
    """
    if results is None or results.get("kind") or not results.get("curves", True):
        return None
    found = metrics(results)
    if name not in found:
        raise ConfigError(f"target is {name!r}, but the run has the figures {', '.join(found)}.")
    return found[name]


def _work(job: Session, planned: stages.Material) -> Results:
    cfg, task, combination = job.cfg, planned.task, planned.combination
    scoring = load_scoring(cfg, task)
    checks = stages.verify_all(job, task, planned.specs, planned.algorithm.maps)
    a, b = stages.endpoints(job, task)
    stages.draw_blocks(job, combination)
    snapshots = Snapshots(task.sampler, a, b, cfg.sample_every, cfg.seed, job.folder, job.logger.picture)
    pair = stages.align(job, planned, a, b, snapshots)
    job.wrote(*(job.folder / name for name in snapshots.pictures))
    with job.stage("merge"):
        merged = combination(task, [a, pair.aligned], **job.given, progress=job.progress)
        information = merged.companions
        merged = dict(merged) if isinstance(b, dict) else merged
        if cfg.repair != NONE:
            merged = stages.repairing(cfg, pair, pair.aligned)(merged, combination.share)
        job.say(combination.words + (f", {cfg.repair}" if cfg.repair != NONE else ""))
    with job.stage("evaluate"):
        curves = stages.curves(cfg, pair, job.progress)
        merge = {
            **combination.record(),
            "repair": cfg.repair,
            "figures": stages.evaluate_merged(cfg, task, merged),
        }
        job.say(stages.barriers(curves))
    with job.stage("sample"):
        samples = stages.sample(pair, cfg.seed)
        seeds = stages.sample_seeds(cfg, pair, samples)
        if len(seeds) > 1:
            save_xyz(seeds, job.folder / XYZ)
            job.wrote(job.folder / XYZ)
    rewards = None
    if scoring is not None:
        with job.stage("score"):
            rewards = scoring(task.model, a, pair.ends, job.progress)
            job.say(in_words(rewards))
    with job.stage("report"):
        if cfg.tensors:
            job.wrote(
                *report.save_tensors(
                    job.folder, pair.match.as_alignment, pair.aligned, merged, information, job.config
                )
            )
            if task.export is not None:
                made, both = {"rebasin_command": job.command}, (pair.spec.identity(), pair.mover)
                share = combination.share
                job.wrote(*task.export(job.folder, merged, made, both, (1 - share, share), job.progress))
        pictures = [
            *snapshots.pictures,
            *([] if samples is None else ["samples.png"]),
            *([XYZ] if len(seeds) > 1 else []),
        ]
        more: Any = {"lam": cfg.lam, "rewards": rewards, "merge": merge, "pictures": pictures}
        more["batch_norms"] = len(batch_norms(task.model))
        figures = report.figures(task.labels, task.aligned, pair.spec, checks, pair.match, curves, **more)
        return job.leave(figures, samples)


def _plan(job: Session, planned: stages.Material) -> str:
    """What would be done, and the specs: the one that is aligned in full, the others in a line."""
    config, task, spec, combination = (
        effective(job.config, job.own),
        planned.task,
        planned.spec,
        planned.combination,
    )
    blocks = combination.blocks
    stages.draw_blocks(job, combination)
    (a, b), estimate, repairs = task.labels, [], config["repair"] != NONE
    if config["algo"]["name"] == "weight_matching":
        seconds = about(matching_seconds(spec))
        estimate = [f"(about {seconds} here for every restart, if A and B are near each other);"]
    others = [(name, other) for name, other in planned.specs.items() if other is not spec]
    return "\n".join(
        [
            "",
            *task.plan,
            f"Would verify the specs of {', '.join(planned.specs)};",
            f"align B ({b}) to A ({a}), the {task.aligned}, by {config['algo']['name']};",
            *estimate,
            f"merge by {combination.words};",
            *([f"repair the merge, and each model on the line, by {config['repair']};"] if repairs else []),
            f"evaluate {config['objective']['name']} at {config['evaluate']['points']} points on"
            f" {', '.join(config['evaluate']['splits'])} data;",
            f"and leave the result in {job.folder}.",
            "",
            *(["The weight of B by block, also in blocks.png:", blocks.table(), ""] if blocks else []),
            f"{task.aligned}: {spec.summary()}",
            *(f"\n{name}: {other.summary().splitlines()[0]}" for name, other in others),
        ]
    )


run_pair = Job(None, stages.load, _plan, _work)
