"""Old .ckpt and .bin files: pickles, read without running anything that is in them.

Only torch's weights-only unpickler touches the file, and it may build nothing but tensors, numbers, text and plain
containers. It is run without data: what it returns says where in the file each tensor lies, and the bytes are read
when they are asked for. A file of before PyTorch 1.6 is no zip archive and is read as a whole.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import CheckpointError
from ..files import PathLike
from ..tensors.reader import RawFile
from ..types import LazyState


@dataclass(frozen=True)
class _Place:
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @property
    def length(self) -> int:
        """Elements from the first to the last one of the tensor, whatever its strides."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))


class PickledState(LazyState):
    """The tensors of a .ckpt or .bin file, each read when it is asked for.

    A "state_dict" inside the pickle is unwrapped; what else the pickle holds (steps, optimisers) is in `left_out`.

    Raises:
        CheckpointError: the file is damaged, is no pickle of tensors, or would run code if it were loaded.
    """

    def __init__(self, path: PathLike):
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self._raw = RawFile(self.path)
        zipped = zipfile.is_zipfile(self.path)
        if zipped:
            _check_stored(self.path)
        content = _unpickle(self.path, zipped)
        nested = content.get("state_dict") if isinstance(content, dict) else None
        tensors = nested if isinstance(nested, dict) else content
        if not isinstance(tensors, dict) or not any(isinstance(t, Tensor) for t in tensors.values()):
            raise CheckpointError(f"{path} holds no named tensors, so it is no model.")
        outside = [str(k) for k in content if k != "state_dict"] if tensors is nested else []
        self.left_out = (*outside, *(str(k) for k, v in tensors.items() if not isinstance(v, Tensor)))
        named = {str(name): tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        super().__init__({name: self._place(name, t) for name, t in named.items()} if zipped else named)

    def _place(self, name: str, tensor: Tensor) -> _Place:
        # Under fake tensors torch notes where in the file a storage begins.
        offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if offset is None or tensor.layout != torch.strided:
            raise CheckpointError(
                f"Tensor {name!r} of {self.path} is of a kind that can't be read: {tensor.layout}."
            )
        place = _Place(
            tensor.dtype,
            tuple(tensor.shape),
            tuple(tensor.stride()),
            offset + tensor.storage_offset() * tensor.dtype.itemsize,
        )
        if place.start + place.length * place.dtype.itemsize > self._raw.size:
            raise CheckpointError(f"{self.path} is cut off: tensor {name!r} lies behind its end.")
        return place

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.known:
            raise KeyError(f"{self.path} has no tensor {name!r}.")
        place = self.known[name]
        if isinstance(place, Tensor):
            return place.clone()
        data = self._raw.read(place.start, place.length * place.dtype.itemsize, f"tensor {name!r}")
        return data.view(place.dtype).as_strided(place.shape, place.stride).contiguous()


def load_pickled(path: PathLike) -> PickledState:
    """The tensors of a .ckpt or .bin file, lazily; nothing that is in it is run.

    Raises:
        CheckpointError: see `PickledState`.
    """
    return PickledState(path)


def _unpickle(path: Path, zipped: bool) -> Any:
    try:
        with FakeTensorMode() if zipped else contextlib.nullcontext():
            return torch.load(os.fspath(path), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise CheckpointError(f"{path} is a damaged pickle, or none of PyTorch's.") from error
        raise CheckpointError(
            f"{path} is refused: to load it, the pickle would have to call {wanted[1]}, which is no tensor and could"
            " be harmful code; convert the file to safetensors with a tool and on a machine that you trust."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} is no readable PyTorch file: {reason.rstrip('.')}.") from error


def _check_stored(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            packed = next((f for f in archive.infolist() if f.compress_type != zipfile.ZIP_STORED), None)
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(f"{path} is a damaged PyTorch file: {error}.") from error
    if packed is not None:
        raise CheckpointError(f"{path} is compressed, which PyTorch's files never are; save it again.")
