"""C2M3: all neurons of all models are matched at once, by Frank and Wolfe's method.

Crisostomi, Fumero, Baieri, Bernard and Rodolà, "C2M3: Cycle-Consistent Multi-Model Merging" (NeurIPS 2024). Each
model i has one permutation, pi_i, to an arrangement that all share, so that going from model to model around a
circle leads back to where one began. The objective is that of all pairs,

    F = sum_(i<j) w_i w_j <pi_i(theta_i), pi_j(theta_j)>  =  1/2 (|S|^2 - sum_i w_i^2 |pi_i(theta_i)|^2),
    S = sum_i w_i pi_i(theta_i),

over matrices in the convex hull of the legal permutations:

    repeat
        G_i = dF / dP_i                                        for every cell of every model
        V_i = the legal permutation with the largest <G_i, V_i>     one assignment a group
        P_i <- (1 - t) P_i + t V_i,    t in [0, 1] with the largest F
    pi_i = the legal permutation nearest to P_i

What differs from the authors' code: F is written with the sum S, so that a step reads every model twice instead
of every pair, and needs three states in memory, not N; block structure (heads, GroupNorm) is respected; F is a
polynomial of t, whose maximum is found exactly; the first model stays where it is, since moving all alike changes
nothing and two models that change places with each other get nowhere. The relaxed matrices are dense: sum of n^2
floats over all cells, for each model. That is small for classifiers, but hundreds of megabytes a model for a
Stable Diffusion UNet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations_with_replacement
from math import fsum
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...arguments import Count, NonNegative, Seed, typed
from ...spec import Permutation, PermutationSpec, Site, to_array
from ...types import Progress, State, tell, widened
from ..assignment.blocks import assign_all
from ..weights.endpoints import inner
from .ends import conclude, start_of
from .mean import match_to_mean
from .models import Models, Source
from .pivot import match_to_pivot
from .result import ManyResult, Pass, Step
from .running_mean import RunningMean

Soft = Mapping[str, Tensor]
"""Cell name -> doubly stochastic matrix [size, size]: new = P @ old."""

Init = Literal["identity", "pivot"] | Sequence[Permutation]
PATIENCE = 5
"""Steps in a row that may gain next to nothing before the search ends (as in the authors' code)."""


@typed
def match_cycle_consistently(
    spec: PermutationSpec,
    states: Sequence[Source],
    *,
    weights: Sequence[float] | None = None,
    init: Init = "identity",
    max_steps: Count = 100,
    tolerance: NonNegative = 1e-6,
    polish: bool = False,
    seed: Seed = 0,
    progress: Progress | None = None,
) -> ManyResult:
    """Bring N models into one arrangement by maximising the inner products of all pairs at once, and average them.

    The first model stays as it is. The result is the best of the start and the end, so it is never worse than
    the start. Errors are those of `match_to_mean`.

    Args:
        spec, states, weights, progress: see `merge_many`.
        init: "identity" (the paper), "pivot" (each matched to the first by weight matching), or a permutation
            for each model, say those of another method.
        max_steps: give up then, with `converged=False`.
        tolerance: a step that gains a smaller share of the objective counts as none.
        polish: go on with MergeMany from the result, which ends where no single model can be improved.
        seed: of the matchings of "pivot" and `polish`; the method itself has no chance in it.
    """
    models = Models(spec, states, weights)
    n = len(models)
    mean = RunningMean(models)
    mean.gather_first()
    start = start_of(init, models, seed, {"pivot": match_to_pivot})
    if any(not p.is_identity for p in start):
        mean.gather(start)
    history, begin = [Pass(0, mean.distance)], mean.objective
    mean.tensors.clear()

    search = _Search(models, start)
    gains = 0
    for number in range(1, max_steps + 1) if n > 1 else ():
        started = perf_counter()
        length, gain = search.step()
        gains = 0 if gain > tolerance * abs(search.objective) else gains + 1
        told = {"length": length, "objective": search.objective, "seconds": models.seconds}
        tell(progress, "cycle-consistent", number, max_steps, **told)
        history.append(_pass(number, models, search.objective, perf_counter() - started))
        if gains >= PATIENCE or length == 0:
            break
    permutations = search.rounded()
    mean.gather(permutations)
    if mean.objective < begin:
        permutations = start
        mean.gather(permutations)
    converged = n == 1 or len(history) <= max_steps
    details = {"steps": len(history) - 1, "relaxed_objective": search.objective}
    measured: RunningMean | ManyResult = mean
    if polish:
        del search
        mean.tensors.clear()
        measured = match_to_mean(
            spec, states, weights=weights, init=permutations, seed=seed, progress=progress
        )
        permutations, converged = measured.permutations, measured.converged
        history += [replace(p, number=len(history) + p.number - 1) for p in measured.history[1:]]
    moved = sum(p.moved() for p in permutations)
    history.append(Pass(len(history), math.nan, moved, (Step(0, moved, 0.0),)))
    known: dict[str, Any] = {"converged": converged, "measured": measured, "details": details}
    return conclude("cycle_consistent", models, permutations, history, **known)


class _Search:
    """The relaxed matrices of every model, and S at the present ones."""

    def __init__(self, models: Models, start: Sequence[Permutation]) -> None:
        self.models, self.spec = models, models.spec
        self.names = [name for name in self.spec.axes if name not in self.spec.buffers]
        self.degree = max(len(self.spec.axes[name]) for name in self.names)
        self.soft: list[dict[str, Tensor]] = [_matrices(p) for p in start]
        self.total = self._sums([self.soft])[0][0]

    def step(self) -> tuple[float, float]:
        """One step of Frank and Wolfe: its length, and what the objective gained."""
        ends = [self.soft[0], *map(self._vertex, range(1, len(self.models)))]
        nodes = np.linspace(0, 1, self.degree + 1)
        sums, products = self._sums([self._between(ends, float(t)) for t in nodes])
        length, before, self.objective = _longest_step(nodes, products)
        shares = [_lagrange(nodes, k)(length) for k in range(len(nodes))]
        self.total = {
            name: torch.stack([s[name] for s in sums]).mul_(_column(shares, sums[0][name])).sum(0)
            for name in self.names
        }
        self.soft = self._between(ends, length)
        return length, self.objective - before

    def rounded(self) -> list[Permutation]:
        """The nearest legal permutations."""
        return [assign_all(self.spec, soft) for soft in self.soft]

    objective = 0.0

    def _between(self, ends: Sequence[Soft], t: float) -> list[dict[str, Tensor]]:
        if t in (0, 1):
            return [dict(soft) for soft in (ends if t else self.soft)]
        return [
            {cell: p if p is v[cell] else torch.lerp(p, v[cell], t) for cell, p in soft.items()}
            for soft, v in zip(self.soft, ends, strict=True)
        ]

    def _vertex(self, i: int) -> dict[str, Tensor]:
        """The legal permutation of model i to which the gradient points."""
        state, weight = self.models.open(i), self.models.weights[i]
        slopes = {c: torch.zeros(cell.size, cell.size) for c, cell in self.spec.cells.items()}
        for name in self.names:
            own = _read(state, self.models.keys[name])
            others = self.total[name] - weight * _applied(self.spec, self.soft[i], name, own)
            for axis, sites in self.spec.axes[name].items():
                part = _applied(self.spec, self.soft[i], name, own, skip=axis)
                for cell, site in sites:
                    slopes[cell].addmm_(_rows(others, axis, site), _rows(part, axis, site).T)
        return _matrices(assign_all(self.spec, slopes))

    def _sums(self, softs: Sequence[Sequence[Soft]]) -> tuple[list[dict[str, Tensor]], np.ndarray]:
        """S for each list of matrices, and 2 F as a bilinear form on them, [lists, lists]; one pass over the models."""
        count = len(softs)
        sums: list[dict[str, Tensor]] = [{} for _ in softs]
        own = np.zeros((count, count))
        for i in range(len(self.models)):
            state, weight = self.models.open(i), self.models.weights[i]
            for name in self.names:
                tensor = _read(state, self.models.keys[name])
                parts = [weight * _applied(self.spec, soft[i], name, tensor) for soft in softs]
                for total, part in zip(sums, parts, strict=True):
                    total[name] = total[name].add_(part) if name in total else part.clone()
                own += _gram(parts)
        products = sum((_gram([total[name] for total in sums]) for name in self.names), np.zeros_like(own))
        return sums, products - own


def _longest_step(nodes: np.ndarray, products: np.ndarray) -> tuple[float, float, float]:
    """The t in [0, 1] at which F is largest, and F at 0 and there; `products` is 2 F between the nodes."""
    basis = [_lagrange(nodes, k) for k in range(len(nodes))]
    curve = np.polynomial.Polynomial([0.0])
    for (i, j), value in np.ndenumerate(products):
        curve = curve + basis[i] * basis[j] * (value / 2)
    turning = [float(r.real) for r in curve.deriv().roots() if abs(r.imag) < 1e-9 and 0 < r.real < 1]
    best = max([0.0, 1.0, *turning], key=lambda t: float(curve(t)))
    return best, float(curve(0.0)), float(curve(best))


def _lagrange(nodes: np.ndarray, k: int) -> np.polynomial.Polynomial:
    """The polynomial that is 1 at node k and 0 at the others."""
    others = np.delete(nodes, k)
    found = np.polynomial.Polynomial.fromroots(others)
    return found / float(found(nodes[k]))


def _column(shares: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(shares, dtype=like.dtype).reshape(-1, *[1] * like.ndim)


def _gram(parts: Sequence[Tensor]) -> np.ndarray:
    """All inner products, [k, k], float64."""
    gram = np.zeros((len(parts), len(parts)))
    for a, b in combinations_with_replacement(range(len(parts)), 2):
        gram[a, b] = gram[b, a] = inner(parts[b], parts[a])
    return gram


def _read(state: State, key: str) -> Tensor:
    tensor = state[key].detach().cpu()
    return tensor.to(widened(tensor.dtype))


def _matrices(permutation: Permutation) -> dict[str, Tensor]:
    return {cell: torch.eye(len(p))[torch.from_numpy(p)] for cell, p in permutation.index.items()}


def _applied(spec: PermutationSpec, soft: Soft, name: str, tensor: Tensor, skip: int | None = None) -> Tensor:
    """The tensor with every axis but `skip` multiplied by the matrices of its cells."""
    for axis, sites in spec.axes[name].items():
        if axis == skip:
            continue
        moved = tensor.movedim(axis, 0).clone(memory_format=torch.contiguous_format)
        for cell, site in sites:
            positions = torch.from_numpy(to_array(site.positions))
            part = moved[positions].reshape(len(positions), -1)
            moved[positions] = (soft[cell].to(part.dtype) @ part).reshape(-1, *moved.shape[1:])
        tensor = moved.movedim(0, axis)
    return tensor


def _rows(tensor: Tensor, axis: int, site: Site) -> Tensor:
    """[neurons, everything else], float32."""
    chosen = tensor.index_select(axis, torch.from_numpy(to_array(site.positions)))
    return chosen.movedim(axis, 0).reshape(len(site.positions), -1).float()


def _pass(number: int, models: Models, objective: float, seconds: float) -> Pass:
    """A step in terms of distance: |S|^2 = 2 F + sum w^2 |theta|^2, exact where the matrices are permutations."""
    weights, squares = models.weights, models.squares
    total = fsum(weights)
    own = fsum(w * w * s for w, s in zip(weights, squares, strict=True))
    spread = fsum(w * s for w, s in zip(weights, squares, strict=True)) - (2 * objective + own) / total
    return Pass(number, float(np.sqrt(max(spread, 0.0) / total)), 0, (), seconds)
