"""Whether matchings of pairs agree: going from model to model around a circle should lead back to where one began."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from math import fsum

from ...spec import Permutation
from ..result import moved_between


def cycle_error(pairs: Mapping[tuple[int, int], Permutation]) -> float:
    """How far matchings of all pairs contradict each other: the mean share of neurons, 0 to 1, that end elsewhere
    when brought from k over j to i instead of directly.

    Args:
        pairs: (i, j), all i != j -> the permutation that brings j to i. Those of one arrangement for all,
            `p_i.invert().compose(p_j)`, give 0.
    """
    models = sorted({i for pair in pairs for i in pair})
    shares = [
        moved_between(pairs[i, k], pairs[i, j].compose(pairs[j, k])) / pairs[i, k].spec.neurons
        for i, j, k in permutations(models, 3)
    ]
    return fsum(shares) / len(shares) if shares else 0.0
