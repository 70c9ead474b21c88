"""How firmly an alignment stands: what the objective would lose if neurons changed places."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...arguments import typed
from ...spec import Permutation, PermutationSpec
from ...types import State
from ..assignment.blocks import leaves
from ..schedule import axes_met
from .costs import WeightCosts
from .endpoints import Endpoints, Normalize


@typed
def exchange_losses(
    spec: PermutationSpec,
    state_a: State,
    state_b: State,
    permutation: Permutation,
    *,
    normalize: Normalize = "repeats",
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """For each group the least that the objective loses when two exchangeable neurons of it change places.

    Zero says that two neurons are interchangeable (dead ones are), less than zero that the alignment can be
    improved. The second-best arrangement of the group is no better than this, and often just this one. Costs
    about as much as one sweep. Groups of one name share the least value; groups without a pair to exchange,
    and those whose objective is not linear (they meet a tensor on two axes), are left out.

    Raises:
        SpecMismatchError, CheckpointError: as `weight_matching`.
    """
    pair = Endpoints(spec, state_a, state_b, normalize=normalize, device=device)
    pair.set(permutation)
    costs = WeightCosts(pair)
    losses: dict[str, float] = {}
    for group in spec:
        if any(len(axes) > 1 for axes in axes_met(group).values()):
            continue
        least = math.inf
        for number, cell in enumerate(group.cells):
            blocks = [x.neurons for x in leaves(group.tree) if x.cell == number and len(x.neurons) > 1]
            for block in costs.diagonal(cell.name, blocks) if blocks else []:
                least = min(least, _least_loss(block))
        if least < math.inf:
            losses[group.name] = min(least, losses.get(group.name, math.inf))
    return losses


def _least_loss(costs: Tensor) -> float:
    """min over i < j of c_ii + c_jj - c_ij - c_ji, for costs [n, n]."""
    stay = costs.diagonal()
    gain = costs + costs.T - stay[:, None] - stay
    return -float(gain.fill_diagonal_(-math.inf).max())
