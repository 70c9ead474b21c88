"""Where a search lives: a folder that follows from what it searches, so that the same command goes on with it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..errors import ConfigError
from ..files import prepare_folder
from ..integrations.hydra import fingerprint, unresolved

try:
    import fcntl
except ImportError:  # Windows: two searches in one folder are not noticed
    fcntl = None

LOCK = ".lock"

RELEVANT = ("model", "data", "objective", "algo", "structure", "space", "base", "seed", "search")
"""What of a configuration trials depend on."""

BUDGET = ("trials", "minutes", "workers", "finalists", "unit", "keep_front")
"""Options of a search that may change from one continuation to the next: the trials before are still good."""


def key(config: Mapping[str, Any]) -> str:
    """Eight digits that stand for all that the trials depend on."""
    return fingerprint(_told(config), 8)


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: config[name] for name in RELEVANT if name in config}
    told["base"] = base_name(config)
    told["search"] = {name: value for name, value in told.get("search", {}).items() if name not in BUDGET}
    return told


def digests(config: Mapping[str, Any]) -> dict[str, str]:
    """What trials depend on -> digits that stand for it."""
    return {name: fingerprint({name: value}, 8) for name, value in _told(config).items()}


def alignment_key(config: Mapping[str, Any]) -> str:
    """Digits that stand for all that an alignment depends on."""
    return fingerprint({n: v for n, v in digests(config).items() if n not in ("space", "search")}, 16)


def base_name(config: Mapping[str, Any]) -> str | None:
    """The base that a configuration names, for the search or for the run's own merge."""
    name = config["base"] if config["base"] is not None else config["merge"]["base"]
    return None if name is None else str(name)


OmegaConf.register_new_resolver(
    "search_key", lambda _root_: key(unresolved(_root_, (*RELEVANT, "merge"))), replace=True
)


def _is_at(file: int, path: Path) -> bool:
    """Whether this open file is the one that has the name now."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for this process alone; the lock ends with the process, however it ends.

    Raises:
        ConfigError: another search is at work there.
    """
    prepare_folder(folder)
    path = folder / LOCK
    while True:
        with open(path, "w") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    raise ConfigError(
                        f"Another search is at work in {folder}; wait for it, or choose a folder with"
                        " hydra.run.dir=FOLDER."
                    ) from error
                if not _is_at(file.fileno(), path):
                    continue  # the search that held it has just ended, and its file with it
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()
            return
