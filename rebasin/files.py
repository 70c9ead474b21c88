"""The package's own files and folders, and the one way to write a file: whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from .errors import CheckpointError, ConfigError

try:
    import fcntl
except ImportError:  # Windows: no locks, so what a killed run left there stays
    fcntl = None

PathLike = str | os.PathLike[str]

MARK = ".partial"

PACKAGE = Path(__file__).resolve().parent


def print_anything() -> None:
    """Names that the console's encoding does not have (a Japanese file on a Windows console) are printed in escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def config_dir() -> Path:
    """The folder of the Hydra configs: `configs/` of a checkout, `rebasin/configs/` of a wheel.

    Raises:
        ConfigError: neither is there; the installation is damaged.
    """
    for folder in (PACKAGE / "configs", PACKAGE.parent / "configs"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(
        f"No config.yaml in {PACKAGE / 'configs'} or {PACKAGE.parent / 'configs'}; install git-rebasin again."
    )


def cache_folder(configured: str | os.PathLike[str] | None = None) -> Path | None:
    """Where traced specs, trained networks and unfinished matchings are kept; None if nothing is to be kept.

    `configured`, else the environment's REBASIN_CACHE, else `rebasin` in XDG_CACHE_HOME or ~/.cache; "off" is none.
    """
    chosen = str(configured or os.environ.get("REBASIN_CACHE") or "")
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rebasin"


def atomic_path(path: PathLike) -> AbstractContextManager[Path]:
    """A temporary path in the folder of `path`, renamed to it at the end, or removed if the block fails.

    What a killed run left behind for the same target is removed first; the files of runs that are alive are
    locked, and stay.

    Raises:
        CheckpointError: the folder can't be written to.
    """
    return _renamed(Path(path), _locked_file, 0o666)


def atomic_folder(path: PathLike) -> AbstractContextManager[Path]:
    """A temporary folder beside `path`, renamed to it at the end, or removed if the block fails.

    Raises:
        CheckpointError: `path` exists and is no empty folder, or it can't be written.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists already; choose a new folder for the result.")
    return _renamed(target, _locked_folder, 0o777)


@contextmanager
def _renamed(target: Path, make: Callable[[Path], tuple[Path, int | None]], mode: int) -> Iterator[Path]:
    """What `make` makes beside `target`, renamed to it at the end."""
    remove_leftovers(target)
    temporary = handle = None
    try:
        temporary, handle = make(target)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(mode & ~umask)  # tempfile makes private ones
        if temporary.is_dir() and target.exists():
            target.rmdir()  # an empty one
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                _remove(temporary)
        if isinstance(error, OSError):
            raise CheckpointError(f"{target} can't be written: {error.strerror or error}.") from error
        raise
    finally:
        if handle is not None:
            os.close(handle)


def remove_leftovers(path: PathLike) -> list[Path]:
    """Remove the temporary files that killed runs left beside `path`; returns their paths."""
    target, removed = Path(path), []
    if fcntl is None or not target.parent.is_dir():
        return removed
    for found in target.parent.iterdir():
        if found.name.startswith(_prefix(target)) and found.name.endswith(MARK + target.suffix):
            with contextlib.suppress(OSError):  # locked by a live run, or gone meanwhile
                handle = os.open(found, os.O_RDONLY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(found)
                    removed.append(found)
                finally:
                    os.close(handle)
    return removed


def write_text(path: PathLike, text: str) -> Path:
    """Write `text` as UTF-8 to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _prefix(target: Path) -> str:
    return f".{target.stem[:150]}-"


def _locked_file(target: Path) -> tuple[Path, int | None]:
    """A new file beside `target`, and the handle that holds its lock."""
    while True:
        # The target's suffix stays last, because some writers (matplotlib, PIL) choose the format by it.
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=_prefix(target), suffix=MARK + target.suffix
        )
        if fcntl is None:
            os.close(handle)
            return Path(name), None
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # else another run took it for a leftover before it was locked
            return Path(name), handle
        os.close(handle)


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """A new folder beside `target`, and the handle that holds its lock."""
    made = Path(tempfile.mkdtemp(dir=target.parent, prefix=_prefix(target), suffix=MARK + target.suffix))
    if fcntl is None:
        return made, None
    handle = os.open(made, os.O_RDONLY)
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
    return made, handle


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut; where folders can't be synced, nothing is lost but that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
