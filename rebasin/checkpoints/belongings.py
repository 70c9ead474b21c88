"""What lies in a diffusers folder besides its weights and their configurations, and belongs to its model all the same:
image processors, safety checkers, licences, notes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..tensors.writer import in_bytes
from .folders import INDEX, PARTS, is_weights
from .prediction_type import SCHEDULER

LARGE = 64 * 2**20
"""Bytes above which a file or subfolder is named instead of copied: it is weights of something that is not merged."""

OWN = (INDEX, SCHEDULER.as_posix())
"""Files that are written anew, besides the components' own."""


@dataclass(frozen=True)
class Belongings:
    """files: place in the folder -> the file itself. notes: a sentence about what is not copied, or none."""

    files: dict[str, Path]
    notes: tuple[str, ...] = ()


def belongings(folder: Path, components: Collection[str] = PARTS, own: Collection[str] = OWN) -> Belongings:
    """What is to be copied out of a diffusers folder when a result is written like it; hidden files are not.

    Args:
        components: the folders in it that have weights of their own; none of them there: the folder itself has.
        own: files that are written anew, besides the components' own.

    Links are followed, as a hub's cache is made of them, but links to folders only at the top.
    """
    files: dict[str, Path] = {}
    large, lost = [], []
    pipeline = any((folder / part).is_dir() for part in components)
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        found, size = {}, 0
        for path in _files(entry):
            place = path.relative_to(folder).as_posix()
            of_component = place.partition("/")[0] in components if pipeline else "/" not in place
            if place in own or (of_component and (path.name == "config.json" or is_weights(path.name))):
                continue
            try:
                if not path.is_file():
                    raise OSError("no file")
                with open(path, "rb"):
                    found[place] = path
                size += path.stat().st_size
            except OSError:
                lost.append(place)
        if size > LARGE:
            large.append(f"{entry.name} ({in_bytes(size)})")
        else:
            files |= found
    notes = []
    if large:
        notes.append(
            f"Not copied from {folder.name}, as it is large and not merged: {', '.join(large)}; copy it if you need it."
        )
    if lost:
        notes.append(
            f"Not copied from {folder.name}, as it can't be read (a link that leads nowhere?): {', '.join(lost)}."
        )
    return Belongings(files, tuple(notes))


def copy_into(folder: Path, what: Belongings) -> None:
    """Copy the files that are not there yet."""
    for place, source in what.files.items():
        target = folder / place
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def _files(entry: Path) -> Iterator[Path]:
    """`entry` itself, or all files in it, and what can't be looked into."""
    if not entry.is_dir():
        yield entry
        return
    for where, folders, names in os.walk(entry):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(where) / name for name in folders if (Path(where) / name).is_symlink())
        yield from (Path(where) / name for name in sorted(names) if not name.startswith("."))
