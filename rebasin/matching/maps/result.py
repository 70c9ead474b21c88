"""What learned matching returns, and what it needs to go on after an interruption: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from ...arguments import typed
from ...spec import Alignment, Permutation
from ...types import State, brief
from ..result import Found
from ..resume_state import ResumeState


@brief
@dataclass(frozen=True)
class LearnedStep:
    """One step; losses are between the ends, minus the mean of the endpoints' on the same batches.

    Attributes:
        number: 0 is the start.
        kind: "start" or "step".
        train: at the share of B that the step drew, on its batch, before it. None at the start.
        heldout: on the held-out batches, after the step. None where it was not measured.
        objective: the lowest of the held-out losses so far.
        turned: how far the maps are from the identity, the mean over groups of |M - I| / sqrt(n), as
            it was when it was last measured.
        seconds: wall time of the step.
    """

    number: int
    kind: Literal["start", "step"]
    train: float | None
    heldout: float | None
    objective: float
    turned: float
    seconds: float


@brief
@dataclass(frozen=True, eq=False)
class LearnedResult(Found):
    """What was learned: `alignment.apply(state_b)` is B brought to A; A stays where it is.

    Losses are on the held-out batches, in the middle of the range that lambda was drawn from, by default the midpoint,
    minus the line between A's and B's; lower is better. Of a range wider than 0.2: the worst at a quarter, half and
    three quarters of it (at nine shares of it where the worst was learned).

    Attributes:
        alignment: what moves B; it changes nothing of what B computes.
        start: the permutation that was started from; None: from maps.
        objective: its loss; `start_objective` that of the start, `initial_objective` that of a naive merge.
        endpoints: the losses of A and B there.
        history: the start and every step; `best_step` is the one that is returned (0: the start).
        turned: group -> how far its map is from the identity, |M - I| / sqrt(n).
        left_out: continuous groups that could not be moved, and why.
        distance_before, distance_after: |A - B| and |A - B aligned| over all that the spec moves.
        seconds: wall time; `seconds_start`, `seconds_gradient` and `seconds_scoring` are parts of it.
    """

    alignment: Alignment
    start: Permutation | None
    objective: float
    start_objective: float
    initial_objective: float
    endpoints: tuple[float, float]
    history: tuple[LearnedStep, ...]
    best_step: int
    turned: Mapping[str, float]
    left_out: Mapping[str, str]
    distance_before: float
    distance_after: float
    seconds: float
    seconds_start: float
    seconds_gradient: float
    seconds_scoring: float

    sweeps: ClassVar[int] = 0

    @property
    def permutation(self) -> Permutation:  # type: ignore[override]
        return self.alignment.permutation

    @property
    def as_alignment(self) -> Alignment:
        return self.alignment

    @property
    def alignment_a(self) -> Alignment:
        """What moves A: nothing, see `learned_matching`."""
        return Alignment.of(self.alignment.spec.identity())

    @property
    def alignment_b(self) -> Alignment:
        return self.alignment

    @property
    def converged(self) -> bool:
        """Nothing better was found in the last fifth of the steps."""
        return self.best_step <= 0.8 * (len(self.history) - 1)

    @property
    def restarts(self) -> tuple[float, ...]:
        """The objective of each attempt: there is one."""
        return (self.objective,)

    @typed
    def apply(self, state_a: State, state_b: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A as it is and B moved, so that their mean computes well.

        Raises:
            SpecMismatchError: one of them is of another architecture.
        """
        self.alignment.spec.check(state_a, "A")
        return dict(state_a), self.alignment.apply(state_b)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "converged": self.converged, "restarts": list(self.restarts)}


@brief
@dataclass(frozen=True)
class Learned:
    """What was learned so far.

    Attributes:
        endpoints, naive: the losses of A and B, and what the plain line between them has above theirs.
        first, objective, best_step: the start's loss, the lowest so far, and the step that it came with.
        as_given: whether the start is better as it was given than with B's norms brought to A's gains.
        history: the start and the steps.
    """

    endpoints: tuple[float, float]
    naive: float
    first: float
    objective: float
    best_step: int = 0
    history: tuple[LearnedStep, ...] = ()
    as_given: bool = False


@brief
@dataclass(frozen=True, eq=False)
class LearnedState(ResumeState):
    """Where learning stands after the start or a step; given to `resume_from`, it ends as if never interrupted.

    The tensors are those that the search goes on to change: save the state before the callback that got it returns.

    Attributes:
        options: what must not change between interruption and continuation, weights and batches included.
        start, gauge: the permutation that was started from, and the maps, float64, norms brought to A's gains.
        given: the maps of the start as it was given.
        seen: what was learned so far; None: nothing yet.
        latents: what is learned, and the moments of its optimiser (see `Latents.tensors`).
        kept: group -> what was learned at the best step.
        draws: how many batches were drawn.
        told: where the line was how high (`Shares.told`).
        seconds: wall time by part.
    """

    called: ClassVar[str] = "learned matching"

    start: Permutation | None = None
    gauge: Mapping[str, Tensor] = field(default_factory=dict)
    given: Mapping[str, Tensor] = field(default_factory=dict)
    seen: Learned | None = None
    latents: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    draws: int = 0
    told: tuple[float, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
