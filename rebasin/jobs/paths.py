"""Paths on the command line as they are, although Hydra's syntax has its own use for what people have in names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..reporting.experiments import parsed

OPTION = re.compile(r"\+{0,2}[\w.@/]+")


def quoted(arguments: Iterable[str]) -> list[str]:
    """`arguments` with quotes around the names of files and folders that there are and that Hydra would not read as
    such: with brackets, commas, an equals sign, or letters that it does not know.
    """
    return [_quoted(argument) for argument in arguments]


def _quoted(argument: str) -> str:
    option, _, value = argument.partition("=")
    if not OPTION.fullmatch(option) or not _is_there(value):
        return argument
    override = parsed(argument)
    if (
        override is not None
        and not isinstance(override.value(), list | dict)
        and not override.is_sweep_override()
    ):
        return argument
    # Backslashes count where a quotation mark follows.
    escaped = re.sub(r"(\\+)$", r"\1\1", re.sub(r"(\\*)'", r"\1\1\\'", value))
    return f"{option}='{escaped}'"


def _is_there(value: str) -> bool:
    try:
        return bool(value) and Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, or of nobody's home
        return False
