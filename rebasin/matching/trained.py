"""Values that a search learns by Adam, and all that it needs to go on with them after an interruption."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, optim

from ..errors import ConfigError
from ..types import State, is_finite


class Trained:
    """Named tensors and their optimiser.

    Attributes:
        values: name -> what is learned.
    """

    def __init__(self, values: Mapping[str, Tensor], decay: float = 0.0) -> None:
        self.values = dict(values)
        self._adam = optim.AdamW(list(self.values.values()), weight_decay=decay)

    def step(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        """One step against the gradients.

        Raises:
            ConfigError: one is not finite, or so large that its square is not.
        """
        if not all(is_finite(gradient.square()) for gradient in gradients.values()):
            raise ConfigError(
                "The gradient of the objective is too large or not finite: compute in float32 or bfloat16, lower lr, "
                "or divide the loss by its size."
            )
        for name, x in self.values.items():
            x.grad = gradients[name]
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()

    def copy(self) -> dict[str, Tensor]:
        return {name: x.clone() for name, x in self.values.items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The values, and the moments of their optimiser, as NAME/WHAT; the search goes on to change them."""
        found = {f"{name}/value": x for name, x in self.values.items()}
        for name, x in self.values.items():
            found |= {f"{name}/{what}": value for what, value in self._adam.state[x].items()}
        return found

    def restore(self, tensors: State) -> None:
        """Take over what `tensors` gave."""
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in self.values}
        for key in tensors:
            name, _, what = key.rpartition("/")
            if what == "value":
                self.values[name].copy_(tensors[key])
            else:
                moments[name][what] = tensors[key].clone()
        state = {place: found for place, found in enumerate(moments.values()) if found}
        if state:
            self._adam.load_state_dict({**self._adam.state_dict(), "state": state})


def through(
    acting: Mapping[str, Tensor] | Mapping[tuple[str, int], Tensor],
    leaves: Mapping[str, Tensor] | Mapping[tuple[str, int], Tensor],
) -> None:
    """Carry the gradients that were collected at `leaves`, detached copies of `acting`, on to what made these."""
    reached = [key for key, leaf in leaves.items() if leaf.grad is not None]
    torch.autograd.backward([acting[key] for key in reached], [leaves[key].grad for key in reached])  # type: ignore[index]
