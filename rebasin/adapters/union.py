"""Specs of several components as one, and a permutation or an alignment carried from one spec into another.

A checkpoint is aligned component by component, but travels as one file: its spec is the disjoint union of the
components', with parameters named `unet.*`, `vae.*`, `text_encoder.*` (as `rebasin.compose` names them).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import SpecMismatchError, shown
from ..spec import (
    DIAGONAL,
    Alignment,
    Cell,
    ContinuousGroup,
    MapSite,
    Permutation,
    PermutationSpec,
    PermutedState,
    to_array,
)
from ..spec.mapped import MappedState
from ..types import State

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2", "controlnet", "transformer")
"""The names of a pipeline's parts, as diffusers names its folders."""

PART = re.compile(
    rf"({'|'.join(COMPONENTS)}|model|image_encoder|prior|vocoder|audio_vae|unconditional)(_\d+)?"
)
"""What parts are called, those of a folder of one model and of larger pipelines, too."""

Member = TypeVar("Member", bound=Permutation | Alignment)
"""Of a spec's symmetry group: what comes out is what went in."""

Rename = Callable[[str], str | None]

SAME = 1e-5
"""Relative: matrices that move a random vector alike up to this are the same."""


def union(members: Mapping[str, Member]) -> Member:
    """One permutation (or alignment) over the disjoint union of several specs; names get the prefix `component.`.

    The empty name adds no prefix: a joint spec has its components' names already.
    """
    specs = []
    index: dict[str, np.ndarray] = {}
    maps: dict[str, Tensor] = {}
    for name, member in members.items():
        before = f"{name}." if name else ""
        specs.append(_renamed(member.spec, lambda parameter, before=before: before + parameter, before))
        index |= {before + cell: perm for cell, perm in _permutation(member).index.items()}
        maps |= {before + group: matrices for group, matrices in _maps(member).items()}
    mapped = any(isinstance(member, Alignment) for member in members.values())
    whole = PermutationSpec(
        groups=tuple(group for spec in specs for group in spec.groups),
        shapes={name: shape for spec in specs for name, shape in spec.shapes.items()},
        buffers=frozenset(name for spec in specs for name in spec.buffers),
        aliases={name: target for spec in specs for name, target in spec.aliases.items()},
        pins=tuple(pin for spec in specs for pin in spec.pins),
        continuous=tuple(group for spec in specs for group in spec.continuous) if mapped else (),
    )
    made: Any = Permutation(whole, index)
    if mapped:
        made = Alignment(made, maps)
    return made


def of_component(member: Member, component: str) -> Member | None:
    """The part of a union that acts on one component, with its names unprefixed; None if it has none. A permutation of
    the component alone, in its own names, is that part already.

    Groups that a joint spec has across components are cut: what is left is legal only along with the rest. Gains of
    another component keep the name that they have in the joint spec.
    """
    prefix = f"{component}."
    if component_of(member.spec) == (component,) and not prefix_of(member.spec, component):
        return member
    own = _renamed(member.spec, lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)
    return part(member, own, prefix) if own.shapes else None


def is_joint(spec: PermutationSpec) -> bool:
    """Whether a group reaches across components: then no component may be moved without the others."""
    groups = [{site.parameter for cell in group.cells for site in cell.sites} for group in spec.groups]
    groups += [{site.parameter for site in group.sites} for group in spec.continuous]
    return len(component_of(spec)) > 1 and any(
        len({name.split(".")[0] for name in names}) > 1 for names in groups
    )


def component_of(spec: PermutationSpec) -> tuple[str, ...]:
    """The components that `spec` speaks of: those of a union, or the one that the parameters' names betray."""
    first = {name.split(".")[0] for name in spec.shapes}
    if all(PART.fullmatch(name) for name in first):
        known = [name for name in COMPONENTS if name in first]
        return (*known, *sorted(first - set(known)))
    if {"conv_in", "time_embedding", "down_blocks"} <= first:
        return ("unet",)
    if "text_projection" in first:  # of the encoders of Stable Diffusion only the second has it
        return ("text_encoder_2",)
    if "text_model" in first or any(name.startswith("encoder.layers.") for name in spec.shapes):
        return ("text_encoder",)
    return ("vae",) if {"encoder", "decoder"} <= first else ()


def prefix_of(spec: PermutationSpec, component: str) -> str:
    """What the names of `component` start with in `spec`: `unet.` in a union, nothing in a spec of its own."""
    return f"{component}." if any(name.startswith(f"{component}.") for name in spec.shapes) else ""


def part(member: Member, spec: PermutationSpec, prefix: str = "") -> Member:
    """`member`'s action on one component, as a member of that component's own `spec`.

    Args:
        member: of a union or a joint spec, in which the component's names start with `prefix`.

    Raises:
        SpecMismatchError: it moves something of the component that `spec` alone keeps in place.
    """
    return _carried(member, spec, lambda name: prefix + name, prefix)


def extend(
    member: Member, joint: PermutationSpec, prefix: str = "unet.", base: State | None = None
) -> Member:
    """The member of `joint` that acts on `prefix`'s parameters as `member` does, and moves nothing else but what must
    follow.

    Args:
        member: of one component alone, or of a union that has it under the same prefix.
        joint: the spec of the component together with others; its names there start with `prefix`.
        base: weights by the names of `member`'s spec, for gains that maps of streams between components are turned by.

    Raises:
        SpecMismatchError: `joint` does not allow what `member` does.
    """
    own = prefix if any(name.startswith(prefix) for name in member.spec.shapes) else ""

    def source(name: str) -> str | None:
        return own + name.removeprefix(prefix) if name.startswith(prefix) else None

    return _carried(member, joint, source, own, base)


def _permutation(member: Permutation | Alignment) -> Permutation:
    return member if isinstance(member, Permutation) else member.permutation


def _maps(member: Permutation | Alignment) -> Mapping[str, Tensor]:
    return {} if isinstance(member, Permutation) else member.maps


def _carried(
    member: Member, spec: PermutationSpec, source: Rename, prefix: str, base: State | None = None
) -> Member:
    """The member of `spec` that acts on each parameter as `member` does on `source(parameter)`; it must have all that
    `member` moves and that starts with `prefix`.
    """
    carried: Any = _carried_permutation(_permutation(member), spec, source, prefix)
    if isinstance(member, Alignment):
        carried = Alignment(carried, _carried_maps(member, spec, source, prefix, base))
    return carried


def _carried_permutation(
    permutation: Permutation, spec: PermutationSpec, source: Rename, prefix: str
) -> Permutation:
    there = {source(name) for name in spec.shapes}
    for name in permutation.spec.axes:
        if name.startswith(prefix) and name not in there:
            raise SpecMismatchError(
                f"The permutation moves {name!r}, which the spec at hand does not have: it was made for another"
                " architecture."
            )

    @cache
    def wanted(name: str) -> dict[int, np.ndarray] | None:
        origin = source(name)
        if origin is None or permutation.spec.aliases.get(origin, origin) not in permutation.spec.shapes:
            return None
        return dict(permutation.axes_of(origin))

    index: dict[str, np.ndarray] = {}
    for cell in spec.cells.values():
        index[cell.name] = np.arange(cell.size)
        for site in cell.sites:
            moves = wanted(site.parameter)
            if moves is not None:
                full = moves.get(site.axis, np.arange(spec.shapes[site.parameter][site.axis]))
                positions = to_array(site.positions)
                order = np.argsort(positions)
                found = np.searchsorted(positions, full[positions], sorter=order)
                index[cell.name] = order[np.minimum(found, cell.size - 1)]
                break
    carried = Permutation(spec, index)
    # Each axis must come out as it was wanted: a pinned one, or one tied to another, can't be carried over.
    for name in spec.shapes:
        there, here = wanted(name), dict(carried.axes_of(name))
        if there is not None and (
            there.keys() != here.keys() or any(not np.array_equal(there[a], here[a]) for a in there)
        ):
            raise SpecMismatchError(
                f"The permutation moves {source(name)!r} in a way that the spec at hand does not allow; was it made for"
                " another architecture, or with the text encoder freed?"
            )
    if not spec.contains(carried):
        raise SpecMismatchError("The permutation is not legal for the spec at hand; was it made for another?")
    return carried


def _carried_maps(
    member: Alignment, spec: PermutationSpec, source: Rename, prefix: str, base: State | None
) -> dict[str, Tensor]:
    """The maps of `spec` that act as those of `member` do: of groups with the same sites the same, else what matrices
    have that effect.
    """
    known = {name: origin for name in spec.shapes if (origin := source(name)) in member.spec.shapes}
    reached = set(known.values())
    groups = {group.name: group for group in member.spec.continuous if group.name in member.maps}
    for group in groups.values():
        for site in group.sites:
            if site.parameter.startswith(prefix) and site.parameter not in reached:
                raise SpecMismatchError(
                    f"The alignment maps {site.parameter!r}, which the spec at hand does not have: it was made for"
                    " another architecture."
                )
    same = {frozenset(_place(g, s) for s in g.sites if s.parameter in reached): n for n, g in groups.items()}
    same.pop(frozenset(), None)

    def of_member(site: MapSite) -> MapSite:
        gain = site.gain
        if gain is not None:
            gain = replace(gain, parameter=known.get(gain.parameter, gain.parameter))
        return replace(site, parameter=known[site.parameter], gain=gain)

    maps: dict[str, Tensor] = {}
    others: list[ContinuousGroup] = []
    for group in spec.continuous:
        sites = [of_member(site) for site in group.sites if site.parameter in known]
        name = same.pop(frozenset(_place(group, site) for site in sites), None)
        if name is not None:
            maps[group.name] = member.maps[name]
        elif sites:
            others.append(replace(group, sites=tuple(sites)))
    if same:
        # Groups that are cut or joined otherwise: what acts on a site, and whether that is all.
        left = [groups[name] for name in same.values()]
        seen = PermutedState(member.permutation, base or {})
        acting = MappedState(left, member.maps, member.spec.aliases, seen)
        found = {group.name: _acting(group, acting, member.spec) for group in others}
        found = {name: matrices for name, matrices in found.items() if matrices is not None}
        places = {
            (s.parameter, s.axis): None for g in (*left, *others) for s in g.sites if s.parameter in reached
        }
        _require_alike(acting, MappedState(others, found, member.spec.aliases, seen), places, member.spec)
        maps |= found
    return maps


def _place(group: ContinuousGroup, site: MapSite) -> tuple[object, ...]:
    """The same for sites at which groups of one kind act alike."""

    def places(positions: range | np.ndarray) -> bytes:
        return to_array(positions).astype(np.int64).tobytes()

    gain = site.gain and (site.gain.parameter, places(site.gain.positions), site.gain.offset, site.gain.power)
    own = group.kind, group.count, group.size
    return (*own, site.parameter, site.axis, places(site.positions), site.power, gain)


def _acting(group: ContinuousGroup, view: MappedState, spec: PermutationSpec) -> Tensor | None:
    """The matrices with which `group` would do what the view does at its sites; None if it does nothing there, or only
    behind gains.
    """
    site = next((s for s in group.sites if s.gain is None and view.acting(s.parameter, s.axis)), None)
    if site is None:
        return None
    positions = torch.from_numpy(to_array(site.positions))
    diagonal = group.kind in DIAGONAL
    units = torch.ones(len(positions), 1) if diagonal else torch.eye(len(positions))
    probe = torch.zeros(spec.shapes[site.parameter][site.axis], units.shape[1], dtype=torch.float64)
    probe[positions] = units.double()
    acted = view.act(site.parameter, site.axis, probe, 0)[positions]
    if diagonal:
        return acted[:, 0] ** site.power
    blocks = acted.reshape(group.count, group.size, group.count, group.size).diagonal(dim1=0, dim2=2)
    blocks = blocks.permute(2, 0, 1).contiguous()
    return blocks if site.power == 1 else torch.linalg.inv(blocks).mT


def _require_alike(
    one: MappedState, other: MappedState, places: Iterable[tuple[str, int]], spec: PermutationSpec
) -> None:
    """Raise `SpecMismatchError` unless both move a random vector alike along these axes."""
    generator = torch.Generator().manual_seed(0)
    for parameter, axis in places:
        if not (one.acting(parameter, axis) or other.acting(parameter, axis)):
            continue
        probe = torch.randn(spec.shapes[parameter][axis], 2, generator=generator, dtype=torch.float64)
        there, here = (view.act(parameter, axis, probe, 0) for view in (one, other))
        if not bool((there - here).norm() < SAME * there.norm()):
            raise SpecMismatchError(
                f"The alignment maps {shown(parameter)} in a way that the spec at hand does not allow; was it made for"
                " another architecture, or with the text encoder freed?"
            )


def _renamed(spec: PermutationSpec, rename: Rename, before: str = "") -> PermutationSpec:
    """`spec` under other names of parameters, without those for which `rename` gives None.

    Names of groups and cells get `before` in front of them.
    """

    def renamed(cell: Cell) -> Cell:
        names = ((rename(site.parameter), site) for site in cell.sites)
        sites = tuple(replace(site, parameter=name) for name, site in names if name)
        return replace(cell, name=before + cell.name, sites=sites)

    def mapped(site: MapSite) -> MapSite | None:
        name, gain = rename(site.parameter), site.gain
        if gain is not None:
            gain = replace(gain, parameter=rename(gain.parameter) or gain.parameter)
        return replace(site, parameter=name, gain=gain) if name else None

    groups = (
        replace(group, name=before + group.name, cells=tuple(map(renamed, group.cells)))
        for group in spec.groups
    )
    continuous = (
        replace(group, name=before + group.name, sites=tuple(filter(None, map(mapped, group.sites))))
        for group in spec.continuous
    )
    return PermutationSpec(
        tuple(group for group in groups if any(cell.sites for cell in group.cells)),
        {name: shape for old, shape in spec.shapes.items() if (name := rename(old))},
        frozenset(name for old in spec.buffers if (name := rename(old))),
        {name: rename(target) or target for old, target in spec.aliases.items() if (name := rename(old))},
        tuple(replace(pin, parameter=name) for pin in spec.pins if (name := rename(pin.parameter))),
        tuple(group for group in continuous if group.sites),
    )
