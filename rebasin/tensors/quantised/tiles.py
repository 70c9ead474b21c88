"""Weights as matrices that fall into tiles, each of which has a scale: of all, of a row, of 32 entries of a row, ..."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .grids import Grid


class Tile(NamedTuple):
    """Rows and columns of a tile; the last ones of a matrix may be cut off."""

    rows: int
    columns: int

    def count(self, rows: int, columns: int) -> tuple[int, int]:
        """How many tiles a matrix has below and beside each other."""
        return -(-rows // self.rows), -(-columns // self.columns)


def matrix(weight: Tensor) -> Tensor:
    """A weight [m, ...] as a matrix [m, n]; a vector [n] is one row."""
    return weight.reshape(weight.shape[0], -1) if weight.dim() > 1 else weight.reshape(1, -1)


def largest(weight: Tensor, tile: Tile) -> Tensor:
    """The largest absolute value of each tile of a matrix [m, n]: [tiles below each other, tiles beside each other]."""
    down, across = tile.count(*weight.shape)
    size = weight.abs()
    more = across * tile.columns - weight.shape[1], down * tile.rows - weight.shape[0]
    if any(more):
        size = F.pad(size, (0, more[0], 0, more[1]))
    return size.reshape(down, tile.rows, across, tile.columns).amax((1, 3))


def spread(scale: Tensor, tile: Tile, rows: int, columns: int) -> Tensor:
    """One number for each tile as what broadcasts to a matrix [rows, columns]."""
    if scale.shape[0] > 1 and tile.rows > 1:
        scale = scale.repeat_interleave(tile.rows, 0)[:rows]
    if scale.shape[1] > 1 and tile.columns > 1:
        scale = scale.repeat_interleave(tile.columns, 1)[:, :columns]
    return scale


def known(sizes: Tensor, scales: Tensor, wanted: Tensor) -> Tensor:
    """The scale of a tile of the old weight that has the same largest value, NaN if there is none.

    So a tile finds its scale again wherever a permutation has moved it, if it has not come apart.
    """
    order = sizes.reshape(-1).argsort()
    old = sizes.reshape(-1)[order]
    place = torch.searchsorted(old, wanted.reshape(-1)).clamp_(max=len(old) - 1)
    found = torch.where(old[place] == wanted.reshape(-1), scales.reshape(-1)[order][place], torch.nan)
    return found.reshape(wanted.shape)


def quantised(
    weight: Tensor,
    tile: Tile,
    grid: Grid,
    fresh: Callable[[Tensor], Tensor],
    old: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """The codes of a matrix [m, n] in float32, and the scale of each tile in float32.

    Args:
        fresh: the scales by the tiles' largest values.
        old: the matrix that was there before and its scales. A tile that these give to the bit keeps its scale.
    """
    sizes = largest(weight, tile)
    scale = fresh(sizes)

    def coded(scale: Tensor) -> Tensor:
        by = spread(scale, tile, *weight.shape)
        return grid.codes(weight / torch.where(by == 0, 1.0, by))

    found = sizes.new_full(sizes.shape, torch.nan)
    if old is not None:
        found = known(largest(old[0], tile), old[1], sizes)
    if bool(found.isnan().all()):
        return coded(scale), scale
    tried = torch.where(found.isnan(), scale, found)
    codes = coded(tried)
    numbers = grid.numbers(codes).mul_(spread(tried, tile, *weight.shape))
    lost = (largest(numbers.sub_(weight), tile) != 0) & ~found.isnan()
    if not bool(lost.any()):
        return codes, tried
    mixed = torch.where(lost, scale, tried)
    return coded(mixed), mixed


def swizzled(scales: Tensor) -> Tensor:
    """Scales [m, n] in the order in which tensor cores take them: [m up to a multiple of 128, n up to one of 4].

    Squares of 128 rows and 4 columns lie one after another; in each, rows i, i + 32, i + 64 and i + 96 are beside
    each other. The layout is that of cuBLAS, "1D block scaling factors".
    """
    rows, columns = padded(*scales.shape)
    whole = scales.new_zeros(rows, columns)
    whole[: scales.shape[0], : scales.shape[1]] = scales
    parts = whole.reshape(rows // 128, 4, 32, columns // 4, 4)
    return parts.permute(0, 3, 2, 1, 4).reshape(rows, columns)


def unswizzled(stored: Tensor, rows: int, columns: int) -> Tensor:
    """Scales [rows, columns], from `swizzled`."""
    high, wide = padded(rows, columns)
    parts = stored.reshape(high // 128, wide // 4, 32, 4, 4)
    return parts.permute(0, 3, 2, 1, 4).reshape(high, wide)[:rows, :columns]


def padded(rows: int, columns: int) -> tuple[int, int]:
    """The shape in which scales [rows, columns] are stored swizzled."""
    return -(-rows // 128) * 128, -(-columns // 4) * 4
