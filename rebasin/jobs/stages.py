"""The steps of a run between loading and reporting: states and specs in, curves and figures out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from ..errors import ConfigError, VerificationError
from ..evaluation import Curve, barrier
from ..matching import MatchResult
from ..merging import interpolate
from ..modules import loaded
from ..spec import PermutationSpec
from ..tracing import verify
from ..types import Progress, State, within
from .resume import Resume, resume_file

if TYPE_CHECKING:
    from ..evaluation.samples import Samples
    from ..tasks import Task


SPLITS = ("train", "heldout")
TOLERANCE = 1e-3
"""Largest relative change of B's loss by permuting it: a last check on the real weights and data."""


def settle(cfg: DictConfig) -> None:
    """Seed torch, set its threads, and refuse impossible settings before anything is loaded.

    Raises:
        ConfigError: names the option and what it takes.
    """
    unknown = [split for split in cfg.evaluate.splits if split not in SPLITS]
    if unknown or not cfg.evaluate.splits:
        raise ConfigError(
            f"evaluate.splits is {list(cfg.evaluate.splits)}; it takes some of {', '.join(SPLITS)}."
        )
    if cfg.evaluate.points < 2:
        raise ConfigError(
            f"evaluate.points is {cfg.evaluate.points}, but a line has at least 2 points, its ends."
        )
    if cfg.seed < 0:
        raise ConfigError(f"seed is {cfg.seed}, but it must not be negative.")
    torch.manual_seed(cfg.seed)
    if cfg.threads > 0:
        torch.set_num_threads(cfg.threads)


def resume(cfg: DictConfig, config: Mapping[str, Any]) -> Resume | None:
    """Where the state of this run's matching is kept while it is unfinished; None without a cache."""
    file = resume_file(config, cfg.path.cache)
    return None if file is None else Resume(file, cfg.resume)


def verify_all(task: Task, specs: Mapping[str, PermutationSpec]) -> dict[str, dict[str, Any]]:
    """Prove the spec of every part; part -> what was proved and how exactly.

    Raises:
        VerificationError: a permutation of a spec changed an output; nothing may be aligned with it.
    """
    checks = {}
    for name, part in task.parts.items():
        spec = specs[name]
        if part.proved is not None:
            error = part.proved(spec)
        else:
            error = verify(part.model, spec, *part.args, **part.kwargs).require().max_relative_error
        checks[name] = {
            "max_relative_error": error,
            "passed": True,
            "groups": len(spec),
            "neurons": spec.neurons,
            "coverage": {"one": spec.coverage().one, "both": spec.coverage().both},
        }
    return checks


def evaluate(
    cfg: DictConfig,
    task: Task,
    state_a: State,
    state_b: State,
    aligned: State,
    match: MatchResult,
    progress: Progress | None = None,
) -> dict[str, dict[str, Curve]]:
    """The curves from A to B and from A to aligned B: split -> "naive", "aligned" -> curve.

    Raises:
        VerificationError: B's loss is another one after permuting it.
    """
    curves: dict[str, dict[str, Curve]] = {}
    for split in _measured(cfg, task):

        def measure(end: State, kind: str, split: str = split) -> Curve:
            def report(event: dict[str, Any]) -> None:
                if progress is not None:
                    progress(within(event, f"{kind}, {split}"))

            def loss(model: torch.nn.Module) -> dict[str, float]:
                return task.objective.evaluate(model, task.batches[split])

            return barrier(task.model, state_a, end, loss, points=cfg.evaluate.points, progress=report)

        naive = measure(state_b, "naive")
        # Where no neuron moved the two lines are the same line.
        curves[split] = {"naive": naive, "aligned": measure(aligned, "aligned") if match.moved else naive}
        before, after = naive.losses[-1], curves[split]["aligned"].losses[-1]
        if math.isfinite(before) and not math.isclose(before, after, rel_tol=TOLERANCE, abs_tol=1e-6):
            raise VerificationError(
                f"The loss of B on {split} was {before:.6g} and is {after:.6g} after permuting it, so the"
                " permutation is not legal for these weights."
            )
    return curves


def evaluate_merged(cfg: DictConfig, task: Task, merged: State) -> dict[str, dict[str, float]]:
    """The figures of the saved merge itself, which need not lie on the line: split -> "loss" and others."""
    splits = _measured(cfg, task)
    model = loaded(task.model, merged) if splits else task.model
    return {split: task.objective.evaluate(model, task.batches[split]) for split in splits}


def _measured(cfg: DictConfig, task: Task) -> list[str]:
    """The splits to evaluate on: none if the task has no data, because its models are too large to compute with."""
    return [split for split in cfg.evaluate.splits if task.batches]


def barriers(curves: Mapping[str, Mapping[str, Curve]]) -> str:
    """The barriers in a few words."""
    return "; ".join(
        f"barrier on {split} {kinds['naive'].barrier:.4g} naive, {kinds['aligned'].barrier:.4g} aligned"
        for split, kinds in curves.items()
    )


def sample(task: Task, state_a: State, state_b: State, aligned: State, seed: int) -> Samples | None:
    """Images of A, B and both midpoints from the same prompts and noise; None if the task makes none."""
    if task.sampler is None:
        return None
    states = {
        f"A: {task.labels[0]}": state_a,
        f"B: {task.labels[1]}": state_b,
        "naive midpoint": interpolate(state_a, state_b, 0.5),
        "aligned midpoint": interpolate(state_a, aligned, 0.5),
    }
    return task.sampler(states, seed)
