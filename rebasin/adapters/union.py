"""Specs of several components as one, and a permutation carried from one spec into another.

A checkpoint is aligned component by component, but travels as one permutation file: its spec is the disjoint union
of the components', with parameters named `unet.*`, `vae.*`, `text_encoder.*` (as `rebasin.compose` names them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import numpy as np

from ..errors import SpecMismatchError
from ..spec import Cell, Permutation, PermutationSpec, to_array

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2", "controlnet", "transformer")
"""The names of a pipeline's parts, as diffusers names its folders."""


def union(permutations: Mapping[str, Permutation]) -> Permutation:
    """One permutation over the disjoint union of several specs; names get the prefix `component.`.

    The empty name adds no prefix: a joint spec has its components' names already.
    """
    specs = []
    index: dict[str, np.ndarray] = {}
    for name, permutation in permutations.items():
        before = f"{name}." if name else ""
        specs.append(_renamed(permutation.spec, lambda parameter, before=before: before + parameter, before))
        index |= {before + cell: perm for cell, perm in permutation.index.items()}
    whole = PermutationSpec(
        groups=tuple(group for spec in specs for group in spec.groups),
        shapes={name: shape for spec in specs for name, shape in spec.shapes.items()},
        buffers=frozenset(name for spec in specs for name in spec.buffers),
        aliases={name: target for spec in specs for name, target in spec.aliases.items()},
        pins=tuple(pin for spec in specs for pin in spec.pins),
    )
    return Permutation(whole, index)


def of_component(permutation: Permutation, component: str) -> Permutation | None:
    """The part of a union that acts on one component, with its names unprefixed; None if it has none. A permutation of
    the component alone, in its own names, is that part already.

    Groups that a joint spec has across components are cut: what is left is legal only along with the rest.
    """
    prefix = f"{component}."
    if component_of(permutation.spec) == (component,) and not prefix_of(permutation.spec, component):
        return permutation
    own = _renamed(
        permutation.spec, lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None
    )
    return part(permutation, own, prefix) if own.shapes else None


def is_joint(spec: PermutationSpec) -> bool:
    """Whether a group reaches across components: then no component may be moved without the others."""
    return len(component_of(spec)) > 1 and any(
        len({site.parameter.split(".")[0] for cell in group.cells for site in cell.sites}) > 1
        for group in spec.groups
    )


def component_of(spec: PermutationSpec) -> tuple[str, ...]:
    """The components that `spec` speaks of: those of a union, or the one that the parameters' names betray."""
    first = {name.split(".")[0] for name in spec.shapes}
    if first <= set(COMPONENTS):
        return tuple(name for name in COMPONENTS if name in first)
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


def part(permutation: Permutation, spec: PermutationSpec, prefix: str = "") -> Permutation:
    """`permutation`'s action on one component, as a member of that component's own `spec`.

    Args:
        permutation: of a union or a joint spec, in which the component's names start with `prefix`.

    Raises:
        SpecMismatchError: it moves something of the component that `spec` alone keeps in place.
    """
    return _carried(permutation, spec, lambda name: prefix + name, prefix)


def extend(permutation: Permutation, joint: PermutationSpec, prefix: str = "unet.") -> Permutation:
    """The member of `joint` that acts on `prefix`'s parameters as `permutation` does, and moves nothing else
    but what must follow.

    Args:
        permutation: of one component alone, or of a union that has it under the same prefix.
        joint: the spec of the component together with others; its names there start with `prefix`.

    Raises:
        SpecMismatchError: `joint` does not allow what `permutation` does.
    """
    own = prefix if any(name.startswith(prefix) for name in permutation.spec.shapes) else ""

    def source(name: str) -> str | None:
        return own + name.removeprefix(prefix) if name.startswith(prefix) else None

    return _carried(permutation, joint, source, own)


def _carried(
    permutation: Permutation, spec: PermutationSpec, source: Callable[[str], str | None], prefix: str
) -> Permutation:
    """The member of `spec` that moves each parameter as `permutation` moves `source(parameter)`; it must have all
    that `permutation` moves and that starts with `prefix`.
    """
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


def _renamed(spec: PermutationSpec, rename: Callable[[str], str | None], before: str = "") -> PermutationSpec:
    """`spec` under other names of parameters, without those for which `rename` gives None.

    Names of groups and cells get `before` in front of them.
    """

    def renamed(cell: Cell) -> Cell:
        names = ((rename(site.parameter), site) for site in cell.sites)
        sites = tuple(replace(site, parameter=name) for name, site in names if name)
        return replace(cell, name=before + cell.name, sites=sites)

    groups = (
        replace(group, name=before + group.name, cells=tuple(map(renamed, group.cells)))
        for group in spec.groups
    )
    return PermutationSpec(
        tuple(group for group in groups if any(cell.sites for cell in group.cells)),
        {name: shape for old, shape in spec.shapes.items() if (name := rename(old))},
        frozenset(name for old in spec.buffers if (name := rename(old))),
        {name: rename(target) or target for old, target in spec.aliases.items() if (name := rename(old))},
        tuple(replace(pin, parameter=name) for pin in spec.pins if (name := rename(pin.parameter))),
    )
