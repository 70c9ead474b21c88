"""The loss on the plane through A, B and B aligned (Git Re-Basin, figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ...errors import ConfigError
from ...objectives.base import Objective
from ...reporting.console import Console
from ...tensors.modules import with_weights
from ...types import ProgressEvent, State
from ..stages import aligned_pair


def study(
    cfg: DictConfig,
    console: Console,
    points: int = 15,
    margin: float = 0.5,
    split: str = "heldout",
    batches: int = 1,
) -> list[dict[str, Any]]:
    """One row: x, y (`points` values each), loss [points, points] with y in rows, places {name: [x, y]}.

    The plane has its origin at A and its first axis towards B aligned; both are in units of |B aligned - A|. The grid
    goes beyond the three models by `margin` units. The loss is over the first `batches` batches of the split.

    Raises:
        ConfigError: fewer than 2 points, or no neuron moved, so that there is no plane.
    """
    if points < 2:
        raise ConfigError(f"study.points is {points}, but a grid has at least 2.")
    pair = aligned_pair(cfg, console)
    if pair.match.as_alignment.is_identity:
        raise ConfigError(
            "Nothing moved, so A, B and B aligned lie on one line: choose another pair or algorithm."
        )
    with console.stage("evaluate"):
        plane = Plane(pair.a, pair.aligned, pair.b)
        (x_far, y_far) = plane.place(pair.b)
        xs = _grid(min(0.0, x_far) - margin, max(1.0, x_far) + margin, points)
        ys = _grid(min(0.0, y_far) - margin, y_far + margin, points)
        chosen = pair.task.batches[split][:batches]
        loss = []
        for row, y in enumerate(ys):
            loss.append([_loss(pair.task.model, pair.task.objective, chosen, plane.at(x, y)) for x in xs])
            console.progress(ProgressEvent("plane", row + 1, len(ys)))
    names = {"A": [0.0, 0.0], "B aligned": [1.0, 0.0], "B": [x_far, y_far]}
    return [{"split": split, "x": xs, "y": ys, "loss": loss, "places": names}]


class Plane:
    """The plane through three states; coordinates of `origin` are (0, 0) and those of `unit` (1, 0).

    Buffers that are no floating point numbers stay those of `origin`.
    """

    def __init__(self, origin: State, unit: State, third: State) -> None:
        self.origin = {name: tensor.detach() for name, tensor in origin.items()}
        self.moving = {name: tensor for name, tensor in self.origin.items() if tensor.is_floating_point()}
        self.u, w = self._from_origin(unit), self._from_origin(third)
        self.length = float(self.u.norm())
        if self.length == 0:
            raise ConfigError("Two of the three models are the same, so they span no plane.")
        v = w - (w @ self.u) / self.length**2 * self.u
        height = float(v.norm())
        if height <= 1e-9 * self.length:
            raise ConfigError("The three models lie on one line, so they span no plane.")
        self.v = v * (self.length / height)

    def place(self, state: State) -> tuple[float, float]:
        """The coordinates of a state's projection on the plane."""
        away = self._from_origin(state)
        return float(away @ self.u) / self.length**2, float(away @ self.v) / self.length**2

    def at(self, x: float, y: float) -> dict[str, Tensor]:
        """The state at (x, y)."""
        steps = (x * self.u + y * self.v).split([tensor.numel() for tensor in self.moving.values()])
        moved = zip(self.moving.items(), steps, strict=True)
        return self.origin | {name: (t.double() + s.view_as(t)).to(t.dtype) for (name, t), s in moved}

    def _from_origin(self, state: State) -> Tensor:
        """The way to a state, float64 [numbers in all floating point tensors]."""
        return torch.cat(
            [state[n].detach().double().flatten() - t.double().flatten() for n, t in self.moving.items()]
        )


def _grid(low: float, high: float, points: int) -> list[float]:
    return torch.linspace(low, high, points, dtype=torch.float64).tolist()


def _loss(model: nn.Module, objective: Objective, batches: Sequence[Any], state: State) -> float:
    with with_weights(model, state):
        return objective.evaluate(model, batches)["loss"]
