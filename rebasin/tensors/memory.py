"""Where a model's tensors lie in memory: which share it, and how to compute with copies that share it likewise.

Whether two tensors are one is told from their storages, offsets and strides. The objects tell nothing: `b.data =
a.data`, a transposed view or a slice are further names of the same numbers.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LARGEST = 1 << 22
"""Up to this many elements two tensors whose memory interlocks are compared element by element."""


@dataclass(frozen=True)
class Place:
    """The memory of a tensor: `start` in bytes (an address, or within the storage `owner` of a meta tensor)."""

    owner: int
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    dtype: torch.dtype

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions of more than one index, the widest steps first."""
        wide = (d for d, n in enumerate(self.shape) if n > 1)
        return tuple(sorted(wide, key=lambda d: -self.strides[d]))

    @property
    def end(self) -> int:
        reach = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return self.start + reach + self.dtype.itemsize

    @property
    def repeats(self) -> bool:
        """Whether two of its elements are one (a dimension was expanded)."""
        reach = self.dtype.itemsize
        for d in reversed(self.dims):
            if self.strides[d] < reach:
                return True
            reach += (self.shape[d] - 1) * self.strides[d]
        return False

    def addresses(self) -> np.ndarray:
        found = np.asarray(self.start)
        for n, s in zip(self.shape, self.strides, strict=True):
            found = np.add.outer(found, np.arange(n) * s)
        return found.ravel()


def place(tensor: Tensor) -> Place | None:
    """Where a tensor lies; None for empty ones and for those without memory of their own (sparse, quantised)."""
    try:
        storage, size = tensor.untyped_storage(), tensor.dtype.itemsize
        owner = storage._cdata if tensor.is_meta else 0
        start = int(tensor.storage_offset()) * size + (0 if tensor.is_meta else storage.data_ptr())
        strides = tuple(s * size if n > 1 else 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    except (NotImplementedError, RuntimeError):
        return None
    return Place(owner, start, tuple(tensor.shape), strides, tensor.dtype) if tensor.numel() else None


Cut = tuple[int, int, int]
"""start, step and count along a dimension."""


@dataclass(frozen=True)
class View:
    """`name` is a part of `base`: `cuts` along each dimension of base; dimension d of name is `dims[d]` of base."""

    name: str
    base: str
    cuts: tuple[Cut, ...]
    dims: tuple[int | None, ...]


@dataclass(frozen=True)
class Sharing:
    """What a model's named tensors share: further names of one tensor, views of others, and all other overlaps."""

    aliases: Mapping[str, str]
    views: tuple[View, ...]
    clashes: Mapping[str, str]


def sharing(named: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Sharing:
    """How the tensors of a state share memory, with each other and with the model's `others`."""
    places = {name: p for name, t in named.items() if (p := place(t)) is not None}
    own = {name: number for number, name in enumerate(named)}
    aliases: dict[str, str] = {}
    first: dict[Place, str] = {}
    for name, where in places.items():
        if first.setdefault(where, name) != name:
            aliases[name] = first[where]
    views: list[View] = []
    clashes = {name: "itself" for where, name in first.items() if where.repeats}
    rest = [(where, name, True) for where, name in first.items()]
    rest += [(p, name, False) for name, t in others.items() if (p := place(t)) is not None]
    rest.sort(key=lambda item: (item[0].owner, item[0].start))
    open_: list[tuple[Place, str, bool]] = []
    for where, name, state in rest:
        open_ = [o for o in open_ if o[0].owner == where.owner and o[0].end > where.start]
        for other, its_name, its_state in open_:
            if not (state or its_state) or _apart(where, other):
                continue
            if state and its_state:
                pair = [(where, name), (other, its_name)]
                small, large = sorted(pair, key=lambda p: (np.prod(p[0].shape), -own[p[1]]))
                view = _view(*small, *large)
                if view is not None:
                    views.append(view)
                    continue
            clashes |= {n: m for n, m, s in ((name, its_name, state), (its_name, name, its_state)) if s}
        open_.append((where, name, state))
    return Sharing(aliases, tuple(views), clashes)


def _apart(a: Place, b: Place) -> bool:
    """Whether two tensors whose ranges of memory overlap have no element in common."""
    if np.prod(a.shape) + np.prod(b.shape) > _LARGEST:
        return False
    step = min(a.dtype.itemsize, b.dtype.itemsize)
    return not np.intersect1d(a.addresses() // step, b.addresses() // step).size


def _view(small: Place, name: str, large: Place, base: str) -> View | None:
    """`small` as a rectangular part of `large`, dimensions in any order; None if it is none."""
    if small.dtype != large.dtype or small.repeats or large.repeats:
        return None
    rest, starts = small.start - large.start, {}
    for d in large.dims:
        starts[d], rest = divmod(rest, large.strides[d])
    if rest:
        return None
    dims: list[int | None] = [None] * len(small.shape)
    cuts = [(starts.get(d, 0), 1, 1) for d in range(len(large.shape))]
    for d in small.dims:
        fits = (k for k in large.dims if k not in dims and not small.strides[d] % large.strides[k])
        k = next(fits, None)
        if k is None:
            return None
        step = small.strides[d] // large.strides[k]
        dims[d], cuts[k] = k, (starts[k], step, small.shape[d])
    inside = all(s + step * (n - 1) < size for (s, step, n), size in zip(cuts, large.shape, strict=True))
    return View(name, base, tuple(cuts), tuple(dims)) if inside else None


_PLAIN = frozenset((bool, int, float, str, type(None)))
"""What most attributes of modules are."""


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All tensors that a model holds by a path: parameters, buffers, attributes and what is in their containers."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()

    def gather(path: str, value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            found[path] = value
        elif isinstance(value, Mapping | list | tuple) and depth and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, item in items:
                gather(f"{path}.{key}", item, depth - 1)

    for name, module in model.named_modules():
        for key, value in vars(module).items():
            inner = key in ("_parameters", "_buffers")
            if key != "_modules" and type(value) not in _PLAIN:
                gather(name if inner else f"{name}.{key}", value, 4)
    return found


def _copies(tensors: Mapping[str, Tensor], dtypes: Mapping[torch.dtype, torch.dtype]) -> dict[int, Tensor]:
    """id of a tensor -> a copy in another type; copies share memory exactly where the tensors do."""
    by_storage: dict[tuple[Any, ...], list[Tensor]] = {}
    for tensor in {id(t): t for t in tensors.values()}.values():
        where = place(tensor)
        key = (tensor.untyped_storage()._cdata,) if where is not None else ("none", id(tensor))
        by_storage.setdefault(key, []).append(tensor)
    made: dict[int, Tensor] = {}
    for members in by_storage.values():
        if place(members[0]) is None:
            made |= {id(t): t.detach().clone() for t in members}
            continue
        # Of a storage that others use as well, only the part from the first to the last element is copied.
        size = members[0].dtype.itemsize
        if any(t.dtype != members[0].dtype for t in members):
            storage = members[0].untyped_storage().clone()
            for t in members:
                empty = torch.empty(0, dtype=t.dtype, device=t.device)
                made[id(t)] = empty.set_(storage, t.storage_offset(), t.size(), t.stride())
            continue
        places = [p for p in map(place, members) if p is not None]
        low = min(t.storage_offset() for t in members)
        high = low + (max(p.end for p in places) - min(p.start for p in places)) // size
        flat = members[0].detach().as_strided((high - low,), (1,), low)
        flat = flat.to(dtypes.get(flat.dtype, flat.dtype), copy=True)
        made |= {id(t): flat.as_strided(t.size(), t.stride(), t.storage_offset() - low) for t in members}
    return made


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy that shares memory within itself where the model does; tensors that were computed are copied, too."""
    tensors = tensors_of(model)
    copies = _copies(tensors, {})
    memo: dict[int, Any] = {}
    for tensor in tensors.values():
        made = copies[id(tensor)]
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            made.__class__ = type(tensor)
            vars(made).update(vars(tensor))
        memo[id(tensor)] = made
    return copy.deepcopy(model, memo)


@contextmanager
def on_copies(model: nn.Module, dtypes: Mapping[torch.dtype, torch.dtype]) -> Iterator[Attributes]:
    """Inside the block the model itself computes with copies of its tensors, in other types; then it is as before.

    Its own tensors are never written to: whatever ends the block, they are there, bit for bit.
    """
    tensors = {id(t): t for t in tensors_of(model).values()}
    attributes = Attributes(model)
    own = [(tensor, tensor.data) for tensor in tensors.values()]
    try:
        for key, made in _copies({str(k): t for k, t in tensors.items()}, dtypes).items():
            tensors[key].data = made
        yield attributes
    finally:
        for tensor, data in own:
            tensor.data = data
        attributes.restore()


class Attributes:
    """The attributes of all modules as they were: models keep tables, counters and computed weights there."""

    def __init__(self, model: nn.Module) -> None:
        self.saved: list[tuple[Any, Any]] = []
        for module in model.modules():
            self._keep(vars(module), 3)

    def _keep(self, container: Any, depth: int) -> None:
        self.saved.append((container, container.copy()))
        for value in container.values() if isinstance(container, dict) else container:
            if depth and type(value) in KEPT:
                self._keep(value, depth - 1)

    def restore(self) -> None:
        for container, before in self.saved:
            if not _same(container, before):
                container.clear()
                container.extend(before) if isinstance(container, list) else container.update(before)


KEPT = (dict, OrderedDict, list, set)
"""Containers whose content is kept; hooks are in ordered ones, and who installs them notes that in an attribute."""


def _same(a: Any, b: Any) -> bool:
    """Whether two containers hold the same objects."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(value is b[key] for key, value in a.items())
    if isinstance(a, set):
        return a == b
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
