"""A gauge of a network's weights: of all that compute the same by scales and invertible matrices, one is chosen.

In it gains are one, what writes a neuron is as large as what reads it, and inside a head the Gram matrices of writer
and reader are equal. Two networks that differ by a member of the group differ in their gauges by a permutation and
*orthogonal* matrices only, which leave norms as they are: what is left to find maximises an inner product, as in weight
matching.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...spec import DIAGONAL, Alignment, ContinuousGroup, MapSite, PermutationSpec, Site, to_array
from ...spec.mapped import MappedState

ROUNDS = 200
ALONE = 2
"""Rounds of a group that shares tensors with no other, which is balanced after the first, but for rounding."""

SETTLED = 1e-9
"""Scales that change by less are settled."""

RIDGE = 1e-12
"""Of a Gram matrix' mean eigenvalue, added to it: what a head does not use is left as it is."""


def rows(site: MapSite | Site, tensor: Tensor, count: int) -> Tensor:
    """A tensor's slices along the axis of a site, [count, size, everything else]; a copy."""
    positions = torch.from_numpy(to_array(site.positions)).to(tensor.device)
    return (
        tensor.index_select(site.axis, positions)
        .movedim(site.axis, 0)
        .reshape(count, len(positions) // count, -1)
    )


def gain_vectors(spec: PermutationSpec) -> set[str]:
    """The parameters that some map is turned by."""
    return {s.gain.parameter for g in spec.continuous for s in g.sites if s.gain is not None}


def is_gain(group: ContinuousGroup, vectors: set[str]) -> bool:
    """Whether it scales one of these `gain_vectors`: its choice is a gauge."""
    return group.kind == "scales" and any(s.parameter in vectors and s.power == 1 for s in group.sites)


def canonical(spec: PermutationSpec, state: Mapping[str, Tensor]) -> Alignment:
    """The scales and invertible matrices that bring `state` (tensors by their names in the spec) into its gauge."""
    gains = gain_vectors(spec)
    maps: dict[str, Tensor] = {}
    for group in spec.continuous:
        if is_gain(group, gains):
            vector = next(s for s in group.sites if s.parameter in gains and s.power == 1)
            values = rows(vector, state[vector.parameter].double(), group.neurons).reshape(-1)
            if bool((values != 0).all()):
                maps[group.name] = 1 / values
    others = [
        g
        for g in spec.continuous
        if g.name not in maps and g.kind in ("scales", "positive scales", "invertible")
    ]
    for groups in _coupled(others):
        names = {s.parameter for g in groups for s in g.sites}
        names |= {s.gain.parameter for g in groups for s in g.sites if s.gain is not None}
        wide = {name: state[name].double() for name in names}
        maps |= _balanced(groups, _seen(spec.continuous, maps, spec.aliases, wide), spec.aliases)
    return Alignment(spec.identity(), maps)


def _coupled(groups: Sequence[ContinuousGroup]) -> list[list[ContinuousGroup]]:
    """The groups in parts that share no tensor: each can be balanced by itself."""
    parts: list[tuple[set[str], list[ContinuousGroup]]] = []
    for group in groups:
        names = {site.parameter for site in group.sites}
        meet = [part for part in parts if not names.isdisjoint(part[0])]
        parts = [part for part in parts if names.isdisjoint(part[0])]
        parts.append((names.union(*(n for n, _ in meet)), [*(g for _, own in meet for g in own), group]))
    return [own for _, own in parts]


def _balanced(
    groups: Sequence[ContinuousGroup], current: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> dict[str, Tensor]:
    """The matrices that balance writers and readers of groups that share tensors, all of them float64."""
    maps: dict[str, Tensor] = {}
    for _ in range(ROUNDS if len(groups) > 1 else ALONE):
        change, found = 0.0, {}
        for group in groups:
            matrices = (_balanced_heads if group.kind == "invertible" else _balanced_scales)(group, current)
            found[group.name] = matrices
            change = max(change, float((matrices - group.identity()).abs().max()))
        current = _seen(groups, found, aliases, current)
        for group in groups:
            new, old = found[group.name], maps.get(group.name)
            maps[group.name] = new if old is None else new * old if group.kind in DIAGONAL else new @ old
        if change < SETTLED:
            break
    return maps


def _seen(
    groups: Sequence[ContinuousGroup],
    maps: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    state: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    view = MappedState(groups, maps, aliases, state)
    return {name: view[name] for name in state}


def _balanced_scales(group: ContinuousGroup, state: Mapping[str, Tensor]) -> Tensor:
    """s with |s W|^2 = |V / s|^2 for each neuron's writers W and readers V, float64 [neurons]."""
    squares = torch.zeros(2, group.neurons, dtype=torch.float64)
    for site in group.sites:
        mine = rows(site, state[site.parameter], group.neurons).double()
        squares[int(site.power < 0)] += mine.square().sum((1, 2))
    written, read = squares
    return torch.where(
        (written > 0) & (read > 0), (read / written) ** 0.25, torch.ones_like(read)
    ).nan_to_num(1.0)


def _balanced_heads(group: ContinuousGroup, state: Mapping[str, Tensor]) -> Tensor:
    """T with T W W^T T^T = T^-T V V^T T^-1 for the writers W and readers V of each block, float64 [count, size, size].

    T^T T is the geometric mean of (W W^T)^-1 and V V^T; of its roots the symmetric one is taken.
    """
    gram = torch.zeros(2, *group.shape, dtype=torch.float64)
    for site in group.sites:
        mine = rows(site, state[site.parameter], group.count).double()
        gram[int(site.power < 0)] += mine @ mine.mT
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    gram = gram + torch.eye(group.size, dtype=torch.float64) * (RIDGE * mean).clamp_min(1e-30)
    written, read = gram
    root = _root(written, 0.5)
    inner = _root(root @ read @ root, 0.5)
    back = _root(written, -0.5)
    return _root(back @ inner @ back, 0.5)


def _root(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return vectors * values.clamp_min(1e-30)[..., None, :] ** exponent @ vectors.mT
