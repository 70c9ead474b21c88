"""What weight matching remembers from one look at a group to the next: it saves work and never changes a result.

products  cost matrices, brought up to date by what moved since (products.py)
duals     the dual variables that proved a group's last assignment, from which the next one starts
          (assignment/jonker_volgenant.py)
unlike    the groups whose neurons were seen to have no near counterparts (nearness.py), so that no
          proof is tried again before most of what they meet has moved

Duals and what is unlike also serve the next matching of the same B to an A that has changed little (projection.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...spec import Indices, to_array
from .endpoints import Endpoints
from .products import Products


@dataclass
class Memory:
    """What outlives a matching of B: `duals` by the first of the neurons (their numbers in B) that a cell assigns."""

    duals: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    unlike: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


class Accelerator:
    """The memory of one matching; costs that are made without one compute everything afresh."""

    def __init__(self, pair: Endpoints, memory: Memory | None = None) -> None:
        memory = Memory() if memory is None else memory
        self.pair = pair
        self.products = Products(pair)
        self.unlike = memory.unlike
        self._duals = memory.duals  # of a cell's neurons by their numbers in B

    def duals(self, cell: str, neurons: Indices) -> Tensor | None:
        """Those of these places' neurons; from costs of some sites only they suit all of them, too, if not as well."""
        kept = self._duals.get((cell, int(neurons[0])))
        return None if kept is None else kept[self._here(cell, neurons)]

    def learn(self, cell: str, neurons: Indices, duals: Tensor) -> None:
        kept = duals.new_zeros(self.pair.index[cell].size)
        kept[self._here(cell, neurons)] = duals
        self._duals[cell, int(neurons[0])] = kept

    def _here(self, cell: str, neurons: Indices) -> Tensor:
        """The numbers in B of the neurons that are at these places now."""
        return torch.from_numpy(self.pair.index[cell][to_array(neurons)])
