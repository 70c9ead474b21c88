"""The package's own files and folders, the one way to write a file (whole or not at all), and the one way to read
plain data out of one.

What stands in a file may be damaged or hostile. `parse` reads JSON strictly, `conform` compares it with a type as
hints write it (and makes tuples and dataclasses of lists and objects), so a loader that declares what it expects can
rely on it. Both raise `SchemaError` alone, whose text is a part of a sentence.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from itertools import repeat
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from .errors import CheckpointError, ConfigError, shown

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
        return Path(os.path.expanduser(chosen))
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rebasin"
    except RuntimeError:  # a user without a home
        return None


def keep(path: PathLike, write: Callable[[Path], object]) -> bool:
    """Let `write` write a file that saves time later, and say whether it could.

    A cache that can't be written costs time, not results: the first time it is told as a warning.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target)
    except (OSError, CheckpointError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).rstrip(".")
        if target.parent not in _unwritable:
            _unwritable.add(target.parent)
            warnings.warn(
                f"{target.parent} can't be written ({reason[:120]}), so nothing is kept there and work is done anew the"
                " next time; name another folder in REBASIN_CACHE (off: none).",
                stacklevel=3,
            )
        return False
    return True


_unwritable: set[Path] = set()
"""The folders that were told of."""


def prepare_folder(folder: PathLike) -> Path:
    """Make a folder for results, and see that it can be written, before the work that they cost.

    Raises:
        CheckpointError: it can't be.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        raise unwritable(target, error) from error
    return target


def unwritable(folder: PathLike, error: OSError) -> CheckpointError:
    """The error for a folder of results that can't be written."""
    return CheckpointError(
        f"{folder} can't be written ({error.strerror or error}); choose another folder for the results."
    )


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


LARGEST = 1 << 63
"""Whole numbers are below this: what numpy and torch can hold."""

LARGEST_SEED, MOST_THREADS = 2**32 - 1, 4096
"""What random generators of all kinds take, multiples included, and what a system may be asked for."""

Leaf = Callable[[Any, Any, str], Any]
"""Makes a value of a type that the caller knows, (type, data, where) -> value; NotImplemented for all others."""


class SchemaError(ValueError):
    """Data that are not what was declared: what is wrong, and where, without capital and period."""


def parse(text: str | bytes, nan: bool = False) -> Any:
    """The data of a JSON text in UTF-8; `nan` allows the constants NaN and Infinity, which are no JSON."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=None if nan else _refused)
    except SchemaError:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        raise SchemaError("it is no JSON") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # readers would disagree about what it means
        names = [name for name, _ in pairs]
        raise SchemaError(f"it names {shown(max(names, key=names.count))} twice")
    return found


def _refused(constant: str) -> Any:
    raise SchemaError(f"it holds {constant}, which is no number")


def conform(kind: Any, data: Any, at: str = "", leaf: Leaf | None = None) -> Any:
    """`data` as a value of type `kind`: lists become tuples, objects dataclasses, as the hints say.

    Known are Any, None, bool, int, float, str, Literal, unions, list, tuple, Mapping with text as keys, TypedDict
    (further keys are let pass) and dataclasses. Numbers may be infinite or NaN where `parse` has allowed them.

    Raises:
        SchemaError: names the place `at` which they differ.
    """
    if leaf is not None and (made := leaf(kind, data, at)) is not NotImplemented:
        return made
    if kind is Any or (kind is str and type(data) is str):
        return data
    origin, kinds = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return _one_of(kinds, data, at, leaf)
    if origin in (list, tuple) and isinstance(data, list):
        each = kinds if origin is tuple and kinds[-1] is not Ellipsis else repeat(kinds[0], len(data))
        if isinstance(each, repeat) or len(each) == len(data):
            pairs = enumerate(zip(each, data, strict=True))
            return origin(conform(one, item, f"{at}/{n}", leaf) for n, (one, item) in pairs)
    elif isinstance(data, dict):
        if isinstance(origin, type) and issubclass(origin, Mapping) and not is_typeddict(kind):
            return {key: conform(kinds[1], value, f"{at}/{key}", leaf) for key, value in data.items()}
        if is_typeddict(kind) or is_dataclass(kind):
            own = _members(kind)
            for name in own:
                if own[name][1] and name not in data:
                    raise SchemaError(f"{_place(at)} has no {name!r}")
            given = {n: conform(own[n][0], data[n], f"{at}/{n}", leaf) for n in own if n in data}
            made: Any = kind
            return {**data, **given} if is_typeddict(kind) else made(**given)
    elif (origin is Literal and data in kinds) or _is_plain(origin, data):
        return data
    raise SchemaError(f"{_place(at)} is {shown(data)}, not {_called(kind)}")


def _one_of(kinds: tuple[Any, ...], data: Any, at: str, leaf: Leaf | None) -> Any:
    if data is None and NoneType in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not NoneType)
    for kind in kinds[:-1]:
        try:
            return conform(kind, data, at, leaf)
        except SchemaError:
            continue
    return conform(kinds[-1], data, at, leaf)


@cache
def _members(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Name -> (type, whether it must be there) of a TypedDict or dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    if is_typeddict(kind):
        free = {name for name, hint in hints.items() if not kind.__total__ or get_origin(hint) is NotRequired}
        return {
            n: (get_args(h)[0] if get_origin(h) is NotRequired else h, n not in free)
            for n, h in hints.items()
        }
    free = {f.name for f in fields(kind) if f.default is not MISSING or f.default_factory is not MISSING}
    return {f.name: (hints[f.name], f.name not in free) for f in fields(kind)}


def _is_plain(kind: Any, data: Any) -> bool:
    if kind is NoneType or kind is None:
        return data is None
    if kind is bool or kind is str:
        return isinstance(data, kind)
    if kind not in (int, float) or isinstance(data, bool) or not isinstance(data, (int, kind)):
        return False
    return not isinstance(data, int) or -LARGEST <= data < LARGEST


def _called(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    origin = get_origin(kind) or kind
    if origin is tuple and get_args(kind)[-1] is not Ellipsis:
        return f"a list of {len(get_args(kind))}"
    return names.get(origin, "a list" if origin in (list, tuple) else "an object")


def _place(at: str) -> str:
    return shown(at.removeprefix("/")) if at else "it"
