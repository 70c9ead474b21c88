"""Matching one B again and again to an A that has changed little since: the projections of straight-through estimation.

Each is weight matching from the permutation that the last one found, with the same outcome to the bit, ties of equally
good assignments apart. What differs is the work:

- Assignments start from the dual variables that proved those of the last projection. Between two steps the costs change
  by some percent, and an optimal assignment of 5,120 neurons then takes a quarter of the time, or less.
- Groups that were seen to have no near counterparts are not asked for a proof again.
- B is read and checked once; distances and objectives, which nobody asks for, are not computed.

Groups are not left out: nearly all change. Of two SD 1.5 UNets of random weights a step of Adam at 10^-3 rearranges 103
of 121 groups and 30 % of the neurons. In a pair of near networks all stay, but a bound on the change by its norm
(Cauchy and Schwarz) proves that, in the median group, only for steps of 4 * 10^-4 altogether; nearness.py, which
measures anew, goes further for not much more than the norms take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...spec import Permutation, PermutationSpec
from ...tensors.free_memory import keep_freed_memory
from ...types import State
from ..schedule import order_of
from .accelerator import Accelerator, Memory
from .costs import WeightCosts, tensor_cores
from .endpoints import Endpoints
from .estimate import where_quicker
from .initial import Visits
from .matching import sweeps, workers_for


@dataclass(frozen=True)
class Projected:
    """The permutation that a projection ends with, and the sweeps that it took."""

    permutation: Permutation
    sweeps: int


class Projector:
    """B, and what its last projection has left to the next one.

    Attributes:
        memory: may be emptied at any time; it saves work and never changes a result.
    """

    def __init__(self, spec: PermutationSpec, b: State, device: torch.device) -> None:
        self.spec, self.b = spec, b
        self.memory = Memory()
        self._device: torch.device | None = None
        self._wanted = device
        self._checked: Mapping[str, float] | None = None

    def __call__(self, target: State, permutation: Permutation, most: int, seed: int) -> Projected:
        """Weight matching of B to `target`, from `permutation`, with at most so many sweeps in random orders.

        Raises:
            SpecMismatchError, CheckpointError: as `weight_matching`.
        """
        if self._device is None:
            self._device = where_quicker(self.spec, self._wanted)
        keep_freed_memory()
        pair = Endpoints(self.spec, target, self.b, device=self._device, checked=self._checked)
        self._checked = {name: bb for name, (_, bb) in pair.squares.items()}
        costs = WeightCosts(pair, Accelerator(pair, self.memory))
        dirty, done = set(range(len(self.spec))), 0
        with tensor_cores(False):
            pair.set(permutation)
            workers, visits = workers_for(self._device), Visits(len(self.spec), None)
            for _ in sweeps(costs, lambda n: self._order(seed, n), dirty, most, workers, visits):
                done += 1
        return Projected(pair.permutation, done)

    def _order(self, seed: int, sweep: int) -> list[int]:
        return order_of("random", len(self.spec), seed, 0, sweep - 1)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The duals, as CELL/FIRST; only where assignments are equally good they make a difference."""
        return {f"{cell}/{first}": duals for (cell, first), duals in self.memory.duals.items()}

    def restore(self, tensors: State) -> None:
        """Take over what `tensors` gave."""
        for key in tensors:
            cell, _, first = key.rpartition("/")
            self.memory.duals[cell, int(first)] = tensors[key].clone()
