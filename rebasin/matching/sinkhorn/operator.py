"""The Sinkhorn operator, its implicit gradient, and soft members of a group with structure.

Pena et al., "Re-basin via implicit Sinkhorn differentiation" (CVPR 2023, arXiv 2212.12042). The operator scales rows
and columns of exp(X / tau) in turns until all of them sum to one:

    S(X) = diag(u) exp(X / tau) diag(v),    S 1 = 1,  1^T S = 1^T

It is the soft form of a linear assignment: for tau -> 0 it goes to the permutation that maximises <X, P>.

Its gradient is that of the point it converges to. Of S o (dX / tau + da 1^T + 1 db^T) all rows and columns must sum to
zero, which determines da and db, so for a loss with the gradient G by S

    dL/dX = S o (G - a 1^T - 1 b^T) / tau,   [ diag(S 1)     S      ] [a]   [ (S o G) 1   ]
                                             [   S^T    diag(S^T 1) ] [b] = [ (S o G)^T 1 ]

No iteration has to be remembered for it. The system is singular along (1, -1), which changes nothing: b_n = 0.

A group with structure has soft members, too (`soft_permutation`), as its best member is found exactly (see
`assignment.blocks`): the value of child j at place i is <X, S(X)> of what is inside, an outer S of these values
(by neuron) orders the children, and a block is the inner S times the outer share. Hardened, it is the exact nested
assignment of X.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...spec import Branch, Group, Leaf, Node, to_array
from ...types import is_finite

Blocks = list[tuple[int, Tensor, Tensor, Tensor]]
"""Cell, its neurons [n, k] at the places and [n, k] at the sources, and how they are mixed, [n, k, k]."""


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tau: float, iterations: int) -> Tensor:
        log = x / tau
        for _ in range(iterations):
            log = log - log.logsumexp(-1, keepdim=True)
            log = log - log.logsumexp(-2, keepdim=True)
        ctx.tau = tau
        ctx.save_for_backward(log.exp())
        return log.exp()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        (s,) = ctx.saved_tensors
        weighted, n = s * slopes[0], s.shape[-1]
        rows, columns = torch.diag_embed(s.sum(-1)), torch.diag_embed(s.sum(-2))
        system = torch.cat([torch.cat([rows, s], -1), torch.cat([s.mT, columns], -1)], -2)[..., :-1, :-1]
        sums = torch.cat([weighted.sum(-1), weighted.sum(-2)[..., :-1]], -1)
        system, sums = system.double(), sums.double()
        found, info = torch.linalg.solve_ex(system, sums)
        if bool(info.any()) or not is_finite(
            found
        ):  # S is hard to the last bit: any solution gives the same slope
            if not is_finite(system):
                raise ConfigError("The soft permutation is not finite: lower lr or noise, or raise tau.")
            found = (torch.linalg.pinv(system, hermitian=True) @ sums[..., None])[..., 0]
        found = found.to(s)
        a, b = found[..., :n], torch.nn.functional.pad(found[..., n:], (0, 1))
        return (weighted - s * (a[..., :, None] + b[..., None, :])) / ctx.tau, None, None


def sinkhorn(x: Tensor, tau: float = 1.0, iterations: int = 20) -> Tensor:
    """S(X) of matrices [..., n, n]: doubly stochastic, columns exactly; differentiable."""
    if x.shape[-1] == 1:
        return torch.ones_like(x)
    return _Sinkhorn.apply(x, tau, iterations)  # type: ignore[return-value]


def soft_permutation(
    group: Group, x: Mapping[str, Tensor], tau: float = 1.0, iterations: int = 20
) -> dict[str, Tensor]:
    """Cell -> how its neurons are mixed, [size, size]: row i has what comes to place i. Differentiable.

    Args:
        group: its tree says what may be exchanged.
        x: cell -> what it is worth to put neuron j at place i, [size, size].
    """
    made = {cell.name: torch.zeros_like(x[cell.name]) for cell in group.cells}
    given = [x[cell.name] for cell in group.cells]
    _, blocks = _soft([group.tree], [group.tree], given, tau, iterations)
    for cell, places, sources, mixed in blocks:
        name = group.cells[cell].name
        made[name] = made[name].index_put((places[:, :, None], sources[:, None, :]), mixed, accumulate=True)
    return made


def _soft(
    places: Sequence[Node], sources: Sequence[Node], x: Sequence[Tensor], tau: float, iterations: int
) -> tuple[Tensor, Blocks]:
    """Of n pairs of a place and what may come to it, all alike: their values [n], <X, S(X)>, and blocks."""
    first, n = places[0], len(places)
    if isinstance(first, Leaf):
        worth = x[first.cell]
        at, of = _numbers(places, worth), _numbers(sources, worth)
        own = worth[at[:, :, None], of[:, None, :]]
        mixed = sinkhorn(own, tau, iterations)
        return (own * mixed).sum((-2, -1)), [(first.cell, at, of, mixed)]
    count = len(first.children)
    if first.moves == "fixed":
        values, blocks = torch.zeros(n).to(x[0]), Blocks()
        for child in range(count):
            own, inner = _soft(_nth(places, child), _nth(sources, child), x, tau, iterations)
            values, blocks = values + own, blocks + inner
        return values, blocks
    pairs = [(p, s) for p, s in zip(_children(places), _children(sources), strict=True)]
    inner_places = [child for p, s in pairs for child in p for _ in s]
    inner_sources = [child for p, s in pairs for _ in p for child in s]
    values, blocks = _soft(inner_places, inner_sources, x, tau, iterations)
    values = values.view(n, count, count)
    mean = values / _neurons(first.children[0])  # one temperature fits all sizes
    if first.moves == "any":
        share = sinkhorn(mean, tau, iterations)
    else:
        orders = torch.tensor(first.moves, device=values.device)
        matrices = torch.nn.functional.one_hot(orders, count).to(values)  # [orders, place, source]
        share = torch.einsum(
            "no,ops->nps", (torch.einsum("nps,ops->no", mean, matrices) / tau).softmax(-1), matrices
        )
    each = share.reshape(-1, 1, 1)
    shared = [
        (cell, at, of, mixed * each.repeat_interleave(len(mixed) // len(each), 0))
        for cell, at, of, mixed in blocks
    ]
    return (share * values).sum((-2, -1)), shared


def _neurons(node: Node) -> int:
    return len(node.neurons) if isinstance(node, Leaf) else sum(map(_neurons, node.children))


def _numbers(leaves: Sequence[Node], like: Tensor) -> Tensor:
    return torch.stack([torch.from_numpy(to_array(leaf.neurons)) for leaf in leaves]).to(like.device)  # type: ignore[union-attr]


def _children(nodes: Sequence[Node]) -> list[tuple[Node, ...]]:
    return [node.children for node in nodes if isinstance(node, Branch)]


def _nth(nodes: Sequence[Node], child: int) -> list[Node]:
    return [children[child] for children in _children(nodes)]
