"""Tensors that share one weight in a search: the whole model, its blocks, points over its depth, kinds of modules, or
what selectors select. Blocks and selectors are those of block weights elsewhere, so a result can be given to a merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError
from ..merging.block_names import find_blocks
from ..merging.block_settings import select

BY = ("model", "blocks", "depth", "kinds", "selectors")
"""The ways to group tensors."""

KINDS = ("embedding", "resnet", "attention", "attn1", "attn2", "mlp", "ff", "norm")
"""Selectors of by=kinds, those that the model has, the last one counts; attn1 and attn2: self and cross attention."""

REST = "default"
"""The group of what nothing selects, as block weights call it."""


@dataclass(frozen=True)
class Groups:
    """Which tensors share a weight.

    Attributes:
        of: tensor name -> group.
        order: the groups, from input to output where they have a depth.
        place: group -> where it lies in the model, 0 to 1, for those that have a depth.
    """

    of: Mapping[str, str]
    order: tuple[str, ...]
    place: Mapping[str, float]


def group_tensors(names: Iterable[str], by: str, selectors: Sequence[str] = ()) -> Groups | None:
    """The groups of the tensors `names`; None where there is one for all (`by` is "model").

    Args:
        by: one of BY. "depth" has the groups of "blocks"; their weights are interpolated.
        selectors: of "selectors"; a tensor belongs to the last that selects it, and else to REST.

    Raises:
        ConfigError: an unknown way, or a selector that selects nothing.
    """
    names = list(names)
    if by not in BY:
        raise ConfigError(f"space.weights.by is {by!r}; choose one of {', '.join(BY)}.")
    if by == "model":
        return None
    blocks = find_blocks(names)
    if by in ("blocks", "depth"):
        places = {block: i / max(1, len(blocks.depth) - 1) for i, block in enumerate(blocks.depth)}
        return Groups(blocks.of, blocks.order, places)
    if by == "selectors" and not selectors:
        raise ConfigError(
            "space.weights.by=selectors needs space.weights.selectors, for example [attn1,attn2,IN]."
        )
    of = dict.fromkeys(names, REST)
    for selector in selectors if by == "selectors" else KINDS:
        try:
            chosen = select(selector, names, blocks)
        except ConfigError:
            if by == "selectors":
                raise
            continue  # this model has no such modules
        of |= dict.fromkeys(chosen, selector)
    order = tuple(dict.fromkeys(of.values()))
    if order == (REST,):
        raise ConfigError(
            "space.weights.by=kinds finds no kind of module in this model; choose blocks or selectors."
        )
    return Groups(of, order, {})


def interpolated(points: Sequence[float], groups: Groups) -> dict[str, float]:
    """Points equally spaced over the depth -> each group's weight; groups without a depth have the points' mean."""
    if len(points) < 2:
        raise ConfigError("Weights over the depth need 2 points or more: space.weights.points=5.")
    depth, mean = np.linspace(0, 1, len(points)), sum(points) / len(points)
    return {
        group: float(np.interp(groups.place[group], depth, points)) if group in groups.place else mean
        for group in groups.order
    }
