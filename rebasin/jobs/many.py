"""The job for many models: load -> spec -> verify -> align all -> merge -> repair -> evaluate -> report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig

from ..errors import ConfigError
from ..types import State, arguments_of, check_options, supply
from .configuration import resolved

if TYPE_CHECKING:
    from ..evaluation.many import Row
    from ..matching.many.result import ManyResult
    from ..reporting.console import Console
    from ..reporting.results import Results
    from ..spec import PermutationSpec
    from ..tasks import Task
    from .combination import Combination


OWN = ("_target_", "name", "many", "repair")
"""Fields of an algorithm's config that are no options of its function."""
REPAIRS = ("reset", "rescale", "closed_form")
"""What `algo.repair` can name."""


def is_many(cfg: DictConfig) -> bool:
    """Whether the chosen algorithm is to merge more than two models, or is one for any number.

    Raises:
        ConfigError: there are other than two models, but the algorithm aligns two.
    """
    from hydra.utils import get_method

    chosen = next((cfg.model.get(field) for field in ("files", "seeds") if cfg.model.get(field)), None)
    several = isinstance(chosen, ListConfig) and len(chosen) != 2
    if "states" in arguments_of(get_method(cfg.algo["_target_"])):
        return True
    if several and not cfg.algo.get("many"):
        raise ConfigError(
            f"There are {len(chosen or ())} networks, but algo={cfg.algo.name} aligns two: choose"
            f" algo=merge_many, or algo=naive for their plain mean."
        )
    return several


def run_many(cfg: DictConfig, folder: Path, console: Console, command: str = "") -> Results | None:
    """`run` for any number of models: their merge beside members, plain mean and ensemble.

    Raises:
        RebasinError: an input is missing or does not fit; one sentence says which and what to do.
    """
    from .. import reporting
    from ..checkpoints import save_safetensors
    from ..matching.many.result import save_permutations
    from ..reporting import many as report
    from ..tasks import load_task
    from . import stages as steps
    from .combination import load_combination

    config = resolved(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    steps.settle(cfg)
    with console.stage("load"):
        algorithm = _function(cfg)
        task = load_task(cfg)
    with console.stage("spec"):
        specs = {name: part.spec() for name, part in task.parts.items()}
        spec = specs[task.aligned]
        console.say(f"{task.aligned}: {spec.neurons:,} neurons in {len(spec)} groups")
    combination = load_combination(cfg, task)
    reporting.save_blocks(combination.blocks, folder)
    if cfg.dry_run:
        then = "" if combination.is_mean else f", then {combination.words}"
        console.console.print(
            f"\nWould verify the specs of {', '.join(specs)};\nmerge {len(task.labels)} models"
            f" ({', '.join(task.labels)}) by {cfg.algo.name}{then};\n"
            f"evaluate on {', '.join(cfg.evaluate.splits)} data;\nand leave the result in {folder}.\n\n"
            f"{task.aligned}: {spec.summary()}",
            markup=False,
        )
        return None

    with reporting.open_logger(cfg.logger, config, folder) as logger:
        with console.stage("verify"):
            checks = steps.verify_all(task, specs)
        with console.stage("endpoints"):
            states = list(task.endpoints(console.progress))
            console.say(f"{len(states)} models: {', '.join(task.labels)}")
        with console.stage("align"):
            progress = reporting.both(console.progress, logger.event)
            result = _align(cfg, config, algorithm, task, spec, states, progress)
            console.say(f"{cfg.algo.name}: distance {result.distance_before:.4g} -> {result.distance:.4g}")
        with console.stage("merge"):
            merged = dict(result.merged)
            members = result.members(states)
            console.say(f"weights {', '.join(f'{w:.3g}' for w in result.weights)}")
        with console.stage("repair"):
            merges = _merges(cfg, task, spec, states, result, merged, combination)
            console.say(", ".join(merges))
        with console.stage("evaluate"):
            rows = {split: _evaluate(task, split, members, merges, result) for split in cfg.evaluate.splits}
        with console.stage("report"):
            about = {"model": cfg.model.name, "algorithm": cfg.algo.name, "spec_hash": spec.hash}
            save_permutations(folder / "permutations.safetensors", result.permutations, about)
            chosen = cfg.algo.name if combination.is_mean else combination.method.name
            for file, name in ((report.MERGED, chosen), (report.REPAIRED, f"{chosen}, REPAIR")):
                if name in merges:
                    save_safetensors(folder / file, merges[name], {**about, "content": name})
            found = report.figures(task.labels, task.aligned, spec, checks, result, rows)
            results = reporting.collect(config, found, console.seconds, command, report.KIND)
            reporting.leave(results, folder)
            logger.results(results, folder)
    console.summary(results, folder)
    return results


def _function(cfg: DictConfig) -> Any:
    """The algorithm's function, checked against its config."""
    from hydra.utils import get_method

    from .algorithm import KEPT, SUPPLY

    target = cfg.algo["_target_"]
    function = get_method(target)
    if "states" not in arguments_of(function):
        target = cfg.algo.many
        function = get_method(target)
    known = arguments_of(function, (*SUPPLY, *KEPT, "states", "model"))
    check_options(f"algo={cfg.algo.name}", _options(cfg), known)
    return function


def _options(cfg: DictConfig) -> dict[str, Any]:
    """The options of the algorithm's function."""
    return {name: value for name, value in resolved(cfg.algo).items() if name not in OWN}


def _align(
    cfg: DictConfig,
    config: Mapping[str, Any],
    function: Any,
    task: Task,
    spec: PermutationSpec,
    states: Sequence[State],
    progress: Any,
) -> ManyResult:
    from . import stages as steps

    resume = steps.resume(cfg, config)
    offered = {
        "spec": spec, "states": states, "model": task.model, "objective": task.objective,
        "batches": task.batches["train"], "seed": cfg.seed, "progress": progress,
        **(resume.arguments(function) if resume is not None else {}),
    }  # fmt: skip
    result = function(**supply(function, offered, _options(cfg), what=f"algo={cfg.algo.name}"))
    if resume is not None:
        resume.finish()
    return result


def _merges(
    cfg: DictConfig,
    task: Task,
    spec: PermutationSpec,
    states: Sequence[State],
    result: ManyResult,
    merged: State,
    combination: Combination,
) -> dict[str, State]:
    """Name -> state: the plain mean and the merge; with `repair` each of them again after a reset of statistics (if
    there are any), after REPAIR, and after REPAIR in closed form, with the goals of its own members.
    """
    from ..matching.many.pivot import naive_mean
    from ..merging.repair import repair, reset_statistics
    from ..merging.repair_closed_form import repair_closed_form

    aligned = any(not p.is_identity for p in result.permutations)
    found: dict[str, tuple[State, Sequence[State]]] = {
        "naive": (dict(naive_mean(spec, states, weights=result.weights).merged), states)
    }
    if aligned or cfg.algo.name != "naive":
        found[cfg.algo.name] = merged, result.members(states)
    if not combination.is_mean:
        members = result.members(states)
        found[combination.method.name] = (
            dict(combination(task, members, seed=cfg.seed, device=cfg.device)),
            members,
        )
    merges: dict[str, State] = {name: state for name, (state, _) in found.items()}
    ways = _repairs(cfg)
    if not ways or not hasattr(task.objective, "logits"):
        return merges
    batches = task.batches["train"]
    for name, (state, members) in found.items():
        data = spec, task.model, state, members, batches
        done = repair(*data, weights=result.weights) if "rescale" in ways else None
        fresh = reset_statistics(task.model, state, batches) if "reset" in ways else state
        if any(fresh[key] is not state[key] for key in state):
            merges[f"{name}, reset"] = fresh
        if done is not None and done.scales:
            merges[f"{name}, REPAIR"] = done.state
        if "closed_form" in ways:
            merges[f"{name}, closed form"] = repair_closed_form(*data, weights=result.weights).state
    return merges


def _repairs(cfg: DictConfig) -> tuple[str, ...]:
    """The ways of `algo.repair`: true is a reset and REPAIR, false none."""
    chosen = cfg.algo.get("repair", True)
    if isinstance(chosen, bool) or chosen is None:
        return REPAIRS[:2] if chosen else ()
    ways = (chosen,) if isinstance(chosen, str) else tuple(chosen)
    unknown = [way for way in ways if way not in REPAIRS]
    if unknown:
        raise ConfigError(
            f"algo.repair has {unknown[0]!r}; it takes true, false or some of {', '.join(REPAIRS)}."
        )
    return ways


def _evaluate(
    task: Task,
    split: str,
    members: Sequence[State],
    merges: Mapping[str, State],
    result: ManyResult,
) -> list[Row]:
    from ..evaluation.many import compare

    return compare(task.model, task.objective, task.batches[split], members, merges, weights=result.weights)
