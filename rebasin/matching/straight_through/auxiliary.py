"""The auxiliary weights of straight-through estimation: how they descend, and which permutation lies closest."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn, optim

from ...errors import ConfigError
from ...spec import Permutation
from ...types import State, widened
from ..weights.projection import Projected, Projector
from .midpoint import Ends

Optimizer = Literal["sgd", "adam"]
Schedule = Literal["constant", "cosine"]


class Auxiliary:
    """Weights w of what the spec moves, A's at first; in at least float32, since small steps would be lost otherwise.

    Each tensor has an optimiser of its own, so that its gradient can go before the next one is widened.
    """

    def __init__(self, ends: Ends, optimizer: Optimizer, lr: float, momentum: float) -> None:
        self.ends = ends
        self.weights = {
            name: nn.Parameter(ends.a[name].to(widened(ends.a[name].dtype), copy=True)) for name in ends.free
        }
        self.optimizers = {
            name: optim.SGD([weight], lr, momentum)
            if optimizer == "sgd"
            else optim.Adam([weight], lr, (momentum, 0.999))
            for name, weight in self.weights.items()
        }

    def descend(
        self, slope: dict[str, Tensor], share: float, rate: float, clip: float | None = None
    ) -> float:
        """One step against the gradient, which is `slope` times `share`; returns its norm.

        The gradients are taken out of `slope` one by one.

        Raises:
            ConfigError: the gradient is not finite.
        """
        squares = (float(part.to(widened(part.dtype)).square().sum()) for part in slope.values())
        norm = share * math.sqrt(math.fsum(squares))
        if not math.isfinite(norm):
            raise ConfigError(
                "The gradient of the objective is not finite: compute in float32 or bfloat16, or lower lr."
            )
        scale = share if clip is None else share * min(1.0, clip / (norm + 1e-6))
        for name, weight in self.weights.items():
            optimizer = self.optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = rate
            weight.grad = slope.pop(name).to(weight.dtype) * scale
            optimizer.step()
            weight.grad = None
        return norm

    def project(
        self, b: Projector, permutation: Permutation, most: int, seed: int, *, nearest: bool = False
    ) -> Projected:
        """Weight matching of `b` to w (algorithm 1), from `permutation`; `nearest`: of its midpoint with A to w."""
        a = self.ends.a
        target = {name: weight.detach() for name, weight in self.weights.items()}
        if nearest:
            # |w - (A + pi(B)) / 2| is smallest where <2w - A, pi(B)> is largest: |pi(B)| is |B| for every pi.
            target = {name: 2 * weight - a[name] for name, weight in target.items()}
        return b({name: target.get(name, a[name]) for name in self.ends.moved}, permutation, most, seed)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights, and the moments of their optimisers, as NAME/WHAT; the search goes on to change them."""
        found = {f"{name}/weight": weight.detach() for name, weight in self.weights.items()}
        for name, optimizer in self.optimizers.items():
            moments = optimizer.state[self.weights[name]]
            found |= {f"{name}/{what}": value for what, value in moments.items() if value is not None}
        return found

    def restore(self, tensors: State) -> None:
        """Take over what `tensors` gave."""
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in self.weights}
        for key in tensors:
            name, _, what = key.rpartition("/")
            if what == "weight":
                self.weights[name].data.copy_(tensors[key])
            else:
                moments[name][what] = tensors[key].clone()
        for name, optimizer in self.optimizers.items():
            if moments[name]:
                optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: moments[name]}})


def rate_of(schedule: Schedule, lr: float, step: int, steps: int) -> float:
    """The learning rate of a step; "cosine" ends at 0."""
    return lr if schedule == "constant" else lr * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
