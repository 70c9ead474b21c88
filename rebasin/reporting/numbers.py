"""Numbers as a reader wants them, the same on every page and in the terminal."""

from __future__ import annotations

import math
from typing import Any


def number(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits, without exponents where they can be avoided."""
    if value is None:
        return "not finite"
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e5:
        return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"
    return f"{value:.{digits - 1}e}"


def signed(loss: float | None, aim: dict[str, Any], digits: int) -> str:
    """A loss as its objective calls it: an accuracy or a reward with its own sign."""
    return number(None if loss is None else aim["sign"] * loss, digits)


def between(low: float | None, high: float | None, digits: int = 3, sign: float = 1.0) -> str:
    """An interval, of losses with the `sign` of their objective; "" where an end is not finite."""
    if low is None or high is None:
        return ""
    low, high = sorted((sign * low, sign * high))
    return f"{number(low, digits)} to {number(high, digits)}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def cell(value: Any) -> str:
    """Whatever a history has."""
    if isinstance(value, float):
        return number(value, 6)
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
