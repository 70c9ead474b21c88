"""Functions and classes that users name by their paths, in configs and options, are looked up here."""

from __future__ import annotations

import importlib
from typing import Any

PATH = "package.module.name"


def located(path: str) -> Any:
    """What is at "package.module.name", or "package.module:name".

    Raises:
        ImportError: there is nothing; its text is a part of a sentence.
    """
    parts = path.replace(":", ".").split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ImportError("it has no module, or is no path")
    try:
        found, rest = _imported(parts[:-1], parts[-1:])
        for name in rest:
            found = getattr(found, name)
    except ImportError:
        raise
    except AttributeError as error:
        raise ImportError(str(error)) from error
    except (Exception, SystemExit) as error:  # the module's own fault: it may run here for the first time
        raise ImportError(f"{type(error).__name__}: {error}") from error
    return found


def _imported(parts: list[str], rest: list[str]) -> tuple[Any, list[str]]:
    """The longest beginning of a path that is a module, and the names inside of it."""
    name = ".".join(parts)
    try:
        return importlib.import_module(name), rest
    except ModuleNotFoundError as error:
        if len(parts) == 1 or error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        return _imported(parts[:-1], [*parts[-1:], *rest])
