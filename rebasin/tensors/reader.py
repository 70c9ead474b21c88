"""Tensor files as lazy mappings: a tensor is read when it is asked for, into memory of its own.

Files are read, not mapped: the pages of a mapped file count as the memory of the process that touches them, and
would make two SDXL files 14 GB of it. A tensor that was read is freed as soon as its user drops it.
"""

from __future__ import annotations

import os
import re
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, shown
from ..files import PathLike
from ..types import DerivedState, LazyState, State, passed
from .header import read_header

STARTS = (
    (rb"version https://git-lfs\.", "a pointer of Git LFS, not the file itself; fetch that (git lfs pull)"),
    (rb"\s*<(?:!doctype|html|head|body|\?xml)", "a web page, so a download has failed; download it again"),
    (rb"[\x20-\x7e\s]{1,200}\Z", "a line of text, so a download has failed; download it again"),
)
"""How what is taken for a file of tensors begins, as people have it, and what it is."""


class RawFile:
    """An open file from which bytes are read at given positions; safe to share between threads and forks.

    Raises:
        CheckpointError: there is no file, or it is nothing that could hold a tensor.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed with this object)
        except FileNotFoundError as error:
            raise CheckpointError(f"There is no file {path}.") from error
        except OSError as error:
            raise CheckpointError(f"{path} can't be read: {error.strerror or error}.") from error
        self.size = os.fstat(self.file.fileno()).st_size
        self._lock = threading.Lock()
        weakref.finalize(self, self.file.close)
        start = self.file.read(201).removeprefix(b"\xef\xbb\xbf")
        self.file.seek(0)
        if not self.size:
            raise CheckpointError(f"{path} is empty; download or copy it again.")
        what = next((what for pattern, what in STARTS if re.match(pattern, start, re.IGNORECASE)), None)
        if what is not None:
            raise CheckpointError(f"{path} is {what}.")

    def read(self, start: int, count: int, what: str) -> Tensor:
        """`count` bytes from `start` as a new uint8 tensor [count].

        Raises:
            CheckpointError: the file became shorter meanwhile, or the disk failed; names the file and `what`.
        """
        data = torch.empty(count, dtype=torch.uint8)
        view = data.numpy().data
        done = 0
        try:
            while done < count:
                got = self._read_at(start + done, view[done:])
                if not got:
                    raise CheckpointError(f"{self.path} became shorter while {what} was read from it.")
                done += got
        except OSError as error:
            raise CheckpointError(
                f"{what} can't be read from {self.path}: {error.strerror or error}."
            ) from error
        return data

    def _read_at(self, position: int, view: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.file.fileno(), [view], position)
        with self._lock:  # Windows: one position for all
            self.file.seek(position)
            return self.file.readinto(view) or 0


class SafetensorsState(LazyState):
    """The tensors of a safetensors file, each read from the disk when it is asked for.

    Shapes and types come from the header (`shape_of`, `dtype_of`) and cost nothing. The header is checked as a
    whole when the file is opened; names are in its order.
    """

    def __init__(self, path: PathLike):
        self.path = Path(path)
        self._raw = RawFile(self.path)
        header = read_header(self._raw.file, self.path, self._raw.size)
        super().__init__(header.entries)
        self.metadata: dict[str, str] = dict(header.metadata)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.known:
            raise KeyError(f"{self.path} has no tensor {name!r}.")
        entry = self.known[name]
        data = self._raw.read(entry.start, entry.end - entry.start, f"tensor {name!r}")
        return data.view(entry.dtype).reshape(entry.shape)

    def origin(self, name: str) -> str:
        return f"{shown(name)} of {self.path}"

    def __repr__(self) -> str:
        return f"SafetensorsState({str(self.path)!r}, {len(self)} tensors)"


class JoinedState(DerivedState):
    """Several lazy states as one: the shards of a file that was saved in parts.

    Raises:
        CheckpointError: two shards have a tensor of the same name.
    """

    def __init__(self, states: Sequence[State]):
        self.metadata: dict[str, str] = {}
        owner: dict[str, State] = {}
        for state in states:
            self.metadata |= getattr(state, "metadata", {})
            for name in state:
                if name in owner:
                    raise CheckpointError(
                        f"Tensor {name!r} is in {getattr(owner[name], 'path', 'one shard')} and in"
                        f" {getattr(state, 'path', 'another')}, so these are no shards of one file."
                    )
                owner[name] = state
        super().__init__({name: passed(state, name) for name, state in owner.items()})


def load_safetensors(path: PathLike) -> SafetensorsState:
    """The tensors of a safetensors file, each read when it is asked for; `.metadata` is the header's.

    Raises:
        CheckpointError: the file is missing, damaged or no safetensors file; names the file and the tensor.
    """
    return SafetensorsState(path)


def load_metadata(path: PathLike) -> dict[str, str]:
    """The metadata in the header of a safetensors file."""
    return load_safetensors(path).metadata
