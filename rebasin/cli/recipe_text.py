"""Writing down what was done: as a recipe of ours, or of sd-mecha."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..errors import ConfigError
from .recipe import FORMAT, PAIRS, Command, holds_files
from .request import KEYS, Request, flag


@dataclass(frozen=True, eq=False)
class Done:
    """A step that was done: what was asked for, and sha256 of the files that it read; `steps` are its inputs that
    earlier steps made, by their paths.
    """

    command: Command
    request: Request
    sha256: Mapping[Path, str]
    name: str | None = None
    steps: Mapping[Path, str] = field(default_factory=dict)


def recipe_text(done: Sequence[Done], folder: Path) -> str:
    """What was done as a recipe of ours that will lie in this folder."""
    entries = [_entries(one, folder) for one in done]
    whole = entries[0] if len(entries) == 1 else {"steps": entries}
    head = f"# rebasin {__version__}: rebasin merge --recipe FILE does this again\n"
    return head + yaml.safe_dump({"rebasin": FORMAT, **whole}, sort_keys=False, allow_unicode=True, width=110)


def _entries(done: Done, folder: Path) -> dict[str, Any]:
    from ..checkpoints.hub import came_from  # late: torch
    from ..checkpoints.provenance import sha256_of
    from .merge_weights import settled

    request = done.request

    def of(path: Path) -> Any:
        if path in done.steps:
            return done.steps[path]
        place = came_from(path)
        return {
            "file": beside(path, folder) if place is None else str(place),
            "sha256": done.sha256.get(path) or sha256_of(path),
        }

    told: dict[str, Any] = {}
    for key, name in KEYS.items():
        value = getattr(request, name)
        if name != "inputs" and value == Request.__dataclass_fields__[name].default:
            continue
        if holds_files(name):
            told[key] = [of(path) for path in value] if isinstance(value, tuple) else of(value)
        elif name in PAIRS:
            told[key] = {n: _read(text) for n, _, text in (pair.partition("=") for pair in value)}
        else:
            told[key] = (
                settled(value) if name == "weights" else list(value) if isinstance(value, tuple) else value
            )
    about = {"command": done.command} if done.command != "merge" else {}
    about |= {"name": done.name} if done.name is not None else {}
    output = {} if request.intermediate else {"output": beside(request.output, folder)}
    return {**about, "models": told.pop("models"), **output, **told}


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def beside(path: Path, folder: Path) -> str:
    """A path as a recipe in this folder names it."""
    try:
        return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()
    except ValueError:  # another drive
        return path.absolute().as_posix()


def mecha_text(done: Sequence[Done], folder: Path) -> str:
    """What was done as a recipe of sd-mecha, whose files are named as they lie from this folder.

    Raises:
        ConfigError: sd-mecha can't do this; says what.
    """
    from ..checkpoints.checkpoint import open_each
    from ..merging.merged import find_method
    from ..merging.recipes import recipe
    from .inputs import open_all
    from .merge_weights import merge_weights, method_options

    request = done[-1].request
    require_mecha(request)
    method = find_method(request.method)
    options = method_options(method, request.options, len(request.inputs))
    models, components = open_all(
        [*request.inputs, *([request.base] if request.base else [])], (), request.variant
    )
    first = open_each(request.inputs[:1], request.variant)[0]
    weights = merge_weights(request, method, len(request.inputs), models[0], components)
    architecture = {"sd1": "sd1-ldm", "sdxl": "sdxl-sgm"}.get(first.family) if first.layout == "ldm" else None
    text = recipe(
        method,
        [beside(path, folder) for path in request.inputs],
        base=None if request.base is None else beside(request.base, folder),
        weights=weights.given if weights.blocks is None else weights.blocks,
        architecture=architecture,
        **options,
    )
    return text  # its reader takes no empty line


def require_mecha(request: Request) -> None:
    """Raise `ConfigError` if sd-mecha can't do what is asked for, before any work."""
    folder = next((path for path in request.inputs if path.is_dir()), None)
    if folder is not None:
        raise ConfigError(f"sd-mecha reads files, and {folder} is a folder; save the recipe as NAME.yaml.")
    if request.align or request.permutation is not None:
        raise ConfigError(
            "sd-mecha knows no alignment, so --save-recipe NAME.mecha needs --no-align: align first (rebasin align A B"
            " -o B_aligned.safetensors) and merge that, or save the recipe as NAME.yaml."
        )
    for name in ("components", "vae", "fisher", "resize_vocabulary"):
        if getattr(request, name):
            raise ConfigError(
                f"A recipe of sd-mecha has nothing for {flag(name)}; leave it out, or save the recipe as NAME.yaml."
            )
