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
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ConfigError, DataError, SpecMismatchError
from ...modules import loaded
from ...objectives import Objective
from ...spec import Permutation, PermutationSpec
from ...types import Progress, tell, widened
from ..straight_through.midpoint import Autocast, Ends
from ..weights.matching import weight_matching
from .mean import match_to_mean
from .models import Models, Source
from .pivot import match_to_pivot
from .result import ManyResult, Pass, Step, moved_between
from .running_mean import RunningMean

Init = Literal["identity", "pivot", "mean"] | Sequence[Permutation]
Lambdas = Literal["random", "fixed"]
SETTLED = 0.2
"""A search that found nothing better in this last share of its steps is called converged."""


def straight_through_many(
    spec: PermutationSpec,
    states: Sequence[Source],
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Any],
    *,
    heldout: Sequence[Any] | None = None,
    weights: Sequence[float] | None = None,
    init: Init = "pivot",
    steps: int = 200,
    lr: float = 1e-3,
    momentum: float = 0.9,
    schedule: Literal["constant", "cosine"] = "cosine",
    lambdas: Lambdas = "random",
    project_every: int = 1,
    projection_sweeps: int = 100,
    evaluate_every: int = 5,
    autocast: Autocast | None = None,
    checkpointing: bool = False,
    seed: int = 0,
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
    began = perf_counter()
    if (
        min(steps, project_every, projection_sweeps, evaluate_every) < 1
        or not lr > 0
        or not 0 <= momentum < 1
    ):
        raise ConfigError(
            "The straight-through estimator needs steps, project_every, projection_sweeps and evaluate_every of at"
            " least 1, a positive lr, and a momentum from 0 to below 1."
        )
    if lambdas not in ("random", "fixed") or schedule not in ("constant", "cosine"):
        raise ConfigError("lambdas is 'random' or 'fixed', and schedule 'constant' or 'cosine'.")
    models = Models(spec, states, weights)
    n = len(models)
    batches = list(batches)
    last = max(1, len(batches) // 5)
    if heldout is None:
        heldout, batches = batches[-last:], batches[:-last] or batches
    if not batches or not heldout:
        raise DataError(
            "The straight-through estimator needs at least one batch to learn from and one to select by."
        )
    where = torch.device(next(model.parameters()).device if device is None else device)
    permutations = _start(init, models, seed)
    mean = RunningMean(models)
    mean.gather_first()
    before = mean.distance
    del mean
    search = _Search(models, model, objective, where, autocast, lambdas, lr, momentum)
    rng = np.random.default_rng(seed)
    history: list[Pass] = []

    with search.ends.ready(checkpointing):
        best, score = list(permutations), search.score(permutations, heldout)
        naive = search.score([spec.identity()] * n, heldout)
        members = [search.score_of(i, heldout) for i in range(n)]
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
            rate = lr if schedule == "constant" else lr * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
            loss = search.descend(permutations, shares / shares.sum(), [batches[order.pop()]], rate)
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
            told = {"objective": score, "loss": loss, "moved": moved, "seconds": perf_counter() - began}
            tell(progress, "straight-through", step, steps, **told)

    mean = RunningMean(models)
    mean.gather(best)
    average = float(np.dot(members, models.shares))
    details = {"loss": score, "start_loss": start, "naive_loss": naive, "members_loss": average}
    details |= {"best_step": best_step, "lambdas": lambdas}
    distance, objective_value = mean.distance, mean.objective
    return ManyResult(
        method="straight_through",
        permutations=tuple(best),
        merged=models.average(best),
        objective=objective_value,
        distance=distance,
        distance_before=before,
        history=(Pass(0, before), *history, Pass(len(history) + 1, distance)),
        converged=n == 1 or best_step <= (1 - SETTLED) * steps,
        moved=sum(p.moved() for p in best),
        weights=models.shares,
        seconds=perf_counter() - began,
        details=details,
    )


class _Search:
    """The models on the device, and the auxiliary weights."""

    def __init__(
        self,
        models: Models,
        model: nn.Module,
        objective: Objective,
        device: torch.device,
        autocast: Autocast | None,
        lambdas: Lambdas,
        lr: float,
        momentum: float,
    ) -> None:
        first = loaded(model, models.open(0))
        self.models, self.device = models, device
        self.ends = Ends(models.spec, first, first, objective, device, autocast)
        self.tensors = [
            {name: models.open(i)[name].detach().to(device) for name in self.ends.b}
            for i in range(len(models))
        ]
        alike = lambdas == "fixed" and len(set(models.weights)) == 1
        count = 1 if alike else max(len(models) - 1, 1)
        self.auxiliary = [
            {name: nn.Parameter(_wide(self.ends.a[name])) for name in self.ends.free} for _ in range(count)
        ]
        weights = [w for own in self.auxiliary for w in own.values()]
        self.optimizer = torch.optim.Adam(weights, lr, (momentum, 0.999))

    def mean(self, permutations: Sequence[Permutation], shares: Sequence[float]) -> dict[str, Tensor]:
        """The models' weighted mean; integers, and what is not saved with a model, are the first's."""
        found = dict(self.ends.a)
        for name in self.ends.b:
            first = self.tensors[0][name]
            if not first.is_floating_point():
                continue
            total = 0.0
            mean = permutations[0].apply_to(name, first).to(widened(first.dtype), copy=True)
            for i, share in enumerate(shares):
                total += share
                if i:
                    tensor = permutations[i].apply_to(name, self.tensors[i][name])
                    mean.lerp_(tensor.to(mean.dtype), share / total)
            found[name] = mean.to(self.ends.a[name].dtype)
        return found

    def score(self, permutations: Sequence[Permutation], batches: Sequence[Any]) -> float:
        return self.ends.evaluate(self.mean(permutations, self.models.shares), batches)

    def score_of(self, i: int, batches: Sequence[Any]) -> float:
        return self.ends.evaluate({**self.ends.a, **self.tensors[i]}, batches)

    def descend(
        self, permutations: Sequence[Permutation], shares: np.ndarray, batches: Sequence[Any], rate: float
    ) -> float:
        """One step of all auxiliary weights against the gradient; returns the loss before it."""
        loss, slope = self.ends.gradient(self.mean(permutations, shares.tolist()), batches)
        if not all(bool(torch.isfinite(s).all()) for s in slope.values()):
            raise ConfigError(
                "The gradient of the objective at the mean is not finite: compute in float32 or bfloat16, or lower lr."
            )
        for k, own in enumerate(self.auxiliary):
            for name, weight in own.items():
                weight.grad = slope[name].to(weight.dtype) * float(shares[k + 1 if len(shares) > 1 else 0])
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def project(self, i: int, permutation: Permutation, sweeps: int, seed: int) -> Permutation:
        """Weight matching of model i to its auxiliary weights, from `permutation`."""
        own = self.auxiliary[i - 1 if len(self.auxiliary) > 1 else 0]
        target: Mapping[str, Tensor] = {name: weight.detach() for name, weight in own.items()}
        return weight_matching(
            permutation.spec,
            {name: target.get(name, self.ends.a[name]) for name in self.ends.moved},
            {name: self.tensors[i][name] for name in self.ends.moved},
            init=permutation,
            max_sweeps=sweeps,
            seed=seed,
            device=self.device,
        ).permutation


def _start(init: Init, models: Models, seed: int) -> list[Permutation]:
    spec, n = models.spec, len(models)
    if isinstance(init, str):
        if init == "identity":
            return [spec.identity()] * n
        if init in ("pivot", "mean"):
            match = match_to_pivot if init == "pivot" else match_to_mean
            return list(match(spec, models.sources, weights=models.weights, seed=seed).permutations)
        raise ConfigError(f"The init {init!r} is unknown: give 'identity', 'pivot', 'mean' or permutations.")
    given = list(init)
    if len(given) != n or not all(spec.contains(p) for p in given):
        raise SpecMismatchError(f"The start needs one permutation of this spec for each of the {n} models.")
    back = given[0].invert()
    return [back.compose(p) for p in given]


def _wide(tensor: Tensor) -> Tensor:
    """A copy in at least float32: small steps would be lost in a narrower type."""
    return tensor.to(widened(tensor.dtype), copy=True)
