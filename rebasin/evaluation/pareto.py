"""The Pareto order of several losses."""

from __future__ import annotations

from collections.abc import Sequence


def beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """At least as low in everything, and lower in something."""
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
