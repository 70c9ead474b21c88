"""Packages that can't live in the environment lie in folders beside it, where only the tests that ask see them.

`make` puts them there: .venv/vision has torchvision, which breaks other imports on a CPU build of torch, and timm;
.venv/reward has image-reward and the old timm that it wants.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment(*folders: str, needs: str) -> dict[str, str] | None:
    """The variables of a process that sees the packages of these folders; None: the package `needs` is nowhere.

    REBASIN_VISION and REBASIN_REWARD say where they lie, if elsewhere.
    """
    found = [path for folder in folders if (path := _path(folder)) is not None]
    if find_spec(needs) is None and not any((path / needs).is_dir() for path in found):
        return None
    places = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep), *map(str, found)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, places))}


def _path(folder: str) -> Path | None:
    named = os.environ.get(f"REBASIN_{folder.upper()}")
    places = [Path(named)] if named else [ROOT / ".venv" / folder, Path(sys.prefix) / folder]
    return next((place for place in places if place.is_dir()), None)
