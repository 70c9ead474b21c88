"""The header of a GGUF file, read and checked before any tensor is: entries, and each tensor's type, shape and place.

Read here and not by the package gguf, which a count that is damaged keeps busy without end.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from .reader import RawFile

MAGIC = b"GGUF"

VERSIONS = (2, 3)

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of an entry's value and their letters in `struct`."""

STRING, ARRAY = 8, 9

DIMENSIONS = 4
"""As many as the format's tensors can have."""


@dataclass(frozen=True)
class Field:
    """An entry: its value, the number of its type, and that of an array's items."""

    value: Any
    kind: int
    items: int | None = None


@dataclass(frozen=True)
class Place:
    """A tensor: the number of its type, its shape (rows first), and where it lies."""

    kind: int
    shape: tuple[int, ...]
    start: int
    bytes: int


class _Cursor:
    def __init__(self, raw: RawFile):
        self.raw, self.position = raw, 0

    def take(self, count: int) -> bytes:
        if count < 0 or self.position + count > self.raw.size:
            raise ValueError("it is cut off")
        data = self.raw.read(self.position, count, "its header").numpy().tobytes()
        self.position += count
        return data

    def numbers(self, letter: str, count: int = 1) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{letter}")
        return struct.unpack(f"<{count}{letter}", self.take(size * count))

    def text(self) -> str:
        return self.take(self.numbers("Q")[0]).decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        return self.numbers(SCALARS[kind])[0]

    def field(self) -> Field:
        (kind,) = self.numbers("I")
        if kind != ARRAY:
            return Field(self.value(kind), kind)
        items, count = self.numbers("I")[0], self.numbers("Q")[0]
        if items == STRING:
            return Field([self.text() for _ in range(min(count, self.raw.size))], kind, items)
        self.require(count)
        return Field(list(self.numbers(SCALARS[items], count)), kind, items)

    def require(self, count: int) -> None:
        if count > self.raw.size:
            raise ValueError("it counts more than it holds")


def read_header(
    raw: RawFile, sizes: Mapping[int, tuple[int, int]]
) -> tuple[dict[str, Field], dict[str, Place]]:
    """The entries and the tensors of a file, in its order.

    Args:
        sizes: number of a type -> the elements of a block, and its bytes.

    Raises:
        ValueError, KeyError, struct.error: the file is damaged.
    """
    cursor = _Cursor(raw)
    if cursor.take(4) != MAGIC or cursor.numbers("I")[0] not in VERSIONS:
        raise ValueError("its version is not known")
    tensors, entries = cursor.numbers("Q", 2)
    cursor.require(max(tensors, entries))
    fields: dict[str, Field] = {}
    for _ in range(entries):
        name = cursor.text()
        if name in fields:
            raise ValueError(f"it has two entries {name!r}")
        fields[name] = cursor.field()
    told = []
    for _ in range(tensors):
        name, (dimensions,) = cursor.text(), cursor.numbers("I")
        if dimensions > DIMENSIONS:
            raise ValueError(f"{name!r} has too many dimensions")
        shape = cursor.numbers("Q", dimensions)[::-1]
        told.append((name, shape, *cursor.numbers("I"), *cursor.numbers("Q")))
    alignment = fields["general.alignment"].value if "general.alignment" in fields else 32
    if type(alignment) is not int or alignment < 1:
        raise ValueError("its alignment is none")
    begin = -(-cursor.position // alignment) * alignment
    places: dict[str, Place] = {}
    for name, shape, kind, offset in told:
        block, size = sizes[kind]
        count = prod(shape)
        if name in places or count >= 2**60 or (shape[-1] if shape else 1) % block or offset % alignment:
            raise ValueError(f"{name!r} has no place")
        places[name] = Place(kind, tuple(shape), begin + offset, count // block * size)
    end = begin
    for name, place in sorted(places.items(), key=lambda one: one[1].start):
        if place.start < end or place.start + place.bytes > raw.size:
            raise ValueError(f"{name!r} overlaps another tensor, or is cut off")
        end = place.start + place.bytes
    return fields, places
