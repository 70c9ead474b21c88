"""The stages that jobs share: from a configuration to aligned models, and what is measured of them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn

from ..errors import ConfigError, VerificationError
from ..evaluation import Curve, barrier
from ..evaluation.samples import Samples
from ..matching import AutoResult, MatchResult
from ..matching.straight_through.draws import few
from ..merging import interpolate
from ..merging.block_figure import save_block_figure
from ..merging.inputs import copies
from ..merging.repair import repair, unfit
from ..reporting.console import Console
from ..reporting.loggers import both
from ..spec import Alignment, Permutation, PermutationSpec
from ..spec.restrict import restrict
from ..tasks import Task, load_task
from ..tensors.modules import loaded
from ..tensors.writer import in_bytes
from ..tracing import verify
from ..types import Progress, ProgressEvent, State, within
from .algorithm import Algorithm, load_algorithm, require_models
from .combination import Combination, load_combination
from .refusals import brought, refuse
from .resume import load_resume
from .skeleton import NONE, Session

NAIVE, PERMUTED, ALIGNED = "naive", "permuted", "aligned"
"""The lines from A: to B, to B in the order that learned maps were started from, to B aligned."""

REPAIRED_AS = "{}_repaired"
"""The lines along which each model is repaired before it is measured."""

SAMPLES = 10_000
"""Of training data, so many are looked at for a repair."""

TOLERANCE = 1e-3
"""Largest relative change of B's loss by permuting it: a last check on the real weights and data."""


@dataclass(frozen=True, eq=False)
class Material:
    """What a job that aligns begins with: the models' symmetries, how they are aligned, and merged then.

    Attributes:
        specs: part -> its symmetries; of the part that is aligned those that `structure` leaves.
    """

    task: Task
    algorithm: Algorithm
    specs: Mapping[str, PermutationSpec]
    combination: Combination

    @property
    def spec(self) -> PermutationSpec:
        """Of the part that is aligned."""
        return self.specs[self.task.aligned]


@dataclass(frozen=True, eq=False)
class AlignedPair:
    """Endpoints A and B, and B aligned to A by the run's algorithm."""

    task: Task
    spec: PermutationSpec
    a: State
    b: State
    aligned: State
    match: MatchResult

    @property
    def ends(self) -> dict[str, State]:
        """What the line from A may end in, by its name: B as it is, permuted as the maps were started from, aligned."""
        start = getattr(self.match, "start", None)
        permuted = {} if start is None or start.is_identity else {PERMUTED: start.view(self.b)}
        return {NAIVE: self.b, **permuted, ALIGNED: self.aligned}

    @property
    def mover(self) -> Permutation | Alignment:
        """What brings B to A: a permutation where there are no maps."""
        found = self.match.as_alignment
        return found if found.maps else found.permutation


def load(job: Session, several: bool = False) -> Material:
    """Task, algorithm (one for `several` models), specs and merge, before any endpoint is loaded."""
    with job.stage("load"):
        refuse(job)  # what the options alone tell, before anything is read
        algorithm = load_algorithm(job.cfg.algo, several)
        task = load_task(job.cfg)
        refuse(job, task, algorithm)
        job.own = brought(job.cfg, task)
        if job.cfg.tensors:
            require_space(job.folder, task.room)
        job.remark(task.remarks)
    if several and algorithm.function.__module__.startswith("rebasin."):
        require_models(algorithm, len(task.labels))
    with job.stage("spec"):
        specs = {name: spec_of(job.cfg, task, name) for name in task.parts}
        spec = specs[task.aligned]
        job.say(f"{task.aligned}: {spec.neurons:,} neurons in {len(spec)} groups")
    combination = load_combination(job.cfg, task)
    if job.kind is None:
        require_repair(job.cfg, task, spec, combination.share)
    job.remark([combination.remark] if combination.remark else [])
    return Material(task, algorithm, specs, combination)


def require_repair(cfg: DictConfig, task: Task, spec: PermutationSpec, share: float) -> None:
    """Refuse a repair that changes nothing of this network, or that has no two members, of B's share `share`.

    Raises:
        ConfigError: tells which, and why.
    """
    if cfg.repair == NONE:
        return
    reason = unfit(spec, task.model, cfg.repair)
    if reason is None and cfg.repair != "reset" and not 0 < share < 1:
        given = f"lam is {cfg.lam}" if cfg.merge.weights is None else f"merge.weights is {cfg.merge.weights}"
        reason = f"{given}, and the goals are those of a mean of A and B"
    if reason is not None:
        raise ConfigError(f"repair={cfg.repair} has no effect here: {reason}; leave it out.")


def require_space(folder: Path, size: float) -> None:
    """Complain of files that there is no room for, before they are computed for hours.

    Raises:
        ConfigError: the disk of `folder`, which need not be there yet, has less than `size` bytes free.
    """
    place = next((one for one in (folder.absolute(), *folder.absolute().parents) if one.is_dir()), folder)
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return  # which is told where something is written
    if size > free:
        raise ConfigError(
            f"The files that this run leaves in {folder} take about {in_bytes(size)}, but the disk has {in_bytes(free)}"
            " free; make room, choose another folder (hydra.run.dir), or leave figures only (tensors=false)."
        )


def spec_of(cfg: DictConfig, task: Task, part: str) -> PermutationSpec:
    """The symmetries of a part; of the aligned one those that `structure` leaves."""
    spec = task.parts[part].spec()
    return restrict(spec, cfg.structure) if part == task.aligned else spec


def verify_all(
    job: Session, task: Task, specs: Mapping[str, PermutationSpec], maps: bool = False
) -> dict[str, dict[str, object]]:
    """Prove the specs of these parts; part -> what was proved and how exactly. `maps`: of the aligned one's, too, in
    double precision, for which products of random matrices are too coarse in any other.

    Raises:
        VerificationError: a permutation of a spec changed an output; nothing may be aligned with it.
    """
    checks, largest = {}, 0.0
    with job.stage("verify"):
        for name, spec in specs.items():
            part = task.parts[name]
            tried = len(spec.continuous) if maps and name == task.aligned else 0
            if part.proved is not None:
                error = part.proved(spec)
            else:
                dtype = torch.float64 if tried else None
                report = verify(part.model, spec, *part.args, dtype=dtype, **part.kwargs).require()
                error, tried = report.max_relative_error, report.maps if tried else 0
            largest = max(largest, error)
            checks[name] = {
                "max_relative_error": error,
                "passed": True,
                "groups": len(spec),
                "neurons": spec.neurons,
                "maps": tried,
                "coverage": {"one": spec.coverage().one, "both": spec.coverage().both},
            }
        job.say(f"largest relative error {largest:.1e}")
    return checks


def endpoints(job: Session, task: Task) -> tuple[State, ...]:
    """Load or train the models."""
    with job.stage("endpoints"):
        states = task.endpoints(job.progress)
        job.say(", ".join(f"{'ABCDEFGH'[i % 8]}: {label}" for i, label in enumerate(task.labels)))
    job.remark(copies(states, task.labels))
    return states


def draw_blocks(job: Session, combination: Combination) -> None:
    """blocks.png, of weights by block."""
    if combination.blocks is not None:
        save_block_figure(combination.blocks, job.folder / "blocks.png")
        job.wrote(job.folder / "blocks.png")


def align(
    job: Session, material: Material, a: State, b: State, listen: Progress | None = None
) -> AlignedPair:
    """B to A; `listen` is told of progress, too."""
    task, spec, algorithm = material.task, material.spec, material.algorithm
    progress = job.logged if listen is None else both(job.logged, listen)
    with job.stage("align"):
        match = algorithm(task, spec, a, b, **job.given, progress=progress, resume=load_resume(job.cfg))
        found = match.as_alignment
        mover = found if found.maps else found.permutation
        # A state that is read from a file stays there: SDXL's would not fit in memory three times.
        aligned = mover.apply(b) if isinstance(b, dict) else mover.view(b)
        maps = f", {len(found.turned)} of {len(spec.continuous)} maps" if found.maps else ""
        chosen = f" ({match.chosen})" if isinstance(match, AutoResult) else ""
        job.say(f"{algorithm.name}{chosen}: {match.moved:,} of {spec.neurons:,} neurons moved{maps}")
    return AlignedPair(task, spec, a, b, aligned, match)


def aligned_pair(cfg: DictConfig, console: Console) -> AlignedPair:
    """Load, trace, verify and align as a run does: what most studies begin with."""
    job = Session(cfg, console)
    material = load(job)
    task = material.task
    verify_all(job, task, {task.aligned: material.spec}, material.algorithm.maps)
    a, b, *_ = endpoints(job, task)
    return align(job, material, a, b)


def splits(cfg: DictConfig, task: Task) -> list[str]:
    """The splits to evaluate on: none if the task has no data, because its models are too large to compute with."""
    return [split for split in cfg.evaluate.splits if task.batches]


def curves(cfg: DictConfig, pair: AlignedPair, progress: Progress) -> dict[str, dict[str, Curve]]:
    """The curves from A to B and from A to aligned B: split -> "naive", "aligned" (see `AlignedPair.ends`) -> curve.

    Raises:
        VerificationError: B's loss is another one after permuting it.
    """
    found: dict[str, dict[str, Curve]] = {}
    task = pair.task

    def measure(end: State, split: str, kind: str, repaired: bool = False) -> Curve:
        def evaluate(model: nn.Module) -> dict[str, float]:
            return task.objective.evaluate(model, task.batches[split])

        def listen(event: ProgressEvent) -> None:
            progress(within(event, f"{kind}, {split}"))

        each = repairing(cfg, pair, end) if repaired else None
        return barrier(
            task.model, pair.a, end, evaluate, points=cfg.evaluate.points, progress=listen, repair=each
        )

    for split in splits(cfg, task):
        # Where nothing moved the lines are the same line.
        still = pair.match.as_alignment.is_identity
        kinds = {
            kind: measure(end, split, kind) for kind, end in pair.ends.items() if not still or kind == NAIVE
        }
        for kind in (NAIVE, ALIGNED) if cfg.repair != NONE else ():
            if not still or kind == NAIVE:
                name = REPAIRED_AS.format(kind)
                kinds[name] = measure(pair.ends[kind], split, name, repaired=True)
        if still:
            kinds |= {kind.replace(NAIVE, ALIGNED): curve for kind, curve in kinds.items()}
        found[split] = kinds
        before, after = kinds[NAIVE].losses[-1], kinds[ALIGNED].losses[-1]
        if math.isfinite(before) and not math.isclose(before, after, rel_tol=TOLERANCE, abs_tol=1e-6):
            raise VerificationError(
                f"The loss of B on {split} was {before:.6g} and is {after:.6g} after aligning it, so what was found is"
                " not legal for these weights."
            )
    return found


def repairing(cfg: DictConfig, pair: AlignedPair, end: State) -> Callable[[State, float], State]:
    """What repairs a model between A and `end`, by training data: the model and lambda -> its tensors."""
    task = pair.task
    batches = few(task.batches["train"], SAMPLES)

    def repaired(merged: State, share: float) -> State:
        members = [(pair.a, 1 - share), (end, share)]
        states, weights = zip(*((state, w) for state, w in members if w > 0), strict=True)
        return repair(
            pair.spec, task.model, merged, states, batches, how=cfg.repair, weights=weights, forward=task.objective.loss
        ).state  # fmt: skip

    return repaired


def evaluate_merged(cfg: DictConfig, task: Task, merged: State) -> dict[str, dict[str, float]]:
    """The figures of the saved merge itself, which need not lie on the line: split -> "loss" and others."""
    measured = splits(cfg, task)
    model = loaded(task.model, merged) if measured else task.model
    return {split: task.objective.evaluate(model, task.batches[split]) for split in measured}


def barriers(curves: Mapping[str, Mapping[str, Curve]]) -> str:
    """The barriers in a few words."""
    return "; ".join(
        f"barrier on {split} {', '.join(f'{curve.barrier:.4g} {kind}' for kind, curve in kinds.items())}"
        for split, kinds in curves.items()
    )


def sample(pair: AlignedPair, seed: int) -> Samples | None:
    """Images of A, B and the midpoints from the same prompts and noise; None if the task makes none."""
    if pair.task.sampler is None:
        return None
    a, b = pair.task.labels
    states = {
        f"A: {a}": pair.a,
        f"B: {b}": pair.b,
        **{f"{kind} midpoint": interpolate(pair.a, end, 0.5) for kind, end in pair.ends.items()},
    }
    return pair.task.sampler(states, seed)


def sample_seeds(cfg: DictConfig, pair: AlignedPair, first: Samples | None) -> dict[int, Samples]:
    """Seed -> images, for `model.seeds_shown` seeds from the run's on; `first` are those of the run's."""
    if first is None:
        return {}
    more = range(cfg.seed + 1, cfg.seed + int(cfg.model.get("seeds_shown") or 1))
    made = {seed: sample(pair, seed) for seed in more}
    return {cfg.seed: first} | {seed: images for seed, images in made.items() if images is not None}
