"""How much memory may still be taken, and what becomes of that which was freed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch

V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
V2 = "memory.max", "memory.current", "inactive_file"
"""Of control groups, the files of limit and usage, and what of the usage in memory.stat is given back on demand."""


def free_memory(device: torch.device, root: Path = Path("/")) -> float | None:
    """Bytes that are free for the asking; None where the system does not tell.

    Args:
        root: of the file system, for tests.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min([*_of_machine(root), *_of_groups(root), *_of_process(root)], default=None)


def _of_machine(root: Path) -> Iterator[float]:
    with suppress(OSError, ValueError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield 1024.0 * int(line.split()[1])


def _of_groups(root: Path) -> Iterator[float]:
    """What the control groups of this process leave, as containers and schedulers of clusters set them."""
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, own = line.split(":", 2)
            if number == "0" and not controllers:
                place, files = root / "sys/fs/cgroup", V2
            elif "memory" in controllers.split(","):
                place, files = root / "sys/fs/cgroup/memory", V1
            else:
                continue
            group = place / own.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(place):  # in a container its own group is the topmost one
                    yield from _of_group(folder, *files)


def _of_group(folder: Path, most: str, taken: str, spare: str) -> Iterator[float]:
    with suppress(OSError, ValueError):  # "max" is no number
        limit, used = (int((folder / name).read_text()) for name in (most, taken))
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.startswith(f"{spare} "):
                used -= int(line.split()[1])
        yield float(max(0, limit - used))


def _of_process(root: Path) -> Iterator[float]:
    """What `ulimit -v` leaves."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int((root / "proc/self/statm").read_text().split()[0])
        if limit != resource.RLIM_INFINITY:
            yield float(max(0, limit - pages * resource.getpagesize()))


@cache
def keep_freed_memory() -> None:
    """Let glibc hold on to up to 64 MB of freed memory, once for the process; elsewhere nothing happens.

    It gives freed memory back to the system at once, and the pages of the next matrix of the same size have to be
    provided anew, a fifth of the time of matching a small network, until it has seen a large block freed: then it takes
    blocks up to that size to be in steady use (mallopt(3), M_MMAP_THRESHOLD). So a block of 32 MB, the largest that
    counts, is asked for and freed, without being written to.
    """
    np.empty((1 << 25) - (1 << 16), dtype=np.uint8)


@cache
def return_freed_memory() -> None:
    """Let glibc give every freed block of more than 8 MB back to the system, from now on; elsewhere nothing happens.

    Of a large model tensors of 10 to 30 MB are read, moved and held in turn. They would come from the heap, between
    others that stay, and what is freed there is lost to the system (mallopt(3), M_MMAP_THRESHOLD).
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 23)


_M_MMAP_THRESHOLD = -3
