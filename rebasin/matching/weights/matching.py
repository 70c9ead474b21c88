"""Weight matching: the permutation of B whose weights are closest to A's, by coordinate descent.

Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries" (2022), section
3.2. Because permuting does not change |B|, the closest pi(B) is the one with the largest inner product,

    |A - pi(B)|^2  =  |A|^2 + |B|^2 - 2 <A, pi(B)>,

and with all groups but one held fixed that is a linear assignment (costs.py), solved exactly
(assignment/blocks.py). Doing so for one group after the other never lowers the objective and ends where no single
group can be improved.

What differs from the paper's code: what a tensor repeats counts once (noise.py; not with `normalize="paper"`);
block structure (heads, GroupNorm) is respected and solved exactly; a group is looked at again only if something that
its costs depend on has changed, so the end is proved, not guessed from a sweep without progress; cost matrices are
float32, but every gain is measured on the weights in float64 before it is accepted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from ...arguments import Count, Seed, typed
from ...spec import Group, Indices, Node, PermutationSpec, displaced
from ...tensors.free_memory import keep_freed_memory, return_freed_memory
from ...tensors.modules import find_device
from ...types import Progress, State, tell
from ..assignment.blocks import Costs, assign, independent, leaves
from ..assignment.linear_assignment import TOLERANCE
from ..descent import coordinate_descent
from ..result import Attempt, MatchResult, MatchState, Sweep, Update
from ..resume_state import told
from ..schedule import Order, axes_met, neighbours, order_of, run_in_order, sharing
from .accelerator import Accelerator
from .costs import WeightCosts, tensor_cores
from .endpoints import Endpoints, Move, Normalize, touched
from .estimate import where_quicker
from .initial import Init, Visits, start
from .nearness import arrangement

NOISE = 1e-3
"""Rounding makes no predicted gain wrong by this share of the largest objective its tensors could have."""


@typed
def weight_matching(
    spec: PermutationSpec,
    state_a: State,
    state_b: State,
    *,
    init: Init = "forward",
    order: Order = "random",
    seed: Seed = 0,
    max_sweeps: Count = 100,
    restarts: Count = 1,
    normalize: Normalize = "repeats",
    device: torch.device | str = "cpu",
    workers: Count | None = None,
    tf32: bool = False,
    progress: Progress | None = None,
    checkpoint: Callable[[MatchState], None] | None = None,
    resume_from: MatchState | None = None,
) -> MatchResult:
    """Find the permutation that brings B to A, from the weights alone.

    The objective counts every parameter that `spec` permutes once: matrices, kernels, biases and norm
    affines; tied weights under one name. Running statistics move along but do not count. Parameters may be
    of any floating point type, also of different ones in A and B.

    Args:
        spec: the architecture's symmetries.
        state_a, state_b: name -> tensor, lazy mappings too; further keys are ignored. Never changed.
        init: "forward" (a first guess from input to output, at least as good in every pair tried and with far
            fewer sweeps to go), "identity" (the paper), "random", or a permutation to start from.
        order: "random" (the paper: a fresh order every sweep), "forward", "backward", or a function of
            (sweep, number of groups) that gives the group numbers in their order.
        seed: of everything random.
        max_sweeps: give up then, with `converged=False`.
        restarts: that many descents, each with orders of its own (from a random start if nothing else would
            differ); the best is returned.
        normalize: how much each parameter counts. "repeats": all numbers alike, but what a tensor repeats (gains for
            every pixel that say one thing of a channel) as if it were written down once. "paper": all numbers alike.
            "tensor": each as if its norm were 1 in A and in B. "noise": each by signal over noise (noise.py).
        device: where cost matrices are computed, unless they are so small that the CPU is quicker (`where_quicker`);
            assignments are solved on the CPU.
        workers: groups that share no tensor are updated by that many threads; the result is that of one.
            Default: 1 on a CPU, where the products are parallel themselves, else one a core up to 16, so
            that the device computes costs while assignments are solved.
        tf32: let a CUDA device round the factors of cost matrices to TF32, 10 bits of mantissa, which is several
            times faster; gains are still measured in float64. No effect on a CPU.
        progress: called after each sweep with stage, step, total, objective, moved, seconds and restart; and, with
            one worker, once a second within a sweep, with the groups done as steps and the seconds left.
        checkpoint: called after each sweep with a `MatchState` that can be saved.
        resume_from: such a state; the end is that of the uninterrupted run.

    Raises:
        SpecMismatchError: a tensor is missing or has another shape than the spec's; the initial permutation
        is illegal.
        CheckpointError: a tensor is not floating point or has NaN or infinite values.
        ConfigError: an option, or the state to continue from, does not fit.
    """
    began = perf_counter()
    device = where_quicker(spec, find_device(device))
    workers = workers or workers_for(device)
    pair = Endpoints(spec, state_a, state_b, normalize=normalize, device=device)
    (return_freed_memory if pair.is_large else keep_freed_memory)()
    initial_objective, distance_before = pair.objective, pair.distance
    options = {
        "architecture": spec.hash,
        "weights": repr(initial_objective),
        "init": told(init),
        "order": told(order),
        "seed": str(seed),
        "restarts": str(restarts),
        "normalize": normalize,
    }
    finished: tuple[float, ...] = ()
    best: Attempt | None = None
    if resume_from is not None:
        resume_from.require(options)
        finished, best = resume_from.finished, resume_from.best
        began -= resume_from.seconds
    costs = WeightCosts(pair, Accelerator(pair))
    visits = Visits(len(spec), progress)

    def descend(attempt: Attempt, dirty: set[int], restart: int) -> Iterator[Attempt]:
        """The attempt after each sweep, until no group is `dirty`: one that is not is optimal given all others."""

        def ordered(sweep: int) -> list[int]:
            return order_of(order, len(spec), seed, restart, sweep - 1)

        for made in sweeps(costs, ordered, dirty, max_sweeps, workers, visits, len(attempt.history)):
            attempt = _attempt(pair, attempt.history, dirty, made, perf_counter() - visits.began)
            yield attempt

    for restart in range(len(finished), restarts):
        with tensor_cores(tf32):
            if resume_from is not None and restart == len(resume_from.finished):
                begun, dirty = resume_from.current, set(resume_from.dirty)
                pair.set(begun.permutation)
            else:
                # In a fixed order a second descent from the same start would repeat the first.
                start(costs, init if restart == 0 or order == "random" else "random", seed, restart, visits)
                dirty = set(range(len(spec)))
                begun = _attempt(pair, (), dirty)
            attempt = begun
            for attempt in descend(begun, dirty, restart):
                seconds = perf_counter() - began
                if checkpoint is not None:
                    checkpoint(MatchState(options, attempt, tuple(sorted(dirty)), finished, best, seconds))
                sweep = attempt.history[-1]
                figures = {"objective": attempt.objective, "moved": sweep.moved, "seconds": seconds}
                figures |= {"left": None, "restart": restart}
                tell(progress, "weight matching", sweep.number, max_sweeps, **figures)
        finished = (*finished, attempt.objective)
        if best is None or attempt.objective > best.objective:
            best = attempt
    assert best is not None
    pair.set(best.permutation)
    return MatchResult(
        **vars(best),
        seconds=perf_counter() - began,
        initial_objective=initial_objective,
        distance_before=distance_before,
        distance_after=pair.distance,
        restarts=finished,
    )


def workers_for(device: torch.device) -> int:
    """On a CPU the products are parallel themselves; a device computes them while threads solve assignments."""
    return 1 if device.type == "cpu" else min(16, os.cpu_count() or 1)


def sweeps(
    costs: WeightCosts,
    order: Callable[[int], list[int]],
    dirty: set[int],
    most: int,
    workers: int,
    visits: Visits,
    first: int = 1,
) -> Iterator[tuple[Update, ...]]:
    """The updates of each sweep, by the `order` of its number (from `first` on), until no group is `dirty` or number
    `most` is done.
    """
    spec = costs.pair.spec
    groups: list[int] = []
    updates: dict[int, Update] = {}

    def improved(number: int) -> bool:
        updates[number] = improve(costs, spec.groups[number])
        return updates[number].moved > 0

    def begin(number: int) -> list[int]:
        updates.clear()
        visits.begin(f"sweep {number}")
        groups[:] = order(number)
        return groups

    def done(number: int) -> None:
        visits.done(updates[number].moved if number in updates else 0)

    run = partial(run_in_order, before=sharing(spec), workers=workers, done=done)
    for _ in coordinate_descent(improved, neighbours(spec), begin, dirty, most, first=first, run=run):
        yield tuple(updates[group] for group in groups if group in updates)


def _attempt(
    pair: Endpoints,
    history: tuple[Sweep, ...],
    dirty: set[int],
    updates: tuple[Update, ...] = (),
    seconds: float = 0.0,
) -> Attempt:
    permutation = pair.permutation
    if history:  # gains are exact, and to add them up costs nothing
        made = [update.gain for sweep in history for update in sweep.updates]
        objective = math.fsum([history[0].objective, *made, *(update.gain for update in updates)])
    else:
        objective = pair.objective
    sweep = Sweep(len(history), objective, permutation.moved(), updates, seconds)
    return Attempt(permutation, objective, (*history, sweep), not dirty)


def improve(costs: WeightCosts, group: Group) -> Update:
    """Bring one group to its best arrangement given all others.

    Its costs are linear in its permutation unless it meets a tensor on two axes (the recurrent matrix of an
    RNN). Then its independent subtrees are updated one after the other, each exactly if it does not meet
    itself. One that does is arranged by the costs at the present permutation, which is a guess; it is taken
    only if it gains, else milder guesses are tried, in which staying in place earns a bonus, up to the point
    where nothing would move.
    """
    if all(len(axes) == 1 for axes in axes_met(group).values()):
        return _accept(costs.pair, group, arrangement(costs, group), certain=True)
    gain, moved = 0.0, 0
    for unit in independent(group.tree):
        meets_itself = _meets_itself(group, unit)
        for share in (0.0, 0.25, 0.5, 0.75) if meets_itself else (0.0,):
            found = assign(group, _Inert(costs, share) if share else costs, units=[unit])
            update = _accept(costs.pair, group, found.index, certain=not meets_itself)
            if update.moved:
                gain, moved = gain + update.gain, moved + update.moved
                break
    return Update(group.name, gain, moved)


def _accept(pair: Endpoints, group: Group, index: Mapping[str, np.ndarray], certain: bool) -> Update:
    """Make the arrangement if it truly gains, as measured in float64 on the weights; else change nothing."""
    moved = displaced(index.values())
    if not moved:
        return Update(group.name, 0.0, 0)
    move: Move = pair.propose(group, index)
    scale = sum(
        pair.weight[name] * math.sqrt(math.prod(pair.squares[name])) for name in touched(group, pair.spec)
    )
    if certain and move.gain < -NOISE * scale:
        raise RuntimeError(
            f"The best arrangement of group {group.name!r} would lose {-move.gain:.6g}: the spec has sites that"
            f" contradict each other, or the device computes wrong products."
        )
    if move.gain <= TOLERANCE * scale:
        return Update(group.name, 0.0, 0)
    pair.make(move, index)
    return Update(group.name, move.gain, moved)


@dataclass(frozen=True)
class _Inert(Costs):
    """Costs with a bonus for staying: `share` of the most that any neuron would gain elsewhere."""

    costs: WeightCosts
    share: float

    def block(self, cell: str, neurons: Indices) -> Tensor:
        block = self.costs.block(cell, neurons)
        bonus = self.share * (block.amax(dim=1) - block.diagonal()).amax()
        return block + bonus * torch.eye(len(block), dtype=block.dtype, device=block.device)


def _meets_itself(group: Group, unit: Node) -> bool:
    """Whether the subtree's own neurons meet on two axes of a tensor."""
    cells = {leaf.cell for leaf in leaves(unit)}
    part = replace(group, cells=tuple(group.cells[c] for c in sorted(cells)))
    return any(len(axes) > 1 for axes in axes_met(part).values())
