"""What all rooms share: a model's tensors by name, lazily or not, what a long job tells its listener, and how a
function that a name stands for gets its arguments: by its signature.
"""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from .errors import CheckpointError, ConfigError, shown, unknown

State = Mapping[str, Tensor]
"""A model as its tensors by name: a `state_dict()`, or any mapping that makes a tensor when it is asked for one."""


class LazyState(Mapping[str, Tensor]):
    """A state whose tensors are read or computed when they are asked for; a subclass says how, in `__getitem__`.

    `known` is the table of its names, which knows shapes and types beforehand: a mapping of the same names to values
    with a `shape` and a `dtype` (entries of a file's header, tensors, `LazyTensor`), or another state.
    """

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.known = known
        self._names = dict.fromkeys(known)  # in order; a mapping's own `in` may make the tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return shape_of(self.known, name)

    def dtype_of(self, name: str) -> torch.dtype:
        return dtype_of(self.known, name)

    def origin(self, name: str) -> str | None:
        """Its name in the file that it is from, and the file, for a sentence; None if it is from none."""
        return None


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a derived state: its shape and type, which are known, how it is made, and its `origin`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    origin: str | None = None


class DerivedState(LazyState):
    """A state of lazy tensors by name, each made anew whenever it is asked for."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        super().__init__(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self.known[name].make()

    def origin(self, name: str) -> str | None:
        return self.known[name].origin


def passed(state: State, name: str) -> LazyTensor:
    """Tensor `name` of `state`, as it is: for a derived state that has it, maybe under another name."""
    return LazyTensor(
        shape_of(state, name), dtype_of(state, name), lambda: state[name], origin_of(state, name)
    )


def shape_of(state: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The shape of a tensor, without reading it where the state is lazy."""
    known = getattr(state, "shape_of", None)  # mappings of the user's own need not derive from LazyState
    return tuple(state[name].shape) if known is None else tuple(known(name))


def origin_of(state: Mapping[str, Any], name: str) -> str | None:
    """See `LazyState.origin`."""
    return state.origin(name) if isinstance(state, LazyState) else None


def place_of(state: Mapping[str, Any], name: str, what: str) -> str:
    """A tensor for a sentence: its name in its file, and the file, if the state knows these, else name and `what`."""
    return origin_of(state, name) or f"{name!r} of {what}"


def dtype_of(state: Mapping[str, Any], name: str) -> torch.dtype:
    """The type of a tensor, without reading it where the state is lazy."""
    known = getattr(state, "dtype_of", None)
    return state[name].dtype if known is None else known(name)


WRAPPER = re.compile(
    r"(?:^|(?<=[./]))(?:_orig_mod|module|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module|state_dict"
    r"|model_state_dict)\."
)
"""What torch.compile, DataParallel and their like, and what flattens a trainer's file, put into names."""


def wrapped(state: Mapping[str, Any]) -> str:
    """The end of a sentence about a name that a state lacks, if its names have a wrapper's word in them; else ""."""
    found = next((match for name in state if (match := WRAPPER.search(name))), None)
    return f"; its names have {found[0]!r} in them, a wrapper's word: remove it" if found else ""


def require_state(state: Any, what: str, names: Iterable[str] | None = None) -> None:
    """A mapping, and, as far as no lazy tensor must be made for that, one of plain tensors with values.

    Args:
        names: look at these alone.

    Raises:
        CheckpointError: it is a model, or an entry is something else; names it.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{what} is of type {type(state).__name__}, but a state is wanted: model.state_dict()."
        )
    if type(state) not in (dict, OrderedDict):  # others may compute, or read, what they are asked for
        return
    if odd := [name for name in state if not isinstance(name, str)]:
        raise CheckpointError(f"{odd[0]!r} is no name of a tensor in {what}: names are text.")
    for name in state if names is None else names:
        if name in state and (fault := _fault(state[name])):
            raise CheckpointError(f"Tensor {name!r} of {what} {fault}.")


def _fault(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"is no tensor but of type {type(value).__name__}: leave it out"
    if isinstance(value, UninitializedParameter | UninitializedBuffer):
        return "has no values yet: call the model once"
    if value.layout != torch.strided or value.is_quantized:
        return "is sparse or quantised: give it as a plain tensor (to_dense, dequantize)"
    return "is on the meta device, without values" if value.is_meta else ""


class ProgressEvent(dict[str, Any]):
    """What a `progress` callback is told: a dict of plain values.

    `stage` says what is being done, `step` how much of `total`; other figures are there where they mean something:
    `seconds` so far and `left` to the end (None: nobody knows), `objective`, `moved` (neurons), `loss`, ...
    """

    def __init__(self, stage: str, step: int, total: int | None = None, **figures: Any) -> None:
        super().__init__(stage=stage, step=step, **({} if total is None else {"total": total}), **figures)


Progress = Callable[[ProgressEvent], None]
"""The one way in which an algorithm talks while it works; printing and logging are the listener's."""

Lost = Callable[[str, Tensor, Tensor], None]
"""Told the name of a tensor, what it was to be, and what it is in the narrower type or code that is written."""


def tell(progress: Progress | None, stage: str, step: int, total: int | None = None, **figures: Any) -> None:
    """Tell a listener, if there is one."""
    if progress is not None:
        progress(ProgressEvent(stage, step, total, **figures))


def within(event: Mapping[str, Any], stage: str) -> ProgressEvent:
    """The same event as a part of another stage."""
    return ProgressEvent(**{**event, "stage": stage})


Kind = TypeVar("Kind")


def brief(kind: type[Kind]) -> type[Kind]:
    """Give a dataclass of results a `repr` of one line: tensors by their shapes, what holds many by how many.

    Stands above `@dataclass`, whose own prints everything, which of a history is pages.
    """
    kind.__repr__ = _in_one_line  # type: ignore[method-assign,assignment]
    return kind


LINE = 240
"""Characters of such a line."""


def _in_one_line(result: Any) -> str:
    parts, name = [], type(result).__name__
    shown_fields = [f for f in fields(result) if f.repr]
    for f in shown_fields:
        parts.append(f"{f.name}={_short_value(getattr(result, f.name))}")
        if len(name) + sum(len(part) + 2 for part in parts) > LINE - 8:
            parts[-1] = "..."
            break
    return f"{name}({', '.join(parts)})"


def _short_value(value: Any) -> str:
    """A value of a field in a few words."""
    kind = type(value).__name__
    if value is None or isinstance(value, bool | int):
        return repr(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return shown(value, 40)
    if hasattr(value, "shape") and hasattr(value, "dtype"):  # of torch or numpy
        return f"{kind}{tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{{{len(value):,} entries}}"
    if isinstance(value, tuple | list | set | frozenset):
        if len(value) <= 3 and all(one is None or isinstance(one, bool | int | float) for one in value):
            return f"({', '.join(map(_short_value, value))})"
        return f"({len(value):,} values)"
    return kind


def is_number(dtype: torch.dtype) -> bool:
    """Whether tensors of this type can be averaged: counters, indices and masks can't."""
    return dtype.is_floating_point or dtype.is_complex


def widened(dtype: torch.dtype) -> torch.dtype:
    """Where sums are taken: at least float32, in which all narrower types are exact. Integers stay what they are."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def common_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The narrowest type, at least float32, in which tensors of all these types are combined."""
    wide = torch.float32
    for dtype in dtypes:
        wide = torch.promote_types(wide, widened(dtype))  # the eight-bit floats promote with nothing
    return wide


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or NaN."""
    if not tensor.numel():
        return True
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    low, high = torch.aminmax(
        real.float() if real.dtype.itemsize == 1 else real
    )  # takes no memory, and NaN wins
    return bool(torch.isfinite(low) & torch.isfinite(high))


REQUIRED = inspect.Parameter.empty
"""The default of an argument that has none."""


@dataclass(frozen=True)
class Maker:
    """Something on offer (see `supply`) that takes work: it is made only where it is wanted."""

    make: Callable[[], Any]


def supply(
    function: Callable[..., Any],
    offered: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    what: str,
) -> dict[str, Any]:
    """The arguments of `function` by name: what its signature asks for out of `offered`, and all of `options`.

    Args:
        offered: values, or `Maker`s of values. What the function does not ask for is left out.
        options: what was set for this function; an option of a name that is also offered wins.
        what: what users call the function, as a sentence about it begins.

    Raises:
        ConfigError: an option that the function does not have, or an argument that nothing gives it.
    """
    options = options or {}
    takes = arguments_of(function)
    check_options(
        what, options, {name: d for name, d in takes.items() if name in options or name not in offered}
    )
    given = {name: value for name, value in offered.items() if name in takes and name not in options}
    return {
        **{name: value.make() if isinstance(value, Maker) else value for name, value in given.items()},
        **options,
    }


def arguments_of(function: Callable[..., Any], without: Container[str] = ()) -> dict[str, Any]:
    """The named arguments of a function with their defaults (or REQUIRED), but those `without`."""
    several = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(function).parameters
    return {n: p.default for n, p in parameters.items() if n not in without and p.kind not in several}


def check_options(what: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with the defaults of `known` filled in.

    Raises:
        ConfigError: an option that is not among them, or none for one that is REQUIRED.
    """
    for name in options:
        if name not in known:
            raise unknown(f"{what} has no option {name!r}", name, known)
    filled = {**known, **options}
    for name, value in filled.items():
        if value is REQUIRED:
            raise ConfigError(f"{what} needs the option {name!r}, which is not set.")
    return filled
