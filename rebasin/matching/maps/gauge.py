"""A gauge of a network's weights: of all that compute the same by scales and invertible matrices, one is chosen.

In it gains are one, what writes a neuron is as large as what reads it, and inside a head the Gram matrices of writer
and reader are equal. Two networks that differ by a member of the group differ in their gauges by a permutation and
*orthogonal* matrices only, which leave norms as they are: what is left to find maximises an inner product, as in weight
matching.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor

from ...spec import DIAGONAL, Alignment, ContinuousGroup, MapSite, PermutationSpec, Site, to_array
from ...spec.mapped import MappedState, gains_of

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


def sign_vector(group: ContinuousGroup, spec: PermutationSpec) -> MapSite | None:
    """Of scales that nothing but vectors write (gains and shifts of a norm) the first vector: its sign is a gauge."""
    written = [site for site in group.sites if site.power == 1]
    vectors = all(len(spec.shapes[site.parameter]) == 1 for site in written)
    return written[0] if group.kind == "scales" and written and vectors else None


def canonical(spec: PermutationSpec, state: Mapping[str, Tensor], without: Container[str] = ()) -> Alignment:
    """The scales and invertible matrices that bring `state` (tensors by their names in the spec) into its gauge.

    Groups `without` which it is to be done stay as they are.
    """
    gains = gain_vectors(spec)
    maps: dict[str, Tensor] = {}
    signs: dict[str, Tensor] = {}
    own = [group for group in spec.continuous if group.name not in without]
    for group in own:
        if is_gain(group, gains):
            vector = next(s for s in group.sites if s.parameter in gains and s.power == 1)
            values = rows(vector, state[vector.parameter].double(), group.neurons).reshape(-1)
            if not gains_of(spec.aliases, state, vector.parameter, 0.0)[
                1
            ]:  # else maps can't be turned by them
                maps[group.name] = 1 / values
        elif (vector := sign_vector(group, spec)) is not None:
            values = rows(vector, state[vector.parameter].double(), group.neurons).reshape(-1)
            signs[group.name] = torch.where(values < 0, -1.0, 1.0).double()
    others = [g for g in own if g.name not in maps and g.kind in ("scales", "positive scales", "invertible")]
    for groups in _coupled(others):
        names = {s.parameter for g in groups for s in g.sites}
        names |= {s.gain.parameter for g in groups for s in g.sites if s.gain is not None}
        wide = {name: state[name].double() for name in names}
        maps |= _balanced(groups, _seen(spec.continuous, maps, spec.aliases, wide), spec.aliases)
    return Alignment(spec.identity(), {**maps, **{n: maps.get(n, 1.0) * sign for n, sign in signs.items()}})


RANK = 1e-10
"""Eigenvalues of a Gram matrix below this share of the largest are none: singular values below 1e-5 of theirs."""


def undetermined(spec: PermutationSpec, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Continuous groups whose matrices the weights do not determine, and why: what writes or reads a block has less
    rank than the block has neurons, so that some directions carry nothing.
    """
    found: dict[str, str] = {}
    for group in spec.continuous:
        if group.kind == "invertible":
            for gram, what in zip(_grams(group, state), ("written", "read"), strict=True):
                values = torch.linalg.eigvalsh(gram)
                rank = (values > RANK * values[..., -1:].clamp_min(1e-300)).sum(-1)
                if bool((rank < group.size).any()):
                    found[group.name] = (
                        f"it is {what} in {int(rank.min())} dimensions of {group.size}, which determine no matrix"
                    )
    return found


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
    current = dict(current)
    for _ in range(ROUNDS if len(groups) > 1 else ALONE):
        change = 0.0
        for group in groups:  # one by one: together they would go too far where they share tensors
            new = (_balanced_heads if group.kind == "invertible" else _balanced_scales)(group, current)
            change = max(change, float((new - group.identity()).abs().max()))
            names = {site.parameter for site in group.sites}
            names |= {site.gain.parameter for site in group.sites if site.gain is not None}
            own = {name: current[name] for name in names}
            current |= _seen([group], {group.name: new}, aliases, own)
            old = maps.get(group.name)
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
    gram = _grams(group, state)
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    gram = gram + torch.eye(group.size, dtype=torch.float64) * (RIDGE * mean).clamp_min(1e-30)
    written, read = gram
    root = _root(written, 0.5)
    inner = _root(root @ read @ root, 0.5)
    back = _root(written, -0.5)
    return _root(back @ inner @ back, 0.5)


def _grams(group: ContinuousGroup, state: Mapping[str, Tensor]) -> Tensor:
    """W W^T and V V^T of all that writes and reads each block, float64 [2, count, size, size]."""
    gram = torch.zeros(2, *group.shape, dtype=torch.float64)
    for site in group.sites:
        mine = rows(site, state[site.parameter], group.count).double()
        gram[int(site.power < 0)] += mine @ mine.mT
    return gram


def _root(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return vectors * values.clamp_min(1e-30)[..., None, :] ** exponent @ vectors.mT


GRID = torch.linspace(-3, 3, 121, dtype=torch.float64)
"""Logarithms of scales that are tried."""


def closest_scales(group: ContinuousGroup, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Of positive scales s those with the smallest |A_w - s B_w|^2 + |A_r - B_r / s|^2 over writers and readers, for
    each neuron by itself, float64 [neurons]: the best of GRID, and Newton's method from there.
    """
    products, squares = (torch.zeros(2, group.neurons, dtype=torch.float64) for _ in range(2))
    for site in group.sites:
        x, y = (rows(site, s[site.parameter], group.neurons).double() for s in (a, b))
        products[int(site.power < 0)] += (x * y).sum((1, 2))
        squares[int(site.power < 0)] += y.square().sum((1, 2))

    def value(t: Tensor) -> Tensor:
        up, down = t.exp(), (-t).exp()
        return squares[0] * up**2 - 2 * products[0] * up + squares[1] * down**2 - 2 * products[1] * down

    t = GRID[torch.stack([value(t.expand(group.neurons)) for t in GRID]).argmin(0)]
    for _ in range(8):
        up, down = t.exp(), (-t).exp()
        slope = 2 * (squares[0] * up**2 - products[0] * up - squares[1] * down**2 + products[1] * down)
        bend = 2 * (2 * squares[0] * up**2 - products[0] * up + 2 * squares[1] * down**2 - products[1] * down)
        step = torch.where(bend > 0, slope / bend, torch.zeros_like(t)).clamp(-0.05, 0.05)
        t = t - step
    return torch.where(value(t) < value(torch.zeros_like(t)), t.exp(), torch.ones_like(t))
