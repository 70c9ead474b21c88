"""The job for many models: load -> spec -> verify -> align all -> merge -> repair -> evaluate -> report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from omegaconf import DictConfig

from ..errors import ConfigError
from ..evaluation.many import compare
from ..files import prepare_folder
from ..matching.many.maps import ManyMapsResult
from ..matching.many.pivot import naive_mean
from ..matching.many.result import ManyResult, save_permutations
from ..merging.repair import REPAIRS, How, repair, unfit
from ..reporting import many as report
from ..reporting.results import Results
from ..spec import Alignment, Permutation
from ..tensors import save_safetensors
from ..types import State
from . import stages
from .resume import load_resume
from .skeleton import Job, Session

ALIGNMENTS = "alignments"
"""The folder of those with maps: 0, the first model's, which does not move, 1, ..."""

REPAIRED: dict[How, str] = {
    "reset": "reset",
    "rescale": "REPAIR",
    "closed_form": "closed form",
    "least_squares": "least squares",
    "zipit": "zipped",
}
"""What can be done to a merge, as its row is called."""


def _plan(job: Session, planned: stages.Material) -> str:
    cfg, task, combination = job.cfg, planned.task, planned.combination
    _repairs(cfg, len(task.labels))
    then = "" if combination.is_mean else f", then {combination.words}"
    return (
        f"\nWould verify the specs of {', '.join(planned.specs)};\nmerge {len(task.labels)} models"
        f" ({', '.join(task.labels)}) by {cfg.algo.name}{then};\n"
        f"evaluate on {', '.join(cfg.evaluate.splits)} data;\nand leave the result in {job.folder}.\n\n"
        f"{task.aligned}: {planned.spec.summary()}"
    )


def _work(job: Session, planned: stages.Material) -> Results:
    cfg, task, spec, combination = job.cfg, planned.task, planned.spec, planned.combination
    name = planned.algorithm.name
    ways = _repairs(cfg, len(task.labels))
    checks = stages.verify_all(job, task, planned.specs, planned.algorithm.maps)
    states = stages.endpoints(job, task)
    stages.draw_blocks(job, combination)
    with job.stage("align"):
        kept = load_resume(cfg)
        result: ManyResult = planned.algorithm(
            task, spec, *states, **job.given, progress=job.logged, resume=kept
        )
        job.say(f"{name}: distance {result.distance_before:.4g} -> {result.distance:.4g}")
    with job.stage("merge"):
        members = result.members(states)
        job.say(f"weights {', '.join(f'{w:.3g}' for w in result.weights)}")
    with job.stage("repair"):
        merges = _merges(cfg, planned, states, result, ways)
        job.say(", ".join(merges))
    with job.stage("evaluate"):
        rows = {
            split: compare(
                task.model, task.objective, task.batches[split], members, merges, weights=result.weights
            )
            for split in stages.splits(cfg, task)
        }
    with job.stage("report"):
        if cfg.tensors:
            about = {"model": cfg.model.name, "algorithm": name, "spec_hash": spec.hash}
            if isinstance(result, ManyMapsResult):
                place = prepare_folder(job.folder / ALIGNMENTS)
                job.wrote(place)
                for i, (label, found) in enumerate(zip(task.labels, result.alignments, strict=True)):
                    content = {"content": f"brings {label} to {task.labels[0]}"}
                    found.save(place / f"{i}.safetensors", about | content)
            else:
                path = job.folder / "permutations.safetensors"
                save_permutations(path, result.permutations, about)
                job.wrote(path)
            chosen = name if combination.is_mean else combination.method.name
            for file, kind in ((report.MERGED, chosen), (report.REPAIRED, f"{chosen}, REPAIR")):
                if kind in merges:
                    about = {**about, "content": kind}
                    job.wrote(save_safetensors(job.folder / file, merges[kind], about))
            if task.export is not None:
                made = {"rebasin_command": job.command}
                job.wrote(
                    *task.export(
                        job.folder, merges[chosen], made, _movers(result), result.weights, job.progress
                    )
                )
        return job.leave(report.figures(task.labels, task.aligned, spec, checks, result, rows))


def _movers(result: ManyResult) -> Sequence[Permutation | Alignment]:
    """What moved each of the models."""
    return result.alignments if isinstance(result, ManyMapsResult) else result.permutations


def _merges(
    cfg: DictConfig,
    planned: stages.Material,
    states: Sequence[State],
    result: ManyResult,
    ways: Sequence[How],
) -> dict[str, State]:
    """Name -> state: the plain mean and the merge; with `repair` each of them again after a reset of statistics (if
    there are any), after REPAIR, and after REPAIR in closed form, with the goals of its own members.
    """
    task, spec, combination = planned.task, planned.spec, planned.combination
    members = result.members(states)
    aligned = any(not p.is_identity for p in _movers(result))
    found: dict[str, tuple[State, Sequence[State]]] = {
        "naive": (dict(naive_mean(spec, states, weights=result.weights).merged), states)
    }
    if aligned or cfg.algo.name != "naive":
        found[cfg.algo.name] = dict(result.merged), members
    if not combination.is_mean:
        merged = combination(task, members, seed=cfg.seed, device=cfg.device)
        found[combination.method.name] = dict(merged), members
    merges: dict[str, State] = {name: state for name, (state, _) in found.items()}
    if not ways or not hasattr(task.objective, "logits"):
        return merges
    batches = task.batches["train"]
    for name, (state, own) in found.items():
        for how in ways:
            if unfit(spec, task.model, how) is None:
                done = repair(spec, task.model, state, own, batches, how=how, weights=result.weights)
                merges[f"{name}, {REPAIRED[how]}"] = done.state
    return merges


def _repairs(cfg: DictConfig, models: int) -> tuple[How, ...]:
    """The ways of `algo.repair` for so many models: true is a reset and REPAIR, false none."""
    chosen = cfg.algo.get("repair", True)
    if isinstance(chosen, bool) or chosen is None:
        return REPAIRS[:2] if chosen else ()
    ways = (chosen,) if isinstance(chosen, str) else tuple(chosen)
    unknown = [way for way in ways if way not in REPAIRS]
    if unknown:
        raise ConfigError(
            f"algo.repair has {unknown[0]!r}; it takes true, false or some of {', '.join(REPAIRS)}."
        )
    if "zipit" in ways and models != 2:
        raise ConfigError(
            f"algo.repair has 'zipit', which pairs the neurons of two models, but this run has {models}."
        )
    return tuple(how for how in REPAIRS if how in ways)


run_many = Job(report.KIND, partial(stages.load, several=True), _plan, _work)
"""For any number of models: their merge beside members, plain mean and ensemble."""
