"""The linear assignment problem, exactly: which column belongs to which row of a cost matrix.

Most assignments that occur while two models are aligned are easy, and to prove one optimal costs far less
than to solve it from nothing. A row's largest entry bounds what the row can contribute, so if the rows'
argmaxima are all different, they are an optimal assignment. The same holds after any number has been
subtracted from each column, because every assignment loses the same total. Half the squared norm of the
column's neuron is a good number to subtract: the argmax of `a_i . b_j - |b_j|^2 / 2` is the nearest neighbour
of a_i, whatever the norms. What neither test decides is solved: a large problem through its promising entries
(candidates.py), a small or easy one, or one that this did not prove in time, by scipy's dense solver.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .candidates import SMALLEST, by_candidates

TOLERANCE = 1e-12
"""A gain has to exceed this share of the values compared; below it the neurons stay where they are."""


SETTLED = 0.63
"""If rows want so many different columns at the given prices, these are balanced as they are (measured)."""


def linear_assignment(
    costs: Tensor,
    potentials: Callable[[], Tensor | None] | None = None,
    tolerance: float = TOLERANCE,
    learn: Callable[[Tensor], None] = lambda prices: None,
) -> tuple[np.ndarray, float, float]:
    """The assignment that maximises `sum_i costs[i, column[i]]`, the identity if that is as good.

    Args:
        costs: [n, n] float, on any device; finite.
        potentials: gives one number a column, [n], to be subtracted in the second shortcut (or None); asked
            for only if the first fails and the problem is not small. It may be anything: it decides how fast
            the answer comes, never what it is worth.
        tolerance: a gain over the identity below this share counts as none.
        learn: told such numbers by which a large problem turned out to be proved; they suit similar costs.

    Returns:
        column: int64 [n], a bijection.
        value: the sum that it reaches.
        gain: its gain over the identity, 0.0 if it is the identity.
    """
    n = costs.shape[0]
    column = _solved(costs, potentials, learn)
    stay = costs.diagonal().double().cpu().numpy()
    if np.array_equal(column, np.arange(n)):
        return column, float(stay.sum()), 0.0
    chosen = costs.gather(1, torch.from_numpy(column).to(costs.device)[:, None])[:, 0].double().cpu().numpy()
    gain = float((chosen - stay).sum())
    if gain <= tolerance * float(np.abs(chosen).sum() + np.abs(stay).sum()):
        return np.arange(n), float(stay.sum()), 0.0
    return column, float(chosen.sum()), gain


def _solved(
    costs: Tensor, potentials: Callable[[], Tensor | None] | None, learn: Callable[[Tensor], None]
) -> np.ndarray:
    """An optimal assignment [n], by the cheapest means that proves it."""
    n = costs.shape[0]
    column, different = _by_argmax(costs)
    if different == n:
        return column
    if n >= SMALLEST:
        easy = different >= _easy(n) * n
        prices = None if potentials is None else potentials()
        prices = costs.mean(dim=0) if prices is None else prices.to(costs)
        regret = prices - costs
        column, different = _by_argmin(regret)
        if different == n:
            return column
        if not easy:
            proved = by_candidates(costs, prices, regret, balance=different < SETTLED * n)
            if proved is not None:
                learn(proved[1])
                return proved[0]
    return linear_sum_assignment(costs.cpu().numpy(), maximize=True)[1].astype(np.int64)


def _easy(n: int) -> float:
    """If rows want so large a share of different columns, the dense solver is faster up to a few hundred neurons, since
    few rows are left for it to do (measured).
    """
    return 0.68 + 0.15 * math.log2(n / SMALLEST)


def _by_argmax(costs: Tensor) -> tuple[np.ndarray, int]:
    """The rows' argmaxima [n], an optimal assignment if they are a bijection, and how many are different."""
    on_cpu = costs.device.type == "cpu"  # there numpy is ten times as fast as torch
    return _different(costs.numpy().argmax(axis=1) if on_cpu else costs.argmax(dim=1).cpu().numpy())


def _by_argmin(regret: Tensor) -> tuple[np.ndarray, int]:
    """The same with argminima."""
    on_cpu = regret.device.type == "cpu"
    return _different(regret.numpy().argmin(axis=1) if on_cpu else regret.argmin(dim=1).cpu().numpy())


def _different(column: np.ndarray) -> tuple[np.ndarray, int]:
    hit = np.zeros(column.size, dtype=bool)
    hit[column] = True
    return column, int(np.count_nonzero(hit))
