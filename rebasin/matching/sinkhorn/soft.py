"""B under soft permutations: its tensors, and the gradient by what the permutations are learned from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ...spec import Indices, Permutation, PermutationSpec, to_array
from ...spec.structure import is_whole
from ...types import State
from ..assignment.blocks import assign_all
from ..trained import Trained, through
from .operator import soft_permutation


class SoftMember:
    """A soft member of a spec's group, learned by Adam: X of every cell, S(X) of the group (see `operator`).

    Attributes:
        learned: cell -> X, [size, size].
    """

    def __init__(
        self,
        spec: PermutationSpec,
        start: Permutation,
        b: State,
        tau: float,
        iterations: int,
        noise: float,
        decay: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self._spec, self._b, self._tau, self._iterations = spec, b, tau, iterations
        random, values = torch.Generator().manual_seed(seed), dict[str, Tensor]()
        for name, cell in spec.cells.items():
            one = torch.zeros(cell.size, cell.size)
            one[torch.arange(cell.size), torch.from_numpy(start.index[name])] = 1
            values[name] = (one + noise * torch.randn(one.shape, generator=random)).to(device)
        self.learned = Trained(values, decay)
        self.names = [
            n for n, t in b.items() if spec.aliases.get(n, n) in spec.axes and t.is_floating_point()
        ]

    def matrices(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Cell -> how its neurons are mixed, [size, size]."""
        found: dict[str, Tensor] = {}
        for group in self._spec:
            found |= soft_permutation(group, values or self.learned.values, self._tau, self._iterations)
        return found

    def permutation(self) -> Permutation:
        """The legal permutation that maximises <X, P>."""
        return assign_all(self._spec, {name: x.detach().cpu() for name, x in self.learned.values.items()})

    def moved(self, matrices: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of B that move, mixed."""
        for name in self.names:
            yield name, self._mixed(name, matrices)

    def descend(self, slopes: Mapping[str, Tensor], rate: float) -> float:
        """One step against the gradient of a loss whose gradient by the moved tensors is `slopes`; its norm."""
        with torch.enable_grad():
            leaves = {name: x.detach().requires_grad_() for name, x in self.learned.values.items()}
            acting = self.matrices(leaves)
            ends = {name: matrix.detach().requires_grad_() for name, matrix in acting.items()}
            for name, slope in slopes.items():  # tensor by tensor: no second copy of B
                self._mixed(name, ends).backward(slope)
            through(acting, ends)
        found = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()}
        self.learned.step(found, rate)
        return float(sum(g.double().square().sum() for g in found.values())) ** 0.5

    def _mixed(self, name: str, matrices: Mapping[str, Tensor]) -> Tensor:
        tensor = self._b[name]
        for axis, sites in self._spec.axes[self._spec.aliases.get(name, name)].items():
            for cell, site in sites:
                tensor = mix(tensor, matrices[cell].to(tensor.dtype), axis, site.positions)
        return tensor


def mix(tensor: Tensor, matrix: Tensor, axis: int, positions: Indices) -> Tensor:
    """`tensor` with what stands at `positions` [n] of an axis mixed by `matrix` [n, n]."""
    whole = is_whole(positions, tensor.shape[axis])
    at = torch.from_numpy(to_array(positions)).to(tensor.device)
    own = tensor if whole else tensor.index_select(axis, at)
    made = (own.movedim(axis, -1) @ matrix.mT).movedim(-1, axis)
    return made if whole else tensor.index_copy(axis, at, made)
