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

import math
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ConfigError, DataError
from ...objectives import Objective
from ...spec import Permutation, PermutationSpec
from ...types import Progress
from ..result import MatchResult
from ..weights.endpoints import Pair
from ..weights.matching import weight_matching
from .best_seen import BestSeen
from .loss_descent import descend
from .midpoint import Autocast, Ends
from .result import StraightThroughResult
from .starts import Start, start_from

Optimizer = Literal["sgd", "adam"]
Schedule = Literal["constant", "cosine"]
Represents = Literal["b_endpoint", "midpoint"]
Projection = Literal["inner_product", "l2"]

SETTLED = 0.2
"""A search that found nothing better in this last share of its steps is called converged."""


def straight_through(
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    objective: Objective,
    batches: Sequence[Any],
    *,
    heldout: Sequence[Any] | None = None,
    init: Start = "weight_matching",
    steps: int = 200,
    optimizer: Optimizer = "adam",
    lr: float = 2e-3,
    momentum: float = 0.9,
    schedule: Schedule = "cosine",
    project_every: int = 1,
    projection_sweeps: int = 100,
    represents: Represents = "b_endpoint",
    projection: Projection = "inner_product",
    clip: float | None = None,
    accumulate: int = 1,
    evaluate_every: int = 1,
    refine: int = 0,
    autocast: Autocast | None = None,
    checkpointing: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> StraightThroughResult:
    """Find the permutation that brings B to A by the loss at their midpoint.

    The start is a candidate like any other, so on the held-out batches the result is never worse than it.
    Losses are told minus the mean of A's and B's on the same batches, as in the paper. Models run in eval
    mode (BatchNorm with the midpoint of the running statistics) and are left as they were.

    Args:
        spec: the architecture's symmetries.
        model_a, model_b: the endpoints, of one architecture.
        objective: what good means; see `rebasin.objectives`.
        batches: of the objective; they are gone through in a random order, again and again.
        heldout: more of them, by which the best permutation is chosen. Default: the last fifth of `batches`,
            which then gives no gradients (a single batch has to do for both). Data that results are reported
            on belongs in neither.
        init: where the search starts: "identity", "weight_matching", "activation_then_weight" (by the
            activations on `batches`, then by the weights), "best" (the best of these on the held-out batches),
            or a permutation.
        steps: gradient steps. The paper makes 12,500 and more.
        optimizer, lr, momentum, schedule: of the auxiliary weights. The paper has SGD, 1e-2, 0.9 and a
            constant rate; `momentum` is Adam's first beta, too. "cosine" ends at 0.
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

    Raises:
        SpecMismatchError, CheckpointError: models, spec and initial permutation do not go together.
        ConfigError: an option has an impossible value, or the search diverged.
        DataError: there are no batches, or a loss is not a finite number.
    """
    began = perf_counter()
    _check_choices(optimizer=(optimizer, Optimizer), schedule=(schedule, Schedule))
    _check_choices(represents=(represents, Represents), projection=(projection, Projection))
    _check_choices(autocast=(autocast, Autocast))
    _check_range(1, steps=steps, project_every=project_every, projection_sweeps=projection_sweeps)
    _check_range(1, accumulate=accumulate, evaluate_every=evaluate_every)
    _check_range(0, lr=lr, clip=clip, refine=refine)
    _check_range(0, 0.9999, momentum=momentum)
    learn, select = _split(batches) if heldout is None else (batches, heldout)
    if not learn or not select:
        raise DataError(
            "The straight-through estimator needs at least one batch to learn from and one to select by."
        )
    where = torch.device(next(model_a.parameters()).device if device is None else device)
    ends = Ends(spec, model_a, model_b, objective, where, autocast)
    share = 0.5 if represents == "b_endpoint" else 1.0  # of the midpoint's gradient that belongs to w
    nearest = represents == "midpoint" and projection == "l2"

    with ends.ready(checkpointing):
        seen = BestSeen(ends, select, steps + refine, progress)
        with seen.clock("start"):
            permutation = start_from(
                init, spec, model_a, model_b, objective, batches, seed, where, seen.score
            )
        seen.start(permutation)
        midpoint = ends.midpoint(permutation)
        auxiliary = _Auxiliary(ends, optimizer, lr, momentum)
        draw = _Draws(ends, learn, accumulate, seed)
        sweeps = 0

        for step in range(steps + 1):  # step 0: w = A, and pi(B) is what lies nearest to it
            train = norm = None
            moved = 0
            if step > 0:
                chosen = next(draw)
                with seen.clock("gradient"):
                    loss, slope = ends.gradient(midpoint, chosen)
                    norm = auxiliary.descend(slope, share, _rate(schedule, lr, step, steps), clip)
                train = loss - draw.endpoints_mean()
            if step % project_every == 0 or step == steps:
                with seen.clock("projection"):
                    match = auxiliary.project(permutation, nearest, projection_sweeps, _mixed(seed, step))
                    sweeps += match.sweeps
                    moved = _differences(match.permutation, permutation)
                    if moved:
                        permutation = match.permutation
                        midpoint = ends.midpoint(permutation)
            due = step - seen.scored_at >= evaluate_every or step in (0, steps)
            seen.step("step" if step else "start", permutation, due, train, moved, norm)

        for made in descend(ends, seen.best, draw, refine, _mixed(seed, steps + 1)):
            for part, seconds in made.seconds.items():
                seen.seconds[part] += seconds
            seen.step("pass", made.permutation, True, made.after - draw.endpoints_mean(), made.moved)

    pair = Pair(spec, ends.a, ends.b, device=where)
    before = pair.distance
    pair.set(seen.best)
    return StraightThroughResult(
        permutation=seen.best,
        objective=seen.objective,
        history=tuple(seen.history),
        converged=seen.best_step <= (1 - SETTLED) * (len(seen.history) - 1),
        seconds=perf_counter() - began,
        best_step=seen.best_step,
        start_objective=seen.first,
        initial_objective=seen.naive,
        endpoints=seen.endpoints,
        distance_before=before,
        distance_after=pair.distance,
        sweeps=sweeps,
        **{f"seconds_{part}": seconds for part, seconds in seen.seconds.items()},
    )


class _Auxiliary:
    """The auxiliary weights w of what the spec moves: how they descend, and which pi(B) lies closest."""

    def __init__(self, ends: Ends, optimizer: Optimizer, lr: float, momentum: float) -> None:
        self.ends = ends
        self.weights = {name: nn.Parameter(_wide(ends.a[name])) for name in ends.free}
        # One for each tensor, so that a large model's widened gradient need not be held as a whole.
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            name: torch.optim.SGD([weight], lr, momentum)
            if optimizer == "sgd"
            else torch.optim.Adam([weight], lr, (momentum, 0.999))
            for name, weight in self.weights.items()
        }

    def descend(self, slope: dict[str, Tensor], share: float, rate: float, clip: float | None) -> float:
        """One step against the gradient, which is that of the midpoint times `share`; returns its norm.

        The gradients are taken out of `slope` one by one.
        """
        squares = (
            float(part.to(torch.promote_types(part.dtype, torch.float32)).square().sum())
            for part in slope.values()
        )
        norm = share * math.sqrt(math.fsum(squares))
        if not math.isfinite(norm):
            raise ConfigError(
                "The gradient of the objective at the midpoint is not finite: compute in float32 or bfloat16,"
                " or lower lr."
            )
        scale = share if clip is None else share * min(1.0, clip / (norm + 1e-6))
        for name, weight in self.weights.items():
            optimizer = self.optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = rate
            weight.grad = slope.pop(name).to(weight.dtype) * scale
            optimizer.step()
            weight.grad = None
        return norm

    def project(self, permutation: Permutation, nearest: bool, sweeps: int, seed: int) -> MatchResult:
        """Weight matching of B to w, from `permutation`; `nearest`: of the midpoint with A to w."""
        ends = self.ends
        target = {name: weight.detach() for name, weight in self.weights.items()}
        if nearest:
            # |w - (A + pi(B)) / 2| is smallest where <2w - A, pi(B)> is largest: |pi(B)| is |B| for every pi.
            target = {name: 2 * weight - ends.a[name] for name, weight in target.items()}
        return weight_matching(
            permutation.spec,
            {name: target.get(name, ends.a[name]) for name in ends.moved},
            {name: ends.b[name] for name in ends.moved},
            init=permutation,
            max_sweeps=sweeps,
            seed=seed,
            device=ends.device,
        )


class _Draws:
    """Lists of `count` batches, all batches in a random order, then in another one, and so on."""

    def __init__(self, ends: Ends, batches: Sequence[Any], count: int, seed: int) -> None:
        self._ends, self._batches, self._count = ends, batches, count
        self._numbers = _endless(len(batches), seed)
        self._means: dict[int, float] = {}
        self._drawn: list[int] = []

    def __iter__(self) -> Iterator[Sequence[Any]]:
        return self

    def __next__(self) -> Sequence[Any]:
        self._drawn = [next(self._numbers) for _ in range(self._count)]
        return [self._batches[number] for number in self._drawn]

    def endpoints_mean(self) -> float:
        """The mean of A's and B's losses on what was drawn last; each batch is evaluated once."""
        for number in self._drawn:
            if number not in self._means:
                self._means[number] = sum(self._ends.endpoints([self._batches[number]])) / 2
        return sum(self._means[number] for number in self._drawn) / self._count


def _split(batches: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Batches to learn from and, the last fifth, to select by."""
    last = max(1, len(batches) // 5)
    return (batches[:-last], batches[-last:]) if len(batches) > 1 else (batches, batches)


def _endless(count: int, seed: int) -> Iterator[int]:
    """All numbers below `count` in a random order, then in another one, and so on."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permutation(count).tolist()


def _rate(schedule: Schedule, lr: float, step: int, steps: int) -> float:
    return lr if schedule == "constant" else lr * (1 + math.cos(math.pi * (step - 1) / steps)) / 2


def _wide(tensor: Tensor) -> Tensor:
    """A copy in at least float32: small steps would be lost in a narrower type."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def _differences(new: Permutation, old: Permutation) -> int:
    """The number of neurons that the two put in different places."""
    return sum(int(np.count_nonzero(index != old.index[name])) for name, index in new.index.items())


def _mixed(seed: int, step: int) -> int:
    """A seed of its own for each step."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def _check_choices(**given: tuple[str | None, Any]) -> None:
    for name, (value, kind) in given.items():
        if value is not None and value not in get_args(kind):
            raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(get_args(kind))}.")


def _check_range(low: float, high: float = math.inf, **given: float | None) -> None:
    for name, value in given.items():
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            most = f" and at most {high}" if high < math.inf else ""
            raise ConfigError(f"{name} is {value}, but it must be at least {low}{most}.")
