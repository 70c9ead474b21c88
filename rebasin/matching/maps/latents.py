"""What is learned of a model's maps, without conditions: a latent x for each continuous group, 0 for the identity.

    rotations                   exp(S),  S = x - x^T, skew; for those that keep the ones in what is orthogonal to them
    invertible                  (I - x/2)^-1 (I + x/2): x and -x are each other's inverses
    scales, positive or not     exp(x)

The gradient goes through the maps tensor by tensor, so that no second copy of the moved model is kept for it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ...spec import DIAGONAL, ContinuousGroup, PermutationSpec
from ...spec.continuous import ones_complement, power
from ...spec.mapped import MappedState
from ..trained import Trained, through

CONDITION = 30.0
"""Invertible matrices beyond this condition number are drawn back half the way to the identity."""

FACTOR = 1e4
"""Scales stay within this factor of 1: further out they turn nothing down that is not down already."""

BALANCED = 20.0
"""Balanced scales stay within this factor of their mean, so that a norm's eps does not see them."""


def latent_shape(group: ContinuousGroup) -> tuple[int, ...]:
    if group.kind in DIAGONAL:
        return group.shape
    n = group.size - (group.kind == "rotations that keep ones")
    return (group.count, n, n)


def matrices(group: ContinuousGroup, latent: Tensor) -> Tensor:
    """The matrices [count, size, size] (or scales [neurons]) of a group for what is learned; differentiable."""
    if group.kind in DIAGONAL:
        return latent.exp()
    if group.kind == "invertible":
        one = torch.eye(group.size, dtype=latent.dtype, device=latent.device)
        return torch.linalg.solve(one - latent / 2, one + latent / 2)
    turned = torch.linalg.matrix_exp(latent - latent.mT)
    if group.kind == "rotations":
        return turned
    basis = ones_complement(group.size).to(latent)
    return basis @ turned @ basis.mT + 1 / group.size


class Latents(Trained):
    """A model's tensors under maps that are learned, by Adam.

    Attributes:
        values: group -> its latent.
        names: the tensors that some map acts on.

    Args:
        balanced: groups of scales that keep a geometric mean of 1.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        groups: Sequence[ContinuousGroup],
        tensors: Mapping[str, Tensor],
        device: torch.device,
        balanced: Collection[str] = (),
    ) -> None:
        self._balanced = set(balanced)
        self.groups = {group.name: group for group in groups}
        super().__init__({g.name: torch.zeros(latent_shape(g), device=device) for g in groups})
        sites = {site.parameter for group in groups for site in group.sites}
        self.names = [name for name in tensors if spec.aliases.get(name, name) in sites]
        self._powers = sorted({(group.name, site.power) for group in groups for site in group.sites})
        unset = dict.fromkeys(self.values, torch.empty(0))  # what acts is in `powers`
        self._view = MappedState(spec.continuous, unset, spec.aliases, tensors)

    def _acting(self, latents: Mapping[str, Tensor]) -> dict[tuple[str, int], Tensor]:
        """(group, exponent) -> what acts at its sites of that exponent."""
        maps = {name: matrices(self.groups[name], x) for name, x in latents.items()}
        return {(name, e): power(self.groups[name].kind, maps[name], e) for name, e in self._powers}

    def moved(self) -> Iterator[tuple[str, Tensor]]:
        """Those tensors that some map acts on, one after the other: all at once would be another copy of the model."""
        with torch.no_grad():
            self._view.powers = self._acting(self.values)
        for name in self.names:
            with torch.no_grad():
                tensor = self._view[name]
            yield name, tensor

    def descend(self, slopes: Mapping[str, Tensor], share: float, rate: float) -> None:
        """One step against the gradient; that by the moved tensors is `slopes` times `share`.

        Raises:
            ConfigError: it is not finite.
        """
        self.step({name: slope.mul_(share) for name, slope in self.gradient(slopes).items()}, rate)
        self._guard()

    def gradient(self, slopes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradient by the latents, of a loss whose gradient by the moved tensors is `slopes`."""
        with torch.enable_grad():
            latents = {name: x.detach().requires_grad_() for name, x in self.values.items()}
            acting = self._acting(latents)
            leaves = {key: matrix.detach().requires_grad_() for key, matrix in acting.items()}
            self._view.powers = leaves
            for name, slope in slopes.items():
                self._view[name].backward(slope)
            through(acting, leaves)
        return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in latents.items()}

    def _guard(self) -> None:
        """Draw matrices back that are about to have no inverse, and scales that are about to be 0 or infinite."""
        for name, group in self.groups.items():
            if group.kind in DIAGONAL:
                x = self.values[name]
                if name in self._balanced:
                    x -= x.mean()
                    x *= min(1.0, math.log(BALANCED) / float(x.abs().max().clamp_min(1e-30)))
                x.clamp_(-math.log(FACTOR), math.log(FACTOR))
            elif group.kind == "invertible":
                x = self.values[name]
                condition = torch.linalg.cond(matrices(group, x.double()))
                x[~(condition < CONDITION)] *= 0.5

    def maps(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The maps as an `Alignment` takes them, float64; those of `values` if given."""
        return {n: matrices(self.groups[n], x.double().cpu()) for n, x in (values or self.values).items()}


def turned(groups: Mapping[str, ContinuousGroup], maps: Mapping[str, Tensor]) -> dict[str, float]:
    """How far maps are from the identity, |M - I| / sqrt(n) by group: 0 not at all, sqrt 2 a random rotation."""
    return {
        name: float((found - groups[name].identity()).norm()) / math.sqrt(groups[name].neurons)
        for name, found in maps.items()
    }
