"""Writing safetensors files: tensor by tensor, in any type, whole or not at all.

The writer asks a lazy state for its shapes and types first and then for one tensor after another, so a merge of two
SDXL files is never in memory as a whole. Equal states give equal files, byte for byte: the safetensors package
leaves its header in random order, this one does not.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import PathLike, atomic_path
from ..types import Progress, State, dtype_of, is_finite, origin_of, require_state, shape_of, tell
from .header import CODES, METADATA

SPARE = 64 * 2**20
"""Bytes that are left free on a disk: a file system that is full to the last byte serves nobody."""

FORMATS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""Types by the names that people use for them."""


def save_safetensors(
    path: PathLike,
    state: State,
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | Callable[[str, torch.dtype], torch.dtype] | None = None,
    keep_order: bool = False,
    finite: bool = False,
    closing: Callable[[], Mapping[str, str]] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write `state` beside `path` and rename: after a crash there is the old file or the new one.

    Views are written as what they show, tied tensors once for each name.

    Args:
        dtype: the type of floating point tensors in the file, or a function of a tensor's name and type that
            chooses it; None: their own. Others (position ids) keep theirs.
        keep_order: names in the header in the order of `state`, instead of sorted.
        finite: refuse to write infinite values and NaN.
        closing: asked when all tensors are written for the metadata that the file is to have, which must be as long:
            what is known only then takes the place of what was held free for it.
        progress: called after each tensor with stage, step, total, name and bytes.

    Raises:
        CheckpointError: a type can't be stored, a value does not fit the type asked for (fp16 ends at 65,504),
            the disk has too little room, or the file can't be written; the message names tensor and file.
    """
    target = Path(path)
    require_state(state, f"the state for {target.name}")
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in state:
        own = dtype_of(state, name)
        stored = target_dtype(name, own, dtype)
        if stored not in CODES:
            raise CheckpointError(
                f"Tensor {name!r} for {target} has type {stored}, which safetensors can't hold."
            )
        layout[name] = stored, shape_of(state, name)
    # Wide types first, so that every tensor is aligned to its item size.
    listed = list(layout) if keep_order else sorted(layout)
    names = sorted(listed, key=lambda name: -layout[name][0].itemsize)
    head, places, size = _header(layout, listed if keep_order else names, names, metadata)
    require_space(target, size)
    # Tensors that are made together (codes and their scales) are asked for one after the other, wherever they lie.
    asked = getattr(state, "together", names)

    with atomic_path(target) as temporary, open(temporary, "wb") as file:
        file.write(head)
        for step, name in enumerate(asked, 1):
            stored, shape = layout[name]
            tensor = state[name].detach().cpu()
            if tuple(tensor.shape) != shape:
                raise CheckpointError(f"Tensor {name!r} changed while {target} was written.")
            tensor = convert(tensor, stored, name, target)
            if finite and tensor.is_floating_point() and not is_finite(tensor):
                raise CheckpointError(
                    f"Tensor {origin_of(state, name) or repr(name)} has values that are infinite or no numbers, so"
                    f" {target} was not written."
                )
            file.seek(len(head) + places[name])
            file.write(as_bytes(tensor))
            tell(progress, "save", step, len(names), name=name, bytes=prod(shape) * stored.itemsize)
            del tensor
        if closing is not None:
            last, *_ = _header(layout, listed if keep_order else names, names, closing())
            if len(last) != len(head):
                raise ValueError(f"the closing header of {target} has {len(last)} bytes, not {len(head)}")
            file.seek(0)
            file.write(last)
        file.flush()
        os.fsync(file.fileno())
    return target


def replace_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Give a safetensors file other metadata, which must not be longer than what it has.

    Raises:
        ValueError: they are.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header[METADATA] = dict(sorted(metadata.items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"the metadata of {path} are longer than what it has room for")
        file.seek(8)
        file.write(text.ljust(size))
        file.flush()
        os.fsync(file.fileno())


def target_dtype(
    name: str, own: torch.dtype, dtype: torch.dtype | Callable[[str, torch.dtype], torch.dtype] | None
) -> torch.dtype:
    """The type in which tensor `name` of type `own` is stored."""
    if dtype is None or not own.is_floating_point:
        return own
    return dtype if isinstance(dtype, torch.dtype) else dtype(name, own)


def convert(tensor: Tensor, dtype: torch.dtype, name: str, where: object) -> Tensor:
    """`tensor` in `dtype`; a finite value that `dtype` can't hold is an error and never becomes infinity.

    Raises:
        CheckpointError: names the tensor, the value and what to do.
    """
    if tensor.dtype == dtype:
        return tensor
    if not dtype.is_floating_point or not tensor.is_floating_point():
        raise CheckpointError(f"Tensor {name!r} of {where} can't be turned from {tensor.dtype} into {dtype}.")
    limit = torch.finfo(dtype).max
    if torch.finfo(tensor.dtype).max > limit and tensor.numel():
        largest = _largest(tensor)
        if largest > limit:
            raise CheckpointError(
                f"Tensor {name!r} has the value {largest:.6g}, but {str(dtype).removeprefix('torch.')} ends at"
                f" {limit:g}, so {where} was not written; choose bf16 or fp32."
            )
    return tensor.to(dtype)


def _largest(tensor: Tensor) -> float:
    """The largest absolute value among those that are numbers at all."""
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    low, high = torch.aminmax(wide)
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = torch.aminmax(wide.nan_to_num(0, 0, 0))
    return max(float(high), -float(low))


def require_space(target: Path, size: int) -> None:
    """Raise `CheckpointError` if the disk of `target` has no room for a file of `size` bytes."""
    try:
        free = shutil.disk_usage(target.parent).free
    except OSError:
        return  # a missing folder is reported by the attempt to write
    # A file of the same name is replaced only at the end, so its room can't be counted.
    if size + SPARE > free:
        raise CheckpointError(
            f"{target} needs {in_bytes(size)} and {in_bytes(SPARE)} to spare, but its disk has {in_bytes(free)} free;"
            " make room, choose another folder, or a smaller type such as fp16."
        )


def in_bytes(size: float) -> str:
    """A number of bytes as people write it: 6.9 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    listed: list[str],
    names: list[str],
    metadata: Mapping[str, str] | None,
) -> tuple[bytes, dict[str, int], int]:
    """The bytes before the tensors, where behind them each begins, and the size of the whole file; data lie in the
    order of `names`.
    """
    offsets: dict[str, list[int]] = {}
    end = 0
    for name in names:
        dtype, shape = layout[name]
        start, end = end, end + prod(shape) * dtype.itemsize
        offsets[name] = [start, end]
    header: dict[str, object] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    for name in listed:
        dtype, shape = layout[name]
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": offsets[name]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begins = {name: place[0] for name, place in offsets.items()}
    return len(text).to_bytes(8, "little") + text, begins, 8 + len(text) + end
