"""Whether matchings of pairs agree: going from model to model around a circle should lead back to where one began."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from math import fsum

from ...arguments import typed
from ...errors import ConfigError, shown
from ...spec import Permutation
from ..result import moved_between


@typed
def cycle_error(pairs: Mapping[tuple[int, int], Permutation]) -> float:
    """How far matchings of all pairs contradict each other: the mean share of neurons, 0 to 1, that end elsewhere
    when brought from k over j to i instead of directly.

    Raises:
        ConfigError: a pair is missing.

    Args:
        pairs: (i, j), all i != j -> the permutation that brings j to i. Those of one arrangement for all,
            `p_i.invert().compose(p_j)`, give 0.
    """
    if odd := [pair for pair in pairs if not isinstance(pair, tuple) or len(pair) != 2]:
        raise ConfigError(f"pairs has {shown(odd[0])}, which is no pair (i, j) of models.")
    models = sorted({i for pair in pairs for i in pair})
    if lost := [pair for pair in permutations(models, 2) if pair not in pairs]:
        raise ConfigError(
            f"pairs has no permutation for {shown(lost[0])}: give one for each pair, both ways."
        )
    shares = [
        moved_between(pairs[i, k], pairs[i, j].compose(pairs[j, k])) / pairs[i, k].spec.neurons
        for i, j, k in permutations(models, 3)
    ]
    return fsum(shares) / len(shares) if shares else 0.0
