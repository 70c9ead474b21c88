"""What a search that looks at the loss remembers: the best permutation it has seen, its history, where time went."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal

from ...errors import DataError
from ...spec import Permutation
from ...types import Progress, tell
from .midpoint import Ends
from .result import Step

SETTLED = 0.2
"""A search that found nothing better in this last share of its steps is called converged."""

PARTS = ("start", "projection", "gradient", "scoring")


@dataclass(frozen=True)
class Seen:
    """What was seen so far. Scores are losses at the midpoint minus the mean of the endpoints' losses.

    Attributes:
        endpoints: the losses of A and B; `naive` and `first` are the scores without a permutation and of the start.
        best, objective, best_step: the permutation with the lowest score, that score, and when it came.
        scored, scored_at: the permutation that was scored last, and when.
        history: the start and the steps; `seconds`: their wall time by PARTS.
    """

    endpoints: tuple[float, float]
    naive: float
    first: float
    best: Permutation
    objective: float
    scored: Permutation
    seconds: Mapping[str, float]
    best_step: int = 0
    scored_at: int = 0
    history: tuple[Step, ...] = ()


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the block's wall time to a part."""
    began = perf_counter()
    yield
    seconds[part] += perf_counter() - began


class BestSeen:
    """Scores permutations on held-out batches, keeps the best, and tells the listener.

    Attributes:
        now: what was seen so far; `lap` is the wall time by PARTS that is not in it yet.
    """

    def __init__(
        self,
        ends: Ends,
        heldout: Sequence[Any],
        total: int,
        began: float,
        progress: Progress | None,
        seen: Seen | None = None,
        stage: str = "straight-through",
    ) -> None:
        """Look at the endpoints and at the naive midpoint, or go on from what an interrupted search has `seen`.

        Raises:
            DataError: a loss is not a finite number.
        """
        self._ends, self._heldout, self._total = ends, heldout, total
        self._began, self._progress, self._stage = began, progress, stage
        self.lap: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        if seen is not None:
            self.now = seen
            return
        identity = ends.spec.identity()
        with self.clock("scoring"):
            losses = ends.endpoints(heldout)
            middle = ends.evaluate(ends.midpoint(identity), heldout)
        if not math.isfinite(sum(losses) + middle):
            raise DataError(
                f"The losses of A, B and their midpoint are {losses[0]:.4g}, {losses[1]:.4g} and {middle:.4g} on the"
                " held-out batches: they must be finite numbers."
            )
        naive = middle - sum(losses) / 2
        self.now = Seen(losses, naive, naive, identity, naive, identity, self._lapped())

    def score(self, permutation: Permutation) -> float:
        loss = self._ends.evaluate(self._ends.midpoint(permutation), self._heldout)
        return loss - sum(self.now.endpoints) / 2

    def start(self, permutation: Permutation) -> None:
        """The first candidate."""
        with self.clock("scoring"):
            first = self.now.naive if permutation.is_identity else self.score(permutation)
        found = {"best": permutation, "scored": permutation, "first": first, "objective": first}
        self.now = replace(self.now, **found, seconds=self._lapped(self.now.seconds))

    def step(
        self,
        kind: Literal["start", "step", "pass"],
        permutation: Permutation,
        due: bool,
        train: float | None,
        moved: int,
        norm: float | None = None,
    ) -> None:
        """Note a step that led to `permutation`, which is scored if that is due and it is not the last one scored."""
        now, number = self.now, len(self.now.history)
        heldout = now.first if number == 0 else None
        if due and permutation != now.scored:
            with self.clock("scoring"):
                heldout = self.score(permutation)
            now = replace(now, scored=permutation, scored_at=number)
            if heldout < now.objective:  # never true of a loss that is not a number
                now = replace(now, best=permutation, objective=heldout, best_step=number)
        times = {f"seconds_{part}": self.lap[part] for part in PARTS[1:]}
        step = Step(number, kind, train, heldout, now.objective, moved, norm, **times)
        self.now = replace(now, history=(*now.history, step), seconds=self._lapped(now.seconds))
        stage = self._stage if kind != "pass" else f"{self._stage}, refinement"
        told = {"objective": now.objective, "loss": train, "heldout": heldout, "moved": moved}
        told |= {"seconds": perf_counter() - self._began, "permutation": now.best}
        del times["seconds_scoring"]
        tell(self._progress, stage, number, self._total, **told, **times)

    def clock(self, part: str) -> AbstractContextManager[None]:
        return timed(self.lap, part)

    def _lapped(self, before: Mapping[str, float] | None = None) -> Mapping[str, float]:
        """The times up to now; the next lap begins."""
        total = {part: seconds + (before or {}).get(part, 0.0) for part, seconds in self.lap.items()}
        self.lap = dict.fromkeys(PARTS, 0.0)
        return total
