"""Batches that are mappings: the latents, noise, timesteps and texts of a diffusion model's problems.

A column has a row for each sample: a tensor, a list, or a (nested) mapping of such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def batched(size: int, **columns: Any) -> list[dict[str, Any]]:
    """Columns of equal length, cut into batches of `size` rows; the last one may be shorter."""
    count = length(next(iter(columns.values())))
    return [
        {name: rows(column, slice(i, i + size)) for name, column in columns.items()}
        for i in range(0, count, size)
    ]


def rows(column: Any, which: slice | Tensor) -> Any:
    """These rows of a column."""
    if isinstance(column, Mapping):
        return {name: rows(part, which) for name, part in column.items()}
    return column[which]


def length(column: Any) -> int:
    """How many rows a column has."""
    return length(next(iter(column.values()))) if isinstance(column, Mapping) else len(column)


def first(column: Any) -> Tensor:
    """The first tensor of a column."""
    return next(leaf for leaf in pytree.tree_leaves(column) if isinstance(leaf, Tensor))


def repeated(column: Any, count: int) -> Any:
    """A column of one row, `count` times; one of so many rows already is itself."""
    return pytree.tree_map(lambda t: t.expand(count, *t.shape[1:]), column)


def joined(columns: Sequence[Any]) -> Any:
    """Columns one below the other."""
    return pytree.tree_map(lambda *parts: torch.cat(parts), *columns)
