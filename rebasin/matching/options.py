"""Options as callers give them, checked before any work begins."""

from __future__ import annotations

import math
from typing import Any, get_args

from ..errors import ConfigError


def check_choices(**given: tuple[str | None, Any]) -> None:
    """Raise `ConfigError` unless each option, given with its Literal type, is one of its choices, or None."""
    for name, (value, kind) in given.items():
        if value is not None and value not in get_args(kind):
            raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(get_args(kind))}.")


def check_range(low: float, high: float = math.inf, **given: float | None) -> None:
    """Raise `ConfigError` unless each option is a number from `low` to `high`, or None."""
    for name, value in given.items():
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            most = f" and at most {high}" if high < math.inf else ""
            raise ConfigError(f"{name} is {value}, but it must be at least {low}{most}.")
