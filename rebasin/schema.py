"""Plain data of our own files, checked against Python's types before anything is made of it.

What stands in a file may be damaged or hostile. `parse` reads JSON strictly, `conform` compares it with a type as
hints write it (and makes tuples and dataclasses of lists and objects), so a loader that declares what it expects can
rely on it. Both raise `SchemaError` alone, whose text is a part of a sentence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from itertools import repeat
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from .errors import shown

LARGEST = 1 << 63
"""Whole numbers are below this: what numpy and torch can hold."""

Leaf = Callable[[Any, Any, str], Any]
"""Makes a value of a type that the caller knows, (type, data, where) -> value; NotImplemented for all others."""


class SchemaError(ValueError):
    """Data that are not what was declared: what is wrong, and where, without capital and period."""


def parse(text: str | bytes, nan: bool = False) -> Any:
    """The data of a JSON text in UTF-8; `nan` allows the constants NaN and Infinity, which are no JSON."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=None if nan else _refused)
    except SchemaError:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        raise SchemaError("it is no JSON") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # readers would disagree about what it means
        names = [name for name, _ in pairs]
        raise SchemaError(f"it names {shown(max(names, key=names.count))} twice")
    return found


def _refused(constant: str) -> Any:
    raise SchemaError(f"it holds {constant}, which is no number")


def conform(kind: Any, data: Any, at: str = "", leaf: Leaf | None = None) -> Any:
    """`data` as a value of type `kind`: lists become tuples, objects dataclasses, as the hints say.

    Known are Any, None, bool, int, float, str, Literal, unions, list, tuple, Mapping with text as keys, TypedDict
    (further keys are let pass) and dataclasses. Numbers may be infinite or NaN where `parse` has allowed them.

    Raises:
        SchemaError: names the place `at` which they differ.
    """
    if leaf is not None and (made := leaf(kind, data, at)) is not NotImplemented:
        return made
    if kind is Any:
        return data
    origin, kinds = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return _one_of(kinds, data, at, leaf)
    if origin in (list, tuple) and isinstance(data, list):
        each = kinds if origin is tuple and kinds[-1] is not Ellipsis else repeat(kinds[0], len(data))
        if isinstance(each, repeat) or len(each) == len(data):
            pairs = enumerate(zip(each, data, strict=True))
            return origin(conform(one, item, f"{at}/{n}", leaf) for n, (one, item) in pairs)
    elif isinstance(data, dict):
        if isinstance(origin, type) and issubclass(origin, Mapping) and not is_typeddict(kind):
            return {key: conform(kinds[1], value, f"{at}/{key}", leaf) for key, value in data.items()}
        if is_typeddict(kind) or is_dataclass(kind):
            own = _members(kind)
            for name in own:
                if own[name][1] and name not in data:
                    raise SchemaError(f"{_place(at)} has no {name!r}")
            given = {n: conform(own[n][0], data[n], f"{at}/{n}", leaf) for n in own if n in data}
            made: Any = kind
            return {**data, **given} if is_typeddict(kind) else made(**given)
    elif (origin is Literal and data in kinds) or _is_plain(origin, data):
        return data
    raise SchemaError(f"{_place(at)} is {shown(data)}, not {_called(kind)}")


def _one_of(kinds: tuple[Any, ...], data: Any, at: str, leaf: Leaf | None) -> Any:
    if data is None and NoneType in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not NoneType)
    for kind in kinds[:-1]:
        try:
            return conform(kind, data, at, leaf)
        except SchemaError:
            continue
    return conform(kinds[-1], data, at, leaf)


@cache
def _members(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Name -> (type, whether it must be there) of a TypedDict or dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    if is_typeddict(kind):
        free = {name for name, hint in hints.items() if not kind.__total__ or get_origin(hint) is NotRequired}
        return {
            n: (get_args(h)[0] if get_origin(h) is NotRequired else h, n not in free)
            for n, h in hints.items()
        }
    free = {f.name for f in fields(kind) if f.default is not MISSING or f.default_factory is not MISSING}
    return {f.name: (hints[f.name], f.name not in free) for f in fields(kind)}


def _is_plain(kind: Any, data: Any) -> bool:
    if kind is NoneType or kind is None:
        return data is None
    if kind is bool or kind is str:
        return isinstance(data, kind)
    if kind not in (int, float) or isinstance(data, bool) or not isinstance(data, (int, kind)):
        return False
    return not isinstance(data, int) or -LARGEST <= data < LARGEST


def _called(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    origin = get_origin(kind) or kind
    if origin is tuple and get_args(kind)[-1] is not Ellipsis:
        return f"a list of {len(get_args(kind))}"
    return names.get(origin, "a list" if origin in (list, tuple) else "an object")


def _place(at: str) -> str:
    return shown(at.removeprefix("/")) if at else "it"
