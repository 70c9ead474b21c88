"""No alignment: the baseline that every method is compared with."""

from __future__ import annotations

from typing import Any

from ..arguments import typed
from ..spec import Alignment, Permutation, PermutationSpec
from ..types import State
from .maps.matching import MapsResult
from .result import MatchResult
from .weights.endpoints import Endpoints


@typed
def naive(spec: PermutationSpec, state_a: State, state_b: State) -> MatchResult:
    """No alignment: the identity, with the figures that other methods are compared with."""
    return measured(spec.identity(), state_a, state_b)


def measured(found: Permutation | Alignment, state_a: State, state_b: State) -> MatchResult:
    """The result that a permutation or an alignment makes, whatever found it: weight matching's figures of it."""
    whole = Alignment.of(found) if isinstance(found, Permutation) else found
    pair = Endpoints(found.spec, state_a, state_b)
    before = pair.objective, pair.distance
    if whole.maps:
        pair = Endpoints(found.spec, state_a, whole.view(state_b))
    else:
        pair.set(whole.permutation)
    figures: dict[str, Any] = {
        "permutation": whole.permutation,
        "objective": pair.objective,
        "history": (),
        "converged": True,
        "seconds": 0.0,
        "initial_objective": before[0],
        "distance_before": before[1],
        "distance_after": pair.distance,
        "restarts": (pair.objective,),
    }
    return MapsResult(**figures, alignment=whole) if whole.maps else MatchResult(**figures)
