"""The algorithms of Git Re-Basin as the paper prints them: read this first.

Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", arXiv 2209.04836.

    weight_matching      section 3.2, algorithm 1: coordinate descent on the inner product of the weights
    activation_matching  section 3.1: one assignment a group, from what the neurons do on the same data
    straight_through     section 3.3, algorithm 2: follow the loss of the midpoint
    merge_many           algorithm 3: each model to the mean of the others

Nothing is accelerated, kept or checked: every cost matrix is computed whole, every assignment is solved by scipy. The
rest of this package computes the same, faster and for more cases; these functions are the oracle of its tests and the
yardstick of `experiments.benchmark_matching`. What is not in the paper is `best`: groups whose neurons may only move
within blocks, or together with them (attention heads, the groups of a GroupNorm).

A state is a mapping from names to tensors. A permutation is `index`: cell -> int64 [n], such that neuron i of pi(B)
is neuron index[i] of B; a cell is a set of neurons that move together wherever they appear, its sites the (parameter,
axis) at which they do (see `rebasin.spec`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..spec import Group, Leaf, Node, Permutation, PermutationSpec, Site, to_array
from ..types import State

Index = dict[str, np.ndarray]


def weight_matching(
    spec: PermutationSpec, a: State, b: State, init: Index | None = None, seed: int = 0, max_sweeps: int = 100
) -> tuple[Permutation, int]:
    """Algorithm 1: the permutation that brings B's weights to A's, and the number of sweeps that it took."""
    index = identity(spec) if init is None else dict(init)
    rng = np.random.default_rng(seed)
    progress, sweeps = True, 0
    while progress and sweeps < max_sweeps:
        progress = False
        for number in rng.permutation(len(spec)):
            group = spec.groups[number]
            costs = {cell.name: weight_costs(spec, a, b, index, cell.name) for cell in group.cells}
            old = value(costs, index, group)
            index |= best(group, costs)  # P_l <- SolveLAP(sum W_a P W_b^T)
            progress |= value(costs, index, group) > old + 1e-12
        sweeps += 1
    return Permutation(spec, index), sweeps


def activation_matching(
    spec: PermutationSpec, z_a: Mapping[str, Tensor], z_b: Mapping[str, Tensor], correlation: bool = False
) -> Permutation:
    """Section 3.1: activations Z [samples, n] of every cell on the same data, equation (1): max <P, Z_a^T Z_b>.

    The paper's code takes the products for its MLPs, and with `correlation` the correlations for its VGG.
    """

    def columns(z: Tensor) -> Tensor:
        z = z.double()
        return (z - z.mean(dim=0)) / z.std(dim=0, correction=0) if correlation else z

    costs = {cell: (columns(z_a[cell]).T @ columns(z_b[cell])).nan_to_num().numpy() for cell in spec.cells}
    return Permutation(spec, {name: p for group in spec for name, p in best(group, costs).items()})


def straight_through(
    spec: PermutationSpec,
    a: State,
    b: State,
    loss: Callable[[State], Tensor],
    steps: int,
    lr: float = 1e-2,
    momentum: float = 0.9,
) -> Permutation:
    """Algorithm 2: auxiliary weights w start at A; their projection pi(B) is what the loss sees, the gradient is w's.

    `loss` is that of a model with these weights, on the next batch.
    """
    w = {name: a[name].detach().clone().requires_grad_() for name in spec.axes}
    optimizer = torch.optim.SGD(w.values(), lr, momentum)
    found, lowest = Permutation(spec, identity(spec)), float("inf")
    index = identity(spec)
    for step in range(steps):
        projected = {name: tensor.detach() for name, tensor in w.items()}
        permutation, _ = weight_matching(spec, projected, b, index, seed=step)  # argmin |w - pi(B)|
        index = dict(permutation.index)
        brought = permutation.apply(b)
        # stop_gradient(pi(B)) + (w - stop_gradient(w)): the value of pi(B), the gradient of w.
        through = {name: brought[name] + (w[name] - w[name].detach()) for name in w}
        middle = loss({name: (a[name] + through.get(name, brought[name])) / 2 for name in a})
        if middle.item() < lowest:
            found, lowest = permutation, middle.item()
        optimizer.zero_grad()
        middle.backward()
        optimizer.step()
    return found


def merge_many(
    spec: PermutationSpec, states: Sequence[State], seed: int = 0, max_passes: int = 100
) -> tuple[list[Permutation], State]:
    """Algorithm 3: the permutations of all models, and their mean."""
    count = len(states)
    found = [Permutation(spec, identity(spec)) for _ in states]
    brought = [dict(state) for state in states]
    rng = np.random.default_rng(seed)
    for _ in range(max_passes):
        progress = False
        for i in rng.permutation(count):
            others = [brought[j] for j in range(count) if j != i]
            mean = {name: torch.stack([other[name] for other in others]).mean(dim=0) for name in spec.axes}
            step, _ = weight_matching(spec, mean, brought[i], seed=seed)
            before, after = (distance(spec, mean, state) for state in (brought[i], step.apply(brought[i])))
            if after < before - 1e-12:
                progress, found[i], brought[i] = True, step.compose(found[i]), step.apply(brought[i])
        if not progress:
            break
    mean = {name: torch.stack([state[name] for state in brought]).mean(dim=0) for name in brought[0]}
    return found, mean


def identity(spec: PermutationSpec) -> Index:
    return {name: np.arange(cell.size) for name, cell in spec.cells.items()}


def weight_costs(spec: PermutationSpec, a: State, b: State, index: Index, cell: str) -> np.ndarray:
    """[n, n]: what the inner product <A, pi(B)> gains from neuron j of B at the place of neuron i of A."""
    size = spec.cells[cell].size
    costs = torch.zeros(size, size)
    for site in spec.cells[cell].sites:
        if site.parameter not in spec.buffers:
            w_b = b[site.parameter]  # as it is by now on its other axes
            for axis, moved in Permutation(spec, index).axes_of(site.parameter, skip=cell):
                w_b = w_b.index_select(axis, torch.from_numpy(moved))
            costs = costs + rows(a[site.parameter], site) @ rows(w_b, site).T
    return costs.numpy()


def rows(tensor: Tensor, site: Site) -> Tensor:
    """The slices of a cell's neurons at one of its sites, [n, everything else], in at least float32."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    chosen = wide.index_select(site.axis, torch.from_numpy(to_array(site.positions)))
    return chosen.movedim(site.axis, 0).reshape(len(site.positions), -1)


def value(costs: Mapping[str, np.ndarray], index: Index, group: Group) -> float:
    return sum(float(costs[c.name][np.arange(c.size), index[c.name]].sum()) for c in group.cells)


def distance(spec: PermutationSpec, a: State, b: State) -> float:
    names = [name for name in spec.axes if name not in spec.buffers]
    return sum(float((a[name].double() - b[name].double()).square().sum()) for name in names) ** 0.5


def best(group: Group, costs: Mapping[str, np.ndarray]) -> Index:
    """The legal arrangement of a group with the largest sum of costs[i, index[i]]."""
    index = {cell.name: np.arange(cell.size) for cell in group.cells}
    for cell, places, neurons in _fill(group, group.tree, group.tree, costs)[1]:
        index[cell][places] = neurons
    return index


def _fill(
    group: Group, there: Node, here: Node, costs: Mapping[str, np.ndarray]
) -> tuple[float, list[tuple[str, np.ndarray, np.ndarray]]]:
    """The best way to fill the places of node `there` with the neurons of `here`: its value, and (cell, places,
    neurons) for each leaf. Neurons of a leaf are exchangeable; children of a branch keep their order ("fixed"), come in
    any, or in one of a list.
    """
    if isinstance(there, Leaf):
        assert isinstance(here, Leaf)
        cell, places, neurons = group.cells[there.cell].name, to_array(there.neurons), to_array(here.neurons)
        block = costs[cell][np.ix_(places, neurons)]
        i, j = linear_sum_assignment(block, maximize=True)
        return float(block[i, j].sum()), [(cell, places, neurons[j])]
    assert not isinstance(here, Leaf)
    n = len(there.children)
    if there.moves == "any":
        legal = [(i, j) for i in range(n) for j in range(n)]
    else:
        orders = [range(n)] if there.moves == "fixed" else there.moves
        legal = sorted({(i, j) for order in orders for i, j in enumerate(order)})
    inner = {(i, j): _fill(group, there.children[i], here.children[j], costs) for i, j in legal}
    if there.moves == "any":
        values = np.array([[inner[i, j][0] for j in range(n)] for i in range(n)])
        order = linear_sum_assignment(values, maximize=True)[1]
    else:
        order = max(orders, key=lambda order: sum(inner[i, j][0] for i, j in enumerate(order)))
    chosen = [inner[i, int(j)] for i, j in enumerate(order)]
    return sum(v for v, _ in chosen), [piece for _, pieces in chosen for piece in pieces]
