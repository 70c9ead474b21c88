"""What an experiment's file declares: its title and question, its recipes, its figures and its table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from ..errors import unknown
from ..files import config_dir

GROUP = "experiment"


def names() -> list[str]:
    """The experiments that there are."""
    return sorted(path.stem for path in (config_dir() / GROUP).glob("[!_]*.yaml"))


def declaration(name: str) -> dict[str, Any]:
    """The block `experiment` of an experiment, with what it inherits.

    Raises:
        ConfigError: there is no such experiment; names those that there are.
    """
    file = config_dir() / GROUP / f"{name}.yaml"
    if name.startswith("_") or not file.is_file():
        raise unknown(f"There is no experiment {name!r}", name, names(), "there are")
    found: Any = OmegaConf.to_container(_block(file))
    return {str(key): value for key, value in found.items()}


@cache
def _block(path: Path) -> Any:
    """The block `experiment` of a file of the group, over those of the files that it inherits from."""
    file: Any = OmegaConf.load(path)
    bases = [path.parent / f"{base}.yaml" for base in file.get("defaults", ()) if isinstance(base, str)]
    return OmegaConf.merge(*map(_block, bases), file.get(GROUP, {}))


def recipe(declared: Mapping[str, Any], size: str) -> list[str]:
    """The overrides of the recipe of this size; sweeps that earlier versions stored have them as they are."""
    found = declared.get(size) or ()
    if isinstance(found, Mapping):
        return [f"{key}={written(value)}" for key, value in found.items()]
    return [*found]


def written(value: Any) -> str:
    """A value of a YAML file as the command line has it."""
    return value if isinstance(value, str) else json.dumps(value)


def parsed(text: str) -> Override | None:
    """An override of a recipe or a command line; None for what is none."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None


def option_of(override: Override) -> str:
    """The option that it sets."""
    return override.get_key_element().lstrip("+~")
