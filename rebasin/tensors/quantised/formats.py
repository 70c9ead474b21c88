"""Each format as pure functions: the numbers that tensors of a file stand for, and such tensors for other numbers.

`parts` are a layer's tensors by what they are for: "codes", "scale" and, in nvfp4, "scale_2".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tiles
from .grids import GRIDS, PAIRS, Grid
from .tiles import Tile

Shape = tuple[int, ...]
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Format:
    """Codes of any of the eight-bit types and a scale for all, for each row, or, if it is `tiled`, for each tile.

    Attributes:
        block: the length of a tile, where a file tells it; 0: by the shapes alone.
        name: if it has one that tells more than the type of its codes.
    """

    block: int = 0
    tiled: bool = False
    name: str = ""

    def shape(self, codes: Shape) -> Shape:
        """The shape of the weight that codes of this shape are, paddings included."""
        return codes

    def tile(self, weight: Shape, scale: Shape) -> Tile | None:
        """The tiles of a weight of this shape which scales of that shape belong to; None if they do not fit."""
        rows, columns = matrix_of(weight)
        if len(weight) == 1 and scale == weight:
            return Tile(1, 1)
        own = tuple(n for i, n in enumerate(scale) if i < 2 or n > 1)
        if prod(scale) == 1:
            return Tile(rows, columns)
        if weight and scale and len(weight) > 1 and prod(scale) == scale[0] == rows:
            return Tile(1, columns)
        if not self.tiled or len(own) != 2 or len(weight) != 2:
            return None
        sizes = [{n, 1, self.block or -(-n // max(k, 1))} for n, k in zip(weight, own, strict=True)]
        fits = [
            [s for s in size if s and -(-n // s) == k] for size, n, k in zip(sizes, weight, own, strict=True)
        ]
        return Tile(max(fits[0]), max(fits[1])) if all(fits) else None

    def dequantise(self, parts: Parts, shape: Shape) -> Tensor:
        """The weight [shape] in float32."""
        codes, scale = parts["codes"], parts["scale"].to(torch.float32)
        tile = self._tile(shape, scale)
        by = tiles.spread(scale.reshape(tile.count(*matrix_of(shape))), tile, *matrix_of(shape))
        return (tiles.matrix(codes.to(torch.float32)) * by).reshape(shape)

    def quantise(self, weight: Tensor, like: Parts) -> dict[str, Tensor]:
        """Parts of the same types and shapes as `like` for another weight, which has the shape of that in `like`.

        A tile whose values are those of one that was there keeps its scale and so its values; all others have the
        scale of their largest value.
        """
        codes, scale = like["codes"], like["scale"]
        rows, columns = matrix_of(tuple(weight.shape))
        tile = self._tile(tuple(weight.shape), scale)
        count = tile.count(rows, columns)
        wide = scale.to(torch.float32).reshape(count)
        grid = GRIDS.get(codes.dtype)
        if grid is None:  # numbers that someone has made of codes, beside their scale
            by = tiles.spread(wide, tile, rows, columns)
            return {
                "codes": (tiles.matrix(weight) / by).reshape(weight.shape).to(codes.dtype),
                "scale": scale,
            }

        def fresh(sizes: Tensor) -> Tensor:
            by = (sizes / grid.largest).to(scale.dtype).to(torch.float32)
            return torch.where(by > 0, by, 1.0)

        old = tiles.matrix(self.dequantise(like, tuple(weight.shape)))
        found, by = tiles.quantised(tiles.matrix(weight), tile, grid, fresh, (old, wide))
        return {"codes": found.reshape(weight.shape), "scale": by.reshape(scale.shape).to(scale.dtype)}

    def fits(self, dtypes: Mapping[str, torch.dtype], weight: Shape, shapes: Mapping[str, Shape]) -> bool:
        """Whether parts of these types and shapes are a weight of that shape."""
        return dtypes["scale"].is_floating_point and self.tile(weight, shapes["scale"]) is not None

    def _tile(self, shape: Shape, scale: Tensor) -> Tile:
        tile = self.tile(shape, tuple(scale.shape))
        assert tile is not None, "looked at when the file was opened"
        return tile


@dataclass(frozen=True)
class Blocks(Format):
    """What block formats share: matrices, padded to full blocks, and swizzled scales of `block` entries of a row."""

    grid: Grid = GRIDS[torch.float8_e4m3fn]
    scales: tuple[torch.dtype, ...] = ()
    pad: int = 32

    def stored(self, weight: Shape) -> Shape:
        """The shape of a matrix with its paddings."""
        rows, columns = weight
        return -(-rows // self.pad) * self.pad, -(-columns // self.pad) * self.pad

    def fits(self, dtypes: Mapping[str, torch.dtype], weight: Shape, shapes: Mapping[str, Shape]) -> bool:
        if len(weight) != 2 or dtypes["codes"] != self.grid.dtype or dtypes["scale"] not in self.scales:
            return False
        whole = self.shape(shapes["codes"])
        room = whole in (weight, self.stored(weight)) and whole[1] % self.block == 0
        return room and prod(shapes["scale"]) == prod(tiles.padded(whole[0], whole[1] // self.block))

    def factors(self, parts: Parts) -> Tensor:
        """What the codes of each block are multiplied with: [rows, blocks] in float32."""
        raise NotImplementedError

    def dequantise(self, parts: Parts, shape: Shape) -> Tensor:
        numbers = self.grid.numbers(parts["codes"])
        by = tiles.spread(self.factors(parts), Tile(1, self.block), *numbers.shape)
        return (numbers * by)[: shape[0], : shape[1]].contiguous()

    def _whole(self, weight: Tensor, like: Parts) -> Tensor:
        rows, columns = self.shape(tuple(like["codes"].shape))
        return F.pad(weight, (0, columns - weight.shape[1], 0, rows - weight.shape[0]))


@dataclass(frozen=True)
class MXFP8(Blocks):
    """e4m3 with a power of two for 32 entries of a row, stored as its exponent (e8m0)."""

    block: int = 32
    name: str = "mxfp8"
    scales: tuple[torch.dtype, ...] = (torch.uint8, torch.float8_e8m0fnu)

    def factors(self, parts: Parts) -> Tensor:
        rows, columns = parts["codes"].shape
        stored = tiles.unswizzled(parts["scale"].view(torch.uint8), rows, columns // self.block)
        return torch.where(stored == 0, 0.0, torch.exp2(stored.to(torch.float32) - 127))

    def quantise(self, weight: Tensor, like: Parts) -> dict[str, Tensor]:
        whole = self._whole(weight, like)

        def fresh(sizes: Tensor) -> Tensor:
            mantissa, exponent = torch.frexp(
                sizes / self.grid.largest
            )  # sizes = mantissa 2^exponent, 1/2 <= mantissa < 1
            up = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-126, 127)
            return torch.where(sizes == 0, 0.0, torch.exp2(up.to(torch.float32)))

        old = self.dequantise(like, tuple(whole.shape)), self.factors(like)
        codes, by = tiles.quantised(whole, Tile(1, self.block), self.grid, fresh, old)
        exponents = torch.where(by == 0, 0, torch.log2(by).round() + 127).to(torch.uint8)
        stored = tiles.swizzled(exponents).reshape(like["scale"].shape).view(like["scale"].dtype)
        return {"codes": codes, "scale": stored}


@dataclass(frozen=True)
class NVFP4(Blocks):
    """Pairs of e2m1 with an e4m3 for 16 entries of a row and a float32 for all."""

    block: int = 16
    name: str = "nvfp4"
    grid: Grid = PAIRS
    scales: tuple[torch.dtype, ...] = (torch.float8_e4m3fn,)
    pad: int = 16

    def shape(self, codes: Shape) -> Shape:
        return (*codes[:-1], 2 * codes[-1]) if codes else codes

    def fits(self, dtypes: Mapping[str, torch.dtype], weight: Shape, shapes: Mapping[str, Shape]) -> bool:
        one = dtypes["scale_2"].is_floating_point and prod(shapes["scale_2"]) == 1
        return one and super().fits(dtypes, weight, shapes)

    def factors(self, parts: Parts) -> Tensor:
        rows, half = parts["codes"].shape
        bits = parts["scale"].view(torch.uint8)
        stored = tiles.unswizzled(bits, rows, 2 * half // self.block).contiguous().view(torch.float8_e4m3fn)
        return parts["scale_2"].to(torch.float32).reshape(1, 1) * stored.to(torch.float32)

    def quantise(self, weight: Tensor, like: Parts) -> dict[str, Tensor]:
        whole = self._whole(weight, like)
        old, scale_2 = self.dequantise(like, tuple(whole.shape)), like["scale_2"]
        factors = self.factors(like)
        size = whole.abs().max()
        if size != old.abs().max():
            most = size / (self.grid.largest * torch.finfo(torch.float8_e4m3fn).max)
            scale_2 = torch.where(most > 0, most, 1.0).reshape(scale_2.shape).to(scale_2.dtype)
        of_all = scale_2.to(torch.float32).reshape(1, 1)

        def rounded(factors: Tensor) -> Tensor:
            ratio = (factors / of_all).clamp(max=torch.finfo(torch.float8_e4m3fn).max)
            return ratio.to(torch.float8_e4m3fn)

        def fresh(sizes: Tensor) -> Tensor:
            return rounded(sizes / self.grid.largest).to(torch.float32) * of_all

        known = (old, factors) if torch.equal(scale_2, like["scale_2"]) else None
        codes, by = tiles.quantised(whole, Tile(1, self.block), self.grid, fresh, known)
        stored = tiles.swizzled(rounded(by).view(torch.uint8)).reshape(like["scale"].shape)
        return {"codes": codes, "scale": stored.view(torch.float8_e4m3fn), "scale_2": scale_2}


def matrix_of(shape: Shape) -> tuple[int, int]:
    """The rows and columns of `tiles.matrix` of a weight of this shape."""
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))


SCALED = Format()
TILED = Format(tiled=True)

FORMATS: dict[str, Format] = {
    "float8_e4m3fn": SCALED,
    "float8_e5m2": SCALED,
    "float8_e4m3fn_rowwise": SCALED,
    "float8_e4m3fn_blockwise": TILED,
    "int8_tensorwise": SCALED,
    "int8_blockwise": TILED,
    "mxfp8": MXFP8(),
    "nvfp4": NVFP4(),
}
"""Formats by the names that ComfyUI's marks have for them."""
