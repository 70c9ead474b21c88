"""Sinkhorn re-basin: a permutation of B that is soft while it is learned, by the loss between A and B.

Pena et al., "Re-basin via implicit Sinkhorn differentiation" (CVPR 2023, arXiv 2212.12042). With S(X) in the place of
the permutation (see `operator`) the merge is differentiable in X, for each cost of the paper:

    weights     | A - S(X)(B) |^2 / parameters
    midpoint    L(1/2 (A + S(X)(B)))
    line        L((1 - lambda) A + lambda S(X)(B)),  lambda drawn from (0, 1) at each step

X starts at the start's permutation matrix and noise, and descends by AdamW. The hard permutation of X is taken now and
then, and the best of them by held-out batches is the result (the paper's code takes the last).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...arguments import Count, NonNegative, Seed, Within, typed
from ...merging.interpolate import interpolate_tensor
from ...objectives import LossFunction, Objective
from ...spec import PermutationSpec
from ...tensors.modules import device_of, find_device
from ...types import Progress
from ..candidates import Start, start_of
from ..result import moved_between
from ..straight_through.best_seen import BestSeen
from ..straight_through.draws import Draws, mixed, split
from ..straight_through.midpoint import Autocast, Ends
from ..straight_through.state import fingerprint
from ..weights.endpoints import Endpoints
from .result import SinkhornResult, SinkhornState
from .soft import SoftMember

Cost = Literal["weights", "midpoint", "line"]
Temperature = Annotated[float, Within(1e-6)]


@typed
def sinkhorn_matching(
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    objective: Objective | LossFunction,
    batches: Sequence[Any],
    *,
    heldout: Sequence[Any] | None = None,
    init: Start = "identity",
    cost: Cost = "line",
    steps: Count = 200,
    lr: NonNegative = 0.1,
    tau: Temperature = 1.0,
    iterations: Count = 20,
    noise: NonNegative = 0.1,
    decay: NonNegative = 0.01,
    evaluate_every: Count = 10,
    autocast: Autocast | None = None,
    checkpointing: bool = False,
    seed: Seed = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    checkpoint: Callable[[SinkhornState], None] | None = None,
    resume_from: SinkhornState | None = None,
) -> SinkhornResult:
    """Learn a permutation of B through doubly stochastic matrices, over the spec's structure.

    The start is a candidate like any other, so on the held-out batches the result is never worse than it. Losses are
    told minus the mean of A's and B's on the same batches. Models run in eval mode and are left as they were.

    Args:
        spec: the architecture's symmetries.
        model_a, model_b: the endpoints, of one architecture.
        objective: what good means; see `rebasin.objectives`. A function (model, batch) -> loss will do.
        batches: of the objective; they are gone through in a random order, again and again.
        heldout: more of them, by which the best permutation is chosen. Default: the last fifth of `batches`.
        init: where it starts, see `straight_through`. At the default `tau` a soft permutation remembers little of it.
        cost: what descends: the "weights"' distance, the loss at the "midpoint", or anywhere on the "line".
        steps: gradient steps.
        lr: of AdamW.
        tau: the temperature: the lower, the harder.
        iterations: of rows and columns in turns.
        noise: the standard deviation of what is added to the start.
        decay: AdamW's, of X.
        evaluate_every: steps between looks at the hard permutation; the last step always has one.
        autocast: "bf16" computes losses and gradients in bfloat16 where torch deems that safe.
        checkpointing: keep only the activations between blocks, for a third more time.
        seed: of the noise, of lambda, and of the order of the batches.
        device: where to compute; default: where `model_a` is.
        progress: called after each step with stage, step, total, objective (the best so far on the held-out batches),
            loss, heldout (None if not scored), moved, seconds, and the best permutation so far as `permutation`.
        checkpoint: called after the start and each step with a `SinkhornState` that can be saved.
        resume_from: such a state; the end is that of the uninterrupted search.

    Raises:
        SpecMismatchError, CheckpointError: models, spec and initial permutation do not go together.
        ConfigError: an option, or the state to continue from, does not fit, or the search diverged.
        DataError: there are no batches, or a loss is not a finite number.
    """
    given, began = dict(locals()), perf_counter()
    learn, select = split(batches, heldout)
    where = device_of(model_a) if device is None else find_device(device)
    ends = Ends(spec, model_a, model_b, objective, where, autocast)
    options: dict[str, str] = {}
    if checkpoint is not None or resume_from is not None:
        options = fingerprint(ends, objective, [list(learn), list(select)], given)
    last = SinkhornState(options) if resume_from is None else resume_from
    last.require(options)
    began -= last.seconds

    with ends.ready(checkpointing):
        seen = BestSeen(ends, select, steps, began, progress, last.seen, stage="Sinkhorn re-basin")
        draw = Draws(ends, learn, 1, seed, last.draws)
        start = seen.now.best
        if last.seen is None:
            with seen.clock("start"):
                start = start_of(init, seen.score, spec, model_a, model_b, objective, learn, seed, where)
            seen.start(start)
        soft = SoftMember(spec, start, ends.b, tau, iterations, noise, decay, seed, where)
        soft.learned.restore(last.learned)
        fixed, count = ends.midpoint(spec.identity()), sum(ends.b[name].numel() for name in ends.free)

        def between(share: float) -> dict[str, Tensor]:
            """(1 - share) A + share S(X)(B), all tensors of the model."""
            with torch.no_grad():
                moved = dict(soft.moved(soft.matrices()))
            return {
                name: interpolate_tensor(name, ends.a[name], moved.get(name, ends.b.get(name, half)), share)
                for name, half in fixed.items()
            }

        for step in range(len(seen.now.history), steps + 1):  # step 0 is the start
            loss, norm, pi = None, None, seen.now.scored
            if step > 0:
                with seen.clock("gradient"):
                    if cost == "weights":
                        apart = {
                            name: t - ends.a[name] for name, t in between(1).items() if name in ends.free
                        }
                        loss = float(sum(t.square().sum() for t in apart.values())) / count
                        slopes = {name: 2 * t / count for name, t in apart.items()}
                    else:
                        share = 0.5 if cost == "midpoint" else _lambda(seed, step)
                        loss, found = ends.gradient(between(share), next(draw), by=ends.free)
                        loss, slopes = loss - draw.endpoints_mean(), {n: share * t for n, t in found.items()}
                    norm = soft.descend(slopes, lr)
            due = step > 0 and (step % evaluate_every == 0 or step == steps)
            if due:
                with seen.clock("projection"):
                    pi = soft.permutation()
            moved = moved_between(seen.now.scored, pi)
            seen.step("step" if step else "start", pi, due, loss, moved, norm)
            if checkpoint is not None:
                kept = seen.now, soft.learned.tensors, draw.made, perf_counter() - began
                checkpoint(SinkhornState(options, *kept))
        certain = {cell: float(m.max(-1).values.mean()) for cell, m in soft.matrices().items()}

    now = seen.now
    pair = Endpoints(spec, ends.a, ends.b, device=where)
    before = pair.distance
    pair.set(now.best)
    return SinkhornResult(
        permutation=now.best,
        objective=now.objective,
        history=now.history,
        best_step=now.best_step,
        start_objective=now.first,
        initial_objective=now.naive,
        endpoints=now.endpoints,
        certainty=certain,
        distance_before=before,
        distance_after=pair.distance,
        seconds=perf_counter() - began,
        seconds_start=now.seconds["start"],
        seconds_gradient=now.seconds["gradient"],
        seconds_scoring=now.seconds["scoring"] + now.seconds["projection"],
    )


def _lambda(seed: int, step: int) -> float:
    return float(np.random.default_rng(mixed(seed, step)).uniform())
