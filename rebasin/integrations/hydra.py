"""What every room does with Hydra's configurations: plain data of them, and what their `_target_`s make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Mapping
from typing import Any

from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf


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


def made(config: DictConfig, **more: Any) -> Any:
    """What the function or class `_target_` makes of the other fields; its errors are not wrapped in Hydra's."""
    options = resolved(config)
    return get_method(options.pop("_target_"))(**options, **more)
