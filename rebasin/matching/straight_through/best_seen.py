"""What a search that looks at the loss remembers: the best permutation it has seen, its history, where time went."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Literal

from ...errors import DataError
from ...spec import Permutation
from ...types import Progress, ProgressEvent
from .midpoint import Ends
from .result import Step

PARTS = ("start", "projection", "gradient", "scoring")


class BestSeen:
    """Scores permutations on held-out batches, keeps the best, and tells the listener.

    Scores are losses at the midpoint minus the mean of the endpoints' losses.

    Attributes:
        best, objective, best_step: the permutation with the lowest score, that score, and when it came.
        endpoints: the losses of A and B; `naive` and `first` are the scores without a permutation and of the start.
        scored_at: the last step that was scored.
        seconds: wall time by PARTS.
    """

    def __init__(
        self,
        ends: Ends,
        heldout: Sequence[Any],
        total: int,
        progress: Progress | None,
    ) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.history: list[Step] = []
        self._began, self._before = perf_counter(), dict(self.seconds)
        self._ends, self._heldout, self._total, self._progress = ends, heldout, total, progress
        with self.clock("scoring"):
            self.endpoints = ends.endpoints(heldout)
            self.naive = self.score(ends.spec.identity())
        if not math.isfinite(sum(self.endpoints) + self.naive):
            raise DataError(
                f"The losses of A, B and their midpoint are {self.endpoints[0]:.4g}, {self.endpoints[1]:.4g} and"
                f" {self.naive + sum(self.endpoints) / 2:.4g} on the held-out batches: they must be finite numbers."
            )

    def score(self, permutation: Permutation) -> float:
        loss = self._ends.evaluate(self._ends.midpoint(permutation), self._heldout)
        return loss - sum(self.endpoints) / 2

    def start(self, permutation: Permutation) -> None:
        """The first candidate."""
        self.best = self._scored = permutation
        with self.clock("scoring"):
            self.objective = self.first = self.naive if permutation.is_identity else self.score(permutation)
        self.best_step = self.scored_at = 0
        self._lap()

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
        number = len(self.history)
        heldout = self.first if number == 0 else None
        if due and permutation != self._scored:
            with self.clock("scoring"):
                heldout = self.score(permutation)
            self._scored, self.scored_at = permutation, number
            if heldout < self.objective:  # never true of a loss that is not a number
                self.best, self.objective, self.best_step = permutation, heldout, number
        self.history.append(Step(number, kind, train, heldout, self.objective, moved, norm, *self._lap()))
        if self._progress is not None:
            self._progress(self._event(self.history[-1]))

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Add the block's wall time to `seconds[part]`."""
        began = perf_counter()
        yield
        self.seconds[part] += perf_counter() - began

    def _lap(self) -> tuple[float, float, float]:
        """Seconds of projection, gradient and scoring since the last call."""
        since = {part: seconds - self._before[part] for part, seconds in self.seconds.items()}
        self._before = dict(self.seconds)
        return since["projection"], since["gradient"], since["scoring"]

    def _event(self, step: Step) -> ProgressEvent:
        return ProgressEvent(
            "straight-through" if step.kind != "pass" else "straight-through, refinement",
            step.number,
            self._total,
            objective=step.objective,
            loss=step.train,
            heldout=step.heldout,
            moved=step.moved,
            seconds=perf_counter() - self._began,
            seconds_projection=step.seconds_projection,
            seconds_gradient=step.seconds_gradient,
            permutation=self.best,
        )
