"""--help that teaches: what there is to choose from, and the options of what was chosen, as `algo=ste --help`.

What an option means is said in one place: in the docstring of the function that has it (see
`integrations.signatures`), or in a comment of the config's file. Hydra's help template names both as
`${groups:}` and `${options:}`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from ..integrations.signatures import FUNCTION, OPTIONS, meanings
from ..reporting.experiments import written
from .experiments import GROUP as EXPERIMENT

WIDTH, INDENT = 120, 40
COMMENT = re.compile(r"( *)([\w.]+):[^#]*(?:# *(.*))?")


def _folders() -> list[Path]:
    """Those that Hydra looks into: the package's, and one of the user's own (--config-dir)."""
    sources = GlobalHydra.instance().config_loader().get_sources()
    return [Path(source.path) for source in sources if source.scheme() == "file"]


def _groups() -> str:
    """The groups and their choices; files that begin with _ are there for others to inherit from."""
    found: dict[str, set[str]] = {}
    for file in (file for folder in _folders() for file in folder.glob("*/[!_]*.yaml")):
        found.setdefault(file.parent.name, set()).add(file.stem)
    return "\n".join(
        f"{group}: {', '.join(sorted(found[group]))}" for group in sorted(found) if group != "hydra"
    )


def _options(_root_: DictConfig) -> str:
    """Every option of the choices on the command line: its value, and what it means."""
    asked = [str(override).lstrip("+").partition("=")[0] for override in _root_.hydra.overrides.task]
    choices = _root_.hydra.runtime.choices
    lines = []
    for group in asked:
        if group in choices and group in _root_ and group != EXPERIMENT:
            lines += [
                f"OPTIONS of {group}={choices[group]}",
                *_lines(group, choices[group], _root_[group]),
                "",
            ]
    return "\n".join(lines).replace("$", "$$")  # Hydra fills in the template afterwards


def _lines(group: str, choice: str, config: DictConfig) -> Iterator[str]:
    told = _meanings(group, choice)
    for name, value in _flat(OmegaConf.to_container(config)):
        if name.rpartition(".")[2] not in ("name", "_target_"):
            option = f"    {group}.{name}={written(value)}"
            lines = textwrap.wrap(told.get(name, ""), WIDTH - INDENT)
            yield option.ljust(INDENT) + lines.pop(0) if lines and len(option) < INDENT else option
            yield from (" " * INDENT + line for line in lines)


def _meanings(group: str, choice: str) -> dict[str, str]:
    """Option -> what it means, of a config and of all that it inherits from."""
    found: dict[str, str] = {}
    file = next((f for folder in _folders() if (f := folder / group / f"{choice}.yaml").is_file()), None)
    if file is None:
        return found
    config: Any = OmegaConf.load(file)
    for default in config.get("defaults", ()):
        if isinstance(default, str):
            base, _, package = default.partition("@")
            prefix = "" if package in ("", "_here_") else f"{package}."
            function = base.removeprefix(FUNCTION).removeprefix(OPTIONS)
            inherited = _meanings(group, base) if function == base else meanings(function)
            found |= {prefix + name: text for name, text in inherited.items()}
    above: list[str] = []
    for line in file.read_text("utf-8").splitlines():
        if match := COMMENT.fullmatch(line):
            above[len(match[1]) // 2 :] = [match[2]]
            found |= {".".join(above): match[3]} if match[3] else {}
    return found


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


OmegaConf.register_new_resolver("groups", _groups, replace=True)
OmegaConf.register_new_resolver("options", _options, replace=True)
