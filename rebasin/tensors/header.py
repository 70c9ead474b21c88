"""The header of a safetensors file, read and checked before any tensor is.

A file is 8 bytes with the length of the header, the header in JSON, and the tensors' bytes one after another.
Checked here, as the format demands it: the lengths, every type, shape and position, and that the tensors cover
the rest of the file exactly once. So a damaged file is refused with the name of the tensor, not read as noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError, shown
from ..files import SchemaError, parse

LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the reference implementation. SDXL's header has 0.3 MB."""

DIMENSIONS = 64
"""As many as torch's tensors can have."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of the types; the format itself is little-endian, as is every machine torch runs on."""

CODES = {dtype: code for code, dtype in DTYPES.items()}

METADATA = "__metadata__"


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its type and shape, and where its bytes start and end, counted from the file's start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says about itself; entries in the order of the header."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(file: BinaryIO, path: Path, size: int) -> Header:
    """The header of the open `file` of `size` bytes.

    Raises:
        CheckpointError: one sentence with the file, the tensor and what is wrong with it.
    """

    def fail(what: str) -> CheckpointError:
        return CheckpointError(f"{path} is no readable safetensors file: {what}.")

    start = file.read(8)
    if len(start) < 8:
        raise fail(f"it has {len(start)} bytes, which is less than the length of a header takes")
    length = int.from_bytes(start, "little")
    if length > LONGEST_HEADER:
        raise fail(
            f"its first 8 bytes announce a header of {length:,} bytes, so it is something else or damaged"
        )
    if 8 + length > size:
        raise fail(
            f"its header should have {length:,} bytes, but the file ends after {size:,}; download it again"
        )
    try:
        data = parse(file.read(length))
        "".join(data).encode()  # half of a surrogate pair is no text
    except (SchemaError, UnicodeEncodeError, TypeError) as error:
        why = (
            str(error).removeprefix("it ") if isinstance(error, SchemaError) else "has names that are no text"
        )
        raise fail(f"its header {why}, so it is something else or damaged") from error
    if not isinstance(data, dict):
        raise fail("its header is no JSON object")
    metadata = data.pop(METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fail("the metadata in its header is not text")
    begin = 8 + length
    entries = {name: _entry(name, value, begin, fail) for name, value in data.items()}
    _check_cover(entries, begin, size, fail)
    return Header(entries, metadata)


def _entry(name: str, value: Any, begin: int, fail: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise fail(f"the entry of tensor {shown(name)} has not exactly dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise fail(f"tensor {shown(name)} has type {shown(code)}, which is none of the format's")
    sizes = isinstance(shape, list) and len(shape) <= DIMENSIONS and all(_is_size(n) for n in shape)
    if not sizes or prod(max(n, 1) for n in shape) >= 2**60:
        raise fail(f"tensor {shown(name)} has the shape {shown(shape)}, which is no list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise fail(f"tensor {shown(name)} has the offsets {shown(offsets)}, which are no two positions")
    needed = prod(shape) * DTYPES[code].itemsize
    if offsets[1] - offsets[0] != needed:
        raise fail(
            f"tensor {shown(name)} of shape {shown(tuple(shape))} and type {code} takes {needed:,} bytes,"
            f" but its offsets {shown(offsets)} leave {offsets[1] - offsets[0]:,}"
        )
    return Entry(DTYPES[code], tuple(shape), begin + offsets[0], begin + offsets[1])


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_cover(entries: Mapping[str, Entry], begin: int, size: int, fail: Any) -> None:
    """Each byte after the header belongs to exactly one tensor: no overlaps, no holes, nothing cut off or added."""
    end, before = begin, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < end:
            raise fail(f"tensors {shown(before)} and {shown(name)} overlap")
        if entry.start > end:
            raise fail(
                f"there are {entry.start - end:,} bytes before tensor {shown(name)} that belong to no tensor"
            )
        if entry.end > size:
            raise fail(
                f"tensor {shown(name)} should end at byte {entry.end:,}, but the file ends after {size:,}; it is cut"
                " off"
            )
        end, before = entry.end, name
    if end != size:
        raise fail(f"{size - end:,} bytes at its end belong to no tensor")
