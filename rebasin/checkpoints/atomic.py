"""Safetensors files, read lazily and written atomically.

The writer streams tensor by tensor, so a lazy state is saved without ever being in memory as a whole. It
sorts the header, which the safetensors package leaves in random order: equal states give equal files, byte
for byte.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

PathLike = str | os.PathLike[str]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of the types; the format itself is little-endian, as is every machine torch runs on."""

CODES = {dtype: code for code, dtype in DTYPES.items()}


class LazyState(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read from the disk when it is asked for.

    Shapes and types come from the header (`shape_of`, `dtype_of`) and cost nothing.
    """

    def __init__(self, path: PathLike):
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="pt") as file:
                self.metadata: dict[str, str] = dict(file.metadata() or {})
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                self._entries = {
                    name: (tuple(entry.get_shape()), entry.get_dtype()) for name, entry in slices.items()
                }
            self._file = safe_open(self.path, framework="pt").__enter__()
        except FileNotFoundError as error:
            raise CheckpointError(f"There is no file {self.path}.") from error
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path} is no readable safetensors file: {error}.") from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._entries:
            raise KeyError(f"{self.path} has no tensor {name!r}.")
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._entries[name][0]

    def dtype_of(self, name: str) -> torch.dtype:
        return DTYPES[self._entries[name][1]]


def load_safetensors(path: PathLike) -> LazyState:
    """The tensors of a safetensors file, each read when it is asked for; `.metadata` is the header's.

    Raises:
        CheckpointError: the file is missing or is no safetensors file; the message names it.
    """
    return LazyState(path)


def load_metadata(path: PathLike) -> dict[str, str]:
    """The metadata in the header of a safetensors file."""
    return load_safetensors(path).metadata


def save_safetensors(
    path: PathLike, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write `state` beside `path` and rename: after a crash there is the old file or the new one.

    Tensors keep their types; views are written as what they show, tied tensors once for each name.

    Raises:
        CheckpointError: a tensor's type can't be stored, or the file can't be written; the message names it.
    """
    target = Path(path)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in state:
        dtype, shape = _describe(state, name)
        if dtype not in CODES:
            raise CheckpointError(
                f"Tensor {name!r} for {target} has type {dtype}, which safetensors can't hold."
            )
        layout[name] = dtype, shape
    # Wide types first, so that every tensor is aligned to its item size.
    names = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))

    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for name in names:
        dtype, shape = layout[name]
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)

    with atomic_path(target) as temporary, open(temporary, "wb") as file:
        file.write(len(head).to_bytes(8, "little"))
        file.write(head)
        for name in names:
            tensor = state[name].detach().cpu().contiguous()
            if (tensor.dtype, tuple(tensor.shape)) != layout[name]:
                raise CheckpointError(f"Tensor {name!r} changed while {target} was written.")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return target


def write_text(path: PathLike, text: str) -> Path:
    """Write `text` as UTF-8 to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """A temporary path in the folder of `path`, renamed to it at the end, or removed if the block fails.

    Raises:
        CheckpointError: the folder can't be written to.
    """
    target = Path(path)
    try:
        # The target's suffix stays last, because some writers (matplotlib, PIL) choose the format by it.
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=target.suffix)
    except OSError as error:
        raise CheckpointError(f"{target} can't be written: {error.strerror or error}.") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{target} can't be written: {error.strerror or error}.") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _describe(state: Mapping[str, Tensor], name: str) -> tuple[torch.dtype, tuple[int, ...]]:
    if isinstance(state, LazyState):
        return state.dtype_of(name), state.shape_of(name)
    tensor = state[name]
    return tensor.dtype, tuple(tensor.shape)
