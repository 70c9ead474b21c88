"""What the straight-through estimator needs to go on after an interruption."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, ClassVar

from torch import Tensor

from ...spec import Permutation
from ...types import brief
from ..candidates import Tried
from ..resume_state import ResumeState, digest_of, told
from .best_seen import Seen
from .loss_descent import Pass
from .midpoint import Ends


@brief
@dataclass(frozen=True, eq=False)
class StraightThroughState(ResumeState):
    """Where the search stands after a candidate for the start, a step or a pass; given to `resume_from`, it ends as if
    never interrupted.

    The tensors are those that the search goes on to change: save the state before the callback that got it returns.

    Attributes:
        options: what must not change between interruption and continuation, weights and batches included.
        candidates: for the start, as far as they are found; `tried` says how good each is.
        seen: the best so far, and the history; None before anything was looked at.
        permutation: pi of the last step; None: the start is yet to be chosen.
        auxiliary: w and the moments of its optimisers (see `Auxiliary.tensors`); none once the steps are done.
        duals: of the last projection's assignments (see `Projector.tensors`), along with these.
        draws: how many lists of batches were drawn.
        sweeps: of weight matching, in all projections together.
        refined: the last pass of the refinement.
        seconds: wall time so far.
    """

    called: ClassVar[str] = "straight-through search"

    candidates: tuple[Permutation, ...] = ()
    tried: tuple[Tried, ...] = ()
    seen: Seen | None = None
    permutation: Permutation | None = None
    auxiliary: Mapping[str, Tensor] = field(default_factory=dict)
    duals: Mapping[str, Tensor] = field(default_factory=dict)
    draws: int = 0
    sweeps: int = 0
    refined: Pass | None = None
    seconds: float = 0.0


ELSEWHERE = {"spec", "model_a", "model_b", "objective", "batches", "heldout"}
ELSEWHERE |= {"checkpointing", "device", "progress", "checkpoint", "resume_from"}


def fingerprint(ends: Ends, objective: Any, batches: Any, given: Mapping[str, Any]) -> dict[str, str]:
    """What a continued search must have in common with the interrupted one: all that was `given` but where it is
    computed and who is told, and what is looked at more closely here.
    """
    own = getattr(objective, "given", objective)
    return {
        "architecture": ends.spec.hash,
        "weights": digest_of([ends.a, ends.b]),
        "objective": f"{getattr(own, '__qualname__', type(own).__qualname__)} {_digest_of_objective(own)[:12]}",
        "batches": digest_of(batches),
        **{name: told(value) for name, value in given.items() if name not in ELSEWHERE},
    }


def _digest_of_objective(own: Any) -> str:
    """Of a function its code, of an object its plain values and tensors; what they refer to elsewhere is not seen."""
    code = getattr(own, "__code__", None)
    return digest_of(dict(getattr(own, "__dict__", {})) if code is None else list(_plain(code)))


def _plain(code: CodeType) -> Iterator[Any]:
    """What a function's code is made of, without addresses in memory: the same in another process."""
    yield from (code.co_code.hex(), *code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _plain(constant)
        elif isinstance(constant, frozenset):  # in an order that each process has its own of
            yield from sorted(map(repr, constant))
        else:
            yield repr(constant)
