"""No alignment: the baseline that every method is compared with."""

from __future__ import annotations

from ..arguments import typed
from ..spec import Permutation, PermutationSpec
from ..types import State
from .result import MatchResult
from .weights.endpoints import Endpoints


@typed
def naive(spec: PermutationSpec, state_a: State, state_b: State) -> MatchResult:
    """No alignment: the identity, with the figures that other methods are compared with."""
    return measured(spec.identity(), state_a, state_b)


def measured(permutation: Permutation, state_a: State, state_b: State) -> MatchResult:
    """The result that a permutation makes, whatever found it: weight matching's figures of it."""
    pair = Endpoints(permutation.spec, state_a, state_b)
    before = pair.objective, pair.distance
    pair.set(permutation)
    return MatchResult(
        permutation=permutation,
        objective=pair.objective,
        history=(),
        converged=True,
        seconds=0.0,
        initial_objective=before[0],
        distance_before=before[1],
        distance_after=pair.distance,
        restarts=(pair.objective,),
    )
