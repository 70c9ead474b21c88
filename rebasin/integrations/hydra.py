"""What every room does with Hydra's configurations: plain data of them, and what their `_target_`s make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError, shown
from .functions import PATH, located


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """`cfg` as plain data, with all interpolations filled in."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def unresolved(cfg: DictConfig, names: Container[object]) -> dict[str, Any]:
    """These fields of `cfg`, where there are any, as plain data with interpolations as they were written."""
    container = OmegaConf.to_container(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key in names]))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def fingerprint(config: Mapping[str, Any], digits: int) -> str:
    """So many hexadecimal digits that stand for a configuration."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def function_of(config: Mapping[Any, Any], option: str, of: str = "") -> Callable[..., Any]:
    """The function or class whose path stands in a config.

    Args:
        option: as users write it; its last part is the field of `config`.
        of: the config that it stands in, GROUP=CHOICE.

    Raises:
        ConfigError: there is none; names option and config, and says what to give.
    """
    field, told = option.rpartition(".")[2], f"{option} of {of}" if of else option
    path = config.get(field)
    if not isinstance(path, str):
        given = "not set" if path is None else shown(path)
        raise ConfigError(f"{told} is {given}, but it takes the path of a function or class, {PATH}.")
    try:
        found = located(path)
    except ImportError as error:
        raise ConfigError(
            f"{told} is {shown(path)}, which can't be imported ({_short(error)}); give the path of a function or class,"
            f" {PATH}."
        ) from error
    if not callable(found):
        raise ConfigError(
            f"{told} is {shown(path)}, which is of type {type(found).__name__} and can't be called; give the path of a"
            f" function or class, {PATH}."
        )
    return found


def _short(error: Exception, room: int = 90) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= room else f"{text[: room - 3]}..."


def made(config: DictConfig, option: str, **more: Any) -> Any:
    """What the function or class `_target_` of the config at `option` makes of the other fields; its errors are not
    wrapped in Hydra's.
    """
    options = resolved(config)
    function = function_of(options, f"{option}._target_")
    options.pop("_target_")
    return function(**options, **more)
