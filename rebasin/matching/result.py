"""What matching returns, and what it needs to continue after an interruption: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, ClassVar

import numpy as np

from ..spec import Alignment, Permutation, displaced
from ..types import brief
from .resume_state import ResumeState


class Found:
    """What all results have that found how B comes to A: a permutation, with maps or without."""

    permutation: Permutation

    @property
    def as_alignment(self) -> Alignment:
        """What brings B to A, with maps if there are any."""
        return Alignment.of(self.permutation)

    @property
    def moved(self) -> int:
        """Neurons that are not where they were in B."""
        return self.permutation.moved()

    @property
    def moved_per_group(self) -> dict[str, int]:
        """The same by group name; groups of one name are added up."""
        moved: dict[str, int] = {}
        for group in self.permutation.spec:
            own = displaced(self.permutation.index[cell.name] for cell in group.cells)
            moved[group.name] = moved.get(group.name, 0) + own
        return moved

    def to_dict(self) -> dict[str, Any]:
        """Everything but permutation and maps, as JSON can have it."""
        return {
            **plain(self, "permutation", "alignment", "start"),
            "moved": self.moved,
            "moved_per_group": self.moved_per_group,
        }


def moved_between(before: Permutation | None, after: Permutation) -> int:
    """How many neurons are at another place than before; None: than without a permutation."""
    if before is None:
        return after.moved()
    return sum(int(np.count_nonzero(index != before.index[cell])) for cell, index in after.index.items())


def plain(result: Any, *without: str) -> dict[str, Any]:
    """The fields of a result, but those `without`, as JSON can have them."""
    return {f.name: _plain(getattr(result, f.name)) for f in fields(result) if f.name not in without}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Update:
    """One group's update: what the objective gained (never negative) and how many neurons changed place."""

    group: str
    gain: float
    moved: int


@brief
@dataclass(frozen=True)
class Sweep:
    """One pass over the groups; number 0 is the start. `updates` has the groups that had to be looked at.

    `objective` and `moved` (neurons not where they were in B) are those at its end, `seconds` is its own
    time.
    """

    number: int
    objective: float
    moved: int
    updates: tuple[Update, ...] = ()
    seconds: float = 0.0


@brief
@dataclass(frozen=True)
class MatchResult(Found):
    """An alignment of B to A: `permutation.apply(state_b)` is B brought to A.

    Attributes:
        permutation: the best that was found.
        objective: `sum w <A, pi(B)>` over the parameters that the spec permutes; w is 1 as the paper has it, else the
            weights that `normalize` gives each of them.
        history: the sweeps of the attempt that found it.
        converged: no single group can be improved any more: each was looked at after the last change of what
            its costs depend on. False if `max_sweeps` ended the search.
        seconds: wall time, including that before an interruption.
        initial_objective, distance_before: without a permutation, as a naive merge would have it.
        distance_before, distance_after: |A - B| and |A - pi(B)| over the same parameters (never normalised).
        restarts: the objective that each attempt reached, in order.
    """

    permutation: Permutation
    objective: float
    history: tuple[Sweep, ...]
    converged: bool
    seconds: float
    initial_objective: float
    distance_before: float
    distance_after: float
    restarts: tuple[float, ...]

    @property
    def sweeps(self) -> int:
        """How many sweeps the history has, the start not counted."""
        return max(0, len(self.history) - 1)

    @property
    def spread(self) -> float:
        """The difference between the best and the worst restart's objective: how far the end depends on
        chance.
        """
        return max(self.restarts) - min(self.restarts)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "sweeps": self.sweeps, "spread": self.spread}


@dataclass(frozen=True)
class Attempt:
    """One descent, finished or not."""

    permutation: Permutation
    objective: float
    history: tuple[Sweep, ...]
    converged: bool


@brief
@dataclass(frozen=True)
class MatchState(ResumeState):
    """Where matching stands after a finished sweep; given to `resume_from`, it ends as if never interrupted.

    Attributes:
        options: what must not change between interruption and continuation, weights included.
        current: the descent under way.
        dirty: the numbers of the groups that are still to be looked at.
        finished: the objectives of the restarts done before it, and `best` the best of these.
        seconds: wall time so far.
    """

    called: ClassVar[str] = "matching"

    current: Attempt
    dirty: tuple[int, ...]
    finished: tuple[float, ...] = ()
    best: Attempt | None = None
    seconds: float = 0.0
