"""Which batches a search learns from, which ones it selects by, and in which order the former come."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from ...errors import DataError
from .midpoint import Ends


def split(batches: Sequence[Any], heldout: Sequence[Any] | None) -> tuple[Sequence[Any], Sequence[Any]]:
    """Batches to learn from and to select by; without `heldout` the last fifth, which then gives no gradients.

    Raises:
        DataError: there is none to learn from or none to select by.
    """
    if heldout is None:
        last = max(1, len(batches) // 5)
        batches, heldout = batches[:-last] or batches, batches[-last:]
    if not batches or not heldout:
        raise DataError("A search by the loss needs at least one batch to learn from and one to select by.")
    return batches, heldout


def few(batches: Sequence[Any], samples: int) -> Sequence[Any]:
    """The first batches, until there are so many samples."""
    found, count = [], 0
    for batch in batches:
        found.append(batch)
        leaves = (leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim)
        count += len(next(leaves, (None,)))
        if count >= samples:
            break
    return found


class Draws(Iterator[Sequence[Any]]):
    """Lists of `count` batches, all batches in a random order, then in another one, and so on.

    Attributes:
        made: how many lists were drawn; those of an interrupted search are passed over.
    """

    def __init__(self, ends: Ends, batches: Sequence[Any], count: int, seed: int, made: int = 0) -> None:
        self._ends, self._batches, self._count, self.made = ends, batches, count, made
        self._numbers = _endless(len(batches), seed)
        for _ in range(made * count):
            next(self._numbers)
        self._losses: dict[int, tuple[float, float]] = {}
        self._drawn: list[int] = []

    def __next__(self) -> Sequence[Any]:
        self._drawn = [next(self._numbers) for _ in range(self._count)]
        self.made += 1
        return [self._batches[number] for number in self._drawn]

    def endpoints(self) -> tuple[float, float]:
        """The mean losses of A and of B on what was drawn last; each batch is evaluated once.

        Raises:
            DataError: one of them is not a finite number.
        """
        for number in self._drawn:
            if number not in self._losses:
                found = self._ends.endpoints([self._batches[number]])
                if not all(map(math.isfinite, found)):
                    bad = "A" if not math.isfinite(found[0]) else "B"
                    raise DataError(
                        f"The loss of {bad} on batch {number} is not a finite number: leave that batch out."
                    )
                self._losses[number] = found
        found = [self._losses[number] for number in self._drawn]
        return sum(a for a, _ in found) / self._count, sum(b for _, b in found) / self._count

    def endpoints_mean(self) -> float:
        """The mean of the two."""
        return sum(self.endpoints()) / 2


def _endless(count: int, seed: int) -> Iterator[int]:
    """All numbers below `count` in a random order, then in another one, and so on."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permutation(count).tolist()


def mixed(seed: int, step: int) -> int:
    """A seed of its own for each step."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
