"""Activations and weights as one objective, and the coordinate descent that climbs it.

The part of the activations is linear in each group's permutation and knows no other group; that of the weights is
linear in each group's permutation given all others. So is their sum, and it can be climbed exactly like the weights
alone (weights/matching.py). Both parts are divided by the largest value that they could have (Cauchy and Schwarz).
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...spec import Group, Indices, displaced, to_array
from ..assignment.blocks import Costs, assign
from ..assignment.linear_assignment import TOLERANCE
from ..descent import coordinate_descent
from ..result import Sweep, Update
from ..schedule import Order, neighbours, order_of
from ..weights.costs import WeightCosts
from ..weights.endpoints import Endpoints

OUTLIER = 100
"""A tensor whose mean square is this many times that of most numbers is none of the ordinary ones."""


def balanced(pair: Endpoints, frozen: Container[str] = ()) -> tuple[dict[str, float], float]:
    """(w_k, largest): `pair`'s weights, lowered where one tensor would drown all others, and what the objective could
    be at most without the tensors in `frozen`, which no training has made.

    What is compared are bounds, |A_k| |B_k|. Outliers (embeddings in other units, frequencies, a tensor that a later
    norm undoes) have at most the bound that all ordinary tensors have together. Where nothing is an outlier, nothing
    changes.
    """
    bounds = {name: pair.weight[name] * math.sqrt(aa * bb) for name, (aa, bb) in pair.squares.items()}
    trained = {name: bound for name, bound in bounds.items() if name not in frozen and bound > 0}
    numbers = {name: math.prod(pair.spec.shapes[name]) for name in bounds}
    mean = {name: bound / max(1, numbers[name]) for name, bound in bounds.items()}
    half, typical = sum(numbers[name] for name in trained) / 2, 0.0
    for name in sorted(trained, key=mean.__getitem__):
        typical, half = mean[name], half - numbers[name]
        if half <= 0:
            break
    ordinary = math.fsum(bound for name, bound in trained.items() if mean[name] <= OUTLIER * typical)
    most = {name: ordinary if mean[name] > OUTLIER * typical else bound for name, bound in bounds.items()}
    factors = {
        name: min(1.0, most[name] / bound) if trained and bound else 1.0 for name, bound in bounds.items()
    }
    counted = trained or bounds
    largest = math.fsum(factors[name] * bound for name, bound in bounds.items() if name in counted)
    return {name: weight * factors[name] for name, weight in pair.weight.items()}, largest


class Joint(Costs):
    """`(1 - weight) * activations / largest + weight * weights / largest` at `pair`'s present permutation.

    activations: cell -> [size, size] float64, A's neurons in rows and B's, as they are in B, in columns; a cell that
    is missing has no part in it. largest: what their sum could be at most, and `frozen` names tensors that are not
    trained, which do not count for the weights' largest (see `balanced`). As costs: what neuron j, where it is now,
    gains at place i.
    """

    def __init__(
        self,
        pair: Endpoints,
        activations: Mapping[str, Tensor],
        largest: float,
        weight: float,
        frozen: Container[str] = (),
    ) -> None:
        self.pair = pair
        pair.weight, most = balanced(pair, frozen)
        self.activations = activations
        self.weights = WeightCosts(pair)
        self.weight = weight
        self.on_activations = (1 - weight) / largest if largest else 0.0
        self.on_weights = weight / most if most else 0.0

    @property
    def objective(self) -> float:
        return self.on_weights * self.pair.objective + math.fsum(
            self.value(cell, np.arange(len(index))) for cell, index in self.pair.index.items()
        )

    def value(self, cell: str, relative: np.ndarray) -> float:
        """The activations' part of a cell if its neurons moved by `relative` from where they are."""
        if cell not in self.activations:
            return 0.0
        index = torch.from_numpy(self.pair.index[cell][relative])
        return self.on_activations * float(self.activations[cell].gather(1, index[:, None]).sum())

    def improve(self, group: Group) -> Update:
        """Bring a group to its best arrangement given all others, if that gains."""
        found = assign(group, self)
        count = displaced(found.index.values())
        if not count:
            return Update(group.name, 0.0, 0)
        move = self.pair.propose(group, found.index)
        gain = self.on_weights * move.gain + math.fsum(
            self.value(cell, index) - self.value(cell, np.arange(index.size))
            for cell, index in found.index.items()
        )
        if gain <= TOLERANCE * self.weight:  # of a sum that is at most 1
            return Update(group.name, 0.0, 0)
        self.pair.make(move, found.index)
        return Update(group.name, gain, count)

    def descend(
        self, groups: Sequence[Group], order: Order, seed: int, max_sweeps: int
    ) -> Iterator[tuple[Sweep, bool]]:
        """Improve these groups until none can be: each sweep, and whether it has come to that."""
        spec = self.pair.spec
        chosen = {number for number, group in enumerate(spec) if group in groups}
        dirty = set(chosen)
        updates: list[Update] = []

        def improved(number: int) -> bool:
            updates.append(self.improve(spec.groups[number]))
            return updates[-1].moved > 0

        def begin(number: int) -> list[int]:
            updates.clear()
            return order_of(order, len(spec), seed, 0, number - 1)

        near = [others & chosen for others in neighbours(spec)]
        began = perf_counter()
        for number in coordinate_descent(improved, near, begin, dirty, max_sweeps):
            moved, seconds = self.pair.permutation.moved(), perf_counter() - began
            yield Sweep(number, self.objective, moved, tuple(updates), seconds), not dirty
            began = perf_counter()

    def block(self, cell: str, neurons: Indices) -> Tensor:
        return self.diagonal(cell, [neurons])[0]

    def diagonal(self, cell: str, blocks: Any) -> list[Tensor]:
        made = self.weights.diagonal(cell, blocks)
        return [self._with_activations(cell, n, block) for n, block in zip(blocks, made, strict=True)]

    def _with_activations(self, cell: str, neurons: Indices, block: Tensor) -> Tensor:
        total = block.double() * self.on_weights
        if cell not in self.activations:
            return total
        rows = torch.from_numpy(to_array(neurons))
        columns = torch.from_numpy(self.pair.index[cell])[rows]
        activations = self.activations[cell][rows[:, None], columns]
        return total.add_(activations.to(total.device), alpha=self.on_activations)
