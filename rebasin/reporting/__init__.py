"""What a run leaves for people: pictures, a self-contained HTML page, the terminal's table, a wandb run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kinds import draw, leave
    from .loggers import both, open_logger
    from .results import collect, load_results
    from .run import save_blocks, save_tensors
    from .snapshots import Snapshots

_PUBLIC = {
    "Snapshots": "snapshots",
    "both": "loggers",
    "collect": "results",
    "draw": "kinds",
    "leave": "kinds",
    "load_results": "results",
    "open_logger": "loggers",
    "save_blocks": "run",
    "save_tensors": "run",
}
# Loaded on first use: matplotlib takes a second, and configurations and results are read without it.

__all__ = [
    "Snapshots", "both", "collect", "draw", "leave", "load_results", "open_logger", "save_blocks", "save_tensors",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
