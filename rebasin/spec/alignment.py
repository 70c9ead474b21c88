"""An alignment: a permutation and a matrix for each continuous group: weights move, what is computed does not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..arguments import typed
from ..errors import CheckpointError, RebasinError, SpecMismatchError, shown
from ..files import PathLike
from ..tensors import load_safetensors, save_safetensors
from ..types import LazyState, State, origin_of
from .continuous import DIAGONAL, ContinuousGroup, GainSite, inverse, power
from .permutation import Permutation, PermutationSpec, digest, require_digest
from .structure import to_array

TOLERANCE = 1e-5
"""How far from orthogonal the matrices of an alignment may be."""

TINY = 1e-6
"""Gains below this share of their vector's median can't be divided by."""

PREFIX = "map:"
"""Before the names of matrices in a file."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """A member of a spec's whole symmetry group: `permutation` first, then `maps`, name of the group -> its matrices.

    Groups that `maps` does not name stay as they are. Matrices are float64 of the group's `shape`. A permutation is an
    alignment without maps (`Alignment.of`).

    Raises:
        SpecMismatchError: a matrix belongs to no group, has another shape, or is not of the group's kind.
    """

    _mistake: ClassVar[type[RebasinError]] = SpecMismatchError

    permutation: Permutation
    maps: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups = self.groups
        checked = {}
        for name, given in self.maps.items():
            if name not in groups:
                raise SpecMismatchError(
                    f"The spec has no continuous group {shown(name)}; it has {len(groups)}, see spec.continuous."
                )
            group = groups[name]
            if not isinstance(given, Tensor) or tuple(given.shape) != group.shape:
                shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise SpecMismatchError(
                    f"The matrices of {shown(name)} are {shape}, but the group wants a tensor of shape {group.shape}."
                )
            maps = given.detach().to("cpu", torch.float64)
            error = group.distance(maps)
            if not error < TOLERANCE:
                raise SpecMismatchError(
                    f"The matrices of {shown(name)} are not {_KINDS[group.kind]} (off by {error:.1e})."
                )
            checked[name] = maps
        object.__setattr__(self, "maps", checked)

    @classmethod
    def of(cls, permutation: Permutation) -> Alignment:
        """The permutation as an alignment."""
        return cls(permutation)

    @classmethod
    def random(cls, spec: PermutationSpec, seed: int = 0) -> Alignment:
        """A random permutation of the group and random matrices, well conditioned and far from the identity."""
        generator = torch.Generator().manual_seed(seed)
        maps = {group.name: group.random(generator) for group in spec.continuous}
        return cls(spec.random(seed), maps)

    @property
    def spec(self) -> PermutationSpec:
        return self.permutation.spec

    @cached_property
    def groups(self) -> dict[str, ContinuousGroup]:
        return {group.name: group for group in self.permutation.spec.continuous}

    def without(self, names: Iterable[str]) -> Alignment:
        """The same but for these continuous groups, which stay."""
        left_out = set(names)
        return Alignment(self.permutation, {n: m for n, m in self.maps.items() if n not in left_out})

    @property
    def is_identity(self) -> bool:
        return self.permutation.is_identity and all(
            torch.equal(maps, self.groups[name].identity()) for name, maps in self.maps.items()
        )

    def __repr__(self) -> str:
        return f"Alignment({self.permutation.moved():,} neurons moved, {len(self.maps)} of {len(self.groups)} maps)"

    def moved(self) -> int:
        """The number of neurons that the permutation does not leave where they are."""
        return self.permutation.moved()

    def apply(self, state: State) -> dict[str, Tensor]:
        """`state` moved; what does not move is passed on, nothing is changed in place. Types stay what they are.

        Raises:
            SpecMismatchError: a tensor is missing or has another shape, or a map would divide by a gain of zero.
        """
        view = self.view(state)
        return {name: view[name] for name in state}

    def view(self, state: State) -> AlignedState:
        """`state` moved when a tensor is read: what `apply` gives, tensor by tensor."""
        self.spec.check(state)
        return AlignedState(self, state)

    def invert(self) -> Alignment:
        """The alignment that undoes this one."""
        back = {name: inverse(self.groups[name].kind, maps) for name, maps in self.maps.items()}
        undone = self.permutation.invert()
        return Alignment(undone, {name: self._moved_by(undone, name, maps) for name, maps in back.items()})

    @typed
    def compose(self, other: Alignment) -> Alignment:
        """The alignment that applies `other` first: `a.compose(b).apply(s)` is `a.apply(b.apply(s))`."""
        maps = dict(self.maps)
        for name, theirs in other.maps.items():
            moved = self._moved_by(self.permutation, name, theirs)
            if name not in maps:
                maps[name] = moved
            else:
                maps[name] = maps[name] * moved if self.groups[name].kind in DIAGONAL else maps[name] @ moved
        return Alignment(self.permutation.compose(other.permutation), maps)

    @typed
    def is_close(self, other: Alignment, tolerance: float = 1e-6) -> bool:
        """Whether both move alike: the same permutation, and matrices that differ by less than `tolerance` anywhere."""
        if self.permutation != other.permutation or self.spec.maps_hash != other.spec.maps_hash:
            return False
        for name in {*self.maps, *other.maps}:
            own, theirs = (a.maps.get(name, self.groups[name].identity()) for a in (self, other))
            if not bool((own - theirs).abs().max() < tolerance):
                return False
        return True

    def save(self, path: PathLike, metadata: Mapping[str, str] | None = None) -> None:
        """A safetensors file: an int32 tensor for each cell, matrices in float64; the header has the spec."""
        tensors = {n: torch.from_numpy(p.astype(np.int32)) for n, p in self.permutation.index.items()}
        tensors |= {PREFIX + name: maps for name, maps in self.maps.items()}
        told = {**json.loads(self.spec.to_json()), "metadata": dict(metadata or {})}
        header = {"spec": json.dumps(told), "digest": digest(self._arrays())}
        save_safetensors(path, tensors, header)

    @classmethod
    def load(cls, path: PathLike) -> Alignment:
        """Read what `save` wrote, or what `Permutation.save` did.

        Raises:
            CheckpointError: the file is none of them, is damaged, or holds what the spec does not allow.
        """
        file = load_safetensors(path)
        spec = PermutationSpec.of_file(file, "alignment")
        names = {name for name in file if name.startswith(PREFIX)}
        if set(file) - names != set(spec.cells):
            raise CheckpointError(f"{path} is damaged: its tensors are not the cells and maps of its spec.")
        groups = {group.name: group for group in spec.continuous}
        maps = {}
        for name in sorted(names):
            group = groups.get(name.removeprefix(PREFIX))
            if group is None or file.shape_of(name) != group.shape or file.dtype_of(name) != torch.float64:
                raise CheckpointError(f"{path} is damaged: its tensor {shown(name)} is no map of its spec.")
            maps[group.name] = file[name]
        try:
            made = cls(Permutation.read(file, spec), maps)
        except SpecMismatchError as error:
            raise CheckpointError(
                f"{path} holds an alignment that its own spec does not allow: {error}"
            ) from error
        require_digest(file, made._arrays())
        return made

    def _arrays(self) -> dict[str, np.ndarray]:
        return {**self.permutation.index, **{PREFIX + n: m.numpy() for n, m in self.maps.items()}}

    def _moved_by(self, permutation: Permutation, name: str, maps: Tensor) -> Tensor:
        """P M P^-1: the same map for neurons that `permutation` has moved."""
        group = self.groups[name]
        order = _order(permutation, group)
        if order is None:
            return maps
        if group.kind in DIAGONAL:
            return maps[order]
        order = order.reshape(group.count, group.size)
        block = order[:, 0] // group.size
        within = order % group.size
        if not bool((order // group.size == block[:, None]).all()):
            raise SpecMismatchError(
                f"The permutation takes neurons of {shown(name)} out of their block, so that both can't be composed."
            )
        return maps[block[:, None, None], within[:, :, None], within[:, None, :]]


def stuck(spec: PermutationSpec, state: State) -> dict[str, str]:
    """Continuous groups that can't act on `state`, and why: their maps divide by gains of which one is about zero."""
    found, known = {}, {}
    for group in spec.continuous:
        for gain in {(s.gain.parameter, s.gain.offset) for s in group.sites if s.gain is not None}:
            if gain not in known:
                known[gain] = _gains(spec, state, *gain)[1]
            if known[gain]:
                found.setdefault(group.name, known[gain])
    return found


def _gains(spec: PermutationSpec, state: State, name: str, offset: float) -> tuple[Tensor, str]:
    """The vector that a map divides by, float64, and why it can't ("" if it can)."""
    aliases = spec.aliases
    key = name if name in state else next((a for a, t in aliases.items() if t == name and a in state), name)
    values = state[key].double() + offset
    smallest, median = float(values.abs().min()), float(values.abs().median())
    if smallest > TINY * median:
        return values, ""
    return values, f"it divides by the gains {name!r}, of which one is {smallest:.1e} (median {median:.1e})"


_KINDS = {
    "invertible": "well conditioned",
    "rotations": "orthogonal",
    "rotations that keep ones": "orthogonal with rows that sum to one",
    "scales": "numbers but zero",
    "positive scales": "positive numbers",
    "signs": "1 or -1",
}


def _order(permutation: Permutation, group: ContinuousGroup) -> Tensor | None:
    """How a permutation reorders a group's neurons, new[i] = old[order[i]], int64 [neurons]; None: not at all."""
    site = group.sites[0]
    index = dict(permutation.axes_of(site.parameter)).get(site.axis)
    if index is None:
        return None
    positions = to_array(site.positions)
    place = np.full(index.size, -1)
    place[positions] = np.arange(positions.size)
    order = place[index[positions]]
    if (order < 0).any():
        raise SpecMismatchError(
            f"The permutation takes neurons out of the continuous group {shown(group.name)}, so that both can't be"
            " composed."
        )
    return torch.from_numpy(order)


class AlignedState(LazyState):
    """A state seen through an alignment; each tensor is read and moved when it is asked for."""

    def __init__(self, alignment: Alignment, state: State) -> None:
        super().__init__(state)
        self.alignment = alignment
        self._powers: dict[tuple[str, int], Tensor] = {}
        self._gains: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.alignment.permutation.apply_to(name, self.known[name])
        for group, sites in self._sites(name):
            for number in sites:
                tensor = self._act(tensor, group, number)
        return tensor

    def origin(self, name: str) -> str | None:
        return origin_of(self.known, name)

    def _sites(self, name: str) -> Iterator[tuple[ContinuousGroup, list[int]]]:
        """Where matrices act on a tensor: scales last, as S stands before what else acts there."""
        name = self.alignment.spec.aliases.get(name, name)
        for diagonal in (False, True):
            for group in self.alignment.spec.continuous:
                if group.name in self.alignment.maps and (group.kind in DIAGONAL) == diagonal:
                    chosen = [k for k, site in enumerate(group.sites) if site.parameter == name]
                    if chosen:
                        yield group, chosen

    def _act(self, tensor: Tensor, group: ContinuousGroup, number: int) -> Tensor:
        """W <- G M G^-1 W along the axis of a site; in double precision if W is, else in single."""
        site = group.sites[number]
        if tensor.ndim <= site.axis or len(site.positions) > tensor.shape[site.axis]:
            raise SpecMismatchError(
                f"Tensor {site.parameter!r} has shape {tuple(tensor.shape)}, but the spec expects"
                f" {tuple(self.alignment.spec.shapes[site.parameter])}."
            )
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        positions = torch.from_numpy(to_array(site.positions)).to(tensor.device)
        rows = tensor.movedim(site.axis, 0)
        shape = rows[positions].shape
        chosen = rows[positions].to(dtype).reshape(len(positions), -1)
        maps = self._power(group, site.power).to(tensor.device)
        if group.kind in DIAGONAL:
            moved = maps.to(dtype)[:, None] * chosen
        else:
            gain = self._gain(group, site.gain)
            if gain is not None:
                maps = maps * gain[:, :, None] / gain[:, None, :]
            moved = maps.to(dtype) @ chosen.reshape(group.count, group.size, -1)
        out = rows.clone()
        out[positions] = moved.reshape(shape).to(tensor.dtype)
        return out.movedim(0, site.axis).contiguous()

    def _power(self, group: ContinuousGroup, exponent: int) -> Tensor:
        key = (group.name, exponent)
        if key not in self._powers:
            self._powers[key] = power(group.kind, self.alignment.maps[group.name], exponent)
        return self._powers[key]

    def _gain(self, group: ContinuousGroup, site: GainSite | None) -> Tensor | None:
        """The diagonal of G as the state has it after the permutation, float64 [count, size]."""
        if site is None:
            return None
        name = site.parameter
        if name not in self._gains:
            values, why = _gains(self.alignment.spec, self.known, name, site.offset)
            if why:
                raise SpecMismatchError(
                    f"The map of {shown(group.name)} can't act, as {why}; leave this group out."
                )
            self._gains[name] = self.alignment.permutation.apply_to(name, values)
        values = self._gains[name][torch.from_numpy(to_array(site.positions))] ** site.power
        return values.reshape(group.count, group.size)
