"""Weight matching: the permutation of B whose weights are closest to A's, by coordinate descent.

Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries" (2022), section
3.2. Because permuting does not change |B|, the closest pi(B) is the one with the largest inner product,

    |A - pi(B)|^2  =  |A|^2 + |B|^2 - 2 <A, pi(B)>,

and with all groups but one held fixed that is a linear assignment (costs.py), solved exactly
(assignment.py). Doing so for one group after the other never lowers the objective and ends where no single
group can be improved.

What differs from the paper's code: block structure (heads, GroupNorm) is respected and solved exactly; a
group is looked at again only if something that its costs depend on has changed, so the end is proved, not
guessed from a sweep without progress; cost matrices are float32, but every gain is measured on the weights
in float64 before it is accepted.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from ...spec import Group, Indices, Node, Permutation, PermutationSpec, displaced
from ...types import Progress, State, tell
from ..assignment.blocks import assign, independent, leaves
from ..assignment.linear_assignment import TOLERANCE
from ..result import Attempt, MatchResult, MatchState, Sweep, Update, moved_per_group
from ..schedule import Order, axes_met, neighbours, order_of, run_in_order, sharing
from .costs import WeightCosts, tensor_cores
from .endpoints import Move, Pair, keep_freed_memory, touched
from .initial import Init, Visit, start
from .nearness import nearest
from .products import Products

EVERY = 1.0
"""Seconds between two calls of the progress callback within a sweep."""

NOISE = 1e-3
"""Rounding makes no predicted gain wrong by this share of the largest objective its tensors could have."""


def weight_matching(
    spec: PermutationSpec,
    state_a: State,
    state_b: State,
    *,
    init: Init = "identity",
    order: Order = "random",
    seed: int = 0,
    max_sweeps: int = 100,
    restarts: int = 1,
    normalize: Literal["tensor"] | None = None,
    device: torch.device | str = "cpu",
    workers: int | None = None,
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
        init: "identity" (the paper), "forward" (a first guess from input to output, usually at least as good
            and with far fewer sweeps to go), "random", or a permutation to start from.
        order: "random" (the paper: a fresh order every sweep), "forward", "backward", or a function of
            (sweep, number of groups) that gives the group numbers in their order.
        seed: of everything random.
        max_sweeps: give up then, with `converged=False`.
        restarts: that many descents, each with orders of its own (from a random start if nothing else would
            differ); the best is returned.
        normalize: None, or "tensor": each parameter counts as if its norm were 1 in A and in B, so that large
            tensors do not outweigh small ones.
        device: where cost matrices are computed; assignments are solved on the CPU.
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
    if restarts < 1 or max_sweeps < 1:
        raise ConfigError("Weight matching needs max_sweeps and restarts of at least 1.")
    if normalize not in (None, "tensor"):
        raise ConfigError(f"The normalisation {normalize!r} is unknown: give 'tensor' or none.")
    if workers is None:
        workers = 1 if torch.device(device).type == "cpu" else min(16, os.cpu_count() or 1)
    keep_freed_memory()
    pair = Pair(spec, state_a, state_b, normalize=normalize, device=device)
    pair.products = Products(pair)
    initial_objective, distance_before = pair.objective, pair.distance
    options = _fingerprint(spec, init, order, seed, restarts, normalize, initial_objective)
    finished: tuple[float, ...] = ()
    best: Attempt | None = None
    resumed = resume_from
    if resumed is not None:
        _check_resumable(resumed, options)
        finished, best = resumed.finished, resumed.best
        began -= resumed.seconds

    def report(now: Attempt, dirty: set[int]) -> None:
        seconds = perf_counter() - began
        if checkpoint is not None:
            checkpoint(MatchState(options, now, tuple(sorted(dirty)), finished, best, seconds))
        tell(
            progress,
            "weight matching",
            now.history[-1].number,
            max_sweeps,
            objective=now.objective,
            moved=now.history[-1].moved,
            seconds=seconds,
            left=None,
            restart=len(finished),
        )

    visits = _Visits(len(spec), progress)
    for restart in range(len(finished), restarts):
        if resumed is not None:
            begun, dirty = resumed.current, set(resumed.dirty)
            pair.set(begun.permutation)
            resumed = None
        else:
            # In a fixed order a second descent from the same start would repeat the first.
            with tensor_cores(tf32):
                start(pair, init if restart == 0 or order == "random" else "random", seed, restart, visits)
            dirty = set(range(len(spec)))
            begun = _attempt(pair, (), dirty)
        with tensor_cores(tf32):
            attempt = _descend(pair, begun, dirty, order, seed, restart, max_sweeps, workers, report, visits)
        finished = (*finished, attempt.objective)
        if best is None or attempt.objective > best.objective:
            best = attempt
    assert best is not None
    pair.set(best.permutation)
    pair.products = None  # it knows the pair: a circle, which would keep the models in memory for a while
    return MatchResult(
        permutation=best.permutation,
        objective=best.objective,
        history=best.history,
        converged=best.converged,
        moved=best.permutation.moved(),
        seconds=perf_counter() - began,
        initial_objective=initial_objective,
        distance_before=distance_before,
        distance_after=pair.distance,
        sweeps=len(best.history) - 1,
        restarts=finished,
        moved_per_group=moved_per_group(best.permutation),
    )


def _descend(
    pair: Pair,
    attempt: Attempt,
    dirty: set[int],
    order: Order,
    seed: int,
    restart: int,
    max_sweeps: int,
    workers: int,
    report: Callable[[Attempt, set[int]], None],
    visits: Visit,
) -> Attempt:
    """Sweep until no group is dirty: one that is not is optimal given all others."""
    near, before = neighbours(pair.spec), sharing(pair.spec)
    for number in range(len(attempt.history), max_sweeps + 1):
        if not dirty:
            break
        began = perf_counter()
        groups = order_of(order, len(pair.spec), seed, restart, number - 1)
        updates = _sweep(pair, groups, dirty, near, before, workers, partial(visits, f"sweep {number}"))
        attempt = _attempt(pair, attempt.history, dirty, updates, perf_counter() - began)
        report(attempt, dirty)
    return attempt


def _sweep(
    pair: Pair,
    groups: Sequence[int],
    dirty: set[int],
    near: Sequence[frozenset[int]],
    before: Sequence[frozenset[int]],
    workers: int,
    visit: Callable[[int, int], None],
) -> tuple[Update, ...]:
    """Improve those of `groups`, in that order, that are dirty when their turn comes."""
    updates: dict[int, Update] = {}
    visited: list[int] = []

    def improve_if_dirty(g: int) -> None:
        visited.append(g)
        if g not in dirty:
            return
        dirty.discard(g)
        updates[g] = improve(pair, pair.spec.groups[g])
        if updates[g].moved:
            dirty.update(near[g])
        if workers <= 1:  # callbacks come from the caller's thread
            visit(len(visited), sum(update.moved for update in updates.values()))

    run_in_order(improve_if_dirty, groups, before, workers)
    return tuple(updates[g] for g in groups if g in updates)


class _Visits:
    """Tells about once a second which group a long sweep has come to, and the seconds left to its end."""

    def __init__(self, groups: int, progress: Progress | None) -> None:
        self.groups, self.progress = groups, progress
        self.sweep, self.began = "", 0.0
        self.told = perf_counter()

    def __call__(self, sweep: str, done: int, moved: int) -> None:
        now = perf_counter()
        if sweep != self.sweep:
            self.sweep, self.began = sweep, now
        elif self.progress is not None and now - self.told > EVERY:
            self.told = now
            left = (now - self.began) / done * (self.groups - done)
            stage = f"weight matching, {sweep}, group"
            tell(self.progress, stage, done, self.groups, moved=moved, seconds=now - self.began, left=left)


def _attempt(
    pair: Pair,
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


def improve(pair: Pair, group: Group) -> Update:
    """Bring one group to its best arrangement given all others.

    Its costs are linear in its permutation unless it meets a tensor on two axes (the recurrent matrix of an
    RNN). Then its independent subtrees are updated one after the other, each exactly if it does not meet
    itself. One that does is arranged by the costs at the present permutation, which is a guess; it is taken
    only if it gains, else milder guesses are tried, in which staying in place earns a bonus, up to the point
    where nothing would move.
    """
    if all(len(axes) == 1 for axes in axes_met(group).values()):
        costs = WeightCosts(pair)
        index = nearest(costs, group)
        return _accept(pair, group, assign(group, costs).index if index is None else index, certain=True)
    gain, moved = 0.0, 0
    for unit in independent(group.tree):
        costs = WeightCosts(pair)
        meets_itself = _meets_itself(group, unit)
        for share in (0.0, 0.25, 0.5, 0.75) if meets_itself else (0.0,):
            found = assign(group, _Inert(costs, share) if share else costs, units=[unit])
            update = _accept(pair, group, found.index, certain=not meets_itself)
            if update.moved:
                gain, moved = gain + update.gain, moved + update.moved
                break
    return Update(group.name, gain, moved)


def _accept(pair: Pair, group: Group, index: Mapping[str, np.ndarray], certain: bool) -> Update:
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
class _Inert:
    """Costs with a bonus for staying: `share` of the most that any neuron would gain elsewhere."""

    costs: WeightCosts
    share: float

    def block(self, cell: str, neurons: Indices) -> Tensor:
        block = self.costs.block(cell, neurons)
        bonus = self.share * (block.amax(dim=1) - block.diagonal()).amax()
        return block + bonus * torch.eye(len(block), dtype=block.dtype, device=block.device)

    def diagonal(self, cell: str, blocks: Any) -> list[Tensor]:
        return [self.block(cell, neurons) for neurons in blocks]

    def prices(self, cell: str, neurons: Indices) -> Tensor | None:
        return None

    def learn(self, cell: str, neurons: Indices, prices: Tensor) -> None:
        pass


def _meets_itself(group: Group, unit: Node) -> bool:
    """Whether the subtree's own neurons meet on two axes of a tensor."""
    cells = {leaf.cell for leaf in leaves(unit)}
    part = replace(group, cells=tuple(group.cells[c] for c in sorted(cells)))
    return any(len(axes) > 1 for axes in axes_met(part).values())


def _fingerprint(
    spec: PermutationSpec,
    init: Init,
    order: Order,
    seed: int,
    restarts: int,
    normalize: str | None,
    initial_objective: float,
) -> dict[str, str]:
    """What a continued run must have in common with the interrupted one."""
    if isinstance(init, Permutation):
        told = "given " + hashlib.sha256(b"".join(i.tobytes() for i in init.index.values())).hexdigest()
    else:
        told = init
    return {
        "architecture": spec.hash,
        "weights": repr(initial_objective),
        "init": told,
        "order": "a function" if callable(order) else order,
        "seed": str(seed),
        "restarts": str(restarts),
        "normalize": str(normalize),
    }


def _check_resumable(state: MatchState, options: Mapping[str, str]) -> None:
    for name, value in options.items():
        if state.options.get(name) != value:
            told = (
                f" ({state.options.get(name)} then, {value} now)"
                if name not in ("architecture", "weights")
                else ""
            )
            raise ConfigError(
                f"This matching can't be continued: its {name} differed{told}; use the same or start afresh."
            )
