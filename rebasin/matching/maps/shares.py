"""Which shares of B a search looks at: where lambda is drawn from at each step, and where the line is judged.

A barrier is the worst point of a line. To lower a mean over the line leaves that point high as long as others are low.
"worst" instead minimises the maximum over maps of the loss by playing it as a game (Freund & Schapire 1999): the line
is cut into stretches, and lambda is drawn from stretch k with probability

    p_k = (1 - EVEN) e_k + EVEN / n,    e_k proportional to exp(SHARP (h_k - min h) / (max h - min h)),

where h_k is a running mean of how far losses in stretch k were above the line between the ends'.
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
"""What a running mean keeps of itself when a loss is added."""

NARROW = 0.2
"""A range of lambda that is no wider is judged at the midpoint alone."""


class Shares:
    """Shares of B between `low` and `high`, drawn uniformly or where the line is highest.

    Attributes:
        heights: by how much each stretch is above the line between the ends; what a search must remember.
    """

    def __init__(
        self, low: float, high: float, how: LamDraw, seed: int, heights: Sequence[float] = ()
    ) -> None:
        self._low, self._width, self._how, self._seed = low, high - low, how, seed
        self.heights = np.array(heights or [0.0] * STRETCHES)

    @property
    def judged(self) -> tuple[float, ...]:
        """Where the best step is chosen: the midpoint of a narrow range; a quarter, half and three quarters of a wider
        one; and all inner ends of stretches where the worst point is what is learned.
        """
        if self._width < NARROW + 1e-9:
            return (0.5,)
        count = STRETCHES if self._how == "worst" else 4
        return tuple(self._low + self._width * part / count for part in range(1, count))

    def draw(self, step: int) -> float:
        """The share of a step, a number between low and high that depends on the seed and on what was told."""
        random = np.random.default_rng(mixed(self._seed, step))
        if self._how == "uniform":
            return float(random.uniform(self._low, self._low + self._width))
        spread = np.ptp(self.heights)
        likely = np.exp(SHARP * (self.heights - self.heights.max()) / (spread or 1.0))
        likely = (1 - EVEN) * likely / likely.sum() + EVEN / STRETCHES
        stretch = random.choice(STRETCHES, p=likely / likely.sum())
        return self._low + self._width * (stretch + float(random.uniform())) / STRETCHES

    def tell(self, share: float, height: float) -> None:
        """The loss at a share was so far above the line between the ends' on the same batches."""
        place = (share - self._low) / self._width * STRETCHES if self._width else 0
        k = min(int(place), STRETCHES - 1)
        self.heights[k] = MEMORY * self.heights[k] + (1 - MEMORY) * height
