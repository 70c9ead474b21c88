"""The straight-through estimator: the permutation of B whose midpoint with A has a small loss.

Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries" (2022), section
3.3, algorithm 2. The loss at 1/2 (A + pi(B)) can't be followed downhill in pi, which is discrete. So there
are auxiliary weights w, and pi(B) is the permutation of B that lies closest to them:

    w <- A
    repeat
        pi <- the permutation that maximises <w, pi(B)>              weight matching, from the last pi
        w  <- w - lr dL/dw,  L = loss(1/2 (A + pi(B))) on a batch    as if pi(B) were w: dL/dw = 1/2 L'

What differs from the paper's code: the best permutation is the best on batches that give no gradients, and it
is a copy (there it is the last one, whatever was meant); it may project only every few steps; only what the
spec moves has auxiliary weights, since nothing else can change pi.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn

from ...arguments import Count, Momentum, NonNegative, NonNegativeInt, Seed, typed
from ...objectives import LossFunction, Objective
from ...spec import PermutationSpec
from ...tensors.modules import device_of, find_device
from ...types import Progress
from ..candidates import Comparison, Start, candidate, candidates
from ..result import moved_between
from ..weights.endpoints import Endpoints
from ..weights.projection import Projector
from .auxiliary import Auxiliary, Optimizer, Schedule, rate_of
from .best_seen import SETTLED, BestSeen
from .draws import Draws, mixed, split
from .loss_descent import descend
from .midpoint import Autocast, Ends
from .result import StraightThroughResult
from .state import StraightThroughState, fingerprint

Represents = Literal["b_endpoint", "midpoint"]
Projection = Literal["inner_product", "l2"]


@typed
def straight_through(
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    objective: Objective | LossFunction,
    batches: Sequence[Any],
    *,
    heldout: Sequence[Any] | None = None,
    init: Start = "best",
    steps: Count = 100,
    optimizer: Optimizer = "adam",
    lr: NonNegative = 2e-3,
    momentum: Momentum = 0.9,
    schedule: Schedule = "constant",
    project_every: Count = 1,
    projection_sweeps: Count = 100,
    represents: Represents = "b_endpoint",
    projection: Projection = "inner_product",
    clip: NonNegative | None = None,
    accumulate: Count = 1,
    evaluate_every: Count = 4,
    refine: NonNegativeInt = 12,
    autocast: Autocast | None = None,
    checkpointing: bool = False,
    seed: Seed = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    checkpoint: Callable[[StraightThroughState], None] | None = None,
    resume_from: StraightThroughState | None = None,
) -> StraightThroughResult:
    """Find the permutation that brings B to A by the loss at their midpoint.

    The start is a candidate like any other, so on the held-out batches the result is never worse than it.
    Losses are told minus the mean of A's and B's on the same batches, as in the paper. Models run in eval
    mode (BatchNorm with the midpoint of the running statistics) and are left as they were.

    Args:
        spec: the architecture's symmetries.
        model_a, model_b: the endpoints, of one architecture.
        objective: what good means; see `rebasin.objectives`. A function (model, batch) -> loss will do.
        batches: of the objective; they are gone through in a random order, again and again.
        heldout: more of them, by which the best permutation is chosen. Default: the last fifth of `batches`,
            which then gives no gradients (a single batch has to do for both). Data that results are reported
            on belongs in neither.
        init: where the search starts: "identity", "weight_matching", "activation_matching" (by the activations on
            the batches that give gradients), "activation_covariance" (by another statistic), "activation_outputs" (by
            what layers write), "output_covariance" (both), "activation_then_weight" (then by the weights),
            "activation_and_weight" (by both at once), "best" (the best of these on the held-out batches, see
            `auto_matching`), or a permutation.
        steps: gradient steps. The paper makes 12,500 and more.
        optimizer: of the auxiliary weights, "adam" or "sgd" (the paper: lr 1e-2, momentum 0.9).
        lr: its learning rate.
        momentum: of SGD, and Adam's first beta.
        schedule: of the learning rate: "constant" (the paper) or "cosine", which ends at 0.
        project_every: steps between projections; the paper projects at each.
        projection_sweeps: at most so many sweeps of weight matching in one.
        represents: what the auxiliary weights stand for: pi(B), or the midpoint, whose gradient they then
            have undivided.
        projection: how weights that stand for a midpoint are projected: by their inner product with pi(B), or
            "l2", to the nearest 1/2 (A + pi(B)). For those that stand for pi(B) the two are the same.
        clip: largest norm of a step's gradient.
        accumulate: batches that one step averages over.
        evaluate_every: a new permutation is scored on the held-out batches if so many steps have passed since
            the last one was. The last always is.
        refine: passes of `loss_descent.descend` over the groups at the end, from the best permutation on: slower
            steps that are verified before they are made. The paper has none.
        autocast: "bf16" computes losses and gradients in bfloat16 where torch deems that safe.
        checkpointing: keep only the activations between blocks, for a third more time.
        seed: of the order of the batches, and of the groups in each projection.
        device: where to compute; default: where `model_a` is.
        progress: called after each step and pass with stage, step, total, objective (the best so far on the
            held-out batches), loss, heldout (None if not scored), moved, seconds, seconds_projection,
            seconds_gradient (of this step), and the best permutation so far as `permutation`.
        checkpoint: called after each candidate for the start, step and pass with a `StraightThroughState` that can be
            saved; with two to three times the memory of what the spec moves it is large.
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
    share = 0.5 if represents == "b_endpoint" else 1.0  # of the midpoint's gradient that belongs to w
    nearest = represents == "midpoint" and projection == "l2"

    options: dict[str, str] = {}
    if checkpoint is not None or resume_from is not None:
        options = fingerprint(ends, objective, [list(learn), list(select)], given)
    last = StraightThroughState(options) if resume_from is None else resume_from
    last.require(options)
    began -= last.seconds

    with ends.ready(checkpointing):
        seen = BestSeen(ends, select, steps + refine, began, progress, last.seen)
        draw = Draws(ends, learn, accumulate, seed, last.draws)
        pi, sweeps, refined = last.permutation, last.sweeps, last.refined
        starts = Comparison(seen.score, last.candidates, last.tried)
        w = Auxiliary(ends, optimizer, lr, momentum)  # Initialize: w <- A
        w.restore(last.auxiliary)
        onto = Projector(spec, {name: ends.b[name] for name in ends.moved}, where)
        onto.restore(last.duals)

        def keep() -> None:
            if checkpoint is not None:
                ongoing = pi is not None and refined is None
                tensors, duals = (w.tensors, onto.tensors) if ongoing else ({}, {})
                kept = tuple(starts.found), tuple(starts.tried), seen.now, pi, tensors, duals, draw.made
                seconds = perf_counter() - began
                checkpoint(StraightThroughState(options, *kept, sweeps, refined, seconds))

        if pi is None:
            data = spec, model_a, model_b, objective, learn, seed, where
            for name in candidates(init)[len(starts.found) :]:
                with seen.clock("start"):
                    if init == "best":
                        starts.add(str(name), partial(candidate, name, *data), spec.identity())
                    else:
                        starts.found.append(candidate(name, *data))
                keep()
            pi = starts.found[starts.best]
            seen.start(pi)

        midpoint = ends.midpoint(pi)
        for step in range(len(seen.now.history), steps + 1):  # repeat; step 0 is a projection only
            train = norm = None
            moved = 0
            if step > 0:
                chosen = next(draw)
                with seen.clock("gradient"):
                    # Evaluate the loss of the midpoint, L(1/2 (A + pi(B))), and its gradient, in terms of w.
                    loss, slope = ends.gradient(midpoint, chosen)
                    # Update parameters: w <- w - lr dL/dw.
                    norm = w.descend(slope, share, rate_of(schedule, lr, step, steps), clip)
                train = loss - draw.endpoints_mean()
            if step % project_every == 0 or step == steps:
                with seen.clock("projection"):
                    # pi <- proj(w), using algorithm 1.
                    match = w.project(onto, pi, projection_sweeps, mixed(seed, step), nearest=nearest)
                    sweeps += match.sweeps
                    moved = moved_between(pi, match.permutation)
                    if moved:
                        pi = match.permutation
                        midpoint = ends.midpoint(pi)
            due = step - seen.now.scored_at >= evaluate_every or step in (0, steps)
            seen.step("step" if step else "start", pi, due, train, moved, norm)
            keep()

        for made in descend(ends, seen.now.best, draw, refine, mixed(seed, steps + 1), refined):
            refined = made
            seen.lap |= made.seconds
            seen.step("pass", made.permutation, True, made.after - draw.endpoints_mean(), made.moved)
            keep()

    now = seen.now
    pair = Endpoints(spec, ends.a, ends.b, device=where)
    before = pair.distance
    pair.set(now.best)
    return StraightThroughResult(
        permutation=now.best,
        objective=now.objective,
        history=now.history,
        converged=now.best_step <= (1 - SETTLED) * (len(now.history) - 1),
        seconds=perf_counter() - began,
        best_step=now.best_step,
        start_objective=now.first,
        initial_objective=now.naive,
        endpoints=now.endpoints,
        distance_before=before,
        distance_after=pair.distance,
        sweeps=sweeps,
        tried=tuple(starts.tried),
        **{f"seconds_{part}": seconds for part, seconds in now.seconds.items()},
    )
