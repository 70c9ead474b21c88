"""Whether matchings of pairs agree: going from model to model around a circle should lead back to where one began."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    shares = [_share(pairs[i, k], pairs[i, j].compose(pairs[j, k])) for i, j, k in _triples(models)]
    return fsum(shares) / len(shares) if shares else 0.0


def _triples(models: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    for i in models:
        for j in models:
            for k in models:
                if len({i, j, k}) == 3:
                    yield i, j, k


def _share(a: Permutation, b: Permutation) -> float:
    return moved_between(a, b) / a.spec.neurons
