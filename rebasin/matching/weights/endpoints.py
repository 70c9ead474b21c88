"""The two endpoints while B is brought to A: A as it is, B under the permutation found so far.

Nothing of the caller's is changed. B's tensors are read through until a permutation moves them; only those
that moved are held here, in their own dtype, so that aligning two nearly identical models costs hardly any
memory. Of a large B some are held, the others are read and permuted each time that they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError
from ...spec import Group, Permutation, PermutationSpec
from ...tensors.modules import find_device
from ...types import State, dtype_of, is_finite, place_of
from ..schedule import axes_met
from .noise import noise_weight, repeats_weight

Normalize = Literal["repeats", "paper", "tensor", "noise"]

CHUNK = 1 << 18
"""Elements that are widened to float64 at a time: they stay in the cache."""

HELD = 3 << 30
"""Bytes of B's tensors that are held when they have moved, on the CPU; the largest of a larger B are not."""

PENDING = 1 << 28
"""Bytes of new values that a proposed move holds; the rest is put together anew if it is made."""

FAR = 1e-3
"""Squared distances above this share of the squared norms follow from inner products without loss of digits."""


@dataclass(frozen=True)
class Slices:
    """New values of a tensor of pi(B): at `places` along `axis`, or, without these, of the whole tensor."""

    values: Tensor
    axis: int = 0
    places: Tensor | None = None


@dataclass(frozen=True)
class Move:
    """A rearrangement of `group`, computed but not yet made: what changes in which tensor (None: not held), what each
    inner product gains by that, and the objective.
    """

    group: Group
    slices: Mapping[str, Slices | None]
    gains: Mapping[str, float]
    gain: float


class Endpoints:
    """A, pi(B), and the objective `sum_k w_k <A_k, pi(B)_k>` over the parameters k that the spec permutes.

    Each parameter counts once, under one of its names if it is tied; buffers do not count. Sums are float64.

    Attributes:
        index: pi, cell name -> int64 [size], `new[i] = old[index[i]]`.
        weight: w_k; 1 as the paper has it, 1 / (|A_k| |B_k|) by tensor, else by what its numbers say (noise.py).
        squares: (|A_k|^2, |B_k|^2) of every counted parameter.
        dtype: of cost matrices; float32, but float64 if the endpoints are.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        state_a: State,
        state_b: State,
        *,
        normalize: Normalize = "paper",
        device: torch.device | str = "cpu",
        checked: Mapping[str, float] | None = None,
    ) -> None:
        """Read and check both endpoints, or A alone if B is known: `checked` has its |B_k|^2; pi is the identity.

        Raises:
            SpecMismatchError: a tensor is missing or has another shape than the spec's.
            CheckpointError: a tensor is not floating point or has NaN or infinite values.
        """
        self.spec = spec
        self.device = find_device(device)
        self.parameters = tuple(name for name in spec.axes if name not in spec.buffers)
        self._a, self._b = state_a, state_b
        self._key_a, self._key_b = keys_of(spec, state_a, "A"), keys_of(spec, state_b, "B")
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._moved: dict[str, Tensor] = {}
        self._followed = self._too_many(state_b)  # which are never held
        self.index = {name: np.arange(cell.size) for name, cell in spec.cells.items()}
        wide = all(
            torch.float64 in (dtype_of(state_a, self._key_a[name]), dtype_of(state_b, self._key_b[name]))
            for name in spec.axes
        )
        self.dtype = torch.float64 if wide else torch.float32
        self.squares: dict[str, tuple[float, float]] = {}
        self.weight: dict[str, float] = {}
        self._naive_dots: dict[str, float] = {}
        for name in spec.axes:
            if checked is not None and name in checked:
                a, b, bb, ab = self.a(name), None, checked[name], None
                aa = squared(a)
            else:
                a, b = self.a(name), self.b(name)
                aa, bb, ab = _moments(a, b)
            kind = torch.float64 if name in spec.buffers else self.dtype  # these are in no cost
            require_finite(aa, a, kind, lambda name=name: place_of(state_a, self._key_a[name], "A"))
            if b is not None:
                require_finite(bb, b, kind, lambda name=name: place_of(state_b, self._key_b[name], "B"))
            if name not in spec.buffers:
                self.squares[name] = aa, bb
                self.weight[name] = _weight(spec, name, a, b, aa * bb, normalize)
                if ab is not None:
                    self._naive_dots[name] = ab
        self._dots = dict(self._naive_dots)

    def a(self, name: str) -> Tensor:
        """A's tensor `name`, on the device, in its own dtype."""
        return self._read("a", name, self._a, self._key_a)

    def b(self, name: str) -> Tensor:
        """pi(B)'s tensor `name`, on the device, in its own dtype."""
        if (moved := self._moved.get(name)) is not None:
            return moved
        tensor = self._read("b", name, self._b, self._key_b)
        return (
            Permutation.trusted(self.spec, self.index).apply_to(name, tensor)
            if name in self._followed
            else tensor
        )

    def _too_many(self, state: State) -> frozenset[str]:
        """The tensors of B that would take more memory than `HELD`, the largest."""
        if self.device.type != "cpu":
            return frozenset()
        sizes = {
            n: math.prod(self.spec.shapes[n]) * dtype_of(state, self._key_b[n]).itemsize
            for n in self.parameters
        }
        small = sorted(sizes, key=lambda name: sizes[name])
        sums = accumulate(sizes[name] for name in small)
        return frozenset(name for name, taken in zip(small, sums, strict=True) if taken > HELD)

    def _read(self, side: str, name: str, state: State, keys: Mapping[str, str]) -> Tensor:
        kept = self._kept.get((side, name))
        if kept is not None:
            return kept
        tensor = state[keys[name]].detach()
        if tensor.device == self.device:
            return tensor
        return self._kept.setdefault((side, name), tensor.to(self.device))  # over the bus once

    @property
    def is_large(self) -> bool:
        """Whether memory is short: some of B's tensors are not held."""
        return bool(self._followed)

    @property
    def permutation(self) -> Permutation:
        """A copy of pi."""
        return Permutation.trusted(self.spec, {name: index.copy() for name, index in self.index.items()})

    @property
    def dots(self) -> Mapping[str, float]:
        """<A_k, pi(B)_k> of every counted parameter. Moves made later add what they gained: no tensor is read again."""
        for name in self.parameters:
            if name not in self._dots:
                self._dots[name] = inner(self.a(name), self.b(name))
        return self._dots

    @property
    def objective(self) -> float:
        return math.fsum(self.weight[name] * dot for name, dot in self.dots.items())

    @property
    def distance(self) -> float:
        """|A - pi(B)|, over the parameters that the spec permutes."""
        return math.sqrt(math.fsum(self._squared_distance(name, dot) for name, dot in self.dots.items()))

    def _squared_distance(self, name: str, dot: float) -> float:
        norms = sum(self.squares[name])
        squared = norms - 2 * dot
        if squared > FAR * norms:
            return squared
        return _summed([d.dot(d) for d in (x.sub_(y) for x, y in _chunks(self.a(name), self.b(name)))])

    @property
    def scale(self) -> float:
        """The largest value that the objective could have, by Cauchy and Schwarz."""
        return math.fsum(self.weight[name] * math.sqrt(aa * bb) for name, (aa, bb) in self.squares.items())

    def set(self, permutation: Permutation) -> None:
        """Make `permutation` pi."""
        if all(np.array_equal(index, self.index[name]) for name, index in permutation.index.items()):
            return
        self._moved = {}
        self.index = {name: np.array(index) for name, index in permutation.index.items()}
        self._dots = {}
        for name in self.parameters:
            if permutation.axes_of(name):
                if name not in self._followed:
                    self._moved[name] = permutation.apply_to(name, self.b(name))
            elif name in self._naive_dots:
                self._dots[name] = self._naive_dots[name]

    def propose(self, group: Group, index: Mapping[str, np.ndarray]) -> Move:
        """What it would do to the objective if the neurons of `group` moved by `index`, relative to where
        they are now. The work is proportional to what moves.
        """
        slices: dict[str, Slices | None] = {}
        gains: dict[str, float] = {}
        pending = 0
        for name, changed, old in self._rearranged(group, index):
            a = self.a(name)
            if changed.places is not None:
                a = a.index_select(changed.axis, changed.places)
                old = old.index_select(changed.axis, changed.places)
            pending += changed.values.nbytes
            slices[name] = None if name in self._followed or pending > PENDING else changed
            # <a, new> - <a, old>, float64
            gains[name] = _summed([x.dot(z.sub_(y)) for x, y, z in _chunks(a, old, changed.values)])
        return Move(group, slices, gains, math.fsum(self.weight[name] * gain for name, gain in gains.items()))

    def make(self, move: Move, index: Mapping[str, np.ndarray]) -> None:
        """Carry out a proposed move."""
        before = {name: dot for name in move.slices if (dot := self._dots.get(name)) is not None}
        again = {name for name, changed in move.slices.items() if changed is None} - self._followed
        for name, changed in move.slices.items():
            if name not in again:
                self._change(name, changed)
        for name, changed, _ in self._rearranged(move.group, index, again):
            self._change(name, changed)
        self._dots.update({name: dot + move.gains[name] for name, dot in before.items()})
        self._reindex(index)

    def move(self, group: Group, index: Mapping[str, np.ndarray]) -> None:
        """Move the neurons of `group` by `index`, relative to where they are now, whatever that gains."""
        for name, changed, _ in self._rearranged(group, index):
            self._change(name, changed)
        self._reindex(index)

    def _rearranged(
        self, group: Group, index: Mapping[str, np.ndarray], names: Collection[str] | None = None
    ) -> Iterator[tuple[str, Slices, Tensor]]:
        """(name, what changes, tensor as it is) for each tensor (of `names`) that is not the same afterwards."""
        own = {cell.name: index[cell.name] for cell in group.cells}
        relative = Permutation.trusted(self.spec, {**self.spec.identity().index, **own})
        for name in touched(group, self.spec) if names is None else names:
            moves = relative.axes_of(name)
            if not moves:
                continue
            b = self.b(name)
            (axis, full), *more = moves
            places = np.flatnonzero(full != np.arange(full.size))
            if more or 2 * places.size > full.size:
                yield name, Slices(relative.apply_to(name, b)), b
            else:
                here, there = (torch.from_numpy(p).to(b.device) for p in (places, full[places]))
                yield name, Slices(b.index_select(axis, there), axis, here), b

    def _change(self, name: str, changed: Slices | None) -> None:
        self._dots.pop(name, None)
        if changed is None or name in self._followed:
            return  # it follows the index
        if changed.places is None:
            self._moved[name] = changed.values
            return
        if name not in self._moved:
            self._moved[name] = self.b(name).clone()
        there, values = self._moved[name], changed.values
        if there.dtype.itemsize == 1:  # torch writes no slices of float8: their bytes are written
            there, values = there.view(torch.uint8), values.view(torch.uint8)
        there.index_copy_(changed.axis, changed.places, values)

    def _reindex(self, index: Mapping[str, np.ndarray]) -> None:
        for cell, relative in index.items():
            self.index[cell] = self.index[cell][relative]


def _weight(
    spec: PermutationSpec, name: str, a: Tensor, b: Tensor | None, squares: float, normalize: Normalize
) -> float:
    """How much a tensor counts; `squares` is |a|^2 |b|^2. Only the paper's needs no b."""
    if normalize == "paper" or squares == 0:
        return 1.0
    if normalize == "tensor":
        return 1 / math.sqrt(squares)
    assert b is not None
    weigh = noise_weight if normalize == "noise" else repeats_weight
    return weigh(a, b, spec.axes[name])


def touched(group: Group, spec: PermutationSpec) -> list[str]:
    """The parameters (no buffers) on which `group` acts."""
    return [name for name in axes_met(group) if name not in spec.buffers]


def inner(a: Tensor, b: Tensor) -> float:
    """<a, b> with products and sums in float64."""
    return _summed([x.dot(y) for x, y in _chunks(a, b)])


def squared(a: Tensor) -> float:
    """|a|^2, float64."""
    return _summed([x.dot(x) for (x,) in _chunks(a)])


def require_finite(
    square: float, tensor: Tensor, dtype: torch.dtype, place: Callable[[], str], done: str = "aligned"
) -> None:
    """Look at |tensor|^2, as `squared` has it, of the tensor at a `place` (see `types.place_of`): whether costs can be
    computed of it in `dtype`.

    Raises:
        CheckpointError: a value is no number, or too large.
    """
    if square < torch.finfo(dtype).max * MARGIN:
        return
    fault = "NaN or infinite values"
    if is_finite(tensor):
        kind = str(dtype).removeprefix("torch.")
        fault = f"values as large as {float(tensor.abs().max()):.1g}, too large for sums of squares in {kind}"
    raise CheckpointError(
        f"Tensor {place()} has {fault}: the checkpoint is damaged or its training diverged, so it can't be {done}."
    )


MARGIN = 1e-3
"""Of the largest number: as many products of two tensors are summed for a cost, at the least."""


def _moments(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """|a|^2, |b|^2 and <a, b>, float64; <a, b> to the bit as `inner` has it."""
    parts = [part for x, y in _chunks(a, b) for part in (x.dot(x), y.dot(y), x.dot(y))]
    found = torch.stack(parts).cpu().tolist() if parts else []  # a device is waited for once
    aa, bb, ab = (math.fsum(found[k::3]) for k in range(3))
    return aa, bb, ab


def _chunks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """The tensors piece by piece, flat and as float64 copies, which are good until the next piece."""
    device = tensors[0].device
    flat = [t.reshape(-1) for t in tensors]
    total = flat[0].numel()
    size = min(CHUNK if device.type == "cpu" else 16 * CHUNK, max(1, total))
    wide = [torch.empty(size, dtype=torch.float64, device=device) for _ in flat]
    with one_thread():
        for start in range(0, total, size):
            length = min(size, total - start)
            yield [w[:length].copy_(t[start : start + length]) for w, t in zip(wide, flat, strict=True)]


@contextmanager
def one_thread() -> Iterator[None]:
    """For the block, let torch use one thread: for many small pieces more are not faster, and where another process
    wants the cores, too, their waiting for each other makes them ten times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _summed(parts: list[Tensor]) -> float:
    return math.fsum(torch.stack(parts).cpu().tolist()) if len(parts) > 1 else float(sum(parts))


def keys_of(spec: PermutationSpec, state: State, what: str) -> dict[str, str]:
    """Under which of its names `state` has each permuted tensor; checks that it has them all, and as
    numbers.
    """
    spec.check(state, what)
    other = {name: alias for alias, name in reversed(list(spec.aliases.items())) if alias in state}
    keys = {name: name if name in state else other[name] for name in spec.axes}
    for key in keys.values():
        dtype = dtype_of(state, key)
        if not dtype.is_floating_point:
            raise CheckpointError(
                f"Tensor {place_of(state, key, what)} is {str(dtype).removeprefix('torch.')}, not floating point:"
                f" convert a quantised checkpoint to floating point first."
            )
    return keys
