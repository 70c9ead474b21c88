"""All symmetries of an architecture, and the single permutation: how it acts on a state, and its file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..arguments import Seed, typed
from ..errors import CheckpointError, RebasinError, SpecMismatchError, shown
from ..files import PathLike, SchemaError, conform, parse
from ..tensors import SafetensorsState, load_safetensors, save_safetensors
from ..types import LazyState, State, origin_of, require_state, shape_of, wrapped
from .checks import require_sound, require_sound_maps
from .continuous import DIAGONAL, ContinuousGroup, inverse
from .mapped import MappedState, stuck
from .serialisation import SpecData, continuous_from, continuous_to, group_from, group_to
from .structure import Cell, Group, Site, admits, draw, to_array

FORMAT = 2
READ = (1, 2)
"""Formats that are read; the first knew of no continuous groups."""

INDEX_TYPES = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Pin:
    """`count` positions of a parameter's axis that may not move, and the operator that forbids it."""

    parameter: str
    axis: int
    count: int
    reason: str


UNREAD = "is read by nothing with these inputs"
"""The reason of pins of parameters that the example does not reach: what they are tied to is not known."""


@dataclass(frozen=True)
class Coverage:
    """Shares (0 to 1) of all parameters with at least one, and of the matrices' with both, axes permuted."""

    one: float
    both: float


@dataclass(frozen=True, eq=False)
class PermutationSpec:
    """All groups of an architecture and where they act.

    `shapes` has every floating point parameter and persistent buffer, `buffers` those that are moved but are no
    parameters (running statistics), `aliases` other names of the same tensor (tied weights), `pins` what stays.
    `continuous` are the linear maps that leave the function as it is, see `rebasin.spec.continuous`. Two specs are
    equal if they permit the same permutations.
    """

    _mistake: ClassVar[type[RebasinError]] = SpecMismatchError  # of who gives something else (arguments.py)

    groups: tuple[Group, ...]
    shapes: Mapping[str, tuple[int, ...]]
    buffers: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    pins: tuple[Pin, ...] = ()
    continuous: tuple[ContinuousGroup, ...] = ()

    def __repr__(self) -> str:
        return f"PermutationSpec({self.neurons:,} neurons in {len(self.groups)} groups, {self.hash[:12]})"

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PermutationSpec) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    @cached_property
    def cells(self) -> dict[str, Cell]:
        """Every cell by name."""
        return {cell.name: cell for group in self.groups for cell in group.cells}

    @cached_property
    def axes(self) -> dict[str, dict[int, tuple[tuple[str, Site], ...]]]:
        """parameter -> axis -> the (cell name, site) pairs that act there."""
        found: dict[str, dict[int, list[tuple[str, Site]]]] = {}
        for cell in self.cells.values():
            for site in cell.sites:
                found.setdefault(site.parameter, {}).setdefault(site.axis, []).append((cell.name, site))
        return {name: {axis: tuple(s) for axis, s in sorted(by.items())} for name, by in found.items()}

    @property
    def neurons(self) -> int:
        return sum(group.neurons for group in self.groups)

    @cached_property
    def hash(self) -> str:
        """sha256 of what the spec permits (names, shapes, groups; not the prose of its pins)."""
        payload = self._payload()
        del payload["pins"], payload["continuous"]
        return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()

    def identity(self) -> Permutation:
        return Permutation.trusted(self, {name: np.arange(cell.size) for name, cell in self.cells.items()})

    @typed
    def random(self, seed: Seed = 0) -> Permutation:
        """A uniformly drawn member of the group."""
        rng = np.random.default_rng(seed)
        index = {name: np.arange(cell.size) for name, cell in self.cells.items()}
        for group in self.groups:
            draw(group, group.tree, group.tree, index, rng)
        return Permutation.trusted(self, index)

    @typed
    def random_alignment(self, seed: Seed = 0) -> Alignment:
        """A random member of the whole group: a permutation, and a matrix for each continuous group."""
        return Alignment.random(self, seed)

    @typed
    def stuck(self, state: State) -> dict[str, str]:
        """Continuous groups that can't act on `state`, and why: they would divide by a gain that is about zero.

        Raises:
            SpecMismatchError: `state` is another architecture's.
        """
        self.check(state, maps=[group.name for group in self.continuous])
        return stuck(self.continuous, self.aliases, state)

    @cached_property
    def maps_hash(self) -> str:
        """sha256 of the continuous groups and their sites."""
        return hashlib.sha256(json.dumps(self._payload()["continuous"], sort_keys=True).encode()).hexdigest()

    @typed
    def contains(self, permutation: Permutation) -> bool:
        """Whether `permutation` is legal: a member of the group that the trees describe."""
        return permutation.spec == self and all(admits(group, permutation.index) for group in self.groups)

    def coverage(self) -> Coverage:
        total = one = matrices = both = 0.0
        for name, shape in self.shapes.items():
            if name in self.buffers or name in self.aliases:
                continue
            numel = math.prod(shape)
            share = [
                sum(len(site.positions) for _, site in self.axes.get(name, {}).get(axis, ())) / max(size, 1)
                for axis, size in enumerate(shape)
            ]
            total += numel
            one += numel * (1 - math.prod(1 - s for s in share))
            if len(shape) >= 2:
                matrices += numel
                both += numel * share[0] * share[1]
        return Coverage(one / total if total else 0.0, both / matrices if matrices else 0.0)

    @typed
    def summary(self, max_rows: int | None = None) -> str:
        """The table a person reads: groups, sizes, structure, where they act, what is pinned and by what."""
        coverage = self.coverage()
        lines = [
            f"{self.neurons:,} neurons in {len(self.groups)} groups ({len(self.cells)} cells); parameters with at"
            f" least one axis permuted {coverage.one:.4%}, with both {coverage.both:.1%}"
            f" (of those that have two)",
            "",
            f"{'group':44}  {'neurons':>8}  {'structure':28}  acts on",
        ]
        for group in self.groups[:max_rows]:
            sites = [f"{s.parameter}[{s.axis}]" for cell in group.cells for s in cell.sites]
            sites = list(dict.fromkeys(sites))
            where = ", ".join(sites[:3]) + (f" and {len(sites) - 3} more" if len(sites) > 3 else "")
            lines.append(f"{group.name:44}  {group.neurons:>8,}  {group.structure:28}  {where}")
        if max_rows is not None and len(self.groups) > max_rows:
            lines.append(f"... and {len(self.groups) - max_rows} more groups")
        if self.pins:
            lines += ["", f"{'pinned axis':56}  {'count':>8}  by"]
            for pin in self.pins[:max_rows]:
                lines.append(f"{pin.parameter + f'[{pin.axis}]':56}  {pin.count:>8,}  {pin.reason}")
            if max_rows is not None and len(self.pins) > max_rows:
                lines.append(f"... and {len(self.pins) - max_rows} more pinned axes")
        lines += self._summary_of_maps(max_rows)
        return "\n".join(lines)

    def _summary_of_maps(self, max_rows: int | None) -> list[str]:
        if not self.continuous:
            return []
        total = sum(group.dimension for group in self.continuous)
        lines = [
            "",
            f"{total:,} free dimensions in {len(self.continuous)} continuous groups",
            "",
            f"{'continuous group':44}  {'neurons':>8}  {'structure':16}  {'dimension':>9}  {'sites':>5}  limited by",
        ]
        for g in self.continuous[:max_rows]:
            row = f"{g.name:44}  {g.neurons:>8,}  {g.structure:16}  {g.dimension:>9,}  {len(g.sites):>5}  {g.limit}"
            lines.append(row.rstrip())
        if max_rows is not None and len(self.continuous) > max_rows:
            lines.append(f"... and {len(self.continuous) - max_rows} more continuous groups")
        return lines

    def to_json(self) -> str:
        hashes = {"hash": self.hash, **({"maps_hash": self.maps_hash} if self.continuous else {})}
        return json.dumps({"format": FORMAT, **hashes, **self._payload()})

    @classmethod
    @typed
    def from_json(cls, text: str) -> PermutationSpec:
        """Read what `to_json` wrote.

        Raises:
            SpecMismatchError: it is something else, of another version, or damaged.
        """
        try:
            data = parse(text)
            version = data.get("format") if isinstance(data, dict) else None
            if version is None:
                raise SpecMismatchError("This text is no permutation spec: it is no JSON with a 'format'.")
            if version not in READ:
                raise SpecMismatchError(
                    f"The permutation spec has format {shown(version)}, but this version reads {READ[0]} to {READ[-1]};"
                    " trace the model again."
                )
            data = conform(SpecData, data if version > 1 else {"continuous": [], **data})
            spec = cls(
                groups=tuple(group_from(g) for g in data["groups"]),
                shapes=data["shapes"],
                buffers=frozenset(data["buffers"]),
                aliases=data["aliases"],
                pins=tuple(Pin(*pin) for pin in data["pins"]),
                continuous=tuple(map(continuous_from, data["continuous"])),
            )
            require_sound(spec.groups, spec.shapes)
            require_sound_maps(spec.continuous, spec.shapes)
        except (SchemaError, RecursionError) as error:
            raise SpecMismatchError(
                f"The permutation spec is damaged ({error}); trace the model again."
            ) from error
        if spec.hash != data["hash"] or (spec.continuous and spec.maps_hash != data.get("maps_hash")):
            raise SpecMismatchError(
                "The permutation spec is damaged: its hash does not fit; trace the model again."
            )
        return spec

    @classmethod
    def of_file(cls, file: SafetensorsState, what: str = "permutation") -> PermutationSpec:
        """The spec in the header of a file of ours.

        Raises:
            CheckpointError: it is no file of that kind, or is damaged.
        """
        if "spec" not in file.metadata:
            raise CheckpointError(f"{file.path} holds no {what}: its header has no spec.")
        try:
            return cls.from_json(file.metadata["spec"])
        except SpecMismatchError as error:
            raise CheckpointError(
                f"{file.path} holds no {what} that can be read: {_clause(error)}"
            ) from error

    def _payload(self) -> dict[str, Any]:
        return {
            "groups": [group_to(g) for g in self.groups],
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "buffers": sorted(self.buffers),
            "aliases": dict(self.aliases),
            "pins": [[p.parameter, p.axis, p.count, p.reason] for p in self.pins],
            "continuous": [continuous_to(g) for g in self.continuous],
        }

    def check(self, state: State, what: str = "the state", maps: Iterable[str] = ()) -> None:
        """Raise `SpecMismatchError` if `state` misses a tensor that the spec moves or has another shape for it.

        Args:
            maps: continuous groups that are to act on it, too.
        """
        acting = {*maps}
        moved = dict.fromkeys(self.axes)
        for group in self.continuous if acting else ():
            moved |= dict.fromkeys(s.parameter for s in group.sites if group.name in acting)
        require_state(state, what, moved)
        for name in moved:
            tensor = _get(state, name, self.aliases)
            if tensor is None:
                raise SpecMismatchError(
                    f"{what[:1].upper()}{what[1:]} has no tensor {name!r}, which the spec permutes{wrapped(state)}."
                )
            if shape_of(state, tensor) != tuple(self.shapes[name]):
                raise SpecMismatchError(
                    f"Tensor {name!r} of {what} has shape {shape_of(state, tensor)}, but the spec expects"
                    f" {tuple(self.shapes[name])}: it was traced for another architecture."
                )


@dataclass(frozen=True, eq=False)
class Permutation:
    """One member of a spec's symmetry group: cell name -> int64 [size], `new[i] = old[index[i]]`.

    Whether the trees of the spec allow it, `spec.contains` says.

    Raises:
        SpecMismatchError: an index is missing, or is no permutation of its cell's neurons.
    """

    _mistake: ClassVar[type[RebasinError]] = SpecMismatchError  # of who gives something else (arguments.py)

    spec: PermutationSpec
    index: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if not isinstance(self.spec, PermutationSpec) or not isinstance(self.index, Mapping):
            raise SpecMismatchError("A permutation is made of its spec and of a mapping, cell name -> index.")
        cells = self.spec.cells
        if self.index.keys() != cells.keys():
            odd = sorted(map(shown, self.index.keys() ^ cells.keys()))[0]
            raise SpecMismatchError(
                f"A permutation of this spec has an index for each of its {len(cells)} cells and no other, but {odd} is"
                " only in one of the two."
            )
        converted = {}
        for name, given in self.index.items():
            index = given if isinstance(given, np.ndarray) else _as_array(given)
            if not _is_permutation(index, cells[name].size):
                raise SpecMismatchError(
                    f"The index of cell {shown(name)} is no permutation of the numbers 0 to {cells[name].size - 1}."
                )
            if index is not given or index.dtype != np.int64:
                converted[name] = index.astype(np.int64)
        if converted:
            object.__setattr__(self, "index", {**self.index, **converted})

    @classmethod
    def trusted(cls, spec: PermutationSpec, index: Mapping[str, np.ndarray]) -> Permutation:
        """The same without a look at the index: for loops, in which it is known to be a permutation."""
        made = object.__new__(cls)
        vars(made).update(spec=spec, index=index)
        return made

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Permutation)
            and self.spec == other.spec
            and all(np.array_equal(p, other.index[name]) for name, p in self.index.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Permutation({self.moved():,} of {self.spec.neurons:,} neurons moved)"

    @typed
    def apply(self, state: State) -> dict[str, Tensor]:
        """`state` with its neurons permuted; tensors that do not move are passed on, nothing is changed in place.

        `state` is any mapping name -> tensor, lazy ones and ones with further keys included.

        Raises:
            SpecMismatchError: a tensor is missing or has another shape; it names the tensor and both shapes.
        """
        self.spec.check(state)
        return {name: self.apply_to(name, state[name]) for name in state}

    @typed
    def view(self, state: State) -> PermutedState:
        """`state` with its neurons permuted when a tensor is read: what `apply` gives, without holding it.

        Raises:
            SpecMismatchError: a tensor is missing or has another shape; it names the tensor and both shapes.
        """
        self.spec.check(state)
        return PermutedState(self, state)

    def apply_to(self, name: str, tensor: Tensor) -> Tensor:
        """One tensor of a state, by its name: the streaming form of `apply`."""
        for axis, index in self.axes_of(name):
            if axis >= tensor.ndim or tensor.shape[axis] != len(index):
                raise SpecMismatchError(
                    f"Tensor {name!r} has shape {tuple(tensor.shape)}, but the spec expects"
                    f" {tuple(self.spec.shapes[self.spec.aliases.get(name, name)])}."
                )
            tensor = tensor.index_select(axis, torch.from_numpy(index).to(tensor.device))
        return tensor

    def axes_of(self, name: str, skip: str | None = None) -> list[tuple[int, np.ndarray]]:
        """The (axis, int64 index [axis size]) pairs that move tensor `name`; identities and cell `skip` left out."""
        name = self.spec.aliases.get(name, name)
        moves = []
        for axis, sites in self.spec.axes.get(name, {}).items():
            full = np.arange(self.spec.shapes[name][axis])
            moved = False
            for cell, site in sites:
                perm = self.index[cell]
                if cell != skip and not _is_identity(perm):
                    positions = to_array(site.positions)
                    full[positions] = positions[perm]
                    moved = True
            if moved:
                moves.append((axis, full))
        return moves

    def invert(self) -> Permutation:
        return Permutation.trusted(self.spec, {name: np.argsort(p) for name, p in self.index.items()})

    @typed
    def compose(self, other: Permutation) -> Permutation:
        """The permutation that applies `other` first: `p.compose(q).apply(s) == p.apply(q.apply(s))`."""
        if self.spec != other.spec:
            raise SpecMismatchError("Permutations of two different specs can't be composed.")
        return Permutation.trusted(self.spec, {name: other.index[name][p] for name, p in self.index.items()})

    @property
    def is_identity(self) -> bool:
        return all(_is_identity(p) for p in self.index.values())

    def moved(self) -> int:
        """The number of neurons that do not stay where they are."""
        return displaced(self.index.values())

    @typed
    def save(self, path: PathLike, metadata: Mapping[str, str] | None = None) -> None:
        """A safetensors file with one int32 tensor a cell; its header has the spec, so the file stands alone."""
        tensors = {name: torch.from_numpy(p.astype(np.int32)) for name, p in self.index.items()}
        told = {**json.loads(self.spec.to_json()), "metadata": dict(metadata or {})}
        save_safetensors(path, tensors, {"spec": json.dumps(told), "digest": digest(self.index)})

    @classmethod
    @typed
    def load(cls, path: PathLike) -> Permutation:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is no permutation, is damaged, or holds an illegal permutation.
        """
        file = load_safetensors(path)
        spec = PermutationSpec.of_file(file)
        if any(name.startswith(MAP) for name in file):
            raise CheckpointError(
                f"{path} holds an alignment with maps: read it with rebasin.Alignment.load."
            )
        if set(file) != set(spec.cells):
            raise CheckpointError(f"{path} is damaged: its tensors are not the cells of its spec.")
        permutation = cls.read(file, spec)
        require_digest(file, permutation.index)
        return permutation

    @classmethod
    def read(cls, file: SafetensorsState, spec: PermutationSpec, prefix: str = "") -> Permutation:
        """The permutation whose indices a file has under the names of the cells, with `prefix` before them.

        Raises:
            CheckpointError: an index is missing or is no permutation, or together they are not legal.
        """
        index = {}
        for name, cell in spec.cells.items():
            key = prefix + name
            known = key in file and file.shape_of(key) == (cell.size,) and file.dtype_of(key) in INDEX_TYPES
            index[name] = file[key].numpy().astype(np.int64) if known else np.empty(0)
            if not _is_permutation(index[name], cell.size):
                raise CheckpointError(
                    f"{file.path} is damaged: its tensor {shown(key)} is no permutation of {cell.size} neurons."
                )
        permutation = cls(spec, index)
        if not spec.contains(permutation):
            raise CheckpointError(f"{file.path} holds a permutation that its own spec does not allow.")
        return permutation


TOLERANCE = 1e-5
"""How far from orthogonal the matrices of an alignment may be."""

TURNED = 1e-6
"""Matrices that differ by less from the identity move nothing."""

MAP = "map:"
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
        if not isinstance(self.permutation, Permutation) or not isinstance(self.maps, Mapping):
            what = "permutation" if not isinstance(self.permutation, Permutation) else "maps"
            raise SpecMismatchError(
                f"An Alignment is a rebasin.Permutation and a mapping of matrices by group, but its {what} is of type"
                f" {type(getattr(self, what)).__name__}."
            )
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
            if given.is_complex():
                raise SpecMismatchError(
                    f"The matrices of {shown(name)} are complex; maps act on real weights."
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
    @typed
    def of(cls, permutation: Permutation) -> Alignment:
        """The permutation as an alignment."""
        return cls(permutation)

    @classmethod
    @typed
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

    @typed
    def without(self, names: str | Iterable[str]) -> Alignment:
        """The same but for these continuous groups, which stay."""
        left_out = {names} if isinstance(names, str) else set(names)
        for name in left_out:
            if name not in self.groups:
                raise SpecMismatchError(
                    f"The spec has no continuous group {shown(name)} to leave out; it has {len(self.groups)}, see"
                    " spec.continuous."
                )
        return Alignment(self.permutation, {n: m for n, m in self.maps.items() if n not in left_out})

    @property
    def turned(self) -> tuple[str, ...]:
        """The continuous groups whose matrices are more than rounding away from the identity."""
        far = {n: float((maps - self.groups[n].identity()).abs().max()) for n, maps in self.maps.items()}
        return tuple(name for name, distance in far.items() if distance > TURNED)

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

    @typed
    def apply(self, state: State) -> dict[str, Tensor]:
        """`state` moved; what does not move is passed on, nothing is changed in place. Types stay what they are.

        Raises:
            SpecMismatchError: a tensor is missing or has another shape, or a map would divide by a gain of zero.
        """
        view = self.view(state)
        return {name: view[name] for name in state}

    @typed
    def view(self, state: State) -> MappedState:
        """`state` moved when a tensor is read: what `apply` gives, tensor by tensor."""
        self.spec.check(state, maps=self.maps)
        permuted = PermutedState(self.permutation, state)
        return MappedState(self.spec.continuous, self.maps, self.spec.aliases, permuted)

    def invert(self) -> Alignment:
        """The alignment that undoes this one."""
        back = {name: inverse(self.groups[name].kind, maps) for name, maps in self.maps.items()}
        undone = self.permutation.invert()
        return Alignment(
            undone, {name: moved_by(undone, self.groups[name], maps) for name, maps in back.items()}
        )

    @typed
    def compose(self, other: Alignment) -> Alignment:
        """The alignment that applies `other` first: `a.compose(b).apply(s)` is `a.apply(b.apply(s))`."""
        maps = dict(self.maps)
        for name, theirs in other.maps.items():
            moved = moved_by(self.permutation, self.groups[name], theirs)
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
            if not bool((own - theirs).abs().max() <= tolerance):
                return False
        return True

    @typed
    def save(self, path: PathLike, metadata: Mapping[str, str] | None = None) -> None:
        """A safetensors file: an int32 tensor for each cell, matrices in float64; the header has the spec."""
        tensors = {n: torch.from_numpy(p.astype(np.int32)) for n, p in self.permutation.index.items()}
        tensors |= {MAP + name: maps for name, maps in self.maps.items()}
        told = {**json.loads(self.spec.to_json()), "metadata": dict(metadata or {})}
        header = {"spec": json.dumps(told), "digest": self.digest}
        save_safetensors(path, tensors, header)

    @classmethod
    @typed
    def load(cls, path: PathLike) -> Alignment:
        """Read what `save` wrote, or what `Permutation.save` did.

        Raises:
            CheckpointError: the file is none of them, is damaged, or holds what the spec does not allow.
        """
        file = load_safetensors(path)
        spec = PermutationSpec.of_file(file, "alignment")
        names = {name for name in file if name.startswith(MAP)}
        if set(file) - names != set(spec.cells):
            raise CheckpointError(f"{path} is damaged: its tensors are not the cells and maps of its spec.")
        groups = {group.name: group for group in spec.continuous}
        maps = {}
        for name in sorted(names):
            group = groups.get(name.removeprefix(MAP))
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

    @property
    def digest(self) -> str:
        """sha256 of indices and matrices."""
        return digest(self._arrays())

    def _arrays(self) -> dict[str, np.ndarray]:
        return {**self.permutation.index, **{MAP + n: m.numpy() for n, m in self.maps.items()}}


_KINDS = {
    "invertible": "well conditioned",
    "rotations": "orthogonal",
    "rotations that keep ones": "orthogonal with rows that sum to one",
    "scales": "numbers but zero",
    "positive scales": "positive numbers",
    "signs": "1 or -1",
}


def moved_by(permutation: Permutation, group: ContinuousGroup, maps: Tensor) -> Tensor:
    """P M P^-1: the same matrices of a group for neurons that `permutation` has moved.

    Raises:
        SpecMismatchError: it takes neurons out of their block.
    """
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
            f"The permutation takes neurons of {shown(group.name)} out of their block, so that both can't be composed."
        )
    return maps[block[:, None, None], within[:, :, None], within[:, None, :]]


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


def is_permutation(state: State, metadata: Mapping[str, str]) -> bool:
    """Whether tensors and header are those of a file of ours with permutations or alignments."""
    return metadata.get("spec", "").startswith("{") and all(
        len(shape_of(state, name)) < 2 or name.startswith(MAP) for name in state
    )


class PermutedState(LazyState):
    """A state seen through a permutation; each tensor is read and moved when it is asked for."""

    def __init__(self, permutation: Permutation, state: State) -> None:
        super().__init__(state)
        self.permutation = permutation

    def __getitem__(self, name: str) -> Tensor:
        return self.permutation.apply_to(name, self.known[name])

    def origin(self, name: str) -> str | None:
        return origin_of(self.known, name)


def digest(indices: Mapping[str, np.ndarray]) -> str:
    """sha256 of indices [size] (or matrices, float64) and their names; kept in the header of their file."""
    sha = hashlib.sha256()
    for name in sorted(indices):
        sha.update(f"{name} {indices[name].size} ".encode())
        sha.update(indices[name].astype("<f8" if indices[name].dtype.kind == "f" else "<i4").tobytes())
    return sha.hexdigest()


def require_digest(file: SafetensorsState, indices: Mapping[str, np.ndarray]) -> None:
    """Raise `CheckpointError` if the header of `file` tells of other indices; older files tell of none."""
    if file.metadata.get("digest") not in (None, digest(indices)):
        raise CheckpointError(
            f"{file.path} is damaged: its indices are not those that were saved, as their digest differs; align again."
        )


def displaced(indices: Iterable[np.ndarray]) -> int:
    """How many neurons are not where they were, under indices [size] of any number of cells."""
    return sum(int(np.count_nonzero(index != np.arange(index.size))) for index in indices)


def _as_array(given: Any) -> np.ndarray:
    """Whole numbers of any type as an array; something that is no index if they are none."""
    try:
        return np.asarray(given)
    except (TypeError, ValueError, RuntimeError):  # ragged lists; tensors on another device
        return np.empty(0)


def _is_permutation(index: np.ndarray, size: int) -> bool:
    """Whether it has each of the whole numbers below `size` once."""
    if index.dtype.kind not in "iu" or index.shape != (size,):
        return False
    if size and (index.min() < 0 or index.max() >= size):
        return False
    seen = np.zeros(size, dtype=bool)
    seen[index] = True
    return bool(seen.all())


def _is_identity(perm: np.ndarray) -> bool:
    return bool((perm == np.arange(perm.size)).all())


def _get(state: State, name: str, aliases: Mapping[str, str]) -> str | None:
    """The key under which `state` has tensor `name`: a tied weight may be there under any of its names."""
    if name in state:
        return name
    return next((alias for alias, target in aliases.items() if target == name and alias in state), None)


def _clause(error: Exception) -> str:
    """A sentence as the end of another."""
    text = str(error)
    return text[:1].lower() + text[1:]
