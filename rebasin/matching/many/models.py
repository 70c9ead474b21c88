"""N models of one architecture that are read one at a time: checked, opened, and averaged tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import fsum, isfinite, nan
from time import perf_counter

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...merging.interpolate import COUNTERS
from ...spec import Permutation, PermutationSpec
from ...tensors import load_safetensors
from ...tensors.quantised import decoded
from ...types import LazyState, State, dtype_of, is_number, place_of, require_state, shape_of, widened
from ..weights.endpoints import keys_of, require_finite, squared

Visit = Callable[[int, str, Tensor], None]
Source = State | str | os.PathLike[str]
"""A state, or the path of a safetensors file that is opened whenever it is read and closed after that."""


def opened(source: Source) -> State:
    """A source as a state."""
    return source if isinstance(source, Mapping) else decoded(load_safetensors(source), source)


class Models:
    """The N models, checked.

    Attributes:
        weights: as given; `shares` with sum 1.
        keys: the name in the spec of every tensor that it permutes -> the name in the states.
        layout: name -> tensor without values, for every tensor of the first model.
        squares: |theta_i|^2 over the parameters that the spec permutes; known once `read_all` was called.
        distance_before: of the models from their mean as they come; known once `RunningMean.gather_first` was called.
        began: when the work on them did, by `perf_counter`; `seconds` is the wall time since.
    """

    squares: tuple[float, ...] = ()
    distance_before = nan

    def __init__(
        self, spec: PermutationSpec, states: Sequence[Source], weights: Sequence[float] | None = None
    ) -> None:
        """Open every model once and compare their names, types and shapes, which costs no reading of files.

        Raises:
            SpecMismatchError, CheckpointError: a model is missing, damaged or of another architecture; the
                message names it.
            ConfigError: there is no model, or the weights do not fit.
        """
        self.began = perf_counter()
        self.spec, self.sources = spec, tuple(states)
        for i, source in enumerate(self.sources):
            if not isinstance(source, str | os.PathLike):
                require_state(source, f"states[{i}]")
        if isinstance(states, (str, Mapping)) or not self.sources:
            raise ConfigError("There is nothing to merge: give a list of at least one model.")
        self.weights = tuple(float(w) for w in weights) if weights is not None else (1.0,) * len(self)
        if len(self.weights) != len(self) or not all(isfinite(w) and w > 0 for w in self.weights):
            raise ConfigError(f"{len(self)} models need as many weights, all positive, not {self.weights}.")
        self.shares = tuple(w / fsum(self.weights) for w in self.weights)
        first = self.open(0)
        self.keys = keys_of(spec, first, self.name(0))
        self.layout = {name: layout_of(first, name) for name in first}
        del first
        for i in range(len(self)):
            self._check_layout(i)

    @property
    def seconds(self) -> float:
        return perf_counter() - self.began

    def read_all(self, visit: Visit | None = None) -> None:
        """Read every tensor of every model, one model after the other, and check its values; `visit` may look at those
        that the spec permutes, on the CPU, by model, name in the spec, and tensor.

        Raises:
            CheckpointError: a model has NaN or infinite values or other integers than the first; names it.
        """
        first = self.open(0)
        whole = {name: first[name].clone() for name, t in self.layout.items() if not is_number(t.dtype)}
        del first
        self.squares = tuple(self._check_values(i, whole, visit) for i in range(len(self)))

    def __len__(self) -> int:
        return len(self.sources)

    def open(self, i: int) -> State:
        return opened(self.sources[i])

    def name(self, i: int) -> str:
        source = self.sources[i]
        return f"states[{i}]" if isinstance(source, Mapping) else f"states[{i}] ({os.fspath(source)})"

    def check_anchor(self, anchor: int | None) -> None:
        """Raise `ConfigError` unless it is the number of a model, or None."""
        if anchor is not None and not 0 <= anchor < len(self):
            raise ConfigError(f"The anchor {anchor} is none of the models 0 to {len(self) - 1}.")

    def average(self, permutations: Sequence[Permutation | None], *, wide: bool = False) -> MeanState:
        """The weighted mean of the models that have a permutation, in that arrangement."""
        return MeanState(self, {i: p for i, p in enumerate(permutations) if p is not None}, wide)

    def _check_layout(self, i: int) -> None:
        state, what = self.open(i), self.name(i)
        self.spec.check(state, what)
        here, there = set(state), self.layout.keys()
        for missing, has, lacks in ((here - there, what, self.name(0)), (there - here, self.name(0), what)):
            if missing:
                raise CheckpointError(
                    f"Tensor {min(missing)!r} is in {has} but not in {lacks}: all models must come from the same"
                    f" architecture."
                )
        for name, first in self.layout.items():
            own = layout_of(state, name)
            if own.shape != first.shape or is_number(own.dtype) != is_number(first.dtype):
                raise CheckpointError(
                    f"Tensor {name!r} of {what} is {_told(own)}, but {_told(first)} in"
                    f" {self.name(0)}: all models must come from the same architecture."
                )
        keys_of(self.spec, state, what)

    def _check_values(self, i: int, whole: Mapping[str, Tensor], visit: Visit | None) -> float:
        state, squares = self.open(i), []
        names = {key: name for name, key in self.keys.items()}
        for name in state:
            tensor = state[name].detach().cpu()
            if not is_number(tensor.dtype):
                if name.rsplit(".", 1)[-1] not in COUNTERS and not torch.equal(tensor, whole[name].cpu()):
                    raise CheckpointError(
                        f"Integer tensor {name!r} of {self.name(i)} differs from that of {self.name(0)}: integers"
                        f" can't be averaged, so make them equal or leave the tensor out."
                    )
                continue
            square = squared(torch.view_as_real(tensor) if tensor.is_complex() else tensor)
            counts = name in names and names[name] not in self.spec.buffers
            kind = torch.float32 if counts and tensor.dtype.itemsize < 8 else torch.float64
            require_finite(
                square, tensor, kind, lambda name=name: place_of(state, name, self.name(i)), "merged"
            )
            if name in names:
                if counts:
                    squares.append(square)
                if visit is not None:
                    visit(i, names[name], tensor)
        return fsum(squares)


def mean_of(tensors: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """The weighted mean, in at least float32; one tensor after the other is asked for."""
    members = zip(tensors, weights, strict=True)
    first, total = next(members)
    mean = first.to(widened(first.dtype), copy=True)
    for tensor, weight in members:
        total += weight
        # Not (W m + w x) / (W + w): the mean of equal tensors is to be these tensors, to the bit.
        mean.lerp_(tensor.to(mean.dtype), weight / total)
    return mean


class MeanState(LazyState):
    """The weighted mean of models, each in an arrangement of its own; a tensor is made when it is asked for.

    It has every tensor of the models, not only those that the spec permutes. Sums are at least float32. Equal
    tensors stay as they are to the bit; integers are the first model's. Tensors have that model's types, or,
    with `wide`, those of the sums. Models are read one after the other, anew for each tensor: `dict(mean)`
    holds it, `save_safetensors` streams it.
    """

    def __init__(self, models: Models, members: Mapping[int, Permutation], wide: bool = False) -> None:
        layout = models.layout
        super().__init__({n: t.to(widened(t.dtype)) for n, t in layout.items()} if wide else layout)
        self._models, self._members = models, dict(members)

    def __getitem__(self, name: str) -> Tensor:
        number = is_number(self.dtype_of(name))
        members = list(self._members.items())[: None if number else 1]
        tensors = (p.apply_to(name, self._models.open(i)[name].detach().cpu()) for i, p in members)
        return mean_of(tensors, [self._models.weights[i] for i, _ in members]).to(self.dtype_of(name))


def layout_of(state: State, name: str) -> Tensor:
    """Type and shape of a tensor, as a tensor without values."""
    return torch.empty(shape_of(state, name), dtype=dtype_of(state, name), device="meta")


def _told(layout: Tensor) -> str:
    return f"{str(layout.dtype).removeprefix('torch.')} {tuple(layout.shape)}"
