"""Where the package's own files are, in a checkout and in an installed wheel alike."""

from __future__ import annotations

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
