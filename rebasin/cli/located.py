"""YAML whose values know their lines, so that a sentence about one says where it stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, shown

LARGEST = 4 << 20
"""Bytes of a recipe; one with a weight for each tensor of a large language model has a hundredth of that."""

MOST = 200_000
"""Values of a recipe: aliases can make millions of a few lines."""


PLAIN = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
"""What entries and lists are that say nothing else."""


@dataclass(frozen=True, eq=False)
class Located:
    """A value and where it stands.

    Attributes:
        value: a mapping from text to `Located`, a list of them, or a plain value.
        where: the file, with the line where that is known.
    """

    value: Any
    where: str

    @property
    def plain(self) -> Any:
        """The value as JSON has it."""
        if isinstance(self.value, dict):
            return {key: one.plain for key, one in self.value.items()}
        return [one.plain for one in self.value] if isinstance(self.value, list) else self.value

    def mapping(self, what: str) -> dict[str, Located]:
        """The value, if it is a mapping; `what` it is of, for the sentence."""
        if not isinstance(self.value, dict):
            raise self.wrong(f"{what} is {shown(self.plain)}, but it is entries KEY: VALUE")
        return self.value

    def sequence(self, what: str) -> list[Located]:
        """The value, if it is a list."""
        if not isinstance(self.value, list):
            raise self.wrong(f"{what} is {shown(self.plain)}, but it is a list")
        return self.value

    def wrong(self, what: str) -> ConfigError:
        """The error whose sentence says where it is."""
        return ConfigError(f"{self.where}: {what}.")


def located(data: Any, where: str) -> Located:
    """Data without lines, of the header of a file."""
    if isinstance(data, Mapping):
        return Located({str(key): located(one, where) for key, one in data.items()}, where)
    return Located([located(one, where) for one in data] if isinstance(data, list) else data, where)


def read_yaml(path: Path) -> list[Located]:
    """The documents of a YAML file.

    Raises:
        ConfigError: it can't be read, is no YAML, names a key twice, or is too large.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"{path} is no recipe: it has more than {LARGEST >> 20} MB.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"There is no recipe {path}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The recipe {path} can't be read: {getattr(error, 'strerror', 'it is no text')}."
        ) from error
    loader = yaml.SafeLoader(text)
    budget = iter(range(MOST))
    try:
        found = []
        while loader.check_node():
            found.append(_located(loader, loader.get_node(), path, budget))
        return found
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ConfigError(
            f"{place}: this is no YAML; indent with spaces, and quote what holds ': '."
        ) from error
    finally:
        loader.dispose()


def _located(loader: Any, node: Any, path: Path, budget: Iterator[int]) -> Located:
    where = f"{path}, line {node.start_mark.line + 1}"
    if next(budget, None) is None:
        raise ConfigError(f"{path} is no recipe: it has more than {MOST:,} values.")
    if not isinstance(node, yaml.ScalarNode) and node.tag not in PLAIN:
        raise ConfigError(
            f"{where}: this is no YAML of entries and lists, but of the kind {shown(node.tag)}."
        )
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            twice = shown(max(names, key=names.count))
            raise ConfigError(f"{where}: the entries that begin here name {twice} twice.")
        loader.flatten_mapping(node)  # what `<<` takes over stands first
        pairs = [(str(key.value), value) for key, value in node.value]
        return Located({name: _located(loader, value, path, budget) for name, value in pairs}, where)
    if isinstance(node, yaml.SequenceNode):
        return Located([_located(loader, one, path, budget) for one in node.value], where)
    return Located(loader.construct_object(node, deep=True), where)
