"""Old .ckpt, .pt and .bin files: pickles, read without running anything that is in them.

An unpickler of our own reads the file, which knows the few opcodes and names that tensors, numbers, text and plain
containers take, and refuses all else. It makes descriptions of tensors; their bytes are found by the directory of the
zip archive (or, in files of before PyTorch 1.6, behind the pickle) and read when they are asked for. Every position,
size and stride is checked against the file before that.
"""

from __future__ import annotations

import math
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from ..errors import CheckpointError, shown
from ..files import PathLike
from ..tensors import SafetensorsState, load_safetensors
from ..tensors.gguf_files import GGUFState
from ..tensors.gguf_header import MAGIC
from ..tensors.header import DTYPES
from ..tensors.reader import RawFile
from ..types import LazyState

EXPANDED = 1 << 20
"""Elements of a view that shows some of its elements several times; a larger one would be a file that wants memory."""

NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Where trainers put the tensors in a pickle that holds other things, too."""


@dataclass(frozen=True)
class _Storage:
    """Elements in the file, those of `key`, from `first` on."""

    key: str
    dtype: torch.dtype
    numel: int
    first: int = 0
    stored: int = 1
    """Bytes of one element as old files count them."""


@dataclass(frozen=True)
class _Tensor:
    """What the pickle says about a tensor; `fault` if it is of a kind that can't be read."""

    storage: _Storage | None = None
    offset: int = 0
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    fault: str = ""


@dataclass(frozen=True)
class _Place:
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    length: int
    """Elements from the first to the last one of the tensor, whatever its strides."""


class PickledState(LazyState):
    """The tensors of a .ckpt, .pt or .bin file, each read when it is asked for.

    A "state_dict" inside the pickle is unwrapped; what else the pickle holds (steps, optimisers) is in `left_out`,
    and those of it that are states, too (moving averages), in `others`.

    Raises:
        CheckpointError: the file is damaged, is no pickle of tensors, or would run code if it were loaded.
    """

    def __init__(self, path: PathLike):
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self._raw = RawFile(self.path)
        try:
            content, starts = _read(self.path, self._raw)
            tensors, self.left_out = _named(content)
            self.others = tuple(name for name in self.left_out if _is_state(content, name))
            if not tensors:
                why = "no model"
                if isinstance(content, list):
                    why = "maybe a LoRA in cloneofsimo's layout, which must be converted to kohya's first"
                raise CheckpointError(f"{path} holds no named tensors, so it is {why}.")
            super().__init__({name: self._place(name, tensor, starts) for name, tensor in tensors.items()})
        except CheckpointError:
            raise
        except Exception as error:  # whatever a damaged pickle does to an unpickler: it does nothing else
            raise CheckpointError(
                f"{path} is no readable PyTorch file: it is a damaged pickle, or none of PyTorch's."
            ) from error

    def _place(self, name: str, tensor: _Tensor, starts: Mapping[str, tuple[int, int]]) -> _Place:
        def fail(what: str) -> CheckpointError:
            return CheckpointError(f"Tensor {shown(name)} of {self.path} {what}.")

        storage, shape, stride = tensor.storage, tensor.shape, tensor.stride
        if storage is None or tensor.fault:
            raise fail(f"is {tensor.fault or 'nothing'}, which can't be read; save it as a plain tensor")
        if storage.key not in starts:
            raise fail("has no values in the file, which is damaged or cut off")
        numbers = (storage.numel, storage.first, tensor.offset, *shape, *stride)
        if len(shape) != len(stride) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise fail("has sizes that are none, so the file is damaged")
        begin, size = starts[storage.key]
        item = storage.dtype.itemsize
        elements = math.prod(shape)
        length = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if elements else 0
        first = storage.first + tensor.offset
        if (first + length) * item > size or storage.numel * item > size:
            raise fail("reaches behind the end of its values, so the file is damaged or cut off")
        if elements > max(length, EXPANDED) or max(shape, default=0) >= 2**48:
            raise fail(f"is expanded to {elements:,} elements of {length:,}; save it as a plain tensor")
        return _Place(storage.dtype, shape, stride, begin + first * item, length)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.known:
            raise KeyError(f"{self.path} has no tensor {name!r}.")
        place = self.known[name]
        data = self._raw.read(place.start, place.length * place.dtype.itemsize, f"tensor {name!r}")
        return data.view(place.dtype).as_strided(place.shape, place.stride).contiguous()

    def origin(self, name: str) -> str:
        return f"{shown(name)} of {self.path}"


def load_pickled(path: PathLike) -> PickledState:
    """The tensors of a .ckpt, .pt or .bin file, lazily; nothing that is in it is run.

    Raises:
        CheckpointError: see `PickledState`.
    """
    return PickledState(path)


def load_tensors(path: PathLike) -> SafetensorsState | PickledState | GGUFState:
    """The tensors of a file of any kind, which is told by its first bytes, not by its name.

    Raises:
        CheckpointError: the file is missing or damaged, or is none of these.
        ConfigError: it is a GGUF file, and the package for these is not installed.
    """
    where = Path(path)
    if not where.is_file():
        return load_safetensors(where)  # its error says what is missing
    with open(where, "rb") as file:
        start = file.read(9)
    if start[:4] == MAGIC and start[8:9] != b"{":
        return GGUFState(where)
    named = where.suffix.lower() in (".safetensors", ".sft") and start[:4] != b"PK\x03\x04"
    return load_safetensors(where) if named or start[8:9] == b"{" else load_pickled(where)


def _named(content: Any) -> tuple[dict[str, _Tensor], tuple[str, ...]]:
    """The tensors of a pickle by name, and the names of what else is there."""
    nested = next((k for k in NESTED if isinstance(content, dict) and isinstance(content.get(k), dict)), None)
    if nested is not None and any(isinstance(v, _Tensor) for v in content[nested].values()):
        inner, more = _named(content[nested])
        return inner, (*(_told(key) for key in content if key != nested), *more)
    found: dict[str, _Tensor] = {}
    left = []
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, _Tensor) and isinstance(key, str | int):
            found[str(key)] = value
        elif isinstance(value, dict) and any(isinstance(one, _Tensor) for one in value.values()):
            # An embedding of the webui: {"string_to_param": {"*": tensor}}.
            found |= {f"{key}.{k}": one for k, one in value.items() if isinstance(one, _Tensor)}
        else:
            left.append(_told(key))
    return found, tuple(left)


def _is_state(content: Any, name: str) -> bool:
    inner = content.get(name)
    return isinstance(inner, dict) and any(isinstance(value, _Tensor) for value in inner.values())


def _told(key: Any) -> str:
    return str(key) if isinstance(key, str | int) else type(key).__name__


def _read(path: Path, raw: RawFile) -> tuple[Any, dict[str, tuple[int, int]]]:
    """What the pickle holds, and where each storage starts and how many bytes it has."""
    if zipfile.is_zipfile(path):
        entries = _entries(path, raw)
        found = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        if len(found) != 1:
            raise CheckpointError(
                f"{path} is a zip archive, but not of PyTorch: it holds {len(found)} data.pkl."
            )
        folder = found[0].removesuffix("data.pkl")
        order = (
            _bytes(raw, entries[f"{folder}byteorder"], 16) if f"{folder}byteorder" in entries else b"little"
        )
        if order != b"little":
            raise CheckpointError(
                f"{path} was saved on a machine with another byte order; load and save it again on such a machine."
            )
        pickled = BytesIO(_bytes(raw, entries[found[0]]))
        inside = f"{folder}data/"
        starts = {
            name.removeprefix(inside): place for name, place in entries.items() if name.startswith(inside)
        }
        return _Unpickler(pickled, path).load(), starts
    with open(path, "rb") as file:
        # A row of pickles: magic number, version, the machine, the content, the keys of the storages.
        magic, _, machine, content, keys = (_Unpickler(file, path).load() for _ in range(5))
        if magic != 0x1950A86A20F9469CFC6C:
            raise CheckpointError(f"{path} is no PyTorch file.")
        if machine.get("little_endian") is not True:
            raise CheckpointError(
                f"{path} was saved on a machine with another byte order; load and save it again on such a machine."
            )
        sizes = _sizes(content)
        starts, position = {}, file.tell()
        for key in keys:
            numel = int.from_bytes(_bytes(raw, (position, 8)), "little")
            if numel != sizes.get(key, (numel, 0))[0]:
                raise CheckpointError(f"{path} is damaged: a storage has not the size that its tensors have.")
            starts[key] = position + 8, numel * sizes.get(key, (0, 0))[1]
            position += 8 + starts[key][1]
        if position > raw.size:
            raise CheckpointError(f"{path} is cut off: its tensors end behind its end.")
        return content, starts


def _entries(path: Path, raw: RawFile) -> dict[str, tuple[int, int]]:
    """Name -> where its bytes start, as its own header in the file tells, and how many they are."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                    raise CheckpointError(
                        f"{path} is compressed, which PyTorch's files never are; save it again."
                    )
                header = _bytes(raw, (entry.header_offset, 30))
                name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
                start = entry.header_offset + 30 + name + extra
                if header[:4] != b"PK\x03\x04" or entry.filename in found:
                    raise CheckpointError(f"{path} is a damaged zip archive, at {shown(entry.filename)}.")
                found[entry.filename] = start, entry.file_size
                if start + entry.file_size > raw.size:
                    raise CheckpointError(f"{path} is cut off: {shown(entry.filename)} lies behind its end.")
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise CheckpointError(f"{path} is a damaged PyTorch file: {shown(str(error))}.") from error
    return found


def _bytes(raw: RawFile, place: tuple[int, int], most: int | None = None) -> bytes:
    start, count = place
    if start < 0 or start + count > raw.size:
        raise CheckpointError(f"{raw.path} is cut off.")
    return raw.read(start, count if most is None else min(count, most), "its directory").numpy().tobytes()


def _sizes(content: Any) -> dict[str, tuple[int, int]]:
    """Storage -> its elements, and the bytes of one, out of all tensors in nested containers."""
    found: dict[str, tuple[int, int]] = {}
    waiting, seen = [content], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, _Tensor) and one.storage is not None:
            item = one.storage.stored
            found[one.storage.key] = one.storage.numel * one.storage.dtype.itemsize // item, item
        elif isinstance(one, (dict, list, tuple, set)) and id(one) not in seen:
            seen.add(id(one))
            waiting += [*one.values()] if isinstance(one, dict) else [*one]
    return found


class _Call:
    """A name in a pickle that may be called, or stand for a type."""

    __slots__ = ("dtype", "make")

    def __init__(self, make: Callable[..., Any] | None = None, dtype: torch.dtype | None = None):
        object.__setattr__(self, "make", make)
        object.__setattr__(self, "dtype", dtype)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)  # a pickle may try

    def __call__(self, *args: Any) -> Any:
        return self.make(*args) if self.make is not None else _Tensor(fault="no tensor")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        return _Tensor(fault="without values")
    return _Tensor(storage, offset, tuple(shape), tuple(stride))


def _typed(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> _Tensor:
    dtype = more[2].dtype  # behind whether it has a gradient, and hooks
    return _tensor(
        replace(storage, dtype=dtype, numel=storage.numel // dtype.itemsize), offset, shape, stride
    )


def _wrapped(function: Any, kind: Any, args: Any, state: Any) -> Any:
    return function(*args) if isinstance(function, _Call) else _Tensor(fault="of a class of its own")


def _fault(what: str) -> _Call:
    return _Call(lambda *args: _Tensor(fault=what))


STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip

KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _Call(lambda *args: dict(*args)),
    "collections.defaultdict": _Call(lambda *args: {}),
    "collections.Counter": _Call(lambda *args: dict(*args)),
    "builtins.set": _Call(lambda *args: set(*args)),
    "builtins.dict": _Call(lambda *args: dict(*args)),
    "_codecs.encode": _Call(lambda text, coding: text.encode("latin-1")),
    "torch.Size": _Call(lambda *args: tuple(*args)),
    "torch.device": _Call(lambda *args: "device"),
    "torch.Tensor": _Call(),
    "torch.nn.parameter.Parameter": _Call(),
    "torch.storage.UntypedStorage": _Call(dtype=torch.uint8),
    "torch.UntypedStorage": _Call(dtype=torch.uint8),
    "torch.serialization._get_layout": _fault("sparse"),
    "torch._utils._rebuild_tensor": _Call(_tensor),
    "torch._utils._rebuild_tensor_v2": _Call(_tensor),
    "torch._utils._rebuild_tensor_v3": _Call(_typed),
    "torch._utils._rebuild_parameter": _Call(lambda data, *more: data),
    "torch._utils._rebuild_parameter_with_state": _Call(lambda data, *more: data),
    "torch._tensor._rebuild_from_type_v2": _Call(_wrapped),
    "torch._utils._rebuild_sparse_tensor": _fault("sparse"),
    "torch._utils._rebuild_sparse_csr_tensor": _fault("sparse"),
    "torch._utils._rebuild_nested_tensor": _fault("nested"),
    "torch._utils._rebuild_qtensor": _fault("quantised"),
    "torch._utils._rebuild_meta_tensor_no_storage": _fault("without values (on the meta device)"),
    "torch._utils._rebuild_wrapper_subclass": _fault("of a class of its own"),
    **{f"torch.{name}": _Call(dtype=dtype) for name, dtype in STORAGES.items()},
    **{str(dtype): _Call(dtype=dtype) for dtype in {*DTYPES.values(), *STORAGES.values()}},
    **{f"torch.{name}": _fault("quantised") for name in ("per_tensor_affine", "per_channel_affine")},
    **{f"torch.{name}Storage": _Call(dtype=torch.uint8) for name in ("QInt8", "QUInt8", "QInt32")},
}
"""All that a pickle may name: stand-ins that build descriptions."""

ALLOWED = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT"
    " BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES"
    " SHORT_BINBYTES BINBYTES8 TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_TUPLE LIST EMPTY_LIST APPEND APPENDS DICT EMPTY_DICT"
    " SETITEM SETITEMS EMPTY_SET ADDITEMS GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL"
    " REDUCE BUILD BINPERSID"
)


class _Unpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]  # Python's own, in Python
    """Descriptions of tensors out of a pickle. The one in C would take memory for indices that the file makes up."""

    stack: list[Any]

    dispatch: ClassVar[dict[int, Any]] = {
        code: pickle._Unpickler.dispatch[code]  # pyright: ignore[reportAttributeAccessIssue]
        for code in (getattr(pickle, name)[0] for name in ALLOWED.split())
    }

    def __init__(self, file: BinaryIO, path: Path):
        super().__init__(file, encoding="utf-8")
        self.source = path

    def find_class(self, module: str, name: str) -> Any:
        known = KNOWN.get(f"{module}.{name}".replace("__builtin__.", "builtins."))
        if known is not None:
            return known
        wanted = re.sub(r"[^\w.]", "?", f"{module}.{name}")[:60]
        raise CheckpointError(
            f"{self.source} is refused: to load it, the pickle would have to call {wanted}, which could be harmful"
            " code; convert the file to safetensors on a machine that you trust."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, numel, *view = pid
        first = int(view[0][1]) if view and view[0] is not None else 0
        return _Storage(str(key), kind.dtype, numel, first, kind.dtype.itemsize)

    def _build(self) -> None:
        self.stack.pop()  # attributes of a container (a state_dict's versions): nobody asks for them

    def _reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, _Call) or not isinstance(args, tuple):
            raise pickle.UnpicklingError("a call of something else")
        self.stack[-1] = function(*args)

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.REDUCE[0]] = _reduce


assert sys.byteorder == "little", "read_header and PickledState take bytes as they are"
