"""Cost matrices from weights: what the objective gains from neuron j of B at the place of neuron i of A.

With everything else held fixed, the objective is linear in the permutation P of one cell (Ainsworth et al.,
section 3.2): a parameter W that the cell meets on an axis contributes <A, P pi(B)> = sum_i <A_i,
pi(B)_p(i)>, its slices along that axis. So

    C[i, j] = sum over the cell's sites of  w * <A_i, pi(B)_j>  =  sum over sites of  w * A @ pi(B)^T

with each tensor laid out as [neurons, everything else]. Weight matrices, convolution kernels, biases and
norm affines all enter that way. pi(B) has every permutation found so far applied, the cell's own included: j
counts places, not original neurons, and the identity stands for leaving things as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...spec import Indices, Site, indices, to_array
from ..assignment.blocks import Costs
from .accelerator import Accelerator
from .endpoints import Endpoints
from .products import Where

Choose = Callable[[str, int], bool]
"""(parameter, axis) -> whether the site is to be counted."""


class WeightCosts(Costs):
    """The costs of a pair of endpoints, computing only the blocks that are asked for."""

    def __init__(
        self, pair: Endpoints, accelerator: Accelerator | None = None, choose: Choose | None = None
    ) -> None:
        """`choose` leaves sites out; buffers are always left out."""
        self.pair, self.accelerator, self.choose = pair, accelerator, choose
        self.dtype = pair.dtype

    def sites(self, cell: str) -> dict[Where, list[Site]]:
        """(parameter, axis) at which the cell counts -> its sites there."""
        by_axis: dict[Where, list[Site]] = {}
        for site in self.pair.spec.cells[cell].sites:
            counts = site.parameter not in self.pair.spec.buffers
            if counts and (self.choose is None or self.choose(site.parameter, site.axis)):
                by_axis.setdefault((site.parameter, site.axis), []).append(site)
        return by_axis

    def coordinates(self, cell: str) -> int:
        """How many weights each of the cell's neurons has at these sites."""
        shapes = self.pair.spec.shapes
        return sum(
            math.prod(shapes[parameter]) // shapes[parameter][axis] * len(sites)
            for (parameter, axis), sites in self.sites(cell).items()
        )

    def slices(self, cell: str, *, widest: bool = False) -> Iterator[tuple[float, Tensor, Tensor]]:
        """(weight, A's, pi(B)'s) weights of the cell's neurons at each site, [n, m] in their own types; those of one
        tensor at a time, or with `widest` only of the one that has the most of them in the best layout.
        """
        shapes = self.pair.spec.shapes

        def width(where: Where) -> tuple[bool, int]:
            shape = shapes[where[0]]
            return where[1] == 0 and len(shape) > 1, math.prod(shape) // shape[where[1]]

        sites = self.sites(cell)
        chosen = [max(sites, key=width)] if widest and sites else sites
        everyone = range(self.pair.index[cell].size)
        for parameter, axis in chosen:
            a, b, own = self.pair.a(parameter), self.pair.b(parameter), sites[parameter, axis]
            for x, y in zip(_parts(a, axis, own, everyone), _parts(b, axis, own, everyone), strict=True):
                yield self.pair.weight[parameter], x, y

    def block(self, cell: str, neurons: Indices) -> Tensor:
        """C of `neurons` at each other's places, [k, k]."""
        return self._products(cell, neurons, 1)[0]

    def diagonal(self, cell: str, blocks: Sequence[Indices]) -> list[Tensor]:
        """The blocks on C's diagonal, those of one size in one batch of products."""
        found: dict[int, Tensor] = {}
        for size in {len(block) for block in blocks}:
            chosen = [k for k, block in enumerate(blocks) if len(block) == size]
            together = indices(np.concatenate([to_array(blocks[k]) for k in chosen]))
            found |= zip(chosen, self._products(cell, together, len(chosen)), strict=True)
        return [found[k] for k in range(len(blocks))]

    def duals(self, cell: str, neurons: Indices) -> Tensor | None:
        return None if self.accelerator is None else self.accelerator.duals(cell, neurons)

    def learn(self, cell: str, neurons: Indices, duals: Tensor) -> None:
        if self.accelerator is not None:
            self.accelerator.learn(cell, neurons, duals)

    def _products(self, cell: str, neurons: Indices, count: int) -> Tensor:
        """[count, k, k] for `count` blocks of k neurons each, which `neurons` lists one after the other."""
        sites = self.sites(cell)
        compute = partial(self._product, sites, neurons)
        if self.accelerator is not None and cell in self.accelerator.products.kept:
            return self.accelerator.products.sum(cell, neurons, count, list(sites), compute)
        k = len(neurons) // count
        total = torch.zeros(count, k, k, dtype=self.dtype, device=self.pair.device)
        vectors_a, vectors_b = [], []
        for parameter, axis in sites:
            a, b = self.pair.a(parameter), self.pair.b(parameter)
            if a.numel() > a.shape[axis]:
                compute(total, (parameter, axis), a, b)
                continue
            for x, y in self._pieces(a, b, axis, sites[parameter, axis], neurons):
                vectors_a.append(x * self.pair.weight[parameter])
                vectors_b.append(y)
        if vectors_a:  # biases and norm affines: one product of rank m instead of m outer products
            _add(total, torch.cat(vectors_a, dim=1), torch.cat(vectors_b, dim=1), 1.0)
        return total

    def _product(
        self,
        sites: Mapping[Where, Sequence[Site]],
        neurons: Indices,
        total: Tensor,
        where: Where,
        a: Tensor,
        b: Tensor,
    ) -> None:
        """total [count, k, k] += weight * the products of the slices of `neurons` in `a` and in `b`."""
        parameter, axis = where
        for x, y in self._pieces(a, b, axis, sites[where], neurons):
            _add(total, x, y, self.pair.weight[parameter])

    def _pieces(
        self, a: Tensor, b: Tensor, axis: int, sites: Sequence[Site], neurons: Indices
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(_parts(a, axis, sites, neurons), _parts(b, axis, sites, neurons), strict=True):
            yield x.to(self.dtype), y.to(self.dtype)


@contextmanager
def tensor_cores(allowed: bool) -> Iterator[None]:
    """For the block, let CUDA compute float32 products from factors rounded to TF32, or forbid it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _add(total: Tensor, a: Tensor, b: Tensor, weight: float) -> None:
    """total [count, k, k] += weight * a @ b^T, block by block; a and b are [count * k, m]."""
    count, k, _ = total.shape
    if count == 1:
        total[0].addmm_(a, b.T, alpha=weight)
    else:
        total.baddbmm_(a.reshape(count, k, -1), b.reshape(count, k, -1).transpose(1, 2), alpha=weight)


def _parts(tensor: Tensor, axis: int, sites: Sequence[Site], neurons: Indices) -> list[Tensor]:
    """The slices of `neurons` along `axis`, laid out as [k, everything else]; views of `tensor` wherever
    that is possible.

    A cell with few sites on the axis (the halves of a GEGLU) gives one part a site, one with many (every
    pixel of a flattened channel) one part with the sites side by side.
    """
    positions = [_positions(site, neurons) for site in sites]
    if all(isinstance(p, range) and p.step == 1 for p in positions):
        return [tensor.narrow(axis, p[0], len(p)).movedim(axis, 0).reshape(len(p), -1) for p in positions]
    flat = np.stack([to_array(p) for p in positions], axis=1)
    chosen = tensor.index_select(axis, torch.from_numpy(flat.reshape(-1)).to(tensor.device))
    return [chosen.movedim(axis, 0).reshape(len(flat), -1)]


def _positions(site: Site, neurons: Indices) -> Indices:
    """Where `neurons` sit on the site's axis."""
    if isinstance(neurons, range):
        return site.positions[neurons.start : neurons.stop : neurons.step]
    return indices(to_array(site.positions)[neurons])
