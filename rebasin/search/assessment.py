"""The winner against known merges, on data that the search has not seen: paired differences and bootstrap intervals.

All models are measured on the same batches (or images of the same prompts from the same noise). Differences are taken
batch by batch, and batches are drawn with replacement: Efron's percentile interval of the mean difference.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
DRAWS = 4000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; the ends are not numbers where there is a single unit."""

    mean: float
    low: float
    high: float
    units: int

    def figures(self) -> dict[str, float]:
        """Mean and ends."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def units_of(batches: Sequence[Any]) -> list[Hashable]:
    """What is drawn at once in a bootstrap: batches, or those of one prompt where every batch has a single prompt."""
    found: list[Hashable] = []
    for number, batch in enumerate(batches):
        prompts = batch.get("prompts") if isinstance(batch, Mapping) else None
        found.append(prompts[0] if prompts and len(set(prompts)) == 1 else number)
    return found


def bootstrap(
    values: Sequence[float], sizes: Sequence[int], units: Sequence[Hashable] | None = None, seed: int = 0
) -> Interval:
    """The mean over samples of `values`, the means of batches with `sizes` samples, and its interval.

    Args:
        units: batches with the same unit are drawn together; None: each is one.
    """
    labels = list(units) if units is not None else list(range(len(values)))
    numbers = {unit: i for i, unit in enumerate(dict.fromkeys(labels))}
    places = [numbers[unit] for unit in labels]
    sums, counts = np.bincount(places, np.multiply(values, sizes)), np.bincount(places, sizes)
    mean = float(sums.sum() / counts.sum())
    if len(numbers) < 2 or not np.isfinite(sums).all():
        return Interval(mean, float("nan"), float("nan"), len(numbers))
    drawn = np.random.default_rng(seed).integers(len(numbers), size=(DRAWS, len(numbers)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(mean, float(low), float(high), len(numbers))


def difference(
    one: Sequence[float],
    other: Sequence[float],
    sizes: Sequence[int],
    units: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Interval:
    """`one` minus `other`, batch by batch: below 0, `one` has the lower loss."""
    return bootstrap([a - b for a, b in zip(one, other, strict=True)], sizes, units, seed)
