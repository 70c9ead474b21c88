"""No alignment: the baseline that every method is compared with."""

from __future__ import annotations

from ..arguments import typed
from ..spec import PermutationSpec
from ..types import State
from .result import MatchResult
from .weights.endpoints import Endpoints


@typed
def naive(spec: PermutationSpec, state_a: State, state_b: State) -> MatchResult:
    """No alignment: the identity, with the figures that other methods are compared with."""
    pair = Endpoints(spec, state_a, state_b)
    return MatchResult(
        permutation=spec.identity(),
        objective=pair.objective,
        history=(),
        converged=True,
        seconds=0.0,
        initial_objective=pair.objective,
        distance_before=pair.distance,
        distance_after=pair.distance,
        restarts=(pair.objective,),
    )
