"""Recipes: what `rebasin merge` and `rebasin align` are asked for, as a file, in one step or several.

    rebasin: 1
    models: [A.safetensors, {file: B.safetensors, sha256: 0f3a...}]
    output: AB.safetensors
    alpha: 0.3
    weights: {IN: 0.2, OUT: [0, 1]}

The keys are the fields of `Request` that change the file (`request.KEYS`); what a header tells of how its file was made
is such a recipe, too.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ..errors import CheckpointError, ConfigError, shown, unknown
from ..files import SchemaError, conform
from . import align
from .located import Located
from .request import KEYS, Request, bounds, kinds

FORMAT = 1
"""What `rebasin:` says in a recipe."""

COMMANDS = ("merge", "align")

ABOUT = ("rebasin", "command", "name", "output")
"""Keys of a step that are no fields of `Request`, or do not change the file."""

PAIRS = ("options", "learn")
"""Fields that are NAME=VALUE, in a recipe entries NAME: VALUE."""

SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
"""1e-1, which YAML takes for text."""

ON_HUB = "hf:/"
"""How the path of a model on the Hub begins."""

Command = Literal["merge", "align"]


@dataclass(frozen=True)
class File:
    """A file that a recipe names: its path, here or on the Hub, the sha256 that it must have, or the earlier step that
    makes it.
    """

    path: Path
    sha256: str | None = None
    step: str | None = None
    where: str = ""


@dataclass(frozen=True, eq=False)
class Step:
    """One merge or alignment.

    Attributes:
        files: field of `Request` -> its files.
        given: other fields -> their values.
        name: by which later steps may use the result.
        output: None of a result that only later steps use, or where the user says where it goes.
    """

    command: Command
    files: Mapping[str, tuple[File, ...]]
    given: Mapping[str, Any]
    name: str | None
    output: Path | None
    where: str

    def request(self, made: Mapping[str, Path], more: Mapping[str, Any]) -> Request:
        """What it asks for; `made` is step -> its result, `more` has further fields.

        Raises:
            ConfigError: a file is missing.
        """
        files, sha256 = {}, {}
        for name, own in self.files.items():
            paths = tuple(one.path if one.step is None else made[one.step] for one in own)
            for one, path in zip(own, paths, strict=True):
                if one.step is None:
                    require_there(one)
                if one.sha256 is not None:
                    sha256[path] = one.sha256
            files[name] = paths if get_origin(kinds()[name]) is tuple else paths[0]
        return Request(**{**files, **self.given, "sha256": sha256, **more})

    def fetched(self) -> Step:
        """The same with files of this machine in place of those on the Hub, which are fetched.

        Raises:
            ConfigError: one can't be fetched; says where it is named, and why.
        """
        from ..checkpoints.hub import local  # late: torch

        def here(file: File) -> File:
            if file.step is not None or not str(file.path).startswith(ON_HUB):
                return file
            try:
                return replace(file, path=local(file.path, self.given.get("variant")))
            except CheckpointError as error:
                raise ConfigError(f"{file.where}: {error}") from error

        return replace(self, files={name: tuple(map(here, own)) for name, own in self.files.items()})


@dataclass(frozen=True, eq=False)
class Recipe:
    """What a recipe says, checked as far as that goes without its models."""

    path: Path
    steps: tuple[Step, ...]
    remarks: tuple[str, ...] = ()


def require_there(file: File) -> None:
    """Raise `ConfigError` if a file that a recipe names is not there."""
    if not file.path.exists():
        raise ConfigError(
            f"{file.where}: there is no {file.path}; paths are relative to the recipe, and models that are given on the"
            " command line take the place of its own."
        )


def require_format(top: Mapping[str, Located]) -> None:
    if "rebasin" in top and (top["rebasin"].plain != FORMAT or isinstance(top["rebasin"].plain, bool)):
        raise top["rebasin"].wrong(
            f"`rebasin` is {shown(top['rebasin'].plain)}, but this version reads recipes of the format {FORMAT}"
        )


def fields_of(command: Command) -> set[str]:
    """The fields of `Request` that a step with this command may set."""
    if command == "merge":
        return set(KEYS.values())
    return {*inspect.signature(align.align).parameters, "inputs", "max_sweeps"} & set(KEYS.values())


def step_of(one: Located, folder: Path, names: Sequence[str]) -> Step:
    """A step: the entries of a recipe that has one, or of one in the list.

    Args:
        folder: where relative paths begin.
        names: of the steps before it.
    """
    entries = one.mapping("A step")
    require_format(entries)
    command = entries["command"].plain if "command" in entries else "merge"
    if command not in COMMANDS:
        raise entries["command"].wrong(f"`command` is {shown(command)}, but it is {' or '.join(COMMANDS)}")
    fields = fields_of(command)
    keys = [key for key, name in KEYS.items() if name in fields]
    files: dict[str, tuple[File, ...]] = {}
    given: dict[str, Any] = {}
    for key, own in entries.items():
        if key in ABOUT:
            continue
        name = KEYS.get(key.replace("-", "_"))
        if name not in fields:
            raise unknown(
                f"{own.where}: there is no key {shown(key, 40)}", key, [*ABOUT[1:], *keys], "a step has"
            )
        if own.plain is None:
            continue
        if holds_files(name):
            several = get_origin(kinds()[name]) is tuple
            listed = own.sequence(f"`{key}`") if several else [own]
            files[name] = tuple(_file(file, folder, names) for file in listed)
        else:
            given[name] = _value(name, key, own)
    models = files.get("inputs", ())
    if len(models) < 2 or (command == "align" and len(models) > 2):
        many = "two" if command == "align" else "two or more"
        raise entries.get("models", one).wrong(
            f"there are {len(models)} `models`, but {command} takes {many}"
        )
    told = {key: entries[key].plain for key in ("name", "output") if key in entries}
    for key, text in told.items():
        if text is not None and (not isinstance(text, str) or not text):
            raise entries[key].wrong(f"`{key}` is {shown(text)}, but it is text")
    output = told.get("output")
    name = told.get("name")
    if name is not None and not re.fullmatch(r"[\w. -]{1,80}", name):
        raise entries["name"].wrong(
            f"`name` is {shown(name)}, but it is letters, digits, spaces, '.', '_' and '-'"
        )
    return Step(command, files, given, name, None if output is None else folder / output, one.where)


def holds_files(name: str) -> bool:
    kind = kinds()[name]
    return Path in get_args(kind)


def _file(one: Located, folder: Path, names: Sequence[str]) -> File:
    text, sha256 = one.plain, None
    if isinstance(one.value, dict):
        for key, own in one.value.items():
            if key not in ("file", "sha256"):
                raise own.wrong(f"a file is a path, or has `file` and `sha256`, but this has {shown(key)}")
        text = one.value["file"].plain if "file" in one.value else None
        sha256 = one.value["sha256"].plain if "sha256" in one.value else None
    if not isinstance(text, str) or not text:
        raise one.wrong(f"{shown(one.plain)} is no path of a file")
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", str(sha256)):
        raise one.wrong(
            f"the sha256 of {text} is {shown(sha256, 20)}, but it has 64 digits of 0 to 9 and a to f"
        )
    if text in names:
        return File(Path(text), sha256, text, one.where)
    here = Path() if text.startswith(ON_HUB) else folder
    return File(here / Path(text).expanduser(), sha256 and sha256.lower(), None, one.where)


def _value(name: str, key: str, own: Located) -> Any:
    """The value of a field that is no file."""
    kind, data = kinds()[name], own.plain
    if name in PAIRS:
        return pairs(data, own, key)
    if name == "weights":
        return _weights(data, own)
    if float in (kind, *get_args(kind)) and isinstance(data, str) and SCIENTIFIC.fullmatch(data):
        data = float(data)
    if get_origin(kind) is tuple and isinstance(data, str):
        data = [data]
    try:
        value = conform(kind, data)
    except SchemaError as error:
        told = str(error).partition(", not ")[2] or "something else"
        raise own.wrong(f"`{key}` is {shown(data)}, but it is {told}") from error
    least, most = bounds(name)
    if isinstance(value, int | float) and (
        (least is not None and value < least) or (most is not None and value > most)
    ):
        raise own.wrong(f"`{key}` is {value}, but it is from {least} to {most}")
    return float(value) if float in (kind, *get_args(kind)) else value


def pairs(data: Any, own: Located, key: str) -> tuple[str, ...]:
    """Entries as NAME=VALUE, so that the option reads the same value from them."""
    if isinstance(data, list) and all(isinstance(one, str) and "=" in one for one in data):
        return tuple(data)
    entries = own.mapping(f"`{key}`")
    return tuple(f"{name}={as_text(one.plain)}" for name, one in entries.items())


def as_text(value: Any) -> str:
    """A value as the option reads it: JSON, or text that is none."""
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        json.loads(value)
    except ValueError:
        return value
    return json.dumps(value)


def _weights(data: Any, own: Located) -> str:
    if isinstance(data, dict):
        return json.dumps(data)
    if isinstance(data, list) and all(
        isinstance(one, int | float) and not isinstance(one, bool) for one in data
    ):
        return ",".join(map(repr, data))
    if isinstance(data, str | int | float) and not isinstance(data, bool):
        return str(data)
    raise own.wrong(
        f"`weights` is {shown(data)}, but it is a number, a list of numbers, a preset, or entries"
    )
