"""A merge as a lazy mapping: the tensor of a name is computed when it is read, from that name's inputs alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..types import (
    LazyState,
    Progress,
    State,
    common_dtype,
    dtype_of,
    is_finite,
    is_number,
    origin_of,
    place_of,
    tell,
)
from .inputs import check_finite, integers_differ, same, wrong_shape
from .interpolate import COUNTERS
from .registry import Method, Weights


@dataclass(eq=False, repr=False)
class MergedState(LazyState):
    """The result of `merge`: a mapping whose tensors are computed each time they are read."""

    method: Method
    states: Sequence[State]
    base: State | None
    weights: Weights
    seed: int
    companions: Sequence[State]
    labels: Sequence[str]
    device: torch.device | str | None
    dtype: torch.dtype | None
    progress: Progress | None
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        super().__init__(self.states[0])
        base = [] if self.base is None else [("the base", self.base)]
        self._sources: list[tuple[str, State]] = [*zip(self.labels, self.states, strict=True), *base]
        self._done: set[str] = set()

    def dtype_of(self, name: str) -> torch.dtype:
        """The tensor's dtype in the result."""
        found = super().dtype_of(name)
        return self.dtype if self.dtype is not None and found.is_floating_point else found

    def weights_of(self, name: str) -> float | list[float] | None:
        """What the method gets as weight for this tensor: alpha, shares, scales, or None where it has none."""
        given = self.weights(name) if callable(self.weights) else self.weights
        return self.method.fit_weights(given, len(self.states), name)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(f"the merge has no tensor {name!r}.")
        with torch.no_grad():
            tensor = self._merged(name)
        if self.progress is not None:
            self._done.add(name)
            tell(self.progress, "merge", len(self._done), len(self), name=name)
        return tensor

    def _merged(self, name: str) -> Tensor:
        weight = self.weights_of(name)
        first = dtype_of(self.states[0], name)
        if not is_number(first):
            return self._whole(name, weight)
        alone = self._alone(weight)
        if alone is not None:
            tensor = self._read(name, *alone)
            if is_number(tensor.dtype) and is_finite(tensor):
                return self._stored(name, tensor, copy=True)
        tensors = [self._read(name, *source) for source in self._sources]
        # Equal tensors need no method. They may even hold infinities: masks are such constants.
        if tensors[0].numel() == 0 or all(same(tensors[0], other) for other in tensors[1:]):
            return tensors[0].to(self.dtype_of(name), copy=True)
        for (label, state), tensor in zip(self._sources, tensors, strict=True):
            check_finite(place_of(state, name, label), tensor, first)
        return self._stored(name, self._computed(name, weight, tensors))

    def _computed(self, name: str, weight: float | list[float] | None, tensors: list[Tensor]) -> Tensor:
        """The method's result, in the dtype it was computed in, on the first model's device."""
        where = tensors[0].device
        companions = [
            self._read(name, f"the companion of {label}", state)
            for label, state in zip(self.labels, self.companions, strict=False)
        ]
        for label, state, tensor in zip(self.labels, self.companions, companions, strict=False):
            if tensor.numel() and not (is_finite(tensor) and bool(tensor.min() >= 0)):
                raise CheckpointError(
                    f"Tensor {place_of(state, name, f'the companion of {label}')} has values below 0 or without end, so"
                    " it is no Fisher information."
                )
        wide = common_dtype(*(tensor.dtype for tensor in tensors))
        for group in (tensors, companions):
            for i, tensor in enumerate(group):  # in place, so that what was read is dropped at once
                tensor = tensor.to(device=self.device or where, dtype=common_dtype(tensor.dtype, wide))
                # Complex numbers are merged as pairs of real ones.
                group[i] = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        models = tensors[: len(self.states)]
        arguments = {
            "models": models,
            "a": models[0],
            "b": models[-1],
            "base": None if self.base is None else tensors[-1],
            "companions": companions,
            "generator": generator(self.seed, name) if "generator" in self.method.takes else None,
            "name": name,
            self.method.weight: weight,
        }
        given = {key: arguments[key] for key in self.method.takes}
        result = self.method.function(**given, **self.options)
        if result.shape != tensors[0].shape:
            raise ConfigError(
                f"The merge method '{self.method.name}' made {tuple(result.shape)} of tensor '{name}', which is"
                f" {tuple(tensors[0].shape)}: a method must keep shapes."
            )
        if any(result.data_ptr() == tensor.data_ptr() for tensor in tensors):
            result = result.clone()
        return (torch.view_as_complex(result.contiguous()) if wide.is_complex else result).to(where)

    def _alone(self, weight: float | list[float] | None) -> tuple[str, State] | None:
        """The one input that these weights leave alone, where the method promises it bit for bit."""
        promise, kind = self.method, self.method.weight
        if kind == "weights" and promise.one:
            assert isinstance(weight, list)
            kept = [source for share, source in zip(weight, self._sources, strict=False) if share != 0]
            return kept[0] if len(kept) == 1 else None
        zero = weight == 0 if kind == "alpha" else kind == "scales" and not any(weight)  # type: ignore[arg-type]
        if zero and promise.zero == "a":
            return self._sources[0]
        if zero and promise.zero == "base" and self.base is not None:
            return self._sources[-1]
        if kind == "alpha" and weight == 1 and promise.one == "b":
            return self._sources[len(self.states) - 1]
        return None

    def _whole(self, name: str, weight: float | list[float] | None) -> Tensor:
        if name.rsplit(".", 1)[-1] in COUNTERS:
            _, state = self._alone(weight) or self._sources[0]
            return state[name].clone()
        first = self._read(name, *self._sources[0])
        for label, state in self._sources[1:]:
            other = self._read(name, label, state)
            if is_number(other.dtype) or not torch.equal(
                first, other.to(device=first.device, dtype=first.dtype)
            ):
                raise integers_differ(name, self.labels[0], label)
        return first.clone()

    def _read(self, name: str, label: str, state: State) -> Tensor:
        tensor = state[name].detach()
        if tuple(tensor.shape) != self.shape_of(name):
            raise wrong_shape(name, self.labels[0], self.shape_of(name), label, tuple(tensor.shape))
        return tensor

    def _stored(self, name: str, tensor: Tensor, copy: bool = False) -> Tensor:
        """Cast to the dtype of the result; a value that does not fit is an error, not an infinity."""
        dtype = self.dtype_of(name)
        result = tensor.to(dtype, copy=copy)
        if not is_finite(result):
            place = origin_of(self.states[0], name) or repr(name)
            raise CheckpointError(
                f"Merging tensor {place} with '{self.method.name}' gave values that {dtype} can't hold: use smaller"
                " weights, or a wider dtype."
            )
        return result


def generator(seed: int, name: str) -> torch.Generator:
    """Random numbers for one tensor, the same on every machine, in every order and in every process."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
