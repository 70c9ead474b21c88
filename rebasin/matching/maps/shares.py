"""Which shares of B a search looks at: where lambda is drawn from at each step, and where the line is judged.

A barrier is the worst point of a line. To lower a mean over the line leaves that point high as long as others are low.
"worst" instead minimises the maximum over maps of the loss by playing it as a game (Freund & Schapire 1999): the line
is cut into stretches, and lambda is drawn from stretch k with probability

    p_k = (1 - EVEN) e_k + EVEN / n,    e_k proportional to exp(SHARP (h_k - min h) / (max h - min h)),

where h_k is a running mean of how far losses in stretch k were above the line between the ends', each loss with
MEMORY times the weight of the next. Stretches that were not seen yet count as the highest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..straight_through.draws import mixed

LamDraw = Literal["uniform", "worst"]

STRETCHES = 10
"""So many stretches of the line are told apart by "worst"."""

SHARP = 4.0
"""The highest stretch is drawn exp(4) times as often as the lowest,"""

EVEN = 0.15
"""but this part of all draws is uniform, so that no stretch is forgotten."""

MEMORY = 0.85
"""The weight of a loss beside that of the next in the same stretch."""

NARROW = 0.2
"""A range of lambda that is no wider is judged at its middle alone."""


class Shares:
    """Shares of B between `low` and `high`, drawn uniformly or where the line is highest."""

    def __init__(self, low: float, high: float, how: LamDraw, seed: int, told: Sequence[float] = ()) -> None:
        self._low, self._width, self._how, self._seed = low, high - low, how, seed
        self._sums, self._weights = np.array(told or np.zeros(2 * STRETCHES)).reshape(2, STRETCHES)

    @property
    def told(self) -> tuple[float, ...]:
        """Sums of the heights of all stretches, and of their weights: what a search must remember."""
        return (*self._sums.tolist(), *self._weights.tolist())

    @property
    def judged(self) -> tuple[float, ...]:
        """Where the best step is chosen: the middle of a narrow range; a quarter, half and three quarters of a wider
        one; and all inner ends of stretches where the worst point is what is learned.
        """
        if self._width < NARROW + 1e-9:
            return (self._low + self._width / 2,)
        count = STRETCHES if self._how == "worst" else 4
        return tuple(self._low + self._width * part / count for part in range(1, count))

    def draw(self, step: int) -> float:
        """The share of a step, a number between low and high that depends on the seed and on what was told."""
        random = np.random.default_rng(mixed(self._seed, step))
        if self._how == "uniform":
            return float(random.uniform(self._low, self._low + self._width))
        heights = np.divide(self._sums, self._weights, out=np.zeros(STRETCHES), where=self._weights > 0)
        highest = heights[self._weights > 0].max(initial=-np.inf)
        heights[self._weights == 0] = highest if np.isfinite(highest) else 0.0
        likely = np.exp(SHARP * (heights - heights.max()) / (np.ptp(heights) or 1.0))
        likely = (1 - EVEN) * likely / likely.sum() + EVEN / STRETCHES
        stretch = random.choice(STRETCHES, p=likely / likely.sum())
        return self._low + self._width * (stretch + float(random.uniform())) / STRETCHES

    def tell(self, share: float, height: float) -> None:
        """The loss at a share was so far above the line between the ends' on the same batches."""
        place = (share - self._low) / self._width * STRETCHES if self._width else 0
        k = min(int(place), STRETCHES - 1)
        self._sums[k] = MEMORY * self._sums[k] + height
        self._weights[k] = MEMORY * self._weights[k] + 1
