"""GGUF files through the package gguf, of the extra `gguf`: tensors as numbers, read and written one at a time.

Names are those of the file. What a file reshaped, as matrices of 256 columns are wanted, has its own shape again; the
entries `comfy.gguf.orig_shape.NAME` tell it. Quantised tensors are float32 here.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, shown
from ..files import PathLike, atomic_path
from ..types import LazyState, Lost, Progress, State, dtype_of, is_finite, origin_of, shape_of, tell
from .gguf_header import Place, read_header
from .reader import RawFile
from .writer import convert, require_space, target_dtype

PLAIN = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8,
    "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
"""The format's names of types that torch has."""

ORIGINAL = "comfy.gguf.orig_shape."
"""Before the name of a tensor that lies in another shape."""

OWN = ("GGUF.", "general.", "split.", ORIGINAL)
"""What entries of the header begin with that tell of the file itself."""


@dataclass(frozen=True)
class Entry:
    """A tensor: its type and shape as it is read, and how and where it lies."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    kind: str
    stored: tuple[int, ...]
    start: int
    bytes: int


class GGUFState(LazyState):
    """The tensors of a GGUF file, each read and multiplied with its scales when it is asked for.

    Raises:
        ConfigError: the package gguf is not installed.
        CheckpointError: the file is missing or damaged, or has tensors that the package can't read.
    """

    def __init__(self, path: PathLike):
        self.path = Path(path)
        self._raw = RawFile(self.path)
        gguf = _package(self.path)
        sizes = {int(kind): pair for kind, pair in gguf.GGML_QUANT_SIZES.items()}
        try:
            self.fields, places = read_header(self._raw, sizes)
            kinds = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
            entries = {name: self._entry(name, place, kinds[place.kind]) for name, place in places.items()}
        except (ValueError, KeyError, TypeError, OverflowError, struct.error) as error:
            raise CheckpointError(
                f"{self.path} is no readable GGUF file: it is cut off or damaged; download it again."
            ) from error
        for name, entry in entries.items():
            if entry.kind not in PLAIN and not _can(gguf, entry.kind, write=False):
                raise CheckpointError(
                    f"Tensor {shown(name)} of {self.path} has type {entry.kind}, which the package gguf can't read;"
                    " take the file that this one was made from."
                )
        super().__init__(entries)
        self.metadata: dict[str, str] = {
            name: field.value
            for name, field in self.fields.items()
            if isinstance(field.value, str) and not name.startswith(OWN)
        }

    def _entry(self, name: str, place: Place, kind: str) -> Entry:
        field = self.fields.get(f"{ORIGINAL}{name}")
        shape = place.shape if field is None else tuple(field.value)
        if any(type(n) is not int or n < 0 for n in shape) or prod(shape) != prod(place.shape):
            raise ValueError(name)
        return Entry(PLAIN.get(kind, torch.float32), shape, kind, place.shape, place.start, place.bytes)

    def bytes_of(self, name: str) -> Tensor:
        """A tensor as it lies in the file: uint8 [bytes]."""
        entry = self.known[name]
        return self._raw.read(entry.start, entry.bytes, f"tensor {name!r}")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.known:
            raise KeyError(f"{self.path} has no tensor {name!r}.")
        entry, data = self.known[name], self.bytes_of(name)
        if entry.kind in PLAIN:
            return data.view(entry.dtype).reshape(entry.shape)
        gguf = _package(self.path)
        rows = data.numpy().reshape(prod(entry.stored[:-1]), -1)
        kind = gguf.GGMLQuantizationType[entry.kind]
        return torch.from_numpy(gguf.quants.dequantize(rows, kind)).reshape(entry.shape)

    def origin(self, name: str) -> str:
        return f"{shown(name)} of {self.path}"


@dataclass(frozen=True, eq=False)
class GGUFTensors:
    """How a GGUF file stores the tensors of a model.

    Attributes:
        file: the file.
        names: the model's names -> the file's.
    """

    file: GGUFState
    names: Mapping[str, str]
    metadata: Mapping[str, str]

    @property
    def codes(self) -> frozenset[str]:
        """The names of what is quantised."""
        return frozenset(own for own, name in self.names.items() if self.file.known[name].kind not in PLAIN)

    def kind(self, name: str) -> str:
        """The type of a tensor in the format's own word."""
        return self.file.known[self.names[name]].kind

    def require_writable(
        self, target: Path, dtype: torch.dtype | Callable[[str, torch.dtype], torch.dtype] | None
    ) -> None:
        """Raise a `RebasinError` unless the package can write these tensors, in `dtype` or as they are."""
        gguf = _package(target)
        kinds = {own: self._kind(own, self.file.dtype_of(name), dtype) for own, name in self.names.items()}
        for own, kind in kinds.items():
            if kind is None:
                raise ConfigError(
                    f"{target} can't have the type that is asked for, as GGUF has none such; choose fp16, bf16 or fp32."
                )
            if kind not in PLAIN and not _can(gguf, kind, write=True):
                raise CheckpointError(
                    f"Tensor {shown(own)} of {self.file.path} has type {kind}, which the package gguf can read but not"
                    " write; add --dtype fp16, or name a .safetensors file for the result."
                )

    def _kind(
        self,
        own: str,
        dtype: torch.dtype,
        wanted: torch.dtype | Callable[[str, torch.dtype], torch.dtype] | None,
    ) -> str | None:
        if wanted is None and own in self.names:
            return self.file.known[self.names[own]].kind
        given = target_dtype(own, dtype, wanted)
        return next((name for name, known in PLAIN.items() if known == given), None)

    def size(
        self, state: State, dtype: torch.dtype | Callable[[str, torch.dtype], torch.dtype] | None
    ) -> int:
        """About how many bytes `state` will have."""
        own = (
            self.file.known[self.names[name]].bytes
            if dtype is None and name in self.names
            else prod(shape_of(state, name)) * target_dtype(name, dtype_of(state, name), dtype).itemsize
            for name in state
        )
        return sum(own)

    def save(
        self,
        target: Path,
        state: State,
        metadata: Mapping[str, str],
        dtype: torch.dtype | Callable[[str, torch.dtype], torch.dtype] | None,
        progress: Progress | None = None,
        lost: Lost | None = None,
    ) -> Path:
        """Write `state`, which has the model's names, with the file's entries and `metadata`, whole or not at all.

        Without a `dtype` tensors have the file's types and lie in its shapes; one that has not changed has its bytes.
        `lost` is told what each quantised one that has changed was to be and what its codes are worth.

        Raises:
            CheckpointError: a value can't be written, or the disk is full.
        """
        gguf = _package(target)
        self.require_writable(target, dtype)
        require_space(target, self.size(state, dtype))
        fields = dict(self.file.fields)
        known = fields.pop("general.architecture", None)
        arch = "unknown" if known is None else str(known.value)
        with atomic_path(target) as temporary:
            writer = gguf.GGUFWriter(temporary, arch)
            for name, field in fields.items():
                stale = dtype is not None and name.startswith((ORIGINAL, "general.file_type"))
                if not stale and name not in metadata and name != "general.alignment":
                    kind, items = (
                        None if n is None else gguf.GGUFValueType(n) for n in (field.kind, field.items)
                    )
                    writer.add_key_value(name, field.value, kind, items)
            for name, text in metadata.items():
                if name != "format":  # of safetensors
                    writer.add_string(name, text)
            kinds: dict[str, str] = {}
            for name in state:
                kind = self._kind(name, dtype_of(state, name), dtype)
                if kind is None:
                    raise CheckpointError(f"Tensor {name!r} for {target} has a type that GGUF has none for.")
                kinds[name] = kind
                stored = self.file.known[self.names[name]].stored if self._as_it_lies(name, dtype) else None
                shape = shape_of(state, name) if stored is None else stored
                number = gguf.GGMLQuantizationType[kind]
                block, size = gguf.GGML_QUANT_SIZES[number]
                writer.add_tensor_info(
                    self.names.get(name, name),
                    shape,
                    _numpy(torch.float32),
                    prod(shape) // block * size,
                    number,
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for step, (name, kind) in enumerate(kinds.items(), 1):
                data = self._data(gguf, name, state, kind, target, dtype, lost)
                writer.write_tensor_data(data.numpy())
                tell(progress, "save", step, len(kinds), name=name, bytes=len(data))
            for file in writer.fout:
                file.flush()
                os.fsync(file.fileno())
            writer.close()
        return target

    def _as_it_lies(self, name: str, dtype: object) -> bool:
        return dtype is None and name in self.names

    def _data(
        self, gguf: Any, name: str, state: State, kind: str, target: Path, dtype: object, lost: Lost | None
    ) -> Tensor:
        """The bytes of a tensor."""
        tensor = state[name].detach().cpu()
        if tensor.is_floating_point() and not is_finite(tensor):
            raise CheckpointError(
                f"Tensor {origin_of(state, name) or repr(name)} has values that are infinite or no numbers, so"
                f" {target} was not written."
            )
        if kind in PLAIN:
            made = convert(tensor, PLAIN[kind], name, target)
            return made.contiguous().reshape(-1).view(torch.uint8)
        own = self.names[name]
        if self._as_it_lies(name, dtype) and torch.equal(tensor.to(torch.float32), self.file[own]):
            return self.file.bytes_of(own)
        rows = tensor.to(torch.float32).contiguous().numpy().reshape(self.file.known[own].stored)
        number = gguf.GGMLQuantizationType[kind]
        codes = gguf.quants.quantize(rows, number)
        if lost is not None:
            worth = gguf.quants.dequantize(codes, number)
            lost(name, torch.from_numpy(rows), torch.from_numpy(worth).reshape(rows.shape))
        return torch.from_numpy(codes).reshape(-1)


def _package(path: Path) -> Any:
    if find_spec("gguf") is None:
        raise ConfigError(
            f"{path.name} is a GGUF file, which needs the package gguf, which is not installed: pip install"
            " 'git-rebasin[gguf]'."
        )
    return import_module("gguf")


def _can(gguf: Any, kind: str, write: bool) -> bool:
    """Whether the package can read or write a quantised type: it is tried with a block of zeros."""
    import numpy as np

    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    try:
        if write:
            gguf.quants.quantize(np.zeros((1, block), np.float32), number)
        else:
            gguf.quants.dequantize(np.zeros((1, size), np.uint8), number)
    except NotImplementedError:
        return False
    return True


def _numpy(dtype: torch.dtype) -> Any:
    return torch.zeros(0, dtype=dtype).numpy().dtype
