"""ZipIt: a merge whose neurons are pairs of the members' neurons, of one member as well as of both.

Stoica, Bolya, Bjorner, Ramesh, Hearn and Hoffman, "ZipIt! Merging Models from Different Tasks without Training" (ICLR
2024, arXiv 2305.03053). Of the 2n neurons [x_A; x_B] of a group n disjoint pairs are taken, greedily the most
correlated first, and each becomes one neuron of the merge. With M [n, 2n] the mean of each pair and U [2n, n] what
hands a merged neuron back to both of its pair (their M and U, section 4),

    W  =  M_l  diag(W_A, W_B)  U_(l-1)  =  M_A W_A U_A + M_B W_B U_B

for all tensors that the group touches. If each pair has one neuron of A and one of B this is the mean of permuted
models, that is Git Re-Basin; what it adds are pairs *inside* a member, where it repeats itself. This is no symmetry:
**the merge computes something that neither member does**.

What differs from the paper: all layers are zipped, none is left apart; their budget for pairs inside a member and
their discount for them are not there; members come aligned (it matters for groups that are left as they are).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..arguments import typed
from ..errors import ConfigError, DataError
from ..spec import Group, Leaf, PermutationSpec, Site, to_array
from ..tensors.modules import Forward, call_model, computing, eval_mode, hooked, to_device
from ..tensors.moments import Moments
from ..tensors.places import Place, known_places, owner_of
from ..types import State, is_finite
from .neuron_moments import NO_SAMPLES, Repaired, member_weights, replaced, working_copy

OWN = 1e-9
"""What a neuron's counterpart in the other member has in advance: it decides among those that nothing tells apart."""


@dataclass(frozen=True)
class Zip:
    """One group's pairs: neuron i of member j goes into merged neuron `into[j][i]`, with the share `share[j][i]`."""

    into: tuple[Tensor, Tensor]
    share: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Watched:
    """Where a group's neurons are seen: a dimension of what a module is given (`reads`) or gives, and its positions."""

    module: str
    reads: bool
    dim: int
    positions: tuple[np.ndarray, ...]


def zippable(spec: PermutationSpec, model: nn.Module) -> tuple[dict[str, Watched], list[str]]:
    """Cell -> where it is seen, of the groups that can be zipped; and the names of the others: neurons in heads or
    blocks, or that a module other than torch's own touches, so that nothing tells which of its axes are read and which
    are made.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, Watched] = {}
    left: list[str] = []
    for group in spec:
        seen = _watched(spec, group, modules) if isinstance(group.tree, Leaf) else None
        if seen is None:
            left.append(group.name)
        else:
            found[group.cells[0].name] = seen  # groups may share a name, cells don't
    return found, left


def _watched(spec: PermutationSpec, group: Group, modules: Mapping[str, nn.Module]) -> Watched | None:
    (cell,) = group.cells
    read: dict[tuple[str, int], list[np.ndarray]] = {}
    made: dict[tuple[str, int], list[np.ndarray]] = {}
    for site in cell.sites:
        for name in (site.parameter, *(a for a, target in spec.aliases.items() if target == site.parameter)):
            place = _place(modules, name, site)
            if place is None or (name != site.parameter and _reads(modules, name, site.axis) != _reads(
                modules, site.parameter, site.axis
            )):  # fmt: skip
                return None
            owner, leaf = owner_of(name, modules)
            if leaf == "weight":
                kept = read if place.where == "input" else made
                kept.setdefault((owner, place.dim), []).append(to_array(site.positions))
    for kept in (read, made):  # behind the non-linearity, where it can be seen there
        for (owner, dim), positions in kept.items():
            return Watched(owner, kept is read, dim, tuple(positions))
    return None


def _place(modules: Mapping[str, nn.Module], name: str, site: Site) -> Place | None:
    """The only place of a parameter's axis, if torch's own module says it and it is the whole output or input."""
    owner, leaf = owner_of(name, modules)
    if f"{owner}.{leaf}".lstrip(".") != name:
        return None  # the weight is computed from it (weight norm)
    places = (known_places(modules[owner]) or {}).get((leaf, site.axis), ())
    whole = len(places) == 1 and places[0].size is None and places[0].where in ("input", "output")
    return places[0] if whole else None


def _reads(modules: Mapping[str, nn.Module], name: str, axis: int) -> bool:
    """Whether what a module is given meets this axis of its parameter; known of zipped groups alone."""
    owner, leaf = owner_of(name, modules)
    return (known_places(modules[owner]) or {})[leaf, axis][0].where == "input"


def pairs(correlation: Tensor) -> np.ndarray:
    """int64 [n, 2]: disjoint pairs of the 2n rows of a symmetric matrix, greedily the largest entry first."""
    size = len(correlation)
    rows, columns = np.triu_indices(size, 1)
    order = np.argsort(-correlation.numpy()[rows, columns], kind="stable")
    free, found = np.ones(size, bool), []
    for a, b in zip(rows[order], columns[order], strict=True):
        if free[a] and free[b]:
            free[a] = free[b] = False
            found.append((a, b))
            if 2 * len(found) == size:
                break
    return np.array(found, dtype=np.int64)


def zipped(correlation: Tensor, shares: Sequence[float]) -> Zip:
    """The pairs [n] of 2n neurons, numbered by their first one, with members' `shares` in them."""
    n = len(correlation) // 2
    correlation = correlation.clone()
    own = torch.arange(n)
    correlation[own, own + n] += OWN
    into, share = torch.empty(2 * n, dtype=torch.int64), torch.empty(2 * n, dtype=torch.float64)
    chosen = pairs(correlation)
    for k, (a, b) in enumerate(chosen[np.argsort(chosen[:, 0])]):
        wa, wb = shares[int(a >= n)], shares[int(b >= n)]
        into[a] = into[b] = k
        share[a], share[b] = wa / (wa + wb), wb / (wa + wb)
    return Zip((into[:n], into[n:]), (share[:n], share[n:]))


def correlations(moments: Moments) -> Tensor:
    """Pearson's, [2n, 2n] float64; of what does not vary 1 with its like, where pairs cost nothing."""
    found = moments.statistic("pearson").cpu()
    dead = found.diagonal() == 0
    return found + dead[:, None] * dead


@typed
def repair_zipit(
    spec: PermutationSpec,
    model: nn.Module,
    merged: State,
    members: Sequence[State],
    batches: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
) -> Repaired:
    """Zip two members' neurons into one network of their width; nothing is changed in place.

    One pass over the data, in which both members run side by side. A group of n neurons needs a matrix of 2n x 2n in
    float64, and its pairs are sorted (n = 4,096: 4 GB while it lasts).

    Args:
        spec: the architecture's symmetries: they tell which neurons are one group's. Groups whose neurons lie in heads
            or blocks, and those that modules other than torch's own touch, stay the members' mean: `left_out`.
        model: the architecture. Its weights do not matter.
        merged: the mean of the members, of which all is kept that no zipped group touches.
        members: the two models as they went into it: permuted.
        batches: of training data.
        weights: of the members, positive; by default alike. A pair of both is weighted by them, one inside a member
            evenly.
        forward, device: see `reset_statistics`.

    Raises:
        DataError: there are no batches, or an activation is not finite.
        ConfigError: the weights do not fit, there are not two members, or no group can be zipped.
    """
    began = perf_counter()
    raw = member_weights(members, weights)
    if len(members) != 2:
        raise ConfigError(f"ZipIt pairs the neurons of two models, not of {len(members)}.")
    shares = [w / fsum(raw) for w in raw]
    call = forward or call_model
    places, left = zippable(spec, model)
    if not places:
        raise ConfigError(
            "No group of this network can be zipped: all lie in heads, blocks or modules of its own."
        )
    copies = [working_copy(model, member, device, "a member") for member in members]
    where = copies[0][1]
    sizes = {cell: spec.cells[cell].size for cell in places}
    moments = {name: Moments.zeros(2 * size, device=where) for name, size in sizes.items()}
    seen = 0
    for batch in batches:
        sides: list[dict[str, Tensor]] = []
        for copy, _ in copies:
            rows: dict[str, list[Tensor]] = {}

            def hook(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
                place = places[name]
                tensor = (args[0] if args else kwargs["input"]) if place.reads else output
                rows.setdefault(name, []).append(_rows(tensor.detach(), place))  # noqa: B023 (called at once)

            watched = {name: copy.get_submodule(place.module) for name, place in places.items()}
            with hooked(watched, hook), torch.no_grad(), eval_mode(copy), computing(batch):
                call(copy, to_device(batch, where))
            sides.append({name: torch.cat(parts) for name, parts in rows.items()})
        for name in sides[0]:
            both = torch.cat([side[name] for side in sides], 1).double()
            moments[name].add(both, both)
            seen += len(both)
    if places and not seen:
        raise DataError(NO_SAMPLES)
    zips: dict[str, Zip] = {}  # cell -> its pairs
    for group in spec:
        cell = group.cells[0].name
        if cell not in moments:
            continue
        if not moments[cell].count:
            left.append(group.name)  # it did not run
            continue
        found = correlations(moments[cell])
        if not is_finite(found):
            raise DataError(
                f"The activations of {group.name!r} are not finite on these batches, so they can't be zipped."
            )
        zips[cell] = zipped(found, shares)
    modules = dict(model.named_modules(remove_duplicate=False))
    states = [copy.state_dict() for copy, _ in copies]
    tensors = {
        name: _tensor(spec, modules, name, [state[name] for state in states], zips, shares)
        for name, axes in spec.axes.items()
        if any(cell in zips for sites in axes.values() for cell, _ in sites)
    }
    tensors |= {alias: tensors[target] for alias, target in spec.aliases.items() if target in tensors}
    return Repaired(replaced(merged, tensors), {}, tuple(left), False, perf_counter() - began)


def _rows(tensor: Tensor, place: Watched) -> Tensor:
    """[samples and positions, neurons] of a tensor; further positions of the same neurons are further samples."""
    flat = tensor.movedim(place.dim, -1)
    flat = flat.reshape(-1, flat.shape[-1])
    return torch.cat([flat[:, torch.from_numpy(p).to(flat.device)] for p in place.positions])


def _tensor(
    spec: PermutationSpec,
    modules: Mapping[str, nn.Module],
    name: str,
    values: Sequence[Tensor],
    zips: Mapping[str, Zip],
    shares: Sequence[float],
) -> Tensor:
    """M_A W_A U_A + M_B W_B U_B along all axes of one parameter; an axis that is not zipped has the members' mean."""
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for j, value in enumerate(values):
        value, made = value.double(), False
        for axis, sites in spec.axes[name].items():
            chosen = [(zips[cell], to_array(site.positions)) for cell, site in sites if cell in zips]
            if not chosen:
                continue
            length = value.shape[axis]
            into = torch.arange(length)
            factor = torch.ones(length, dtype=torch.float64)
            reads = _reads(modules, name, axis)
            if not reads:
                factor *= shares[j]
                made = True
            for found, positions in chosen:
                places = torch.from_numpy(positions)
                into[places] = places[found.into[j]]
                factor[places] = 1.0 if reads else found.share[j]
            shape = [1] * value.ndim
            shape[axis] = -1
            value = torch.zeros_like(value).index_add_(
                axis, into.to(value.device), value * factor.to(value.device).reshape(shape)
            )
        total += value if made else shares[j] * value
    return total
