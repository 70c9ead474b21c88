"""Maps at work: a state seen through the matrices of continuous groups, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import SpecMismatchError, shown
from ..types import LazyState, State, origin_of, widened
from .continuous import DIAGONAL, ContinuousGroup, GainSite, MapSite, power
from .structure import is_whole, to_array

TINY = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 0.06}
"""Gains below this share of their vector's median can't be divided by: what is rounded to the type afterwards would
differ by a thousandth and more.
"""


def stuck(groups: Sequence[ContinuousGroup], aliases: Mapping[str, str], state: State) -> dict[str, str]:
    """Groups that can't act on `state`, and why: their maps divide by gains of which one is about zero."""
    found: dict[str, str] = {}
    known: dict[tuple[str, float], str] = {}
    for group in groups:
        for gain in {(s.gain.parameter, s.gain.offset) for s in group.sites if s.gain is not None}:
            if gain not in known:
                known[gain] = gains_of(aliases, state, *gain)[1]
            if known[gain]:
                found.setdefault(group.name, known[gain])
    return found


def gains_of(aliases: Mapping[str, str], state: State, name: str, offset: float) -> tuple[Tensor, str]:
    """The vector that a map divides by, float64, and why it can't ("" if it can)."""
    key = name if name in state else next((a for a, t in aliases.items() if t == name and a in state), name)
    values = state[key].detach().double() + offset
    smallest, median, largest = (float(f(values.abs())) for f in (torch.min, torch.median, torch.max))
    if smallest > TINY.get(state[key].dtype, 0.1) * median and largest < float("inf"):
        return values, ""
    one = smallest if largest < float("inf") else largest
    kind = str(state[key].dtype).removeprefix("torch.")
    return (
        values,
        f"it divides by the gains {name!r} ({kind}), of which one is {one:.1e} (median {median:.1e})",
    )


class Rounding:
    """What is lost when tensors that were moved are rounded to a narrow type again, tensor by tensor.

    `squares`: name -> the squared norms of what was lost, and of the tensor.
    """

    def __init__(self) -> None:
        self.squares: dict[str, tuple[float, float]] = {}

    def rounded(self, name: str, wide: Tensor, dtype: torch.dtype) -> Tensor:
        """`wide` in the type, and remembered what that has cost; a tensor that comes again counts once."""
        narrow = wide.to(dtype)
        if dtype != wide.dtype:
            self.note(name, wide, narrow)
        return narrow

    def note(self, name: str, wide: Tensor, narrow: Tensor) -> None:
        """Remember what writing `wide` as `narrow` has cost, if anything."""
        lost = (narrow.to(wide.dtype) - wide).double().square().sum()
        self.squares[name] = float(lost), float(wide.double().square().sum())

    @property
    def error(self) -> float:
        """Relative to the norm of all tensors that were rounded."""
        lost, size = (sum(pair[i] for pair in self.squares.values()) for i in (0, 1))
        return math.sqrt(lost / size) if size else 0.0


class MappedState(LazyState):
    """A state seen through `maps`, name of the group -> matrices; a tensor is read and moved when it is asked for.

    Narrow types, float8 too, are multiplied in single precision and rounded once; `rounding` says what that costs.
    """

    def __init__(
        self,
        groups: Sequence[ContinuousGroup],
        maps: Mapping[str, Tensor],
        aliases: Mapping[str, str],
        state: State,
    ) -> None:
        super().__init__(state)
        # Scales last: S stands before what else acts at a site.
        self.groups = sorted((g for g in groups if g.name in maps), key=lambda g: g.kind in DIAGONAL)
        self.maps, self.aliases = maps, aliases
        self._sites: dict[str, list[tuple[ContinuousGroup, MapSite]]] = {}
        for group in self.groups:
            for site in group.sites:
                self._sites.setdefault(site.parameter, []).append((group, site))
        self.powers: dict[tuple[str, int], Tensor] = {}
        """(group, exponent) -> M or M^-T, where they are known already."""
        self.rounding = Rounding()
        self._vectors: dict[tuple[str, float], Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.known[name]
        sites = self._sites.get(self.aliases.get(name, name), ())
        if not sites:
            return tensor
        wide = tensor.to(widened(tensor.dtype))
        for group, site in sites:
            wide = self._act(wide, group, site)
        return self.rounding.rounded(name, wide, tensor.dtype)

    def origin(self, name: str) -> str | None:
        return origin_of(self.known, name)

    @property
    def turning(self) -> set[str]:
        """The vectors that the maps are turned by."""
        return {s.gain.parameter for sites in self._sites.values() for _, s in sites if s.gain is not None}

    def acts(self, name: str) -> bool:
        """Whether a map acts on a tensor."""
        return self.aliases.get(name, name) in self._sites

    def acting(self, name: str, axis: int) -> list[ContinuousGroup]:
        """The groups that act on an axis of a tensor."""
        return [
            group for group, site in self._sites.get(self.aliases.get(name, name), ()) if site.axis == axis
        ]

    def turned(self, name: str, axis: int) -> bool:
        """Whether one of them is turned by gains there."""
        sites = self._sites.get(self.aliases.get(name, name), ())
        return any(site.gain is not None for _, site in sites if site.axis == axis)

    def act(self, name: str, axis: int, tensor: Tensor, along: int) -> Tensor:
        """Another tensor moved along one of its axes as `name` is along `axis`."""
        for group, site in self._sites.get(self.aliases.get(name, name), ()):
            if site.axis == axis:
                tensor = self._act(tensor, group, replace(site, axis=along))
        return tensor

    def _act(self, tensor: Tensor, group: ContinuousGroup, site: MapSite) -> Tensor:
        """W <- G M G^-1 W along the axis of a site; in double precision if W is, else in single."""
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise SpecMismatchError(
                f"Tensor {shown(site.parameter)} is {kind}, but maps act on floating point numbers; convert it first."
            )
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        rows = tensor.movedim(site.axis, 0)
        whole = is_whole(site.positions, rows.shape[0])
        positions = None if whole else torch.from_numpy(to_array(site.positions)).to(tensor.device)
        chosen = rows if positions is None else rows[positions]
        flat = chosen.to(dtype).reshape(len(site.positions), -1)
        maps = self._power(group, site.power).to(tensor.device)
        if group.kind in DIAGONAL:
            moved = maps.to(dtype)[:, None] * flat
        else:
            gain = self._gain(group, site.gain)
            if gain is not None:
                maps = maps * gain[:, :, None] / gain[:, None, :]
            moved = maps.to(dtype) @ flat.reshape(group.count, group.size, -1)
        moved = moved.reshape(chosen.shape).to(tensor.dtype)
        out = moved if positions is None else rows.index_copy(0, positions, moved)
        return out.movedim(0, site.axis).contiguous()

    def _power(self, group: ContinuousGroup, exponent: int) -> Tensor:
        key = (group.name, exponent)
        if key not in self.powers:
            self.powers[key] = power(group.kind, self.maps[group.name], exponent)
        return self.powers[key]

    def _gain(self, group: ContinuousGroup, site: GainSite | None) -> Tensor | None:
        """The diagonal of G as the state has it, float64 [count, size]."""
        if site is None:
            return None
        name, key = site.parameter, (site.parameter, site.offset)
        if key not in self._vectors:
            if name not in self.known and all(
                t != name or a not in self.known for a, t in self.aliases.items()
            ):
                raise SpecMismatchError(
                    f"The map of {shown(group.name)} is turned by the gains {shown(name)}, which are not there; give"
                    " the model's weights, too (base, on the command line --base)."
                )
            values, why = gains_of(self.aliases, self.known, name, site.offset)
            if why:
                raise SpecMismatchError(
                    f"The map of {shown(group.name)} can't act, as {why}; leave this group out."
                )
            self._vectors[key] = values
        values = self._vectors[key][torch.from_numpy(to_array(site.positions))] ** site.power
        return values.reshape(group.count, group.size)
