"""The job of `python -m rebasin.search`: load -> align -> try merges -> choose -> judge -> report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError
from .configuration import resolved

if TYPE_CHECKING:
    from ..reporting.console import Console
    from ..reporting.results import Results
    from ..search.setup import Inputs, Setup
    from ..search.verdict import Finalist

BEST = "best.safetensors"
SAVED = "study"


def search(cfg: DictConfig, folder: Path, console: Console, command: str = "") -> Results | None:
    """Search as `cfg` says and leave everything in `folder`; goes on with a search that is there.

    Returns the content of results.json; None with `dry_run=true`, which shows the plan before anything is tried.

    Raises:
        RebasinError: an input is missing or does not fit; one sentence says which and what to do.
    """
    # Late: torch, diffusers and matplotlib take seconds to import, and --help and --cfg need none of them.
    from .. import reporting
    from ..checkpoints import write_text
    from ..search.folder import base_name, locked
    from ..search.record import figures
    from ..search.setup import load_inputs, prepare
    from ..search.study import (
        NAME,
        enqueue,
        finished,
        make_sampler,
        need_optuna,
        open_study,
        seconds_of,
        take_over,
    )
    from ..search.verdict import best_trials, finals, judge, references
    from ..tasks import load_task
    from . import stages as steps

    need_optuna()
    config = resolved(cfg)
    options = cfg.search
    _check(options)
    make_sampler(options.sampler, 0, 1)
    steps.settle(cfg)
    with locked(folder), reporting.open_logger(cfg.logger, config, folder) as logger:
        if cfg.again:
            for path in folder.glob(f"{Path(NAME).stem}.*"):
                path.unlink()
        write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
        with console.stage("load"):
            task = load_task(cfg)
            inputs = load_inputs(cfg, task, console.progress)
            console.say(", ".join(f"{'ABCDEFGH'[i % 8]}: {label}" for i, label in enumerate(inputs.labels)))
        with console.stage("align"):
            inputs = _aligned(cfg, task, inputs, folder, console)
        with console.stage("space"):
            setup = prepare(cfg, task, inputs)
            console.say(f"{setup.space.in_words()}; {' and '.join(aim.name for aim in setup.aims)}")
        if cfg.dry_run:
            console.console.print(_plan(cfg, setup, folder), markup=False)
            return None
        with console.stage("search"):
            study = open_study(folder, [aim.name for aim in setup.aims], options.prune)
            lost, before = take_over(study), len(finished(study))
            known = references(inputs.labels, inputs.base is not None)
            baseline = _baseline(study, setup, known)
            enqueue(study, _starts(options, setup))
            _try(cfg, folder, study, setup, reporting.both(console.progress, logger.event))
            done = finished(study)
            console.say(_told(done, before, lost, seconds_of(done)))
        with console.stage("choose"):
            ranked = finals(
                setup.bench, setup.aims, best_trials(study, options.finalists), known, console.progress
            )
            winner = ranked[0]
            console.say(f"{winner.label}: {winner.candidate}"[:160])
        with console.stage("judge"):
            judged = judge(setup.bench, setup.aims, winner.candidate, known, cfg.seed, console.progress)
        with console.stage("report"):
            found = figures(setup, base_name(config), study, baseline, ranked, judged, before)
            results = reporting.collect(config, found, console.seconds, command, "search")
            save(folder / BEST, setup, winner, judged, config)
            if options.keep_front and len(setup.aims) > 1:
                for number, finalist in enumerate(f for f in ranked[1:] if f.front):
                    save(folder / f"front-{number + 1}.safetensors", setup, finalist, None, config)
            reporting.leave(results, folder)
            logger.results(results, folder)
    console.summary(results, folder)
    return results


def save(
    path: Path,
    setup: Setup,
    finalist: Finalist,
    judged: list[dict[str, Any]] | None,
    config: Mapping[str, Any],
) -> None:
    """Write a merge tensor by tensor; the header has its recipe and what it was worth."""
    from ..checkpoints import save_safetensors
    from ..search.folder import base_name

    groups = setup.space.groups
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
    if judged is not None:
        about["heldout"] = json.dumps({one["name"]: one["models"]["winner"] for one in judged})
    save_safetensors(path, setup.bench.merged(finalist.candidate), about)


def _check(options: DictConfig) -> None:
    if options.trials < 0 or options.minutes < 0 or (not options.trials and not options.minutes):
        raise ConfigError(
            f"search.trials is {options.trials} and search.minutes {options.minutes}; at least one must be above 0, so"
            " that the search ends."
        )
    for name, least in (("workers", 1), ("batch", 1), ("unit", 1), ("finalists", 1), ("warm", 1)):
        if options[name] < least:
            raise ConfigError(f"search.{name} is {options[name]}, but it must be at least {least}.")
    if options.data not in ("train", "heldout"):
        raise ConfigError(f"search.data is {options.data!r}; it takes train or heldout.")
    if not 0 < options.choose < 1:
        raise ConfigError(f"search.choose is {options.choose}, but it is a share between 0 and 1.")


def _aligned(cfg: DictConfig, task: Any, inputs: Inputs, folder: Path, console: Console) -> Inputs:
    from ..search.setup import align_all
    from . import stages as steps

    if cfg.algo.name == "naive":
        console.say("not aligned")
        return inputs
    part = task.parts[task.aligned]
    spec = part.spec()
    if not list(folder.glob("permutation-*.safetensors")):
        steps.verify_all(_only(task), {task.aligned: spec})
    found = align_all(cfg, task, spec, inputs, folder, console.progress)
    moved = ", ".join(f"{label} {p.moved():,}" for label, p in found.items())
    console.say(f"{cfg.algo.name}: neurons moved: {moved} of {spec.neurons:,}")
    return inputs.moved(found)


def _only(task: Any) -> Any:
    """The task without the parts that are shared by all models."""
    import dataclasses

    return dataclasses.replace(task, parts={task.aligned: task.parts[task.aligned]})


def _starts(options: DictConfig, setup: Setup) -> list[tuple[str, dict[str, Any]]]:
    from ..search.warm_starts import warm_starts

    settings = OmegaConf.to_container(options.starts, resolve=True)
    assert isinstance(settings, list)
    return warm_starts(setup.space, list(setup.inputs.states[0]), settings)


def _baseline(study: Any, setup: Setup, known: dict[str, Any]) -> dict[str, list[float]]:
    """The known merges on the data of the search, measured once and kept in the study."""
    from ..search.trials import measure

    found = study.user_attrs.get("baseline")
    if found is None:
        found = {}
        for label, candidate in known.items():
            losses = measure(setup.bench, setup.aims, candidate, "search")
            found[label] = [aim.mean(x, "search") for aim, x in zip(setup.aims, losses, strict=True)]
        study.set_user_attr("baseline", found)
    return found


def _try(cfg: DictConfig, folder: Path, study: Any, setup: Setup, progress: Any) -> None:
    from ..search.trials import Budget, work
    from ..search.worker import workers

    options = cfg.search
    budget = Budget(options.trials, options.minutes)
    more = options.workers - 1 if budget.left(study) else 0
    with workers(folder, more) as running:
        work(
            study, setup.space, setup.bench, setup.aims, budget,
            sampler=options.sampler, warm=options.warm, seed=cfg.seed, progress=progress,
        )  # fmt: skip
        for process in running:
            process.wait()
    for i in range(1, more + 1):
        code = running[i - 1].returncode
        if code:
            raise ConfigError(f"Worker {i} ended with code {code}; see {folder / f'worker-{i}.log'}.")


def _told(done: list[Any], before: int, lost: int, seconds: float) -> str:
    pruned = sum(trial.state.name == "PRUNED" for trial in done)
    parts = [f"{len(done)} trials in {seconds:.0f} s, {pruned} given up early"]
    if before or lost:
        parts.append(f"went on after {before} of them")
    return ", ".join(parts)


def _plan(cfg: DictConfig, setup: Setup, folder: Path) -> str:
    options = cfg.search
    budget = [f"{options.trials} trials"] if options.trials else []
    budget += [f"{options.minutes:g} minutes"] if options.minutes else []
    lines = [
        "",
        f"Would search {setup.space.in_words()},",
        f"beginning with {len(_starts(options, setup))} known merges, for {' or '.join(budget)} with {options.workers}"
        " worker(s),",
    ]
    for aim in setup.aims:
        lines.append(
            f"by {aim.name}: {len(aim.search)} batches to search on, {len(aim.choose)} to choose by,"
            f" {len(aim.heldout)} held-out units to judge by;"
        )
    if setup.space.groups is not None:
        lines.append(f"groups: {', '.join(setup.space.groups.order)};")
    return "\n".join([*lines, f"and leave the result in {folder}."])
