"""A large linear assignment problem through its few promising entries, with a proof that no other matters.

Let every column j have a price v_j. A row i regrets a column by how much more it would gain elsewhere,

    regret_ij  =  max_k (c_ik - v_k)  -  (c_ij - v_j)  >=  0,

and an assignment whose rows all have what they regret least is optimal, because any other has at most the
same sum of c_ij - v_j and pays the same prices. At good prices an optimal assignment therefore consists of
entries of small regret, of which a row has a dozen, not hundreds:

    1  prices: a few rounds of Sinkhorn's balancing, whose scaling factors are near optimal prices (Cuturi,
       "Sinkhorn Distances", 2013)
    2  candidates: every row's entries of small regret, and the diagonal, so that a complete assignment exists
    3  the best assignment on the candidates: Jonker and Volgenant's algorithm for sparse costs, of scipy
    4  the prices that prove it best there: each row's column gets cheaper until no candidate tempts the row
       (Bellman and Ford's relaxation, which ends because a best assignment has no cycle to gain from)
    5  all entries at these prices: those that tempt a row become candidates, too, and 3 to 5 are repeated

When none tempts, the assignment is optimal among all: this is a proof, and steps 1 and 2 decide only how soon
it comes. Everything that touches all n^2 entries runs where the costs are, so of a matrix on a GPU only the
candidates are copied.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

SMALLEST = 256
"""Below so many neurons the dense solver is as fast."""

PER_ROW = 16
"""Candidates a row, about."""

BALANCING = 10
"""Rounds of Sinkhorn's balancing."""

SMOOTH = 0.08
"""Sinkhorn's temperature as a share of what the average column lies below a row's best."""

SAMPLE = 32
"""Rows by which the width of the candidates is set."""

ROUNDS = 8
"""So often are candidates added before the dense solver has to do it."""

MOST_PER_ROW = 8 * PER_ROW
"""With more candidates (many dead or equal neurons) the dense solver is as fast."""

STEPS = 1 << 16
"""Into so many steps is the width of the candidates divided when they are compared (see `_Candidates.best`)."""

EXACT = 2e-12
"""A row is not tempted by less than this share of the largest cost: float64 rounding."""


def by_candidates(
    costs: Tensor, prices: Tensor, regret: Tensor, balance: bool = True
) -> tuple[np.ndarray, Tensor] | None:
    """The assignment [n], int64, with the largest sum of `costs` [n, n], and the prices [n], float64, that
    prove it; None if it was not proved in time.

    Args:
        costs: float, on any device; finite.
        prices: [n], where to start: better ones save time.
        regret: [n, n], `prices - costs`; it is used up.
        balance: whether they need step 1.
    """
    n = costs.shape[0]
    if balance:
        prices = prices + _balance(regret.sub_(regret.amin(dim=1, keepdim=True)))
        torch.sub(prices, costs, out=regret)
    width = _width(regret[:: max(1, n // SAMPLE)].cpu().numpy())
    chosen = _below(regret, regret.amin(dim=1, keepdim=True) + width)
    chosen.diagonal().fill_(True)
    largest = max(map(abs, (float(x) for x in costs.aminmax())))
    v = prices.double().cpu().numpy()
    for _ in range(ROUNDS):
        candidates = _Candidates(costs, chosen)
        if len(candidates.costs) > MOST_PER_ROW * n:
            break
        column = candidates.best(v, width)
        proof = candidates.prove(column, v)
        if proof is None:
            break
        v = proof
        tempting = _tempting(costs, column, v, largest, regret)
        if not tempting.numel():
            return column, torch.from_numpy(v)
        chosen.view(-1)[tempting] = True
    return None


def _balance(regret: Tensor) -> Tensor:
    """What to add to the prices so that rows, choosing softly, want every column about equally often, [n].

    `regret` is used up: with n in the thousands every further matrix would count.
    """
    temperature = SMOOTH * float(regret.mean())
    if not temperature > 0:
        return regret.new_zeros(len(regret))
    wanted = regret.mul_(-1 / temperature).exp_()
    column = regret.new_ones(len(regret))
    tiny = torch.finfo(regret.dtype).tiny ** 0.5
    for _ in range(BALANCING):
        row = (wanted @ column).clamp_min_(tiny).reciprocal_()
        column = (row @ wanted).clamp_min_(tiny).reciprocal_()
    return column.log_().mul_(-temperature)


def _width(sample: np.ndarray) -> float:
    """By how much a candidate's regret may exceed its row's least: so that rows have PER_ROW on average."""
    sample = np.sort(sample, axis=1)
    return float((sample[:, min(PER_ROW, sample.shape[1]) - 1] - sample[:, 0]).mean())


def _tempting(costs: Tensor, column: np.ndarray, v: np.ndarray, largest: float, regret: Tensor) -> Tensor:
    """The flat numbers of the entries that a row would rather have than its own at prices `v`, in float64; `regret` is
    the place to compute in.
    """
    prices = torch.from_numpy(v).to(costs.device)
    own = torch.from_numpy(column).to(costs.device)[:, None]
    torch.sub(prices.to(costs.dtype), costs, out=regret)
    # Rounding moves no regret by more than this; what lies nearer is computed again in float64.
    scale = largest + float(np.abs(v).max())
    flat = _flat(_below(regret, regret.gather(1, own) + 8 * torch.finfo(costs.dtype).eps * scale))
    row, column_of = flat // len(v), flat % len(v)
    at = own[row, 0]
    ahead = costs[row, column_of].double() - prices[column_of] - (costs[row, at].double() - prices[at])
    return flat[ahead > 2 * EXACT * scale]


def _below(regret: Tensor, limit: Tensor) -> Tensor:
    """regret <= limit, with limits [n, 1]; numpy is twice as fast as torch on a CPU."""
    return (
        torch.from_numpy(regret.numpy() <= limit.numpy()) if regret.device.type == "cpu" else regret <= limit
    )


def _flat(mask: Tensor) -> Tensor:
    """The flat numbers of what is true; numpy is six times as fast as torch on a CPU."""
    flat = mask.view(-1)
    return (
        torch.from_numpy(np.flatnonzero(flat.numpy())) if mask.device.type == "cpu" else flat.nonzero()[:, 0]
    )


class _Candidates:
    """Some entries of the costs, row by row, in float64."""

    def __init__(self, costs: Tensor, chosen: Tensor) -> None:
        n = len(costs)
        flat = _flat(chosen)
        self.costs = costs.reshape(-1)[flat].double().cpu().numpy()
        self.row, self.column = np.divmod(flat.cpu().numpy(), n)
        self.start = np.searchsorted(self.row, np.arange(n + 1))

    def best(self, v: np.ndarray, width: float) -> np.ndarray:
        """The assignment [n] with the largest sum on the candidates, nearly always; prices `v` save time.

        The solver gets whole numbers. It makes rows bid for columns, and where equal offers differ by the rounding
        of a floating point sum, it would raise the bids by that much, practically forever. Assignments that
        differ by less than a step are no different to it; if it took a worse one, `prove` fails.
        """
        regret = v[self.column] - self.costs
        regret -= np.minimum.reduceat(regret, self.start[:-1])[self.row]
        weight = (
            np.rint(np.minimum(regret * (STEPS / (width or 1.0)), 32.0 * STEPS)) + 1
        )  # 0 would be no entry
        indices, start = self.column.astype(np.int32), self.start.astype(np.int32)
        graph = csr_array((weight, indices, start), shape=(len(v), len(v)))
        return min_weight_full_bipartite_matching(graph)[1].astype(np.int64)

    def prove(self, column: np.ndarray, v: np.ndarray) -> np.ndarray | None:
        """Prices of at most `v` at which no row is tempted by a candidate, or None if they take too long."""
        n = len(v)
        owner = np.empty_like(column)
        owner[column] = np.arange(n)
        own = self.costs[self.column == column[self.row]]
        ahead = self.costs - own[self.row]
        rival = owner[self.column]
        tolerance = EXACT * float(np.abs(self.costs).max())
        price, first = v[column], self.start[:-1]
        for _ in range(64 + n // 8):
            bid = np.minimum.reduceat(price[rival] - ahead, first)
            if (bid >= price - tolerance).all():
                return price[owner]
            price = np.minimum(price, bid)
        return None
