"""Experiments: named recipes with their axes and figures, `python -m rebasin.run +experiment=NAME [size=small]`.

Each is one file of the config group `experiment` (in a checkout and in an installed wheel alike). What it
shares with others it inherits, by its defaults list. Its blocks `full`, `small` and, for some, `short` are overrides,
option -> value, in Hydra's own language, sweeps included; `expand` puts those of the chosen size into the command line,
behind everything that the user wrote: what the user sets wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError, RebasinError
from ..integrations.hydra import fingerprint, unresolved
from ..reporting.experiments import GROUP, declaration, names, option_of, parsed, recipe
from ..reporting.results import IRRELEVANT, load_results, relevant

__all__ = ["declaration", "expand", "finished", "names"]

SIZES = ("full", "small", "short")
SHOW = {"--cfg", "-c", "--info", "-i"}


def expand(arguments: Sequence[str]) -> list[str]:
    """`arguments` with the overrides of the experiment that they name, where they don't set the same option.

    With flags that only show a configuration (`--cfg job`) each axis has its first value. Arguments without an
    experiment, and those that Hydra will refuse anyway, are returned as they are.

    Raises:
        ConfigError: there is no such experiment or size.
    """
    given: dict[str, Any] = {}
    where = 0
    for place, argument in enumerate(arguments):
        override = None if argument.startswith("-") else parsed(argument)
        if override is not None:
            key = option_of(override)
            given[key] = override.value()
            where = place if key == GROUP else where
    name = given.get(GROUP)
    if not isinstance(name, str):
        return list(arguments)
    size = given.get("size", "full")
    if size not in SIZES:
        raise ConfigError(f"size is {size!r}, but an experiment has the sizes {', '.join(SIZES)}.")
    declared = declaration(name)
    if size not in declared:
        raise ConfigError(f"The experiment {name} has no size={size}: take size=full or size=small.")
    preset = [o for o in map(parsed, recipe(declared, size)) if o is not None]
    added = [override for override in preset if option_of(override) not in given]
    flags = [argument for argument in arguments if argument.startswith("-")]
    shown = [_first(o) if flags else str(o.input_line) for o in added]
    # The experiment says so itself, but after a mistake Hydra would only notice that axes need --multirun.
    mode = [] if flags else ["--multirun"]
    shown += ["hydra.mode=RUN"] if SHOW & set(flags) else []
    return [*mode, *arguments[:where], f"+{GROUP}={name}", *shown, *arguments[where + 1 :]]


def _first(override: Override) -> str:
    """The override with the first value of its axis."""
    if not override.is_sweep_override():
        return str(override.input_line)
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"


def finished(config: Mapping[str, Any], folder: Path) -> bool:
    """Whether `folder` has the results of a run with this configuration, and its tensors, if these are wanted."""
    try:
        found = load_results(folder)["config"]
    except RebasinError:
        return False
    if config.get("tensors") and not found.get("tensors"):
        return False
    return fingerprint(relevant(config), 64) == fingerprint(relevant(found), 64)


def folder_digits(_root_: DictConfig) -> str:
    """Ten digits that stand for what is relevant; they name a run's folder in a sweep."""
    return fingerprint(relevant(unresolved(_root_, {str(key) for key in _root_} - {*IRRELEVANT})), 10)


OmegaConf.register_new_resolver("fingerprint", folder_digits, replace=True)
