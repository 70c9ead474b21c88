"""MergeMany: each model is matched to the mean of the others, until none comes closer.

Algorithm 3 of Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries"
(2022):

    repeat
        for i in a random order of 1..N
            theta' = mean of all theta_j, j != i            (as they are by now)
            theta_i <- pi(theta_i),  pi = weight matching of theta_i to theta'
    until no theta_i came closer to its theta'
    return mean of all theta_j

What differs from the paper's code: no model is ever changed. Each has a permutation, that from its original to
its present arrangement, and is read anew whenever it is needed; only the running mean is held (float32), so that
the memory needed does not depend on N. Instead of waiting for a whole pass without progress, the end is reached
as soon as every model was looked at since the last one that moved, which is the same in less time. And in the
end all is brought into the arrangement of the first model: moving all models alike changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from math import fsum
from time import perf_counter
from typing import Any, Literal

import torch

from ...arguments import Count, Seed, check_values, typed
from ...errors import ConfigError, shown
from ...spec import Permutation, PermutationSpec
from ...types import Progress, check_options, tell
from ..descent import coordinate_descent
from ..result import MatchResult, moved_between
from ..resume_state import told
from ..schedule import Order, order_of
from ..weights.matching import weight_matching
from .ends import check_given, conclude
from .models import Models, Source
from .result import ManyResult, ManyState, Pass, Step, anchored
from .rounds import Found, Round, Turn, Workers, gain, match_one, matched
from .running_mean import RunningMean

Named = Literal["identity", "progressive"]
Start = Named | Sequence[Permutation]

MATCH: Mapping[str, Any] = {"init": "identity", "order": "random", "max_sweeps": 100}
"""The paper's options of the weight matchings among many models, each until `match` says otherwise."""

OPTIONS = ("init", "order", "max_sweeps", "restarts", "device", "workers")
"""What `match` may give to weight matching. Normalised, it would not be the distance that falls."""


@typed
def match_to_mean(
    spec: PermutationSpec,
    states: Sequence[Source],
    *,
    weights: Sequence[float] | None = None,
    init: Start = "identity",
    keep: bool = False,
    order: Order = "random",
    anchor: int | None = 0,
    seed: Seed = 0,
    max_passes: Count = 100,
    match: Mapping[str, Any] = MATCH,
    scratch: str | os.PathLike[str] | None = None,
    workers: Workers | None = None,
    progress: Progress | None = None,
    checkpoint: Callable[[ManyState], None] | None = None,
    resume_from: ManyState | None = None,
) -> ManyResult:
    """Bring N models to each other, each to the mean of the others by weight matching, and average them.

    One model is open at a time. Beside it there is the running mean, in float32, and what one weight matching
    takes: never more, however many models there are.

    Args:
        spec: the architecture's symmetries.
        states: the models: name -> tensor, lazy mappings too, or paths of safetensors files. Never changed.
        weights: of the models in the mean, positive; by default all alike.
        init: "identity" (the paper: the first mean is that of the models as they come), "progressive" (in the
            first pass each model joins when its turn comes and is matched to the mean of those before it),
            or permutations of the first models, say those of a finished merge: further models then join
            one by one.
        keep: models whose permutations were given in `init` stay where they are; only the further ones are matched.
            So a model is added to a finished merge of many in a few matchings.
        order: of the models in each pass; see `weight_matching`. With two models the second moves first.
        anchor: all is brought into the arrangement of this model; None leaves it where it ended.
        seed: of everything random.
        max_passes: give up then, with `converged=False`.
        match: options of weight matching: init ("identity" or "forward"; where a model's first matching
            starts), order, max_sweeps, restarts, device, workers.
        scratch: a folder in which the running mean is kept instead of in memory (4 bytes a parameter).
        workers: match as many models of a pass at once, each to the running mean of the others as it was when the
            round began; see rounds.py. With one worker the result is that without, to the bit; with several it depends
            on their number alone, and the distance never rises either. Models travel to them by pickling: paths and
            lazy states of files as names. Each holds the running mean.
        progress: called after each model with stage, pass, step, total, model, objective, moved, seconds.
        checkpoint: called after each model, of a round after the last, with a `ManyState` that can be saved.
        resume_from: such a state; the result is that of the uninterrupted run, to the bit.

    Raises:
        SpecMismatchError: a model misses a tensor of the spec or has another shape for it.
        CheckpointError: a file is missing or damaged, or a model's tensors do not fit the first one's, or have
            NaN or infinite values. All models are checked before any work starts; the message names the one.
        ConfigError: an option, or the state to continue from, does not fit.
    """
    models = Models(spec, states, weights)
    models.check_anchor(anchor)
    if workers is not None and not isinstance(getattr(workers, "count", None), int):
        raise ConfigError(
            f"workers is {shown(workers)}, but it takes None or what calls functions elsewhere, with a count and a call"
            " (rebasin.integrations.ray_cluster)."
        )
    run = _Run(models, init, keep, order, seed, match, scratch, workers)
    if resume_from is None:
        run.start()
    else:
        run.restore(resume_from)

    def bring_closer(i: int) -> bool:
        changed = run.bring_closer(i)
        if checkpoint is not None and not run.ready:
            checkpoint(run.state())
        told = {"pass": len(run.history), "model": i, "objective": run.objective}
        told |= {"moved": run.steps[-1].moved, "seconds": models.seconds}
        tell(progress, "merge many", len(run.steps), len(models), **told)
        return changed

    # Models that are settled have their turn, too: taking one out of the mean and putting it back rounds the mean.
    passes = coordinate_descent(
        bring_closer, run.others, run.begin_pass, run.dirty, max_passes, first=len(run.history), run=run.in_rounds,
        clean=True,
    )  # fmt: skip
    for _ in passes:
        run.end_pass()

    permutations = anchored([p or spec.identity() for p in run.current], anchor)
    return conclude("mean", models, permutations, run.history, converged=not run.dirty, measured=run.mean)


def match_options(match: Mapping[str, Any] | None) -> dict[str, Any]:
    """Checked options of the weight matchings among many models, those of `MATCH` filled in.

    Raises:
        ConfigError: there is no such option, or it can't be had here.
    """
    options = {**MATCH, **(match or {})}
    check_options("The matching of many models", options, dict.fromkeys(OPTIONS))
    check_values(weight_matching, options, "The matching of many models", "match.")
    if options["init"] not in ("identity", "forward"):
        raise ConfigError(
            f"A matching among many starts at 'identity' or 'forward', not {options['init']!r}."
        )
    return options


@dataclass
class _Run:
    """A merge under way. At any time `current[i](theta_i)` is model i as it is by now; None: it is yet to join.

    Attributes:
        dirty: the models that may not be best where they are, those to be kept there left out.
        others: for each model those that its moves make dirty.
        begun, turns, steps: of the pass under way: where the models were at its beginning, their order, and the
            updates made so far.
        objective: that the last matching reached.
        ready: model -> what its worker found, for the models of the round under way that are yet to move.
        changed: whether a model of this round has moved.
    """

    models: Models
    init: Start
    keep: bool
    order: Order
    seed: int
    match: InitVar[Mapping[str, Any]]
    scratch: InitVar[str | os.PathLike[str] | None]
    workers: Workers | None = None
    objective: float = 0.0

    def __post_init__(self, match: Mapping[str, Any], scratch: str | os.PathLike[str] | None) -> None:
        models, keep, self.spec = self.models, self.keep, self.models.spec
        self.options = match_options(match)
        self.first_start = self.options.pop("init")
        self.current = _begin(self.spec, self.init, len(models))
        if keep and isinstance(self.init, str):
            raise ConfigError("keep=True needs the permutations that are to be kept as init.")
        free = {i for i, p in enumerate(self.current) if p is None or not keep}
        self.others = [free - {i} for i in range(len(models))]
        self.dirty = set(free) if len(models) > 1 else set[int]()
        self.free, self.matches = free, 0
        self.left: tuple[int, ...] | None = None  # of an interrupted pass
        self.mean = RunningMean(models, scratch)
        self.ready: dict[int, Found] = {}
        self.changed = False

    def start(self) -> None:
        self.mean.gather_first()
        if not isinstance(self.init, str) and None not in self.current:
            self.mean.gather(self.current)
        self.history = [Pass(0, self.mean.distance)]
        self.fingerprint = self._fingerprint()

    def restore(self, state: ManyState) -> None:
        self.models.read_all()
        self.fingerprint = self._fingerprint()
        state.require(self.fingerprint)
        self.models.distance_before = state.distance_before
        self.models.began -= state.seconds
        self.history, self.steps, self.turns = list(state.history), list(state.steps), state.order
        self.matches, self.begun, self.current = state.matches, state.begun, list(state.current)
        self.dirty.intersection_update(state.dirty)
        self.mean.gather(self.begun)
        for i in self.turns[: state.done]:  # the same sums as then, so that no bit differs
            self.mean.remove(i, self.begun[i])
            after = self.current[i]
            assert after is not None
            self.mean.add(i, after)
        if self.dirty:
            self.left = self.turns[state.done :]
        else:  # it was interrupted between the last model and the end of its pass
            self.end_pass()

    def begin_pass(self, number: int) -> Sequence[int]:
        """The order of the models; those of an interrupted pass that are left."""
        if self.left is not None:
            left, self.left = self.left, None
            return left
        if None in self.current:
            self.mean.gather(self.current)
        self.begun, self.steps = tuple(self.current), list[Step]()
        n = len(self.models)
        if n == 2:  # who moves is only a matter of the arrangement in which both end: let it be the first's
            turns = [0, 1] if self.current[0] is None else [1, 0]
        else:
            turns = order_of(self.order, n, self.seed, 0, number - 1)
        self.turns = tuple(i for i in turns if i in self.free)
        return self.turns

    def in_rounds(self, visit: Callable[[int], None], order: Sequence[int]) -> None:
        """Visit the models in their order, as many as there are workers matched beforehand."""
        count = 1 if self.workers is None else max(1, self.workers.count)
        for first in range(0, len(order), count):
            members = order[first : first + count]
            self.ready, self.changed = {}, False
            if self.workers is not None and self.dirty and None not in self.current:
                self.ready = self._match_all(self.workers, members)
            for i in members:
                visit(i)

    def bring_closer(self, i: int) -> bool:
        """Match model i to the mean of the others; whether that makes these dirty."""
        started = perf_counter()
        before, settled = self.current[i], True
        early, changed = self.ready.pop(i, None), self.changed
        self.mean.remove(i, before)
        if self.mean.inside:
            found = early or self._match(i, before)
            after, settled, self.objective = found.permutation, found.converged, found.objective
            self.matches += 1
            if (
                early is not None
                and changed
                and before is not None
                and not self._still_nearer(i, before, after)
            ):
                after = before
        else:
            after, self.objective = before or self.spec.identity(), 0.0  # the first: the others come to it
        self.mean.add(i, after)
        self.current[i] = after
        moved = moved_between(before, after)
        self.changed |= moved > 0
        # A model matched to a mean that some are not yet part of, or have moved in since, is to be looked at again.
        if None in self.current or not settled or (early is not None and changed):
            self.dirty.add(i)
        self.steps.append(Step(i, moved, perf_counter() - started))
        return moved > 0 or before is None

    def end_pass(self) -> None:
        moved = sum(step.moved for step in self.steps)
        self.mean.gather(self.current)
        if None in self.begun and self.mean.distance > self.history[0].distance:
            # Joining one by one was a bad start; the promise is that the distance never rises.
            self.current, moved = [p or self.spec.identity() for p in self.begun], len(self.models)
            self.dirty.update(self.free)
            self.mean.gather(self.current)
        seconds = sum(step.seconds for step in self.steps)
        self.history.append(Pass(len(self.history), self.mean.distance, moved, tuple(self.steps), seconds))

    def state(self) -> ManyState:
        return ManyState(
            options=self.fingerprint,
            begun=self.begun,
            current=tuple(self.current),
            order=self.turns,
            done=len(self.steps),
            dirty=tuple(sorted(self.dirty)),
            matches=self.matches,
            history=tuple(self.history),
            steps=tuple(self.steps),
            distance_before=self.models.distance_before,
            seconds=self.models.seconds,
        )

    def _match(self, i: int, before: Permutation | None) -> MatchResult:
        """Match model i to the mean, from where it is or from the first start, but never for the worse."""
        options = {**self.options, "seed": self.seed + self.matches}
        start = self._start(before)
        return matched(self.spec, self.mean.tensors, self.models.open(i), before, start, options)

    def _match_all(self, workers: Workers, members: Sequence[int]) -> dict[int, Found]:
        """Each of these models matched to the mean of all others as they are, all of them by workers."""
        models = self.models
        mean = {name: self.mean.tensors[name].numpy() for name in models.keys}
        common = Round(self.spec, mean, models.keys, self.options, torch.get_num_threads())
        turns = []
        for number, i in enumerate(members):
            before = self.current[i]
            assert before is not None
            share = models.weights[i] / fsum(models.weights[j] for j in self.mean.inside - {i})
            turns.append(
                Turn(models.sources[i], before, share, self._start(before), self.seed + self.matches + number)
            )
        return dict(zip(members, workers.call(match_one, common, turns), strict=True))

    def _still_nearer(self, i: int, before: Permutation, after: Permutation) -> bool:
        """Whether a move is for the better now that model i is out of the mean and others of its round have moved."""
        return gain(self.mean.tensors, self.models.open(i), self.models.keys, before, after) > 0

    def _start(self, before: Permutation | None) -> str | None:
        """Where a matching starts if not `before`: at the first of all."""
        first = self.first_start != "identity" and len(self.history) == 1
        return self.first_start if before is None or (first and before.is_identity) else None

    def _fingerprint(self) -> dict[str, str]:
        """What a continued run must have in common with the interrupted one."""
        inner = {name: told(self.options.get(name)) for name in ("order", "max_sweeps", "restarts")}
        own = {name: told(getattr(self, name)) for name in ("init", "order", "seed", "keep")}
        if self.workers is not None and self.workers.count > 1:
            own["workers"] = str(self.workers.count)
        return {
            "architecture": self.spec.hash,
            "models": repr(self.models.squares),
            "weights": repr(self.models.weights),
            **own,
            "match": repr({"init": self.first_start, **inner}),
        }


def _begin(spec: PermutationSpec, init: Start, n: int) -> list[Permutation | None]:
    """Each model's permutation, None for those that are to join in the first pass."""
    if isinstance(init, str):
        return [spec.identity() if init == "identity" else None] * n
    if len(init) > n:
        raise ConfigError(f"There are {len(init)} permutations to start from, but only {n} models.")
    check_given(spec, init)
    return [*init, *[None] * (n - len(init))]
