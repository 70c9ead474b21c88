"""What the straight-through estimator returns: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ...spec import Permutation
from ...types import brief
from ..candidates import Tried
from ..result import Found


@brief
@dataclass(frozen=True)
class Step:
    """One step of the search; losses are at the midpoint, minus the mean of A's and B's on the same batches.

    Attributes:
        number: 0 is the start, at which there is a projection only.
        kind: "start", "step" (of the gradient, with a projection if there was one), or "pass" (over all groups,
            in the refinement at the end).
        train: on the batches of the step, before the step, or after the pass. None at the start.
        heldout: on the held-out batches, after the step. None where it was not measured.
        objective: the lowest of the held-out losses so far.
        moved: neurons that the step moved.
        gradient_norm: of the gradient by the auxiliary weights, before clipping; steps only.
        seconds_projection, seconds_gradient, seconds_scoring: wall time of its parts; a pass's verdicts are
            scoring.
    """

    number: int
    kind: Literal["start", "step", "pass"]
    train: float | None
    heldout: float | None
    objective: float
    moved: int
    gradient_norm: float | None
    seconds_projection: float
    seconds_gradient: float
    seconds_scoring: float

    @property
    def seconds(self) -> float:
        """Wall time of the step."""
        return self.seconds_projection + self.seconds_gradient + self.seconds_scoring


@brief
@dataclass(frozen=True)
class StraightThroughResult(Found):
    """An alignment of B to A: `permutation.apply(state_b)` is B brought to A.

    Losses are on the held-out batches, at the midpoint, minus the mean of A's and B's; lower is better.

    Attributes:
        permutation: the best that was found, at the step `best_step`; 0 is the start.
        objective: its loss; `start_objective` that of the start, `initial_objective` that of a naive merge.
        history: the start and every step.
        converged: the last fifth of the steps has brought no improvement.
        seconds: wall time; `seconds_start` (finding the start), `seconds_projection`, `seconds_gradient` and
            `seconds_scoring` are parts of it.
        endpoints: the held-out loss of A and of B.
        distance_before, distance_after: |A - B| and |A - pi(B)| over the parameters that the spec permutes.
        sweeps: of weight matching, in all projections together.
        tried: the candidates for the start, of `init="best"`.
    """

    permutation: Permutation
    objective: float
    history: tuple[Step, ...]
    converged: bool
    seconds: float
    best_step: int
    start_objective: float
    initial_objective: float
    endpoints: tuple[float, float]
    distance_before: float
    distance_after: float
    sweeps: int
    seconds_start: float
    seconds_projection: float
    seconds_gradient: float
    seconds_scoring: float
    tried: tuple[Tried, ...] = ()

    @property
    def restarts(self) -> tuple[float, ...]:
        """The objective of each attempt: there is one."""
        return (self.objective,)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "restarts": list(self.restarts)}
