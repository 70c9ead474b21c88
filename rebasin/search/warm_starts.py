"""Warm starts: merges that people make anyway, tried before the sampler proposes any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..merging.blocks import block_weights
from .groups import REST
from .space import Space


def warm_starts(
    space: Space, names: Sequence[str], settings: Sequence[Any]
) -> list[tuple[str, dict[str, Any]]]:
    """(name, parameters) of the merges to begin with.

    The first method whose weight is a share begins with every setting, each other method with its default: its weight
    for one that adds a difference, the middle for one that goes from A to B.

    Args:
        names: the model's tensors.
        settings: block weights: numbers, names of presets, mappings; see `merging.blocks.block_weights`.

    Raises:
        ConfigError: a setting that can't be read, or does not fit the model.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    weights = [(str(setting), _by_group(space, names, setting)) for setting in settings]
    first = True
    for method in space.methods:
        kind, _ = space.meaning(method)
        if kind == "share" and first:
            first = False
            found += [(f"{method.name} {label}", space.parameters(value, method)) for label, value in weights]
            continue
        default = method.default_weight if method.default_weight is not None else 0.5
        label = method.name if kind is None else f"{method.name} {default:g}"
        found.append((label, space.parameters(lambda _, d=default: d, method)))
    unique: dict[tuple[Any, ...], tuple[str, dict[str, Any]]] = {}
    for label, parameters in found:  # clipping to the ranges can make two of them the same
        unique.setdefault(tuple(sorted(parameters.items(), key=str)), (label, parameters))
    return list(unique.values())


def _by_group(space: Space, names: Sequence[str], setting: Any) -> Callable[[str], float]:
    """Group, or "" for all -> the mean of the weights that a setting gives its tensors."""
    weights = block_weights(setting, names, default=0.5).weights
    whole = sum(weights.values()) / len(weights)
    if space.groups is None:
        return lambda _: whole
    of = space.groups.of

    def mean(group: str) -> float:
        # The groups that share a weight because they are not in `only` are taken together.
        shared = {other for other in of.values() if other not in space.only} if space.only else set()
        taken = {group, *(shared if group == REST else ())}
        inside = [weight for name, weight in weights.items() if of[name] in taken]
        return sum(inside) / len(inside) if inside else whole

    return mean
