"""The figure of a run that a sweeper which optimises looks at."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError


def target(results: dict[str, Any] | None, name: str) -> float | None:
    """The figure `name` of a run that aligned two models; None for other runs, and after a dry run.

    Raises:
        ConfigError: the run has no such figure; names some that it has.
    """
    from ..reporting.metrics import metrics

    if results is None or results.get("kind") or not results.get("curves", True):
        return None
    found = metrics(results)
    if name not in found:
        raise ConfigError(f"target is {name!r}, but the run has the figures {', '.join(found)}.")
    return found[name]
