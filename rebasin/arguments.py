"""What callers give to functions, looked at before any work begins: types by the signature, then values."""

from __future__ import annotations

import inspect
import math
import os
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence, ValuesView
from dataclasses import dataclass, replace
from functools import cache, wraps
from numbers import Integral
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from .errors import CheckpointError, ConfigError, RebasinError, shown
from .types import State

F = TypeVar("F", bound=Callable[..., Any])

LARGEST = 2**63 - 1
"""Torch's generators take no larger seed, and nothing else is counted so far."""


@dataclass(frozen=True)
class Within:
    """In `Annotated[float, Within(0, 1)]`: numbers from `low` to `high`, never NaN nor infinite.

    Both are among them, but for `low` with `above`, and `high` with `below`.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def complaint(self, name: str, value: float) -> str:
        """What is wrong with the value, a sentence; "" where it fits."""
        high_enough = value > self.low if self.above else value >= self.low
        low_enough = value < self.high if self.below else value <= self.high
        too_large = isinstance(value, Integral) and abs(int(value)) > LARGEST
        if high_enough and low_enough and math.isfinite(value) and not too_large:
            return ""
        if too_large and self.high == math.inf:
            return f"{name} is a number so large that nothing can take it; give a smaller one."
        wanted = [f"{'above' if self.above else 'at least'} {self.low}"] if self.low > -math.inf else []
        if self.high < math.inf:
            wanted.append(f"{'below' if self.below else 'at most'} {self.high}")
        told = " and ".join(wanted)
        if not wanted or not math.isfinite(value):
            told = f"a finite number{', ' if told else ''}{told}"
        return f"{name} is {shown(value)}, but it must be {told}."


Count = Annotated[int, Within(1)]
NonNegativeInt = Annotated[int, Within(0)]
Seed = Annotated[int, Within(0)]
Finite = Annotated[float, Within(-math.inf)]
NonNegative = Annotated[float, Within(0)]
Positive = Annotated[float, Within(0, above=True)]
Share = Annotated[float, Within(0, 1)]
Momentum = Annotated[float, Within(0, 0.9999)]
ShareBelowOne = Annotated[float, Within(0, 1, below=True)]


@dataclass(frozen=True)
class Kind:
    """What an annotation lets in.

    Attributes:
        called: in words; "" lets in anything.
        fits: whether a value is of this kind. No entry of a mapping but a dict is read for that: it may be lazy.
        mistake: the error for what is not.
        entries: of what kind the entries of a list or mapping are.
        parts: of a union.
        plain: a scalar or an array of numpy or torch that fits as Python's own number or list.
        complaint: of the argument's name and a value of this kind: why this one does not fit, a sentence, else "".
    """

    called: str
    fits: Callable[[Any], bool]
    mistake: type[RebasinError] = ConfigError
    entries: Kind | None = None
    parts: tuple[Kind, ...] = ()
    plain: Callable[[Any], Any] = lambda value: value
    complaint: Callable[[str, Any], str] = lambda name, value: ""

    def error(self, where: str, name: str, value: Any) -> RebasinError:
        """The sentence about a value that does not fit: `where` takes something else as `name`."""
        if complaint := self.complaint(name, value):
            return self.mistake(complaint)
        for kind in self.parts or (self,):  # the entry that is to blame, if it is one
            if kind.entries is not None and isinstance(value, list | tuple | dict):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for i, entry in items:
                    if not kind.entries.fits(entry):
                        return kind.entries.error(where, f"{name}[{shown(i)}]", entry)
        plain = value is None or isinstance(value, str | bytes | int | float | complex)
        given = (
            shown(value)
            if plain and not _is_too_large(value)
            else f"an object of type {type(value).__name__}"
        )
        given = "a number so large" if _is_too_large(value) else given
        if self.mistake is CheckpointError:
            kind = "None" if value is None else f"of type {type(value).__name__}"
            return CheckpointError(f"{name} is {kind}, but a state is wanted: model.state_dict().")
        return self.mistake(f"{where} takes {self.called} as {name}, not {given}.")


def typed(function: F) -> F:
    """Hold a function's arguments, or those of a class's constructor, against their annotations at each call.

    Scalars and arrays of numpy and torch that fit become Python's own; what isn't annotated, or by what is imported for
    type checkers alone, is passed on. Called in `torch.inference_mode`, the function itself runs outside it.

    Raises (when called):
        CheckpointError: something else was given where a state is wanted.
        SpecMismatchError: likewise, for a spec or a permutation.
        ConfigError: likewise, for anything else.
    """
    made: Any = function
    if isinstance(made, type):
        made.__init__ = _guarded(made.__init__, made)
        return cast(F, made)
    return cast(F, _guarded(function, function))


def _guarded(function: Callable[..., Any], owner: Callable[..., Any]) -> Callable[..., Any]:
    @cache
    def kinds() -> tuple[list[tuple[str, Kind]], dict[str, Kind]]:  # late: names may stand for later imports
        return _kinds(function, owner)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        places, names = kinds()
        last = len(places) - 1
        own = [places[min(i, last)] for i in range(len(args))]
        taken = [_taken(owner, name, kind, value) for (name, kind), value in zip(own, args, strict=True)]
        options = {n: _taken(owner, n, names.get(n, names["**"]), value) for n, value in kwargs.items()}
        return outside(*taken, **options)

    outside = outside_inference_mode(function)
    return call


def outside_inference_mode(function: F) -> F:
    """A function that leaves `torch.inference_mode`, where no gradient flows and casts pass by whoever watches them."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return cast(F, call)


def _taken(function: Callable[..., Any], name: str, kind: Kind, value: Any) -> Any:
    if not kind.fits(value):
        raise kind.error(function.__qualname__, name, value)
    return kind.plain(value) if isinstance(value, Tensor | np.ndarray | np.generic) else value


def _kinds(
    function: Callable[..., Any], owner: Callable[..., Any]
) -> tuple[list[tuple[str, Kind]], dict[str, Kind]]:
    """The kind of each argument by place, the last one for all further ones, and by name, "**" for other names."""
    found = kinds_of(owner)
    places: list[tuple[str, Kind]] = []
    names = {"**": ANYTHING}
    for name, parameter in inspect.signature(function).parameters.items():
        kind = found.get(name, ANYTHING)
        if parameter.kind not in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
            places.append((name, kind))
        if parameter.kind != inspect.Parameter.VAR_POSITIONAL:
            names["**" if parameter.kind == inspect.Parameter.VAR_KEYWORD else name] = kind
    return places or [("", ANYTHING)], names


def kinds_of(function: Callable[..., Any]) -> dict[str, Kind]:
    """The kind of each annotated argument of a function, or of each field of a class."""
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # imported for type checkers alone
        return {}
    return {name: _known(hint) for name, hint in hints.items() if name != "return"}


def _known(hint: Any) -> Kind:
    try:
        return kind_of(hint)
    except TypeError:
        return ANYTHING


@cache
def kind_of(hint: Any) -> Kind:
    """What a type hint lets in.

    Raises:
        TypeError: it is not understood.
    """
    origin, inside = get_origin(hint), get_args(hint)
    if hint in KINDS:
        return KINDS[hint]
    if origin in (Union, types.UnionType):
        return _union(tuple(kind_of(one) for one in inside))
    if origin is Literal:
        return _one_of(inside)
    if origin is Annotated:
        return _limited(kind_of(inside[0]), [limit for limit in inside[1:] if isinstance(limit, Within)])
    if hint == State:
        return Kind("a state", lambda value: isinstance(value, Mapping), CheckpointError)
    if origin is not None and issubclass(origin, Callable):
        return FUNCTION
    if origin is not None and issubclass(origin, Mapping):
        entries = kind_of(inside[1])
        return Kind(
            "a mapping",
            lambda value: (
                isinstance(value, Mapping)
                and (type(value) not in (dict, OrderedDict) or _all(value.values(), entries))
            ),
            entries=entries,
        )
    if origin is not None and issubclass(origin, Iterable):
        entries = kind_of(inside[0])
        if not issubclass(origin, Sequence):
            return Kind(
                "an iterable", lambda value: _is_iterable(value) and _all(value, entries), entries=entries
            )
        return Kind(
            "a list",
            lambda value: _is_list(value) and _all(value, entries),
            entries=entries,
            plain=lambda value: list(map(entries.plain, value)),
        )
    if not isinstance(hint, type):
        raise TypeError(f"The annotation {hint} is of no kind that is known.")
    if getattr(hint, "_is_protocol", False):
        return ANYTHING
    article = "an" if hint.__name__[0] in "AEIOU" else "a"
    mistake = getattr(hint, "_mistake", ConfigError)
    return Kind(f"{article} {hint.__name__}", lambda value: isinstance(value, hint), mistake)


def _one_of(choices: tuple[Any, ...]) -> Kind:
    types_of = {type(choice) for choice in choices}
    told = ", ".join(map(str, choices))

    def fits(value: Any) -> bool:
        return type(value) in types_of and value in choices

    def complaint(name: str, value: Any) -> str:
        if type(value) not in types_of or value in choices:
            return ""
        return f"{name} is {shown(value)}; choose one of {told}."

    return Kind(f"one of {told}", fits, complaint=complaint)


def _limited(kind: Kind, limits: Sequence[Within]) -> Kind:
    def complaint(name: str, value: Any) -> str:
        told = (limit.complaint(name, kind.plain(value)) for limit in limits if kind.fits(value))
        return next(filter(None, told), "")

    def fits(value: Any) -> bool:
        return kind.fits(value) and not complaint("", value)

    return replace(kind, fits=fits, complaint=complaint)


def _union(parts: tuple[Kind, ...]) -> Kind:
    if ANYTHING in parts:
        return ANYTHING
    kinds = tuple(kind for part in parts for kind in part.parts or (part,))
    tests = tuple(kind.fits for kind in kinds)
    mistakes = {kind.mistake for kind in kinds if kind is not NONE}
    mistake = CheckpointError if CheckpointError in mistakes else ConfigError
    mistake = mistakes.pop() if len(mistakes) == 1 else mistake
    called = [kind.called for kind in kinds]
    told = " or ".join([", ".join(called[:-1]), called[-1]])
    others = [kind for kind in kinds if kind is not NONE]
    alone = len(others) == 1  # else the sentence tells of all
    return Kind(
        told,
        lambda value: any(test(value) for test in tests),
        mistake,
        parts=kinds,
        plain=lambda value: next(kind for kind in kinds if kind.fits(value)).plain(value),
        complaint=others[0].complaint if alone else lambda name, value: "",
    )


def _all(values: Any, kind: Kind) -> bool:
    known = isinstance(values, list | tuple | set | frozenset | ValuesView | Tensor | np.ndarray)
    if kind is ANYTHING or not known:  # to go over others may read files
        return True
    return all(map(kind.fits, values))


def _is_whole(value: Any) -> bool:
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta:  # a scalar is a number
        return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return isinstance(value, Integral) and not isinstance(value, bool) and not _is_too_large(value)


def _is_too_large(value: Any) -> bool:
    return isinstance(value, Integral) and not -LARGEST <= int(value) <= LARGEST


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray):  # a scalar is a number
        array = isinstance(value, np.ndarray)
        real = value.dtype.kind in "iuf" if array else value.dtype != torch.bool and not value.is_complex()
        return value.ndim == 0 and real and (array or not value.is_meta)
    known = isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)
    return known and not _is_too_large(value)


def _is_list(value: Any) -> bool:
    if isinstance(value, Sequence):
        return not isinstance(value, str | bytes | bytearray | memoryview)
    own = hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, type)
    return own and not isinstance(value, Mapping | nn.Module) and getattr(value, "ndim", 1) > 0


def _is_iterable(value: Any) -> bool:
    if isinstance(value, str | bytes | bytearray | memoryview | nn.Module | type):
        return False
    return (hasattr(value, "__iter__") or hasattr(value, "__getitem__")) and getattr(value, "ndim", 1) > 0


ANYTHING = Kind("", lambda value: True)
NONE = Kind("None", lambda value: value is None)
FUNCTION = Kind("a function", callable)

KINDS: Mapping[Any, Kind] = {
    Any: ANYTHING,
    object: ANYTHING,
    type(None): NONE,
    int: Kind("a whole number", _is_whole, plain=int),
    float: Kind("a number", _is_number, plain=float),
    bool: Kind("True or False", lambda value: isinstance(value, bool | np.bool_), plain=bool),
    str: Kind("text", lambda value: isinstance(value, str)),
    os.PathLike[str]: Kind("a path", lambda value: isinstance(value, os.PathLike)),
    Callable: FUNCTION,
    nn.Module: Kind("a model (torch.nn.Module)", lambda value: isinstance(value, nn.Module)),
    Tensor: Kind("a tensor", lambda value: isinstance(value, Tensor)),
    np.ndarray: Kind("an array", lambda value: isinstance(value, np.ndarray)),
    torch.dtype: Kind("a torch.dtype", lambda value: isinstance(value, torch.dtype)),
    # Whether it is there, find_device says; CUDA devices may be numbers.
    torch.device: Kind("a torch.device", lambda value: isinstance(value, torch.device) or _is_whole(value)),
}
"""Kinds that have words of their own; other classes go by their names."""


def check_values(
    function: Callable[..., Any], options: Mapping[str, Any], what: str, prefix: str = ""
) -> dict[str, Any]:
    """Hold options against the annotations of the function of ours that will get them, before any work is done for it;
    others' functions may not keep to theirs, and an option that is a function itself may be made later. Returns them,
    with Python's own numbers for those of numpy and torch.

    Raises:
        ConfigError: names `what` takes the option, and the option with the prefix before it.
    """
    if not function.__module__.startswith("rebasin."):
        return dict(options)
    made = dict(options)
    for name, low in options.items():
        high = options.get(f"{name.removesuffix('_low')}_high") if name.endswith("_low") else None
        if _is_number(low) and _is_number(high) and low > high:
            raise ConfigError(
                f"{prefix}{name} is {low}, above {prefix}{name.removesuffix('_low')}_high, {high}."
            )
    for name, kind in kinds_of(function).items():
        if name in options and kind is not FUNCTION:
            if not kind.fits(options[name]):
                raise kind.error(what, prefix + name, options[name])
            if isinstance(options[name], Tensor | np.ndarray | np.generic):
                made[name] = kind.plain(options[name])
    return made
