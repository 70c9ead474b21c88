"""Where the package's own files are, in a checkout and in an installed wheel alike, and where it keeps others."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ConfigError

PACKAGE = Path(__file__).resolve().parent


def config_dir() -> Path:
    """The folder of the Hydra configs: `configs/` of a checkout, `rebasin/configs/` of a wheel.

    Raises:
        ConfigError: neither is there; the installation is damaged.
    """
    for folder in (PACKAGE / "configs", PACKAGE.parent / "configs"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(
        f"No config.yaml in {PACKAGE / 'configs'} or {PACKAGE.parent / 'configs'}; install git-rebasin again."
    )


def cache_folder(configured: str | os.PathLike[str] | None = None) -> Path | None:
    """Where traced specs, trained networks and unfinished matchings are kept; None if nothing is to be kept.

    `configured`, else the environment's REBASIN_CACHE, else `rebasin` in XDG_CACHE_HOME or ~/.cache; "off" is none.
    """
    chosen = str(configured or os.environ.get("REBASIN_CACHE") or "")
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rebasin"
