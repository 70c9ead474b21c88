"""What an experiment's file declares: its title and question, its recipes, its figures and its table."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from ..errors import unknown
from ..files import config_dir

GROUP = "experiment"


def names() -> list[str]:
    """The experiments that there are."""
    return sorted(path.stem for path in (config_dir() / GROUP).glob("[!_]*.yaml"))


def declaration(name: str) -> dict[str, Any]:
    """The block `experiment` of an experiment's file.

    Raises:
        ConfigError: there is no such experiment; names those that there are.
    """
    file = config_dir() / GROUP / f"{name}.yaml"
    if name.startswith("_") or not file.is_file():
        raise unknown(f"There is no experiment {name!r}", name, names(), "there are")
    found = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(found, dict)
    return found[GROUP]
