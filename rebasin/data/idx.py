"""The IDX format of MNIST: two zero bytes, a type, the number of axes, their sizes as big-endian uint32."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from ..errors import DataError

# MNIST's files hold unsigned bytes (type 8); the format's other types are not used by any data set here.
UNSIGNED_BYTE = 8
LARGEST = 1 << 30  # bytes; a header that promises more is damaged (MNIST has 47 million)


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped (told by its first two bytes) or not.

    Raises:
        DataError: the file cannot be read, is no such file, or has fewer or more bytes than its header says;
            names the file.
    """
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else open(path, "rb") as file:
            return _parse(file, path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): fetch it again.") from error


def _parse(file, path: Path) -> np.ndarray:
    start = file.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] != UNSIGNED_BYTE or not 1 <= start[3] <= 4:
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes (it starts with {start.hex(' ') or 'nothing'})."
        )
    sizes = file.read(4 * start[3])
    if len(sizes) < 4 * start[3]:
        raise DataError(f"{path} ends inside its header: fetch it again.")
    shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
    expected = math.prod(shape)
    if expected > LARGEST:
        raise DataError(
            f"{path} claims to hold an array of {shape}, which is too large to be true: fetch it again."
        )
    body = file.read(expected + 1)
    if len(body) != expected:
        found = "more" if len(body) > expected else f"only {len(body)}"
        raise DataError(f"{path} should hold {expected} bytes of data but has {found}: fetch it again.")
    return np.frombuffer(bytearray(body), np.uint8).reshape(shape)
