"""The words that all rooms share: a model's tensors by name, lazily or not, and what a long job tells its listener."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]
"""A model as its tensors by name: a `state_dict()`, or any mapping that makes a tensor when it is asked for one."""


class LazyState(Mapping[str, Tensor]):
    """A state whose tensors are read or computed when they are asked for.

    Those that know shapes and types beforehand, from a file's header say, override the two methods.
    """

    def shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)

    def dtype_of(self, name: str) -> torch.dtype:
        return self[name].dtype


def shape_of(state: State, name: str) -> tuple[int, ...]:
    """The shape of a tensor, without reading it where the state is lazy."""
    known = getattr(state, "shape_of", None)  # mappings of the user's own need not derive from LazyState
    return tuple(state[name].shape) if known is None else tuple(known(name))


def dtype_of(state: State, name: str) -> torch.dtype:
    """The type of a tensor, without reading it where the state is lazy."""
    known = getattr(state, "dtype_of", None)
    return state[name].dtype if known is None else known(name)


class ProgressEvent(dict[str, Any]):
    """What a `progress` callback is told: a dict of plain values.

    `stage` says what is being done, `step` how much of `total`; other figures are there where they mean something:
    `seconds` so far and `left` to the end (None: nobody knows), `objective`, `moved` (neurons), `loss`, ...
    """

    def __init__(self, stage: str, step: int, total: int | None = None, **figures: Any) -> None:
        super().__init__(stage=stage, step=step, **({} if total is None else {"total": total}), **figures)


Progress = Callable[[ProgressEvent], None]
"""The one way in which an algorithm talks while it works; printing and logging are the listener's."""


def tell(progress: Progress | None, stage: str, step: int, total: int | None = None, **figures: Any) -> None:
    """Tell a listener, if there is one."""
    if progress is not None:
        progress(ProgressEvent(stage, step, total, **figures))


def within(event: Mapping[str, Any], stage: str) -> ProgressEvent:
    """The same event as a part of another stage."""
    return ProgressEvent(**{**event, "stage": stage})


def is_number(dtype: torch.dtype) -> bool:
    """Whether tensors of this type can be averaged: counters, indices and masks can't."""
    return dtype.is_floating_point or dtype.is_complex


def widened(dtype: torch.dtype) -> torch.dtype:
    """Where sums are taken: at least float32, in which all narrower types are exact. Integers stay what they are."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
