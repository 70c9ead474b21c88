"""What Sinkhorn re-basin returns, and what it needs to go on after an interruption: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ...spec import Permutation
from ...types import brief
from ..result import Found
from ..resume_state import ResumeState
from ..straight_through.best_seen import Seen
from ..straight_through.result import Step


@brief
@dataclass(frozen=True)
class SinkhornResult(Found):
    """An alignment of B to A: `permutation.apply(state_b)` is B brought to A.

    Losses are on the held-out batches, at the midpoint, minus the mean of A's and B's; lower is better.

    Attributes:
        permutation: the best that was found, at the step `best_step`; 0 is the start.
        objective: its loss; `start_objective` that of the start, `initial_objective` that of a naive merge.
        history: the start and every step.
        certainty: group -> the mean over neurons of the largest share that anything has in them, in the last soft
            permutation: 1 is a permutation, 1 / n says nothing.
        seconds: wall time; `seconds_start`, `seconds_gradient` and `seconds_scoring` are parts of it.
        endpoints: the held-out loss of A and of B.
        distance_before, distance_after: |A - B| and |A - pi(B)| over the parameters that the spec permutes.
    """

    permutation: Permutation
    objective: float
    history: tuple[Step, ...]
    best_step: int
    start_objective: float
    initial_objective: float
    endpoints: tuple[float, float]
    certainty: Mapping[str, float]
    distance_before: float
    distance_after: float
    seconds: float
    seconds_start: float
    seconds_gradient: float
    seconds_scoring: float

    sweeps: ClassVar[int] = 0

    @property
    def converged(self) -> bool:
        """Nothing better was found in the last fifth of the steps."""
        return self.best_step <= 0.8 * (len(self.history) - 1)

    @property
    def restarts(self) -> tuple[float, ...]:
        """The objective of each attempt: there is one."""
        return (self.objective,)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "restarts": list(self.restarts), "converged": self.converged}


@brief
@dataclass(frozen=True, eq=False)
class SinkhornState(ResumeState):
    """Where the search stands after the start or a step; given to `resume_from`, it ends as if never interrupted.

    The tensors are those that the search goes on to change: save the state before the callback that got it returns.

    Attributes:
        options: what must not change between interruption and continuation, weights and batches included.
        seen: the best so far, and the history.
        learned: X of every cell, and the moments of its optimiser.
        draws: how many batches were drawn.
        seconds: wall time so far.
    """

    called: ClassVar[str] = "Sinkhorn re-basin"

    seen: Seen | None = None
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    draws: int = 0
    seconds: float = 0.0
