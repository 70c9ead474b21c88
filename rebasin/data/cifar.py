"""CIFAR-10 and CIFAR-100 as their publisher has them: the binary or the python version, unpacked or as .tar.gz.

The python version is a pickle of a dictionary with one array of bytes; it is read by an unpickler that knows numpy's
arrays and nothing else, so a file can't run anything.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, first_line

SIDE = 32
PIXELS = 3 * SIDE * SIDE

Read = Callable[[str], bytes | None]
"""File name -> its content; None if it is not there."""


@dataclass(frozen=True)
class Layout:
    """What the publisher's archives hold.

    `files`: of training and test, with .bin behind in the binary version; `labels`: bytes before each image there, of
    which the last is used.
    """

    archive: str
    files: tuple[tuple[str, ...], tuple[str, ...]]
    labels: int
    key: bytes
    md5: str


LAYOUTS = {
    "cifar10": Layout(
        archive="cifar-10-binary.tar.gz",
        files=(tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)),
        labels=1,
        key=b"labels",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
    ),
    "cifar100": Layout(
        archive="cifar-100-binary.tar.gz",
        files=(("train",), ("test",)),
        labels=2,  # coarse, fine
        key=b"fine_labels",
        md5="03b5dce01913d631647c71ecec9e9cb8",
    ),
}
ADDRESS = "https://www.cs.toronto.edu/~kriz/"


def read_cifar(name: str, path: Path) -> dict[str, np.ndarray]:
    """The arrays train_x, test_x [n, 3, 32, 32] uint8 and train_y, test_y [n] int64 of "cifar10" or "cifar100".

    path: the publisher's .tar.gz, its unpacked folder, or a folder that has either.

    Raises:
        DataError: a file is missing, truncated or of another layout; the sentence names it.
    """
    layout = LAYOUTS[name]
    where, read = _source(path, layout)
    first = layout.files[0][0]
    versions = [(suffix, decode) for suffix, decode in VERSIONS.items() if read(first + suffix) is not None]
    if not versions:
        raise DataError(
            f"{where} has neither {first}.bin nor {first}: pass the publisher's .tar.gz or its unpacked folder."
        )
    suffix, decode = versions[0]
    arrays = {}
    for split, files in zip(("train", "test"), layout.files, strict=True):
        parts = []
        for file in (f"{name}{suffix}" for name in files):
            content = read(file)
            if content is None:
                raise DataError(f"{where} has no {file}: unpack the publisher's archive again.")
            parts.append(decode(content, layout, f"{file} of {where}"))
        images, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
        arrays |= {f"{split}_x": images.reshape(-1, 3, SIDE, SIDE), f"{split}_y": labels.astype(np.int64)}
    return arrays


def _source(path: Path, layout: Layout) -> tuple[Path, Read]:
    if path.is_dir():
        wanted = [layout.files[0][0] + suffix for suffix in VERSIONS]
        folders = [path, *sorted(p for p in path.iterdir() if p.is_dir())]
        found = next((f for f in folders if any((f / name).is_file() for name in wanted)), None)
        if found is not None:
            return found, lambda name: (found / name).read_bytes() if (found / name).is_file() else None
        archives = [path / a for a in (layout.archive, layout.archive.replace("binary", "python"))]
        path = next((archive for archive in archives if archive.is_file()), path)
        if path.is_dir():
            return path, lambda name: None
    if not path.is_file():
        raise DataError(f"There is no file or folder {path}.")
    try:
        whole = path.read_bytes()
        if whole.startswith(b"\x1f\x8b"):
            whole = gzip.decompress(whole)  # to its end, where the checksum is
        with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
            content = {}
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None:
                    content[Path(member.name).name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{path} is no .tar.gz that can be read to its end ({first_line(error).rstrip('.')}); give the publisher's"
            " archive, its unpacked folder, or an .npz file."
        ) from error
    return path, content.get


def _binary(content: bytes, layout: Layout, where: str) -> tuple[np.ndarray, np.ndarray]:
    rows = np.frombuffer(content, dtype=np.uint8)
    if not rows.size or rows.size % (layout.labels + PIXELS):
        raise DataError(f"{where} has {rows.size} bytes, which is no whole number of images: fetch it again.")
    rows = rows.reshape(-1, layout.labels + PIXELS)
    return rows[:, layout.labels :], rows[:, layout.labels - 1]


def _python(content: bytes, layout: Layout, where: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        found = _Arrays(io.BytesIO(content), encoding="bytes").load()
        x, y = np.asarray(found[b"data"]), np.asarray(found[layout.key])
    except Exception as error:  # a pickle can fail in many ways
        raise DataError(f"{where} can't be read ({error}): fetch it again.") from error
    if x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != PIXELS or y.shape != x.shape[:1] or not len(x):
        raise DataError(
            f"{where} has images {x.shape} {x.dtype} and labels {y.shape}, not (n, {PIXELS}) and (n,)."
        )
    return x, y


VERSIONS = {".bin": _binary, "": _python}


class _Arrays(pickle.Unpickler):
    """Plain values and numpy's arrays; anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        reconstruct = np.zeros(1).__reduce__()[0]  # wherever this version of numpy keeps it
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding="latin1": str(text).encode("latin1")  # how Python 3 writes bytes
        known = {"_reconstruct": reconstruct, "ndarray": np.ndarray, "dtype": np.dtype}
        if module.split(".")[0] == "numpy" and name in known:
            return known[name]
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which is no array")
