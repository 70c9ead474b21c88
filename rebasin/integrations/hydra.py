"""What every room does with Hydra's configurations: plain data of them, and what their `_target_`s make."""

from __future__ import annotations

from typing import Any

from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """`cfg` as plain data, with all interpolations filled in."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def made(config: DictConfig, **more: Any) -> Any:
    """What the function or class `_target_` makes of the other fields; its errors are not wrapped in Hydra's."""
    options = resolved(config)
    return get_method(options.pop("_target_"))(**options, **more)
