"""What most studies begin with: two endpoints, the spec, and B aligned to A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ...matching import MatchResult
from ...spec import PermutationSpec
from ...spec.restrict import restrict
from ...types import State

if TYPE_CHECKING:
    from ...reporting.console import Console
    from ...tasks import Task


@dataclass(frozen=True, eq=False)
class AlignedPair:
    """Endpoints A and B, and B aligned to A by the run's algorithm."""

    task: Task
    spec: PermutationSpec
    a: State
    b: State
    aligned: State
    match: MatchResult


def aligned_pair(cfg: DictConfig, console: Console) -> AlignedPair:
    """Load, trace, verify and align as a run does (rebasin/run.py)."""
    from ...tasks import load_task
    from ...tracing import verify
    from ..algorithm import load_algorithm

    with console.stage("load"):
        algorithm = load_algorithm(cfg.algo)
        task = load_task(cfg)
    with console.stage("spec"):
        part = task.parts[task.aligned]
        spec = restrict(part.spec(), cfg.structure)
        console.say(f"{task.aligned}: {spec.neurons:,} neurons in {len(spec)} groups")
    with console.stage("verify"):
        report = verify(part.model, spec, *part.args, **part.kwargs).require()
        console.say(f"largest relative error {report.max_relative_error:.1e}")
    with console.stage("endpoints"):
        a, b, *_ = task.endpoints(console.progress)
    with console.stage("align"):
        match = algorithm(task, spec, a, b, seed=cfg.seed, progress=console.progress)
        console.say(f"{algorithm.name}: {match.moved:,} of {spec.neurons:,} neurons moved")
    return AlignedPair(task, spec, a, b, match.permutation.apply(b), match)
