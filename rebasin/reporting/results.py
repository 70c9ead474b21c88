"""results.json: everything that was measured, from which pictures and page can be drawn again."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

from ..errors import CheckpointError
from ..files import SchemaError, conform, parse, write_text

if TYPE_CHECKING:
    from ..spec import PermutationSpec

FORMAT = 1
NAME = "results.json"

Results = dict[str, Any]
"""The content of results.json: what `collect` puts around the figures of a kind of job."""


class Environment(TypedDict):
    """What `environment` tells."""

    versions: Mapping[str, str | None]


class Common(TypedDict):
    """What all results have, whatever their kind."""

    kind: NotRequired[Literal["many", "study", "search", "methods"]]
    own: NotRequired[Mapping[str, str]]
    name: str
    algorithm: str
    seconds: Mapping[str, float]
    environment: Environment
    config: Mapping[str, Any]
    command: str


def effective(config: Mapping[str, Any], own: Mapping[str, str] | None) -> dict[str, Any]:
    """A configuration with what the model has in the place of groups that it does not read."""
    return {**config, **{group: {"name": name} for group, name in (own or {}).items()}}


PACKAGES = ("git-rebasin", "torch", "diffusers", "transformers", "safetensors", "numpy", "scipy")


def collect(
    config: Mapping[str, Any],
    figures: Mapping[str, Any],
    seconds: Mapping[str, float],
    command: str = "",
    kind: str | None = None,
    own: Mapping[str, str] | None = None,
) -> Results:
    """Everything about a job as plain data, with the keys of results.json; null is what is not finite.

    Args:
        config: the resolved configuration.
        figures: what a job of this kind measured.
        seconds: of its stages.
        kind: None for a run on two models, or a kind of `kinds`.
        own: group of the configuration -> what the model has in its place.
    """
    of = kind if kind in ("search", "methods") else config["algo"]["name"]
    return plain(
        {
            "format": FORMAT,
            **({} if kind is None else {"kind": kind}),
            "name": f"{config['model']['name']}-{of}",
            "model": config["model"]["name"],
            "data": effective(config, own)["data"]["name"],
            **({"own": own} if own else {}),
            "algorithm": config["algo"]["name"],
            "seed": config["seed"],
            **figures,
            "seconds": {**seconds, "total": sum(seconds.values())},
            "environment": environment(config.get("device", "cpu")),
            "config": dict(config),
            "command": command,
        }
    )


def described(spec: PermutationSpec) -> dict[str, Any]:
    """A spec in a few figures."""
    coverage = spec.coverage()
    sizes = {"groups": len(spec), "cells": len(spec.cells), "neurons": spec.neurons, "pins": len(spec.pins)}
    return {"hash": spec.hash, **sizes, "coverage": {"one": coverage.one, "both": coverage.both}}


IRRELEVANT = (
    "again", "dry_run", "experiment", "hydra", "logger", "path", "resume", "size", "target",
    "tensors", "threads",
)  # fmt: skip
"""Options that change no figure: a finished run with other values of these is still finished."""


def relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's configuration its figures depend on."""
    return {key: value for key, value in config.items() if key not in IRRELEVANT}


def command_line(overrides: Sequence[str]) -> str:
    """The command that does a run again."""
    return " ".join(["python -m rebasin.run", *map(shlex.quote, overrides)])


def environment(device: str | None = "cpu") -> dict[str, Any]:
    """What the figures may depend on: versions, machine, the device's own name, threads."""
    import torch

    from ..tensors.modules import find_device

    found = find_device(device)
    cuda = found.type == "cuda"

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(found) if cuda else str(found).replace("cpu", "CPU"),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def save_results(folder: Path, results: Mapping[str, Any]) -> Path:
    """Write results.json."""
    return write_text(folder / NAME, json.dumps(results, indent=1, allow_nan=False) + "\n")


def load_results(folder: str | os.PathLike[str]) -> Results:
    """The results of the run in `folder`.

    Raises:
        CheckpointError: there is no results.json of this format; the message names the file.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        raise CheckpointError(f"There is no {path}; name the folder of a finished run.")
    results = read_json(path)
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this version (format {FORMAT}); run the job again.")
    return checked(Common, results, path)


def checked(kind: Any, data: Any, path: Path) -> Any:
    """Data of a file, as they are declared.

    Raises:
        CheckpointError: they are others.
    """
    try:
        return conform(kind, data)
    except SchemaError as error:
        raise CheckpointError(f"{path} is damaged ({error}); run the job again.") from error


def read_json(path: Path) -> Any:
    """What is in a JSON file.

    Raises:
        CheckpointError: it can't be read.
    """
    try:
        return parse(path.read_bytes())
    except (OSError, SchemaError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}.") from error


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def plain(value: Any) -> Any:
    """`value` as JSON can have it; null is what is not finite."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):  # numpy and torch scalars
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)
