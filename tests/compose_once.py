"""Hydra reads and merges the same files once a session: to compose a configuration is what most tests begin with.

What depends on files and choices of groups is kept; values of options are set anew each time, as Hydra does it. Only of
the package's own files: those in other folders are tests' own, and change.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import yaml
from hydra._internal import config_loader_impl as loader
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import DefaultsList
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

from rebasin.files import config_dir


def compose_once(patch: pytest.MonkeyPatch) -> None:
    listed, merged = loader.create_defaults_list, loader.ConfigLoaderImpl._compose_config_from_defaults_list
    read = ConfigRepository.load_config
    own = {f"file://{config_dir()}", "pkg://hydra.conf", "signature://", "structured://"}
    lists: dict[Any, DefaultsList] = {}
    configs: dict[int, DictConfig | None] = {}  # by the identity of a kept list
    files: dict[Any, ConfigResult | None] = {}

    def load(self: Any, config_path: str) -> ConfigResult | None:
        sources = tuple(source.full_path() for source in self.get_sources())
        if not own.issuperset(sources):
            return read(self, config_path=config_path)
        if (sources, config_path) not in files:
            files[sources, config_path] = read(self, config_path=config_path)
        return copy.deepcopy(files[sources, config_path])  # what Hydra merges into, it changes

    def create(repo: Any, config_name: Any, overrides_list: list[Override], **more: Any) -> DefaultsList:
        values = [one for one in overrides_list if _is_value(repo, one)]
        others = tuple(one.input_line for one in overrides_list if not any(one is value for value in values))
        if not own.issuperset(source.full_path() for source in repo.get_sources()):
            return listed(repo, config_name, overrides_list, **more)
        key = config_name, others, *more.items()
        if key not in lists:
            lists[key] = listed(repo, config_name, overrides_list, **more)
            configs[id(lists[key].defaults)] = None
        return replace(lists[key], config_overrides=values)

    def merge(self: Any, defaults: Any, repo: Any) -> DictConfig:
        if id(defaults) not in configs:
            return merged(self, defaults, repo)
        found = configs[id(defaults)] = configs[id(defaults)] or merged(self, defaults, repo)
        return copy.deepcopy(found)

    patch.setattr(ConfigRepository, "load_config", load)
    patch.setattr(loader, "create_defaults_list", create)
    patch.setattr(loader.ConfigLoaderImpl, "_compose_config_from_defaults_list", merge)
    patch.setattr("omegaconf.omegaconf.yaml", _Yaml())


def _is_value(repo: Any, override: Override) -> bool:
    """Whether it sets an option; others choose files."""
    if override.is_sweep_override():
        return False
    return isinstance(override.value(), dict) or not repo.group_exists(override.key_or_group)


class _Yaml:
    """`yaml` for OmegaConf.load, which parses a text once."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(yaml, name)

    def load(self, stream: Any, Loader: Any) -> Any:
        text = stream if isinstance(stream, str) else stream.read()
        if text not in self.known:
            if not isinstance(stream, str):
                stream.seek(0)  # what is wrong in it is told with its name
            self.known[text] = yaml.load(stream, Loader=Loader)
        return copy.deepcopy(self.known[text])
