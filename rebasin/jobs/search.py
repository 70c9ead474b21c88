"""The job of `python -m rebasin.search`: load -> align -> try merges -> choose -> assess -> report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError
from ..files import write_text
from ..integrations.hydra import resolved
from ..merging.inputs import copies
from ..reporting.console import Console
from ..reporting.results import Results
from ..reporting.search_page import KIND
from ..search.evaluator import Setup
from ..search.folder import base_name, digests, locked
from ..search.record import figures
from ..search.space import warm_starts
from ..search.study import (
    FOR,
    NAME,
    enqueue,
    finished,
    make_sampler,
    need_optuna,
    open_study,
    require_same,
    seconds_of,
    take_over,
    writing,
)
from ..search.trials import Budget, work
from ..search.verdict import Finalist, assess, best_trials, finals, references
from ..tasks import load_task
from ..tensors import save_safetensors
from .materials import align_all, check, load_inputs, prepare
from .refusals import brought, refuse
from .skeleton import Job, Session
from .worker import workers

BEST = "best.safetensors"


def search(cfg: DictConfig, folder: Path, console: Console, command: str = "") -> Results | None:
    """Search as `cfg` says; goes on with a search that is in `folder`."""
    with locked(folder), writing(folder):
        return _search(cfg, folder, console, command)


def _prepare(job: Session) -> Setup:
    need_optuna()
    cfg, options = job.cfg, job.cfg.search
    if options.trials < 0 or options.minutes < 0 or (not options.trials and not options.minutes):
        raise ConfigError(
            f"search.trials is {options.trials} and search.minutes {options.minutes}; at least one must be above 0, so"
            " that the search ends."
        )
    check(cfg, "search", "workers", "batch", "unit", "finalists", "warm")
    make_sampler(options.sampler, 0, 1)
    if cfg.again:
        for path in job.folder.glob(f"{Path(NAME).stem}.*"):
            path.unlink()
    require_same(job.folder, job.config)
    with job.stage("load"):
        task = load_task(cfg)
        refuse(job, task)
        job.own = brought(job.cfg, task)
        job.remark(task.remarks)
        inputs = load_inputs(cfg, task, job.progress)
        job.say(", ".join(f"{'ABCDEFGH'[i % 8]}: {label}" for i, label in enumerate(inputs.labels)))
    job.remark(copies(inputs.states, inputs.labels))
    inputs = inputs.moved(align_all(job, task, inputs))
    with job.stage("space"):
        setup = prepare(cfg, task, inputs)
        job.say(f"{setup.space.in_words()}; {' and '.join(one.name for one in setup.evaluator.objectives)}")
    return setup


def _work(job: Session, setup: Setup) -> Results:
    cfg, options, evaluator = job.cfg, job.cfg.search, setup.evaluator
    known = references(setup.inputs.labels, setup.inputs.base is not None)
    with job.stage("search"):
        job.wrote(job.folder / NAME)
        study = open_study(job.folder, evaluator.objectives, options.prune)
        study.set_user_attr(FOR, digests(job.config))
        lost, before = take_over(study), len(finished(study))
        # The known merges on the data of the search, measured once and kept in the study.
        measured = study.user_attrs.get("baseline")
        baseline = measured or {label: evaluator.means(one, "search") for label, one in known.items()}
        study.set_user_attr("baseline", baseline)
        enqueue(study, _starts(options, setup))
        _with_workers(job, study, setup)
        done = finished(study)
        pruned = sum(trial.state.name == "PRUNED" for trial in done)
        told = f"{len(done)} trials in {seconds_of(done):.0f} s, {pruned} given up early"
        job.say(told + (f", went on after {before} of them" if before or lost else ""))
    with job.stage("choose"):
        ranked = finals(evaluator, best_trials(study, options.finalists), known, job.progress)
        winner = ranked[0]
        job.say(f"{winner.label}: {winner.candidate}"[:160])
    with job.stage("judge"):
        judged = assess(evaluator, winner.candidate, known, cfg.seed, job.progress)
    with job.stage("report"):
        _save(job, BEST, setup, winner, judged)
        if options.keep_front and len(evaluator.objectives) > 1:
            for number, finalist in enumerate(f for f in ranked[1:] if f.front):
                _save(job, f"front-{number + 1}.safetensors", setup, finalist)
        return job.leave(figures(setup, base_name(job.config), study, baseline, ranked, judged, before))


def _with_workers(job: Session, study: Any, setup: Setup) -> None:
    """Try merges, in further processes too, which read the configuration in the folder."""
    options = job.cfg.search
    write_text(job.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(job.config)))
    more = options.workers - 1 if Budget(options.trials, options.minutes).left(study) else 0
    with workers(job.folder, more) as running:
        work(study, setup, options, seed=job.cfg.seed, progress=job.logged)
        for process in running:
            process.wait()
    for number, process in enumerate(running, 1):
        if process.returncode:
            log = job.folder / f"worker-{number}.log"
            raise ConfigError(f"Worker {number} ended with code {process.returncode}; see {log}.")


def _save(
    job: Session, name: str, setup: Setup, finalist: Finalist, judged: Sequence[dict[str, Any]] = ()
) -> None:
    """Write a merge tensor by tensor; the header has its recipe and what it was worth."""
    groups, config = setup.space.groups, job.config
    recipe = {
        **finalist.candidate.to_dict(),
        "models": list(setup.inputs.labels),
        "base": base_name(config),
        "aligned": config["algo"]["name"],
        "seed": config["seed"],
        "groups": setup.space.by,
        "order": list(groups.order) if groups is not None else [],
    }
    about = {
        "content": f"merge found by a search, {finalist.label}",
        "model": config["model"]["name"],
        "recipe": json.dumps(recipe),
    }
    if judged:
        about["heldout"] = json.dumps({one["name"]: one["models"]["winner"] for one in judged})
    job.wrote(save_safetensors(job.folder / name, setup.evaluator.merged(finalist.candidate), about))


def _starts(options: DictConfig, setup: Setup) -> list[tuple[str, dict[str, Any]]]:
    return warm_starts(setup.space, list(setup.inputs.states[0]), resolved(options)["starts"])


def _plan(job: Session, setup: Setup) -> str:
    options = job.cfg.search
    budget = [f"{options.trials} trials"] if options.trials else []
    budget += [f"{options.minutes:g} minutes"] if options.minutes else []
    groups = setup.space.groups
    return "\n".join(
        [
            "",
            f"Would search {setup.space.in_words()},",
            f"beginning with {len(_starts(options, setup))} known merges, for {' or '.join(budget)} with"
            f" {options.workers} worker(s),",
            *(
                f"by {one.name}: {len(one.search)} batches to search on, {len(one.choose)} to choose by,"
                f" {len(one.heldout)} held-out units to judge by;"
                for one in setup.evaluator.objectives
            ),
            *([] if groups is None else [f"groups: {', '.join(groups.order)};"]),
            f"and leave the result in {job.folder}.",
        ]
    )


_search = Job(KIND, _prepare, _plan, _work)
