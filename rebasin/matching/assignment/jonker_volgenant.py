"""Jonker and Volgenant's algorithm for the dense linear assignment problem, from any dual variables, compiled by numba.

"A shortest augmenting path algorithm for dense and sparse linear assignment problems", Computing 38 (1987).

Let column j have a dual variable p_j, its price. Row i wants the columns with the largest c_ij - p_j, and an assignment
that gives every row one that it wants is optimal, because any other has at most the same sum of c_ij - p_j and pays the
same prices. Two steps lead there, and from the first bid on every row that has a column wants it:

    bids    A row without a column takes the one that it wants most, and raises its dual until the second best is as
            good (the paper's augmenting row reduction, an auction without a minimal bid). Who had it must bid again.
            That settles nearly all rows; the last ones would outbid each other for long, so the number is limited.
    paths   A row that is left finds the cheapest chain of exchanges to a column that nobody has (Dijkstra's algorithm),
            and duals rise along the way by as much as is needed to keep everyone content.

The duals decide how soon the end is reached, not where: from those of a similar problem hardly any path is needed.
Where many rows are left after a few bids, duals are therefore found first, by auctions in which every bid exceeds the
last one by a large step, then by a small one, and whose outcome is forgotten (scaling: Bertsekas, "Auction algorithms
for network flow problems", 1992). A hard problem of thousands of rows then takes a fifth of the time.

Half a second goes into importing numba, and a few into compiling, once for an installation: the machine code is kept
beside this file or, if that can't be written to, in the user's cache. Other threads of Python's run on meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

LANES = 64
"""So many columns are looked at in one go, one of each residue class: that loop becomes vector instructions."""

HARD = 0.15
"""If so large a share of the rows is left by one bid a row, duals are found first,"""

STEPS = (0.1, 0.02)
"""by auctions with these steps, in standard deviations of the costs,"""

PATIENCE = 30
"""in each of which at most so many bids a row displace another."""

BIDS = 2
"""So many are allowed without a step, in each of"""

ROUNDS = 2
"""so many rounds."""

SAMPLE = 64
"""By so many rows are duals and costs judged."""

WORTH = 0.2
"""Duals are a better start than none if they lower the bound on a row by so many of their own standard deviations. From
those of costs that differ by a twentieth a solution takes a quarter of the time, by a fifth nearly all of it, and from
those of costs that have nothing in common twice as long (measured, independent networks of 1,280 to 5,120 neurons)."""


def _compiled(function: Callable[..., Any]) -> Any:
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is nowhere to keep the machine code: every process compiles its own
        return njit(nogil=True)(function)


def solve(costs: np.ndarray, duals: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The assignment with the largest sum, and the duals that prove it.

    Args:
        costs: [n, n] float32 or float64; finite.
        duals: [n], where to start, taken only if they bound the sum closely enough (`WORTH`).

    Returns:
        column: int64 [n], a bijection; of several that are best, any.
        duals: float64 [n]; no row would gain from another column, but for float64's rounding.
    """
    costs = np.ascontiguousarray(costs)
    start = np.zeros(len(costs))
    if duals is not None:
        given = np.array(duals, dtype=np.float64)
        if _lowered(costs, given) > WORTH * float(given.std()):
            start = given
    return _solve(costs, start, HARD, np.array(STEPS), PATIENCE, BIDS, ROUNDS), start


@_compiled
def _solve(costs: Any, duals: Any, hard: float, steps: Any, patience: int, bids: int, rounds: int) -> Any:
    """The assignment [n]; `duals` [n] become those that prove it."""
    n = duals.size
    column, row = np.full(n, -1), np.full(n, -1)
    free = _bid(costs, duals, column, row, np.arange(n), n, 0.0)
    if free.size > hard * n:
        spread = costs[:: max(1, n // SAMPLE)].std()
        for step in steps:
            column[:], row[:] = -1, -1
            _bid(costs, duals, column, row, np.arange(n), patience * n, step * spread)
        column[:], row[:] = -1, -1
        free = np.arange(n)
    for _ in range(rounds):
        free = _bid(costs, duals, column, row, free, bids * n, 0.0)
    if free.size:
        unowned = np.flatnonzero(row < 0)
        for left in range(free.size):
            _path(costs, duals, column, row, free[left], unowned[: free.size - left])
    return column


@_compiled
def _bid(costs: Any, duals: Any, column: Any, row: Any, free: Any, bids: int, step: float) -> Any:
    """One round of bids of the rows in `free`, each `step` higher than it has to be, of which at most about `bids`
    displace another row; those left at its end.
    """
    lane = np.empty(LANES)
    queue = free.copy()
    next_, left = 0, 0
    while next_ < queue.size:
        i = queue[next_]
        next_ += 1
        best, second, j, other = _two_best(costs[i], duals, lane)
        rises = best - second + step > 0.0 and other >= 0
        if rises:
            duals[j] += best - second + step
        elif row[j] >= 0 and other >= 0:  # both are wanted: rather the one that may have no owner
            j = other
        owner = row[j]
        column[i], row[j] = j, i
        if owner >= 0:
            bids -= 1
            if rises and bids > 0:  # goes on at once: it may displace another, and so on
                next_ -= 1
                queue[next_] = owner
            else:
                queue[left] = owner
                left += 1
    return queue[:left]


@_compiled
def _path(costs: Any, duals: Any, column: Any, row: Any, first: int, ends: Any) -> None:
    """Give row `first` a column by the cheapest chain of exchanges to one of `ends`, the columns without an owner.

    `reach` [n] has what it would cost the rows so far to get each column. The k-th row looked at, rows[k], is the
    owner of columns[k - 1], the nearest that was open, and gets at column j at the cost of offset[k] - (c_ij - p_j).
    `closed` [n] is infinite for columns that are reached. The last of `ends` takes the place of the one that is taken.
    """
    n = duals.size
    lane, reach, closed, offset = np.empty(LANES), np.full(n, np.inf), np.zeros(n), np.empty(n)
    rows, columns = np.empty(n, np.int64), np.empty(n, np.int64)
    distance, seen, end, i = 0.0, 0, -1, first
    content = _two_best(costs[i], duals, lane)[0]
    while True:
        rows[seen], offset[seen] = i, distance + content
        j, distance = _nearest(costs[i], duals, offset[seen], reach, closed, lane)
        # Among equally near columns one without an owner, else long plateaus are searched.
        for k in range(ends.size):
            if reach[ends[k]] <= distance:
                end = ends[k]
                ends[k] = ends[ends.size - 1]
                break
        if end >= 0:
            break
        columns[seen] = j
        seen += 1
        closed[j] = np.inf
        i = row[j]
        content = np.float64(costs[i, j]) - duals[j]
    j, before = end, seen + 1
    while before > 0:  # each column goes to the row that reached it at the least cost; that row's own is next
        least, k = np.inf, 0
        for candidate in range(before):
            cost = offset[candidate] - (np.float64(costs[rows[candidate], j]) - duals[j])
            if cost < least:
                least, k = cost, candidate
        row[j] = rows[k]
        j, column[rows[k]] = column[rows[k]], j
        before = k
    for k in range(seen):
        duals[columns[k]] += distance - reach[columns[k]]


@_compiled
def _two_best(costs: Any, duals: Any, lane: Any) -> Any:
    """The largest and the second largest c_j - p_j of a row [n], and their columns (-1: there is but one column)."""
    n = duals.size
    whole = n - n % LANES
    lane[:] = -np.inf
    for start in range(0, whole, LANES):
        for k in range(LANES):
            net = np.float64(costs[start + k]) - duals[start + k]
            lane[k] = net if net > lane[k] else lane[k]
    for j in range(whole, n):
        lane[j - whole] = max(lane[j - whole], np.float64(costs[j]) - duals[j])
    best, second, at, other = -np.inf, -np.inf, 0, -1
    for k in range(LANES):
        if lane[k] > best:
            best, second, at, other = lane[k], best, k, at if best > -np.inf else -1
        elif lane[k] > second:
            second, other = lane[k], k
    first, rival, runner = -1, -np.inf, -1  # within the best lane
    for j in range(at, n, LANES):
        net = np.float64(costs[j]) - duals[j]
        if net == best and first < 0:
            first = j
        elif net > rival:
            rival, runner = net, j
    if rival >= second:
        return best, rival, first, runner
    for j in range(other, n, LANES):
        if np.float64(costs[j]) - duals[j] == second:
            return best, second, first, j
    return best, second, first, -1


@_compiled
def _nearest(costs: Any, duals: Any, offset: float, reach: Any, closed: Any, lane: Any) -> Any:
    """Lowers `reach` [n] to what the columns cost by way of a row [n]; the nearest open column and its distance."""
    n = duals.size
    whole = n - n % LANES
    lane[:] = np.inf
    for start in range(0, whole, LANES):
        for k in range(LANES):
            cost = offset - (np.float64(costs[start + k]) - duals[start + k])
            cost = cost if cost < reach[start + k] else reach[start + k]
            reach[start + k] = cost
            cost += closed[start + k]
            lane[k] = cost if cost < lane[k] else lane[k]
    for j in range(whole, n):
        reach[j] = min(reach[j], offset - (np.float64(costs[j]) - duals[j]))
        lane[j - whole] = min(lane[j - whole], reach[j] + closed[j])
    at = 0
    for k in range(LANES):
        if lane[k] < lane[at]:
            at = k
    for j in range(at, n, LANES):
        if reach[j] + closed[j] == lane[at]:
            return j, lane[at]
    return -1, lane[at]  # no column is open: there are none for any row


@_compiled
def _lowered(costs: Any, duals: Any) -> float:
    """By how much the duals lower the bound on the sum, max_j (c_ij - p_j) over the rows plus the sum of the p_j: the
    mean of a sample of rows.
    """
    lane = np.empty(LANES)
    none = np.zeros(duals.size)
    lowered, rows = 0.0, 0
    for i in range(0, duals.size, max(1, duals.size // SAMPLE)):
        lowered += _two_best(costs[i], none, lane)[0] - _two_best(costs[i], duals, lane)[0]
        rows += 1
    return lowered / rows - duals.mean()
