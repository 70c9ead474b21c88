"""Many models in one arrangement of their neurons, so that their mean is a model again.

`merge_many` is MergeMany, algorithm 3 of Ainsworth, Hayase and Srinivasa, "Git Re-Basin" (2022):

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

`match_to_pivot` is the simple alternative: all are matched to one of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import fsum, isfinite, sqrt
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..checkpoints import load_safetensors
from ..errors import CheckpointError, ConfigError, SpecMismatchError
from ..merging.interpolate import COUNTERS
from ..spec import Permutation, PermutationSpec
from .many_result import ManyResult, ManyState, Pass, Step
from .pair import CHUNK
from .result import MatchResult
from .schedule import Order, order_of
from .weights import weight_matching

State = Mapping[str, Tensor]
Source = State | str | os.PathLike[str]
"""A state, or the path of a safetensors file that is opened whenever it is read and closed after that."""

Start = Literal["identity", "progressive"] | Sequence[Permutation]

OPTIONS = ("init", "order", "max_sweeps", "restarts", "device", "workers")
"""What `match` may give to weight matching. Normalised, it would not be the distance that falls."""


def merge_many(
    spec: PermutationSpec,
    states: Sequence[Source],
    *,
    weights: Sequence[float] | None = None,
    init: Start = "identity",
    order: Order = "random",
    anchor: int | None = 0,
    seed: int = 0,
    max_passes: int = 100,
    match: Mapping[str, Any] | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    checkpoint: Callable[[ManyState], None] | None = None,
    resume_from: ManyState | None = None,
) -> ManyResult:
    """Bring N models to each other, each to the mean of the others by weight matching, and average them.

    One model is open at a time. Beside it there are the running mean and, in the end, the result: no more
    than three models in memory, however many there are.

    Args:
        spec: the architecture's symmetries.
        states: the models: name -> tensor, lazy mappings too, or paths of safetensors files. Never changed.
        weights: of the models in the mean, positive; by default all alike.
        init: "identity" (the paper: the first mean is that of the models as they come), "progressive" (in the
            first pass each model joins when its turn comes and is matched to the mean of those before it),
            or permutations of the first models, say those of a finished merge: further models then join
            one by one.
        order: of the models in each pass; see `weight_matching`. With two models the second moves first.
        anchor: all is brought into the arrangement of this model; None leaves it where it ended.
        seed: of everything random.
        max_passes: give up then, with `converged=False`.
        match: options of weight matching: init ("identity" or "forward"; where a model's first matching
            starts), order, max_sweeps, restarts, device, workers.
        progress: called after each model with stage, pass, step, total, model, objective, moved, seconds.
        checkpoint: called after each model with a `ManyState` that can be saved.
        resume_from: such a state; the result is that of the uninterrupted run, to the bit.

    Raises:
        SpecMismatchError: a model misses a tensor of the spec or has another shape for it.
        CheckpointError: a file is missing or damaged, or a model's tensors do not fit the first one's, or have
            NaN or infinite values. All models are checked before any work starts; the message names the one.
        ConfigError: an option, or the state to continue from, does not fit.
    """
    began = perf_counter()
    if max_passes < 1:
        raise ConfigError("Merging many models needs max_passes of at least 1.")
    models = _Models(spec, states, weights)
    n = len(models)
    if anchor is not None and not 0 <= anchor < n:
        raise ConfigError(f"The anchor {anchor} is none of the models 0 to {n - 1}.")
    run = _Run(models, init, order, seed, match, resume_from)
    began -= run.seconds

    while not run.converged and len(run.history) <= max_passes:
        while run.to_do:
            i = run.to_do[0]
            objective = run.bring_closer(i)
            run.seconds = perf_counter() - began
            if checkpoint is not None:
                checkpoint(run.state())
            if progress is not None:
                event = {"stage": "merge many", "pass": len(run.history), "step": len(run.steps), "total": n}
                event |= {"model": i, "objective": objective, "moved": run.steps[-1].moved}
                progress(event | {"seconds": run.seconds})
        run.end_pass()

    permutations = [p or spec.identity() for p in run.current]
    if anchor is not None and not permutations[anchor].is_identity:
        back = permutations[anchor].invert()
        permutations = [back.compose(p) for p in permutations]
    distance, objective = run.mean.distance, run.mean.objective
    run.mean.tensors = {}  # makes room for the result
    return ManyResult(
        permutations=tuple(permutations),
        merged=models.average(permutations),
        objective=objective,
        distance=distance,
        distance_before=run.distance_before,
        history=tuple(run.history),
        converged=run.converged,
        moved=sum(p.moved() for p in permutations),
        weights=models.shares,
        seconds=perf_counter() - began,
    )


def match_to_pivot(
    spec: PermutationSpec,
    states: Sequence[Source],
    *,
    pivot: int | Literal["best"] = 0,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    match: Mapping[str, Any] | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> ManyResult:
    """Match every model to one of them, the pivot, by weight matching, and average all.

    One matching a model, but what two others have in common and the pivot has not is lost. Arguments and
    errors are those of `merge_many`; two models are open at a time.

    Args:
        pivot: the model that stays, or "best": every pair is matched, and the pivot is the one with the
            smallest (weighted) sum of squared distances to all others, N (N - 1) / 2 matchings.
    """
    began = perf_counter()
    options = _match_options(match)
    start = options.pop("init", "identity")
    models = _Models(spec, states, weights)
    n = len(models)
    if pivot != "best" and (isinstance(pivot, str) or not 0 <= pivot < n):
        raise ConfigError(f"The pivot {pivot!r} is none of the models 0 to {n - 1}, nor 'best'.")
    mean = _Mean(models)
    mean.gather([spec.identity()] * n)
    distance_before = mean.distance
    pairs = (
        list(combinations(range(n), 2)) if pivot == "best" else [(pivot, i) for i in range(n) if i != pivot]
    )
    to: dict[tuple[int, int], Permutation] = {}  # (i, j): brings j to i
    apart = np.zeros((n, n))
    steps: list[Step] = []
    converged = True
    for number, (i, j) in enumerate(pairs):
        started = perf_counter()
        found = weight_matching(
            spec, models.open(i), models.open(j), init=start, seed=seed + number, **options
        )
        to[i, j] = found.permutation
        if pivot == "best":
            to[j, i] = found.permutation.invert()
        apart[i, j] = apart[j, i] = found.distance_after**2
        converged &= found.converged
        steps.append(Step(j, found.moved, perf_counter() - started))
        if progress is not None:
            event = {"stage": "match to pivot", "step": number + 1, "total": len(pairs), "model": j}
            event |= {"objective": found.objective, "moved": found.moved}
            progress(event | {"seconds": perf_counter() - began})
    chosen = int(np.argmin(apart @ np.asarray(models.weights))) if pivot == "best" else pivot
    permutations = [spec.identity() if i == chosen else to[chosen, i] for i in range(n)]
    mean.gather(permutations)
    distance, objective = mean.distance, mean.objective
    del mean
    moved = sum(p.moved() for p in permutations)
    history = (Pass(0, distance_before), Pass(1, distance, moved, tuple(steps), perf_counter() - began))
    return ManyResult(
        permutations=tuple(permutations),
        merged=models.average(permutations),
        objective=objective,
        distance=distance,
        distance_before=distance_before,
        history=history,
        converged=converged,
        moved=moved,
        weights=models.shares,
        seconds=perf_counter() - began,
        pivot=chosen,
    )


class _Run:
    """A merge under way. At any time `current[i](theta_i)` is model i as it is by now; None: it is yet to join.

    Attributes:
        to_do: the models whose turn is still to come in this pass; empty when all are settled.
        settled: models known to be best where they are as long as no other moves.
    """

    def __init__(
        self,
        models: _Models,
        init: Start,
        order: Order,
        seed: int,
        match: Mapping[str, Any] | None,
        resumed: ManyState | None,
    ) -> None:
        self.models, self.spec, self.seed = models, models.spec, seed
        self.order: Order = order
        self.options = _match_options(match)
        self.first_start = self.options.pop("init", "identity")
        self.begin = _begin(self.spec, init, len(models))
        self.fingerprint = _fingerprint(models, init, self.begin, order, seed, self.first_start, self.options)
        self.mean = _Mean(models)
        if resumed is not None:
            self._restore(resumed)
            return
        self.mean.gather([self.spec.identity()] * len(models))
        self.distance_before = self.mean.distance
        if not isinstance(init, str) and None not in self.begin:
            self.mean.gather(self.begin)
        self.history = [Pass(0, self.mean.distance)]
        self.settled, self.matches, self.seconds = set[int](), 0, 0.0
        self.converged = len(models) == 1
        self.current = list(self.begin)
        if not self.converged:
            self._begin_pass()

    def bring_closer(self, i: int) -> float:
        """Match model i to the mean of the others, and give back the objective that was reached."""
        started = perf_counter()
        before, found = self.current[i], None
        if not self.mean.inside - {i}:
            after = before or self.spec.identity()  # the first of all: the others come to it
        else:
            self.mean.remove(i, before)
            found = self._match(i, before)
            after = found.permutation
            self.matches += 1
        self.mean.add(i, after)
        self.current[i] = after
        moved = _moved(before, after)
        if moved or before is None:
            self.settled.clear()
        # A model matched to a mean that some are not yet part of is to be looked at again.
        if None not in self.current and (found is None or found.converged):
            self.settled.add(i)
        self.steps.append(Step(i, moved, perf_counter() - started))
        return found.objective if found is not None else 0.0

    @property
    def to_do(self) -> tuple[int, ...]:
        return () if len(self.settled) == len(self.models) else self.turns[len(self.steps) :]

    def end_pass(self) -> None:
        moved = sum(step.moved for step in self.steps)
        self.mean.gather(self.current)
        if None in self.begun and self.mean.distance > self.history[0].distance:
            # Joining one by one was a bad start; the promise is that the distance never rises.
            self.current, moved = [p or self.spec.identity() for p in self.begin], len(self.models)
            self.settled.clear()
            self.mean.gather(self.current)
        seconds = sum(step.seconds for step in self.steps)
        self.history.append(Pass(len(self.history), self.mean.distance, moved, tuple(self.steps), seconds))
        self.converged = len(self.settled) == len(self.models)
        if not self.converged:
            self._begin_pass()

    def state(self) -> ManyState:
        return ManyState(
            options=self.fingerprint,
            begun=self.begun,
            current=tuple(self.current),
            order=self.turns,
            done=len(self.steps),
            settled=frozenset(self.settled),
            matches=self.matches,
            history=tuple(self.history),
            steps=tuple(self.steps),
            distance_before=self.distance_before,
            seconds=self.seconds,
        )

    def _begin_pass(self) -> None:
        if None in self.current:
            self.mean.gather(self.current)
        self.begun, self.steps = tuple(self.current), list[Step]()
        n = len(self.models)
        if n == 2:  # who moves is only a matter of the arrangement in which both end: let it be the first's
            self.turns = (0, 1) if self.current[0] is None else (1, 0)
        else:
            self.turns = tuple(order_of(self.order, n, self.seed, 0, len(self.history) - 1))

    def _restore(self, state: ManyState) -> None:
        _check_resumable(state, self.fingerprint)
        self.distance_before, self.seconds = state.distance_before, state.seconds
        self.history, self.steps, self.turns = list(state.history), list(state.steps), state.order
        self.settled, self.matches, self.converged = set(state.settled), state.matches, False
        self.begun, self.current = state.begun, list(state.current)
        self.mean.gather(self.begun)
        for i in self.turns[: state.done]:  # the same sums as then, so that no bit differs
            self.mean.remove(i, self.begun[i])
            after = self.current[i]
            assert after is not None
            self.mean.add(i, after)

    def _match(self, i: int, before: Permutation | None) -> MatchResult:
        """Match model i to the mean, from where it is or from the first start, but never for the worse."""
        state, seed = self.models.open(i), self.seed + self.matches
        if before is None or (
            self.first_start != "identity" and len(self.history) == 1 and before.is_identity
        ):
            found = weight_matching(
                self.spec, self.mean.tensors, state, init=self.first_start, seed=seed, **self.options
            )
            if before is None or found.objective > found.initial_objective:
                return found
        return weight_matching(self.spec, self.mean.tensors, state, init=before, seed=seed, **self.options)


class _Models:
    """The N models, checked, and read one at a time.

    Attributes:
        weights: as given; `shares` with sum 1.
        keys: the name in the spec of every tensor that it permutes -> the name in the states.
        squares: |theta_i|^2 over the parameters that the spec permutes.
    """

    def __init__(
        self, spec: PermutationSpec, states: Sequence[Source], weights: Sequence[float] | None
    ) -> None:
        self.spec, self.sources = spec, tuple(states)
        if isinstance(states, (str, Mapping)) or not self.sources:
            raise ConfigError("There is nothing to merge: give a list of at least one model.")
        self.weights = tuple(float(w) for w in weights) if weights is not None else (1.0,) * len(self)
        if len(self.weights) != len(self) or not all(isfinite(w) and w > 0 for w in self.weights):
            raise ConfigError(f"{len(self)} models need as many weights, all positive, not {self.weights}.")
        self.shares = tuple(w / fsum(self.weights) for w in self.weights)
        first = self.open(0)
        spec.check(first, self.name(0))
        names = set(first)
        alias = {target: other for other, target in spec.aliases.items() if other in names}
        self.keys = {name: name if name in names else alias[name] for name in spec.axes}
        layout = {name: _layout(first, name) for name in first}
        whole = {name: first[name].clone() for name, (dtype, _) in layout.items() if not _is_number(dtype)}
        del first
        for i in range(len(self)):
            self._check_layout(i, layout)
        self.squares = tuple(self._check_values(i, whole) for i in range(len(self)))

    def __len__(self) -> int:
        return len(self.sources)

    def open(self, i: int) -> State:
        source = self.sources[i]
        return source if isinstance(source, Mapping) else load_safetensors(source)

    def name(self, i: int) -> str:
        source = self.sources[i]
        return f"states[{i}]" if isinstance(source, Mapping) else f"states[{i}] ({os.fspath(source)})"

    def average(self, permutations: Sequence[Permutation]) -> dict[str, Tensor]:
        """The weighted mean of all tensors. Equal ones stay as they are to the bit; integers are the first's."""
        merged: dict[str, Tensor] = {}
        dtypes: dict[str, torch.dtype] = {}
        total = 0.0
        for i, permutation in enumerate(permutations):
            total += self.weights[i]
            self._average_one(i, permutation, self.weights[i] / total, merged, dtypes)
        for name, dtype in dtypes.items():
            merged[name] = merged[name].to(dtype)
        return merged

    def _average_one(
        self,
        i: int,
        permutation: Permutation,
        share: float,
        merged: dict[str, Tensor],
        dtypes: dict[str, torch.dtype],
    ) -> None:
        state = self.open(i)
        for name in state:
            tensor = permutation.apply_to(name, state[name].detach().cpu())
            if i == 0:
                dtypes[name] = tensor.dtype
                merged[name] = tensor.to(_wide(tensor.dtype), copy=True)
            elif _is_number(merged[name].dtype):
                merged[name].lerp_(tensor.to(merged[name].dtype), share)

    def _check_layout(self, i: int, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        state, what = self.open(i), self.name(i)
        self.spec.check(state, what)
        names = set(state)
        for one, other, has, lacks in (
            (names, layout, what, self.name(0)),
            (layout, names, self.name(0), what),
        ):
            missing = [name for name in one if name not in other]
            if missing:
                raise CheckpointError(
                    f"Tensor {min(missing)!r} is in {has} but not in {lacks}: all models must come from the same"
                    f" architecture."
                )
        for name, (dtype, shape) in layout.items():
            own_dtype, own_shape = _layout(state, name)
            if own_shape != shape or _is_number(own_dtype) != _is_number(dtype):
                raise CheckpointError(
                    f"Tensor {name!r} of {what} is {_told(own_dtype, own_shape)}, but {_told(dtype, shape)} in"
                    f" {self.name(0)}: all models must come from the same architecture."
                )
        for key in self.keys.values():
            dtype = _layout(state, key)[0]
            if not dtype.is_floating_point:
                raise CheckpointError(
                    f"Tensor {key!r} of {what} is {str(dtype).removeprefix('torch.')}, not floating point:"
                    f" convert a quantised checkpoint to floating point first."
                )

    def _check_values(self, i: int, whole: Mapping[str, Tensor]) -> float:
        state, squares = self.open(i), []
        counted = {key for name, key in self.keys.items() if name not in self.spec.buffers}
        for name in state:
            tensor = state[name].detach().cpu()
            if not _is_number(tensor.dtype):
                if name.rsplit(".", 1)[-1] not in COUNTERS and not torch.equal(tensor, whole[name].cpu()):
                    raise CheckpointError(
                        f"Integer tensor {name!r} of {self.name(i)} differs from that of {self.name(0)}: integers"
                        f" can't be averaged, so make them equal or leave the tensor out."
                    )
            elif not bool(torch.isfinite(tensor.to(_wide(tensor.dtype))).all()):
                raise CheckpointError(
                    f"Tensor {name!r} of {self.name(i)} has NaN or infinite values: the checkpoint is damaged or"
                    f" its training diverged, so it can't be merged."
                )
            elif name in counted:
                squares.append(_square(tensor))
        return fsum(squares)


class _Mean:
    """The mean of those models that are in it, of the tensors that the spec permutes, in float32 or wider.

    Attributes:
        tensors: name -> mean.
        inside: the models that are in it.
        spread: `sum_j w_j |pi_j(theta_j) - mean|^2` over parameters, float64; right after `gather`, and not
            kept up to date by `add` and `remove`.
    """

    def __init__(self, models: _Models) -> None:
        self.models = models
        self.tensors: dict[str, Tensor] = {}
        self.inside: set[int] = set()
        self.spread = 0.0

    @property
    def weight(self) -> float:
        return fsum(self.models.weights[i] for i in self.inside)

    @property
    def distance(self) -> float:
        return sqrt(self.spread / fsum(self.models.weights))

    @property
    def objective(self) -> float:
        """`sum_(i<j) w_i w_j <pi_i(theta_i), pi_j(theta_j)>`, when all are in it: by
        |sum_j w_j theta_j|^2 = W (sum_j w_j |theta_j|^2 - spread).
        """
        weights, squares = self.models.weights, self.models.squares
        total = fsum(weights) * (fsum(w * s for w, s in zip(weights, squares, strict=True)) - self.spread)
        return (total - fsum(w * w * s for w, s in zip(weights, squares, strict=True))) / 2

    def gather(self, permutations: Sequence[Permutation | None]) -> None:
        """Make it anew from the models, which ends the rounding of many additions and removals."""
        self.tensors, self.inside, self.spread = {}, set(), 0.0
        for i, permutation in enumerate(permutations):
            if permutation is not None:
                self.add(i, permutation, measure=True)

    def add(self, i: int, permutation: Permutation, *, measure: bool = False) -> None:
        """Take model i in, in its arrangement `permutation`; with `measure` add to `spread`, too."""
        state, weight, old = self.models.open(i), self.models.weights[i], self.weight
        self.inside.add(i)
        total, apart = self.weight, []
        for name, key in self.models.keys.items():
            tensor = permutation.apply_to(name, state[key].detach().cpu())
            if old == 0:
                self.tensors[name] = tensor.to(_wide(tensor.dtype), copy=True)
                continue
            if measure and name not in self.models.spec.buffers:
                apart.append(_square(tensor, self.tensors[name]))
            # Not (W m + w x) / (W + w): the mean of equal tensors is to be these tensors, to the bit.
            self.tensors[name].lerp_(tensor.to(self.tensors[name].dtype), weight / total)
        self.spread += weight * old / total * fsum(apart)

    def remove(self, i: int, permutation: Permutation | None) -> None:
        """Take model i out, which is in it in the arrangement `permutation`; None: it is not, do nothing."""
        if permutation is None:
            return
        state = self.models.open(i)
        self.inside.remove(i)
        rest = self.weight
        if not rest:
            self.tensors = {}
        for name, mean in self.tensors.items():
            key = self.models.keys[name]
            tensor = permutation.apply_to(name, state[key].detach().cpu()).to(mean.dtype)
            mean.lerp_(tensor, -self.models.weights[i] / rest)


def _begin(spec: PermutationSpec, init: Start, n: int) -> list[Permutation | None]:
    """Each model's permutation, None for those that are to join in the first pass."""
    if isinstance(init, str):
        if init == "identity":
            return [spec.identity()] * n
        if init == "progressive":
            return [None] * n
        raise ConfigError(f"The init {init!r} is unknown: give 'identity', 'progressive' or permutations.")
    given = list(init)
    if len(given) > n:
        raise ConfigError(f"There are {len(given)} permutations to start from, but only {n} models.")
    for i, permutation in enumerate(given):
        if not spec.contains(permutation):
            raise SpecMismatchError(
                f"The permutation of states[{i}] to start from is none of this spec's: it was made for another"
                f" architecture, or breaks a block structure."
            )
    return [*given, *[None] * (n - len(given))]


def _moved(before: Permutation | None, after: Permutation) -> int:
    """How many neurons are at another place than before."""
    if before is None:
        return after.moved()
    return sum(int(np.count_nonzero(index != before.index[name])) for name, index in after.index.items())


def _match_options(match: Mapping[str, Any] | None) -> dict[str, Any]:
    options = dict(match or {})
    for name in options:
        if name not in OPTIONS:
            raise ConfigError(
                f"The matching of many models has no option {name!r}: it has {', '.join(OPTIONS)}."
            )
    if options.get("init", "identity") not in ("identity", "forward"):
        raise ConfigError(
            f"A matching among many starts at 'identity' or 'forward', not {options['init']!r}."
        )
    return options


def _fingerprint(
    models: _Models,
    init: Start,
    begin: Sequence[Permutation | None],
    order: Order,
    seed: int,
    start: str,
    options: Mapping[str, Any],
) -> dict[str, str]:
    """What a continued run must have in common with the interrupted one."""
    given = [p for p in begin if p is not None] if not isinstance(init, str) else []
    told = hashlib.sha256(b"".join(i.tobytes() for p in given for i in p.index.values())).hexdigest()
    chosen = {name: repr(options[name]) for name in sorted(options) if name in ("max_sweeps", "restarts")}
    inner = options.get("order", "random")
    return {
        "architecture": models.spec.hash,
        "models": repr(models.squares),
        "weights": repr(models.weights),
        "init": init if isinstance(init, str) else f"{len(given)} given {told}",
        "order": "a function" if callable(order) else order,
        "seed": str(seed),
        "match": repr({"init": start, "order": "a function" if callable(inner) else inner} | chosen),
    }


def _check_resumable(state: ManyState, options: Mapping[str, str]) -> None:
    for name, value in options.items():
        if state.options.get(name) != value:
            raise ConfigError(
                f"This merge can't be continued: its {name} differed; use the same or start afresh."
            )


def _layout(state: State, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
    # Lazy mappings tell both from the file's header.
    if hasattr(state, "dtype_of") and hasattr(state, "shape_of"):
        return state.dtype_of(name), tuple(state.shape_of(name))  # pyright: ignore[reportAttributeAccessIssue]
    tensor = state[name]
    return tensor.dtype, tuple(tensor.shape)


def _told(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {shape}"


def _is_number(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Where a mean is taken: at least float32. Integers stay what they are."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def _square(a: Tensor, b: Tensor | None = None) -> float:
    """|a|^2 or |a - b|^2, in float64, piece by piece."""
    if b is None:
        return fsum(float(x.double().square().sum()) for x in a.reshape(-1).split(CHUNK))
    pieces = zip(a.reshape(-1).split(CHUNK), b.reshape(-1).split(CHUNK), strict=True)
    return fsum(float((x.double() - y.double()).square().sum()) for x, y in pieces)
