"""STE-MM: the straight-through estimator for many models, which follows the loss of their mean.

Ito, Yamada and Kumagai, "Linear Mode Connectivity between Multiple Models modulo Permutation Symmetries" (ICML
2025, PMLR 267). For two models see straight_through.py. The first model stays; every other one has auxiliary
weights w_i, and pi_i(theta_i) is the permutation of theta_i that lies closest to them:

    w_i <- theta_1
    repeat
        pi_i <- the permutation that maximises <w_i, pi_i(theta_i)>       weight matching, from the last pi_i
        theta <- sum_i l_i pi_i(theta_i)                                  l random, or the weights of the merge
        w_i  <- w_i - lr l_i dL/dtheta,  L = loss(theta) on a batch

What differs from the authors' code: the best permutations are those of the best mean on batches that give no
gradients, and the start is a candidate like any other; models run in eval mode; only what the spec moves has
auxiliary weights. With l fixed and alike all w_i are the same, so there is one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...arguments import Count, Momentum, NonNegative, Seed, typed
from ...errors import DataError
from ...objectives import LossFunction, Objective
from ...spec import Permutation, PermutationSpec
from ...tensors.modules import device_of, find_device, loaded
from ...types import Progress, tell
from ..result import moved_between
from ..straight_through.auxiliary import Auxiliary, Schedule, rate_of
from ..straight_through.best_seen import SETTLED
from ..straight_through.draws import split
from ..straight_through.midpoint import Autocast, Ends
from ..weights.projection import Projector
from .ends import conclude, first_distance, start_of
from .mean import match_to_mean
from .models import Models, Source, mean_of
from .pivot import match_to_pivot
from .result import ManyResult, Pass, Step

Init = Literal["identity", "pivot", "mean"] | Sequence[Permutation]
Lambdas = Literal["random", "fixed"]


@typed
def straight_through_many(
    spec: PermutationSpec,
    states: Sequence[Source],
    model: nn.Module,
    objective: Objective | LossFunction,
    batches: Sequence[Any],
    *,
    heldout: Sequence[Any] | None = None,
    weights: Sequence[float] | None = None,
    init: Init = "pivot",
    steps: Count = 200,
    lr: NonNegative = 1e-3,
    momentum: Momentum = 0.9,
    schedule: Schedule = "cosine",
    lambdas: Lambdas = "random",
    project_every: Count = 1,
    projection_sweeps: Count = 100,
    evaluate_every: Count = 5,
    autocast: Autocast | None = None,
    checkpointing: bool = False,
    seed: Seed = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> ManyResult:
    """Bring N models to each other by the loss of their mean, and average them.

    All models are in memory (on `device`), and with `lambdas` "random" their auxiliary weights with two moments
    each, too. The result is the best mean on the held-out batches, the start included.

    Args:
        spec, states, weights, seed, progress: see `merge_many`.
        model: the architecture; its weights are left as they are.
        objective, batches, heldout, autocast, checkpointing, device: see `straight_through`.
        init: where the search starts: "identity", "pivot" (each matched to the first: where the first projection
            of the authors' code ends), "mean" (MergeMany), or a permutation for each model.
        steps: gradient steps, of Adam.
        lr, momentum, schedule: of Adam; `momentum` is its first beta, and "cosine" ends at 0.
        lambdas: the point whose gradient is taken: "random" in the simplex of the models (the authors' default),
            which asks for low losses between all of them, or "fixed", the mean itself.
        project_every, projection_sweeps, evaluate_every: as for `straight_through`.

    Raises:
        SpecMismatchError, CheckpointError: see `match_to_mean`.
        ConfigError: an option has an impossible value, or the search diverged.
        DataError: there are no batches, or a loss is not a finite number.
    """
    models = Models(spec, states, weights)
    n = len(models)
    batches, heldout = split(batches, heldout)
    where = device_of(model) if device is None else find_device(device)
    permutations = list(start_of(init, models, seed, {"pivot": match_to_pivot, "mean": match_to_mean}))
    history = [Pass(0, first_distance(models))]
    first = loaded(model, models.open(0))
    alike = lambdas == "fixed" and len(set(models.weights)) == 1
    search = _Search(models, Ends(spec, first, first, objective, where, autocast), alike, lr, momentum)
    rng = np.random.default_rng(seed)

    with search.ends.ready(checkpointing):
        best, score = list(permutations), search.score(permutations, heldout)
        naive = search.score([spec.identity()] * n, heldout)
        members = [search.ends.evaluate({**search.ends.a, **own}, heldout) for own in search.tensors]
        if not math.isfinite(sum(members) + score):
            raise DataError(
                "The losses of the models and their mean on the held-out batches must be finite numbers."
            )
        start, best_step, scored = score, 0, list(permutations)
        order: list[int] = []
        for step in range(1, steps + 1) if n > 1 else ():
            started = perf_counter()
            order = order or rng.permutation(len(batches)).tolist()
            shares = rng.random(n) if lambdas == "random" else np.asarray(models.weights)
            batch = batches[order.pop()]
            loss = search.descend(
                permutations, shares / shares.sum(), batch, rate_of(schedule, lr, step, steps)
            )
            moves: list[Step] = []
            if step % project_every == 0 or step == steps:
                for i in range(1, n):
                    clock = perf_counter()
                    new = search.project(i, permutations[i], projection_sweeps, seed + step * n + i)
                    moves.append(Step(i, moved_between(permutations[i], new), perf_counter() - clock))
                    permutations[i] = new
            if (step % evaluate_every == 0 or step == steps) and scored != permutations:
                now, scored = search.score(permutations, heldout), list(permutations)
                if now < score:  # never true of a loss that is not a number
                    best, score, best_step = list(permutations), now, step
            moved = sum(move.moved for move in moves)
            history.append(Pass(step, math.nan, moved, tuple(moves), perf_counter() - started))
            told = {"objective": score, "loss": loss, "moved": moved, "seconds": models.seconds}
            tell(progress, "straight-through", step, steps, **told)

    average = float(np.dot(members, models.shares))
    details: dict[str, Any] = {"loss": score, "start_loss": start, "naive_loss": naive}
    details |= {"members_loss": average, "best_step": best_step, "lambdas": lambdas}
    history.append(Pass(len(history), math.nan))
    converged = n == 1 or best_step <= (1 - SETTLED) * steps
    return conclude("straight_through", models, best, history, converged=converged, details=details)


def _computable(tensor: Tensor) -> Tensor:
    """In the eight-bit floats nothing is computed."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


class _Search:
    """The models on the device, and the auxiliary weights of all but the first."""

    def __init__(self, models: Models, ends: Ends, alike: bool, lr: float, momentum: float) -> None:
        self.models, self.ends = models, ends
        self.tensors = [
            {name: _computable(models.open(i)[name].detach()).to(ends.device) for name in ends.b}
            for i in range(len(models))
        ]
        count = 1 if alike else max(1, len(models) - 1)
        self.auxiliary = [Auxiliary(ends, "adam", lr, momentum) for _ in range(count)]
        self._onto = [
            Projector(ends.spec, {name: own[name] for name in ends.moved}, ends.device)
            for own in self.tensors
        ]

    def mean(self, permutations: Sequence[Permutation], shares: Sequence[float]) -> dict[str, Tensor]:
        """The models' weighted mean; integers, and what is not saved with a model, are the first's."""
        found = dict(self.ends.a)
        for name, first in self.tensors[0].items():
            if first.is_floating_point():
                brought = (
                    p.apply_to(name, own[name]) for p, own in zip(permutations, self.tensors, strict=True)
                )
                found[name] = mean_of(brought, shares).to(self.ends.a[name].dtype)
        return found

    def score(self, permutations: Sequence[Permutation], batches: Sequence[Any]) -> float:
        return self.ends.evaluate(self.mean(permutations, self.models.shares), batches)

    def descend(
        self, permutations: Sequence[Permutation], shares: np.ndarray, batch: Any, rate: float
    ) -> float:
        """One step of all auxiliary weights against the gradient; returns the loss before it."""
        loss, slope = self.ends.gradient(self.mean(permutations, shares.tolist()), [batch])
        for own, share in zip(self.auxiliary, shares[1:], strict=False):
            own.descend(dict(slope), float(share), rate)
        return loss

    def project(self, i: int, permutation: Permutation, sweeps: int, seed: int) -> Permutation:
        """Weight matching of model i to its auxiliary weights, from `permutation`."""
        own = self.auxiliary[i - 1 if len(self.auxiliary) > 1 else 0]
        return own.project(self._onto[i], permutation, sweeps, seed).permutation
