"""Reading recipes: YAML of ours or of mergekit, or the header of a file that was merged or aligned."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, shown
from .located import located, read_yaml
from .mergekit import translated
from .recipe import COMMANDS, ON_HUB, Recipe, Step, fields_of, require_format, step_of

NUMBER = re.compile(r"[-+0-9.eE]+|true|false")
"""A value that names no function."""


def read_recipe(path: Path, alone: bool = False) -> Recipe:
    """The recipe in a YAML file of ours or of mergekit, or in the header of a file that was merged or aligned.

    Args:
        alone: of a header the last step only; otherwise inputs that are not there are made first, as it tells.

    Raises:
        ConfigError: it can't be read, or asks for what can't be done; names the key and the line.
        CheckpointError: a file that should have a header is damaged.
    """
    if path.is_dir() or path.suffix.lower() in (".safetensors", ".sft", ".gguf", ".ckpt"):
        return Recipe(path, _of_header(path, alone))
    documents = read_yaml(path)
    if not documents or documents[0].plain is None:
        raise ConfigError(f"{path} is empty; a recipe has entries such as `models: [A, B]`.")
    first = documents[0]
    if isinstance(first.value, dict) and "merge_method" in first.value:
        return translated(path, documents)
    if len(documents) > 1:
        raise ConfigError(f"{path} has {len(documents)} documents, but a recipe is one; list its `steps`.")
    top = first.mapping("A recipe")
    if "steps" not in top:
        return Recipe(path, (step_of(first, path.parent, ()),))
    for key in top:
        if key not in ("rebasin", "steps"):
            raise top[key].wrong(f"{shown(key)} stands beside `steps`, but belongs into one of them")
    require_format(top)
    steps: list[Step] = []
    for one in top["steps"].sequence("`steps`"):
        step = step_of(one, path.parent, [step.name for step in steps if step.name is not None])
        if step.name in [known.name for known in steps if known.name]:
            raise one.wrong(f"a second step has the name {shown(step.name)}")
        steps.append(step)
    for number, step in enumerate(steps):
        later = [one.name for one in steps[number:] if one.name]
        for file in (file for files in step.files.values() for file in files if file.step is None):
            if file.path.name in later and file.path.parent == path.parent and not file.path.exists():
                what = "this step itself" if file.path.name == step.name else "a later step"
                raise ConfigError(f"{file.where}: {file.path.name} is {what}; a step uses those before it.")
    if not steps:
        raise top["steps"].wrong("there are no steps; give one or more")
    used = {file.step for step in steps for files in step.files.values() for file in files if file.step}
    for step in steps[:-1]:
        if step.output is None and step.name not in used:
            raise ConfigError(
                f"{step.where}: no later step uses the result of this one, and it has no `output`; give it one, or"
                " leave the step out."
            )
    return Recipe(path, tuple(steps))


def _of_header(path: Path, alone: bool) -> tuple[Step, ...]:
    """The recipe of a file that we wrote; its inputs are looked for beside it."""
    from ..checkpoints import provenance  # late: torch
    from ..checkpoints.checkpoint import open_each

    (checkpoint,) = open_each([path])
    made = provenance.read(provenance.metadata_of(checkpoint))
    if not (made or {}).get("recipe"):
        raise ConfigError(
            f"{path} does not tell how it was made: it is no result of rebasin, or lost its header."
        )
    command = made["recipe"].get("command")  # type: ignore[index]
    if command not in COMMANDS:
        raise ConfigError(
            f"{path} was made by {shown(command)}, but a recipe is of a merge or an alignment; give such a file."
        )
    steps: dict[str, tuple[str, Step]] = {}
    last = _made(made or {}, f"the header of {path}", path.resolve().parent, None, None if alone else steps)
    return (*(step for _, step in steps.values()), last)


def _made(
    made: Mapping[str, Any],
    where: str,
    folder: Path,
    name: str | None,
    steps: dict[str, tuple[str, Step]] | None,
) -> Step:
    """The step that a header tells of; those that make inputs which are not there come into `steps` before it."""
    from ..checkpoints.provenance import understood

    told, files = dict(made["recipe"]), []
    told.pop("output", None)  # ours has none, and where files go is not for a header to say
    command = told["command"]
    require_data(told, where)
    for one in made.get("inputs", ()):
        file, sha256 = str(one.get("name")), str(one.get("sha256"))
        if file.startswith(ON_HUB):
            raise ConfigError(f"{where} names {shown(file)}, but a header does not say what is fetched.")
        own, before = file.removesuffix(".safetensors"), understood(one.get("made")) or {}
        makes = (before.get("recipe") or {}).get("command") in COMMANDS and own != file
        if steps is not None and makes and not (folder / file).exists():
            if own not in steps:
                steps[own] = (sha256, _made(before, where, folder, own, steps))
            file = own if steps[own][0] == sha256 else file
        files.append({"file": file, "sha256": sha256})
    if command == "align":
        own = fields_of(command)  # its header tells of some that it has not, too
        told = {key: value for key, value in told.items() if key in own or (key != "to" and value)}
        told["models"] = files[::-1]
    else:
        fisher = told.get("fisher") or []
        further = [key for key in ("base", "vae") if told.get(key)]
        count = len(files) - len(further) - len(fisher)
        told["models"] = files[:count]
        told |= dict(zip(further, files[count:], strict=False))
        told["fisher"] = files[count + len(further) :]
    return step_of(located({**told, "name": name}, where), folder, list(steps or ()))


def require_data(told: Mapping[str, Any], where: str) -> None:
    """Refuse what would have a header, which may come from anyone, name functions that are called.

    Raises:
        ConfigError: it names one.
    """
    options = told.get("options")
    entries = (
        [f"{name}={value}" for name, value in options.items()] if isinstance(options, Mapping) else options
    )
    entries = entries if isinstance(entries, list) else []  # of NAME=VALUE, as `pairs` reads both
    named = [str(one) for one in entries if str(one).partition("=")[0] == "score"]
    given = told.get("learn")
    pairs = [str(one).partition("=") for one in given] if isinstance(given, list) else []
    named += [name + is_one + text for name, is_one, text in pairs if not NUMBER.fullmatch(text)]
    if named or (given and not pairs):
        raise ConfigError(
            f"{where} asks for {shown(named[0] if named else given, 60)}, which may call a function of your Python, and"
            " a header does not do that; give the options of this merge on the command line, or in a YAML recipe."
        )
