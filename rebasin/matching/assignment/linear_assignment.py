"""The linear assignment problem, exactly: which column belongs to which row of a cost matrix.

Most assignments that occur while two models are aligned are easy, and to prove one optimal costs far less than to
solve it from nothing: a row's largest entry bounds what the row can contribute, so if the rows' argmaxima are all
different, they are an optimal assignment. That is found where the costs are. What it does not decide is solved on the
CPU, from the dual variables that proved the last solution of a similar problem, if there was one
(jonker_volgenant.py); small problems by scipy, and all of them where numba does not work.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

TOLERANCE = 1e-12
"""A gain has to exceed this share of the values compared; below it the neurons stay where they are."""

ROWS = 512
"""So many are widened to float64 at a time."""

SMALLEST = 64
"""Below so many neurons scipy is as quick, and numba need not be loaded."""


def linear_assignment(
    costs: Tensor, duals: Tensor | None = None, learn: Callable[[Tensor], None] = lambda duals: None
) -> tuple[np.ndarray, float, float]:
    """The assignment that maximises `sum_i costs[i, column[i]]`, the identity if that is as good but for TOLERANCE.

    Args:
        costs: [n, n] float, on any device; finite.
        duals: one number a column, [n], from which a large problem is solved. They may be anything: they decide how
            fast the answer comes, never what it is worth.
        learn: told the duals, float64 on the CPU, that prove the solution of a large problem; they suit similar costs.

    Returns:
        column: int64 [n], a bijection.
        value: the sum that it reaches.
        gain: its gain over the identity, 0.0 if it is the identity.
    """
    n = costs.shape[0]
    column = _solved(costs, duals, learn)
    stay = costs.diagonal().double().cpu().numpy()
    if np.array_equal(column, np.arange(n)):
        return column, float(stay.sum()), 0.0
    chosen = costs.gather(1, torch.from_numpy(column).to(costs.device)[:, None])[:, 0].double().cpu().numpy()
    gain = float((chosen - stay).sum())
    if gain <= TOLERANCE * float(np.abs(chosen).sum() + np.abs(stay).sum()):
        return np.arange(n), float(stay.sum()), 0.0
    return column, float(chosen.sum()), gain


def _solved(costs: Tensor, duals: Tensor | None, learn: Callable[[Tensor], None]) -> np.ndarray:
    """An optimal assignment [n], by the cheapest means that proves it."""
    n = costs.shape[0]
    if duals is not None:  # it was not easy the last time
        if costs.device.type != "cpu" and stays(costs, duals):
            return np.arange(n)
    else:
        on_cpu = costs.device.type == "cpu"  # there numpy is ten times as fast as torch
        column = costs.numpy().argmax(axis=1) if on_cpu else costs.argmax(dim=1).cpu().numpy()
        hit = np.zeros(n, dtype=bool)
        hit[column] = True
        if hit.all():
            return column
    column, proof = solved(costs.cpu().numpy(), None if duals is None else duals.double().cpu().numpy())
    if proof is not None:
        learn(torch.from_numpy(proof))
    return column


def solved(costs: np.ndarray, duals: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """An optimal assignment [n] for costs [n, n] on the CPU and, of a large problem, the duals that prove it."""
    solve = None if len(costs) < SMALLEST else _solver()
    if solve is None:
        return linear_sum_assignment(costs, maximize=True)[1].astype(np.int64), None
    return solve(costs, duals)


def stays(costs: Tensor, duals: Tensor) -> bool:
    """Whether these duals prove that no assignment gains more than TOLERANCE over the identity: by one pass over the
    costs, where they are, instead of their way to the CPU and a solution there.

    No sum exceeds the rows' largest c_ij - p_j plus the sum of the p_j, which the identity pays, too.
    """
    prices = duals.to(costs.device, torch.float64)
    own = costs.diagonal().double()
    most = torch.cat([(rows.double() - prices).amax(dim=1) for rows in costs.split(ROWS)])
    return bool((most - (own - prices)).sum() <= TOLERANCE * own.abs().sum())


_loading = Lock()  # threads that need it at once load it once, and are told once


def _solver() -> Callable[..., Any] | None:
    """Jonker and Volgenant's algorithm; None, after one warning, where numba does not work."""
    with _loading:
        return _load_solver()


@cache
def _load_solver() -> Callable[..., Any] | None:
    try:
        from .jonker_volgenant import solve  # numba takes half a second to load, and few tasks need it

        solve(np.eye(2, dtype=np.float32), np.zeros(2))  # compiles, or loads what was compiled
    except Exception as error:  # not installed, not of numpy's version, damaged machine code: any of them
        reason = " ".join(str(error).split())[:200].rstrip(".")
        warnings.warn(
            f"numba does not work here ({type(error).__name__}: {reason}), so scipy solves all assignments: the results"
            " are as good, but large ones take longer.",
            stacklevel=4,
        )
        return None
    return solve
