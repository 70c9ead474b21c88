"""Whichever alignment merges best, of all that are cheap to find, and never one that is worse than not aligning.

    for each candidate pi(B): nothing, weights, activations (statistics and places that differ), both
        loss(pi) = max over lambda of  L((1 - lambda) A + lambda pi(B)) - [(1 - lambda) L(A) + lambda L(B)]
    the pi with the smallest loss

L is the objective on batches that no candidate has learned from and that no report should use. What is compared is the
barrier itself at a few lambdas, since a report shows the barrier: a candidate that is best at the midpoint alone may
have a hill beside it. Below zero it still tells merges apart that are better than the line between their ends. Not
aligning is the first candidate and keeps its place unless another is strictly lower, so the result is never worse than
naive by this measure; on other data it can be, by the noise of the batches that select.

Where asked, the straight-through estimator and learned maps (`auto_alignment`) join in, from the best so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import nn

from ..arguments import Count, Seed, typed
from ..errors import DataError
from ..objectives import LossFunction, Objective
from ..spec import Alignment, Permutation, PermutationSpec
from ..tensors.modules import device_of, find_device
from ..types import Progress, ProgressEvent, brief, tell, within
from .candidates import Comparison, Tried, candidate, candidates
from .maps.learned import learned_matching
from .maps.matching import MapsResult
from .maps.result import LearnedState
from .naive import measured
from .result import MatchResult
from .resume_state import ResumeState
from .straight_through.draws import few, split
from .straight_through.estimator import straight_through
from .straight_through.midpoint import Ends
from .straight_through.state import StraightThroughState, fingerprint
from .weights.matching import weight_matching

NAIVE, STE, LEARNED = "naive", "straight_through", "learned"


@brief
@dataclass(frozen=True)
class AutoResult(MatchResult):
    """The best of several alignments; the fields of `MatchResult`, with these differences:

    `objective` and `initial_objective` are the largest losses above the line between the ends on the batches that
    select, of the chosen one and of naive: lower is better. There is no history. `restarts` has the chosen one's alone.

    Attributes:
        chosen: the name of the best.
        tried: all candidates, in the order in which they were compared.
        points: at so many lambdas between the ends; 0: there was no data, nobody has looked at what a merge computes.
        endpoints: the losses of A and B on these batches.
    """

    chosen: str = field(kw_only=True)
    tried: tuple[Tried, ...] = field(kw_only=True)
    points: Count = field(kw_only=True)
    endpoints: tuple[float, float] = field(default=(math.nan, math.nan), kw_only=True)


@brief
@dataclass(frozen=True)
class AutoMapsResult(AutoResult, MapsResult):
    """The same where maps were among the candidates; `alignment` has some if they were best."""


@brief
@dataclass(frozen=True, eq=False)
class AutoState(ResumeState):
    """Where a comparison stands after a candidate, or within a search; given to `resume_from`, it ends as if never
    interrupted.

    Attributes:
        options: what must not change between interruption and continuation, weights and batches included.
        candidates, tried: what was found and how good it is, as far as it is compared.
        search, learning: where the straight-through estimator, or learning maps, stands.
        seconds: wall time so far.
    """

    called: ClassVar[str] = "comparison of alignments"

    candidates: tuple[Permutation, ...] = ()
    tried: tuple[Tried, ...] = ()
    search: StraightThroughState | None = None
    learning: LearnedState | None = None
    seconds: float = 0.0


@typed
def auto_matching(
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    objective: Objective | LossFunction | None = None,
    batches: Sequence[Any] = (),
    *,
    heldout: Sequence[Any] | None = None,
    points: Count = 3,
    samples: Count = 4000,
    ste: bool = False,
    search_steps: Count | None = None,
    seed: Seed = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    checkpoint: Callable[[AutoState], None] | None = None,
    resume_from: AutoState | None = None,
) -> AutoResult:
    """Find the alignment of B to A whose line of models is best, of several; never one that is worse than none.

    A candidate that can't be found is left out, and `tried` has the sentence of its error. Without batches weight
    matching is all there is, and `points` is 0: nobody has looked at what the merge computes. Models run in eval mode
    and are left as they were.

    Args:
        spec: the architecture's symmetries.
        model_a, model_b: the endpoints, of one architecture.
        objective: what good means; see `rebasin.objectives`. A function (model, batch) -> loss will do.
        batches: of the objective.
        heldout: more of them, by which the candidates are compared. Default: the last fifth of `batches`, which the
            candidates then do not see (a single batch has to do for both). Data that results are reported on belongs in
            neither.
        points: how many lambdas between the ends the loss is looked at, equally spaced; 1 is the midpoint.
        samples: the activations of so many samples are looked at.
        ste: let the straight-through estimator go on from the best and join in, which takes minutes.
        search_steps: its gradient steps, and those of learned maps; None: their own defaults.
        seed: of all that is drawn.
        device: where to compute; default: where `model_a` is.
        progress: called after each candidate with stage, step, total, objective (the best so far), moved, seconds and
            the best permutation so far as `permutation`, and by the searches.
        checkpoint: called after each candidate, and within searches, with an `AutoState` that can be saved.
        resume_from: such a state; the end is that of the uninterrupted comparison.

    Raises:
        SpecMismatchError, CheckpointError: models and spec do not go together.
        ConfigError: an option, or the state to continue from, does not fit.
        DataError: the loss of A or B is not a finite number.
    """
    found = _best(False, **locals())
    return AutoResult(**found)


@typed
def auto_alignment(
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    objective: Objective | LossFunction | None = None,
    batches: Sequence[Any] = (),
    *,
    heldout: Sequence[Any] | None = None,
    points: Count = 3,
    samples: Count = 4000,
    ste: bool = False,
    search_steps: Count | None = None,
    seed: Seed = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    checkpoint: Callable[[AutoState], None] | None = None,
    resume_from: AutoState | None = None,
) -> AutoMapsResult:
    """`auto_matching` with learned maps among the candidates, which go on from the best permutation.

    Args:
        Those of `auto_matching`.

    Raises:
        What `auto_matching` raises. A spec without maps is told in `tried`.
    """
    found = _best(True, **locals())
    return AutoMapsResult(**found)


def _best(
    learned: bool,
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    objective: Any,
    batches: Sequence[Any],
    heldout: Sequence[Any] | None,
    points: int,
    samples: int,
    ste: bool,
    search_steps: int | None,
    seed: int,
    device: torch.device | str | None,
    progress: Progress | None,
    checkpoint: Callable[[AutoState], None] | None,
    resume_from: AutoState | None,
) -> dict[str, Any]:
    """The fields of the result."""
    given, began = dict(locals()), perf_counter()
    where = device_of(model_a) if device is None else find_device(device)
    if objective is None or not batches:
        return _unseen(learned, spec, model_a, model_b, seed, where, progress)
    learn, select = split(batches, heldout)
    ends = Ends(spec, model_a, model_b, objective, where)
    options: dict[str, str] = {}
    if checkpoint is not None or resume_from is not None:
        options = fingerprint(ends, objective, [list(learn), list(select)], given)
    last = AutoState(options) if resume_from is None else resume_from
    last.require(options)
    began -= last.seconds
    still = spec.identity()

    with ends.ready(False):
        losses = ends.endpoints(select)
        if not math.isfinite(sum(losses)):
            raise DataError(
                f"The losses of A and B are {losses[0]:.4g} and {losses[1]:.4g} on the batches that select: they must"
                " be finite numbers."
            )

        def above(found: Permutation | Alignment) -> float:
            """The largest loss above the line between the ends; not a number if one on it is not."""
            shares = [(k + 1) / (points + 1) for k in range(points)]
            line = [(1 - share) * losses[0] + share * losses[1] for share in shares]
            seen = [ends.evaluate(ends.between(found, share), select) for share in shares]
            excess = [loss - level for loss, level in zip(seen, line, strict=True)]
            return max(excess) if all(map(math.isfinite, excess)) else math.nan

        compared = Comparison(above, last.candidates, last.tried)

        def keep(**inside: Any) -> None:
            if checkpoint is not None:
                now = tuple(compared.found), tuple(compared.tried)
                checkpoint(AutoState(options, *now, **inside, seconds=perf_counter() - began))

        def search(function: Callable[..., Any], state: Any, kept: str, init: Permutation) -> Any:
            """What a search by the loss finds from `init` on."""

            def listen(event: ProgressEvent) -> None:
                if progress is not None:
                    progress(within(event, f"candidate {len(compared.tried) + 1}, {event['stage']}"))

            more: dict[str, Any] = {} if search_steps is None else {"steps": search_steps}
            told = None if checkpoint is None else lambda now: keep(**{kept: now})
            return function(
                spec, model_a, model_b, objective, learn, heldout=select, init=init, seed=seed, device=where,
                progress=listen, checkpoint=told, resume_from=state, **more,
            ).as_alignment  # fmt: skip

        def all_candidates() -> Iterator[tuple[str, Callable[[], Any]]]:
            data = spec, model_a, model_b, objective, few(learn, samples), seed, where
            for name in candidates():
                shown = NAIVE if name == "identity" else str(name)
                yield shown, partial(candidate, name, *data)
            if ste:
                yield STE, lambda: search(straight_through, last.search, "search", best()).permutation
            if learned:
                yield LEARNED, lambda: search(learned_matching, last.learning, "learning", best())

        def best() -> Any:
            return compared.found[compared.best]

        plan = list(all_candidates())
        for name, make in plan[len(compared.tried) :]:
            compared.add(name, make, still)
            tell(
                progress, "candidates", len(compared.tried), len(plan), moved=best().moved(), permutation=best(),
                objective=compared.tried[compared.best].loss, seconds=perf_counter() - began,
            )  # fmt: skip
            if name != LEARNED:  # the last, whose maps a state need not hold
                keep()
        naive = compared.tried[0].loss
        chosen = compared.tried[compared.best]

    about = {"chosen": chosen.name, "tried": tuple(compared.tried), "points": points, "endpoints": losses}
    figures = _figures(learned, measured(best(), ends.a, ends.b)) | about
    return figures | {
        "objective": chosen.loss,
        "initial_objective": naive,
        "restarts": (chosen.loss,),
        "seconds": perf_counter() - began,
    }


def _unseen(
    learned: bool,
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    seed: int,
    device: torch.device,
    progress: Progress | None,
) -> dict[str, Any]:
    """Without data: what weight matching finds, which nobody has looked at."""
    found = weight_matching(
        spec, model_a.state_dict(), model_b.state_dict(), seed=seed, device=device, progress=progress
    )
    tried = (Tried("weight_matching", math.nan, found.moved, found.seconds),)
    return _figures(learned, found) | {"chosen": "weight_matching", "tried": tried, "points": 0}


def _figures(learned: bool, found: MatchResult) -> dict[str, Any]:
    """The fields that a result with maps, or without, has in common with one that was found."""
    names = replace(found).__dataclass_fields__
    own = {name: getattr(found, name) for name in names if name != "alignment"}
    return own | ({"alignment": found.as_alignment} if learned else {})
