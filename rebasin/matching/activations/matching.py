"""Activation matching: the permutation of B under which its neurons do what A's do on the same data.

Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries" (2022), section 3.1:
with activations Z_A and Z_B of a layer on the same inputs, minimise |Z_A - P Z_B|, that is, maximise

    sum_i C[i, p(i)]      with C[i, j] = E[z_i of A * z_j of B],

a linear assignment. Groups do not depend on each other, so one pass over the data and one assignment for each group
are all there is to it. Groups with block structure (heads, GroupNorm) are solved exactly by the assignments of
assignment/blocks.py, and neurons that are seen at several places have the mean of the places' C.

The choice of C is the paper's own: E[z_A z_B] for its MLPs, correlation for its VGG. A sum of products is ruled by
the neurons of large scale; where scales differ (deep and normalised networks, diffusion) correlation is better.

Neurons that are dead on the data go with nothing. Where that leaves several arrangements equally good, the one of
them that brings the weights closest is taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...arguments import NonNegativeInt, Seed, typed
from ...errors import ConfigError
from ...objectives import LossFunction, Objective
from ...spec import Permutation, PermutationSpec, displaced
from ...tensors.modules import Forward
from ...tensors.moments import Statistic
from ...types import Progress, State, brief, tell
from ..assignment.blocks import Assignment, assign
from ..result import MatchResult, Sweep, Update
from ..weights.endpoints import Endpoints
from .joint import Joint
from .statistics import (
    TOKENS,
    ActivationState,
    ActivationStatistics,
    Precision,
    Reads,
    Sites,
    activation_statistics,
)

TIES = 1e-6
"""The weights' share where they decide what activations leave open; no difference between activations is as small."""
TIE_SWEEPS = 100


@brief
@dataclass(frozen=True)
class ActivationResult(MatchResult):
    """An alignment by activations; the fields of `MatchResult`, with these differences:

    `objective` and `initial_objective` are sums of the statistic over all neurons with and without the permutation
    (correlations: at most the number of neurons); `history` has the start and one sweep. The distances are those of
    the weights, as for weight matching.

    Attributes:
        statistic: the one that was maximised.
        scores: group name -> its mean statistic per neuron before and after.
        places: group name -> the module tensors at which its neurons were seen.
        fallback: names of the groups that were matched by their weights, being seen nowhere.
        batches, statistics_bytes: what was looked at, and the memory that the statistics took.
    """

    statistic: Statistic = "pearson"
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    places: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fallback: tuple[str, ...] = ()
    batches: int = 0
    statistics_bytes: int = 0


@typed
def activation_matching(
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Iterable[Any],
    *,
    statistic: Statistic = "pearson",
    reads: Reads = "inputs",
    sites: Sites = None,
    tokens: NonNegativeInt | None = TOKENS,
    objective: Objective | LossFunction | None = None,
    forward: Forward | None = None,
    fallback_to_weights: bool = False,
    seed: Seed = 0,
    precision: Precision | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    checkpoint: Callable[[ActivationState], None] | None = None,
    resume_from: ActivationState | None = None,
) -> ActivationResult:
    """Find the permutation that brings B to A by what their neurons do on the same data.

    Both models run in evaluation mode on every batch, once; their weights, hooks and training flags are as before
    afterwards. Memory does not grow with the number of batches, and the result does not depend on how samples are
    cut into batches, up to rounding.

    Args:
        spec: the architecture's symmetries.
        model_a, model_b: two models of that architecture, of any floating point type.
        batches: any iterable, passed through once. How a batch is given to a model, see `forward`.
        statistic: "pearson" (correlation), "inner_product" (the paper's for MLPs) or "covariance".
        reads: "inputs" looks at neurons where a layer reads them, behind norm and non-linearity, as the paper does;
            "outputs" where a layer writes them; "both" at both. Neurons that have no such place are looked at where
            they can be seen (queries and keys: where they are written).
        sites: of several such places of a residual stream, None or "all", the "last" one (REPAIR's end of a
            stage), or those in a list of module names; a group that none of these shows keeps all of its places.
        tokens: look at that many positions (pixels, tokens) of each sample, drawn by `seed`; None or 0: at all of
            them.
        objective: batches are this objective's; its loss is what calls the models.
        forward: calls a model on a batch, `forward(model, batch)`. Without it and without objective, a tensor or
            (tensor, labels) is the model's input, a tuple its arguments, a mapping its keyword arguments.
        fallback_to_weights: match groups that are seen nowhere by their weights, given all others.
        precision: of the sums; None: float64, or float32 where that would take more than 2 GiB.
        device: copies of the models run there; None: the models run where they are.
        progress: called before the first and after each batch with stage, step, total, bytes (of the statistics) and
            seconds, and at the end with objective and moved.
        checkpoint: called after each batch with an `ActivationState` that can be saved.
        resume_from: such a state; of the same batches, those it has seen are skipped.

    Raises:
        SpecMismatchError: a model is not of the architecture of `spec`, or the two compute differently.
        DataError: there are no batches, or one gives NaN or infinite activations.
        ConfigError: an option does not fit, or a group can't be seen at any module and there is to be no fallback.
    """
    statistics = activation_statistics(
        spec, model_a, model_b, batches, objective=objective, forward=forward, reads=reads, sites=sites, tokens=tokens,
        seed=seed, precision=precision, device=device, progress=progress, checkpoint=checkpoint,
        resume_from=resume_from,
    )  # fmt: skip
    require_seen(statistics, fallback_to_weights)
    solved = _solve(statistics, statistic)
    del statistics  # for large models gigabytes, which measuring the result can use
    found = _finish(solved, model_a.state_dict(), model_b.state_dict())
    figures = {"objective": found.objective, "moved": found.moved, "seconds": found.seconds}
    tell(progress, "activation matching", 1, 1, **figures)
    return found


@typed
def match_statistics(
    statistics: ActivationStatistics, state_a: State, state_b: State, *, statistic: Statistic = "pearson"
) -> ActivationResult:
    """The best permutation for statistics at hand, so that one pass over the data serves several choices.

    The states are the two models' weights: for the distances, and for what the statistics leave open.
    """
    return _finish(_solve(statistics, statistic), state_a, state_b)


@dataclass(frozen=True, eq=False)
class _Solved:
    """What the statistics have to say; they themselves may go."""

    spec: PermutationSpec
    found: Sequence[Assignment]  # of each group
    left: Mapping[str, Tensor]  # the costs of groups for which something is left open
    largest: float  # what the objective could be at most
    about: Mapping[str, Any]  # further fields of the result
    seconds: float


def _solve(statistics: ActivationStatistics, statistic: Statistic) -> _Solved:
    """The assignment of every group that was seen; the others stay."""
    began = perf_counter()
    spec = statistics.spec
    found: list[Assignment] = []
    scores: dict[str, tuple[float, float]] = {}
    left: dict[str, Tensor] = {}
    for group in spec:
        costs = {cell.name: statistics.costs(cell.name, statistic) for cell in group.cells}
        if group in statistics.unseen:
            found.append(Assignment({cell.name: np.arange(cell.size) for cell in group.cells}, 0.0, 0.0))
        else:
            found.append(assign(group, costs))
            value, gain = found[-1].value, found[-1].gain
            scores[group.name] = (value - gain) / group.neurons, value / group.neurons
        if group in statistics.unseen or any(_silent(matrix) for matrix in costs.values()):
            left |= costs
    about = {
        "statistic": statistic,
        "scores": scores,
        "places": statistics.places(),
        "fallback": tuple(group.name for group in statistics.unseen),
        "batches": statistics.batches,
        "statistics_bytes": statistics.bytes,
    }
    seconds = statistics.seconds + perf_counter() - began
    largest = sum(statistics.largest(cell, statistic) for cell in spec.cells)
    return _Solved(spec, found, left, largest, about, seconds)


def _finish(solved: _Solved, state_a: State, state_b: State) -> ActivationResult:
    """Let the weights decide what is open, and measure."""
    began = perf_counter()
    spec = solved.spec
    pair = Endpoints(spec, state_a, state_b)
    distance = pair.distance
    pair.set(Permutation(spec, {cell: p for one in solved.found for cell, p in one.index.items()}))
    open_ = [group for group in spec if group.cells[0].name in solved.left]
    joint = Joint(pair, solved.left, solved.largest, TIES)
    deque(joint.descend(open_, "forward", 0, TIE_SWEEPS), maxlen=0)
    permutation = pair.permutation
    updates = tuple(
        Update(group.name, one.gain, displaced(permutation.index[cell.name] for cell in group.cells))
        for group, one in zip(spec, solved.found, strict=True)
    )
    initial = sum(one.value - one.gain for one in solved.found)
    reached = sum(one.value for one in solved.found)
    seconds = solved.seconds + perf_counter() - began
    start = Sweep(0, initial, 0)
    return ActivationResult(
        permutation=permutation,
        objective=reached,
        history=(start, Sweep(1, reached, permutation.moved(), updates, seconds)),
        converged=True,
        seconds=seconds,
        initial_objective=initial,
        distance_before=distance,
        distance_after=pair.distance,
        restarts=(reached,),
        **solved.about,
    )


def _silent(costs: Tensor) -> bool:
    """Whether a neuron of A or B goes with nothing at all."""
    zero = costs == 0
    return bool(zero.all(dim=0).any() or zero.all(dim=1).any())


def require_seen(statistics: ActivationStatistics, fallback: bool) -> None:
    """Raise `ConfigError` if a group is seen nowhere and may not be matched otherwise."""
    if statistics.unseen and not fallback:
        more = f" and {len(statistics.unseen) - 1} more" if statistics.unseen[1:] else ""
        raise ConfigError(
            f"The neurons of group {statistics.unseen[0].name!r}{more} never appear at an input or output"
            f" of a module that is called: allow fallback_to_weights, or use weight matching."
        )
