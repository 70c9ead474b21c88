"""The loss along the straight line between two states, and its barrier.

Two definitions of the barrier are in use and both are reported (Ainsworth et al., "Git Re-Basin",
2209.04836): the paper's text measures the loss against the line between the endpoints' losses, the paper's
code against their mean. They agree where the endpoints are equally good.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..arguments import typed
from ..errors import CheckpointError, ConfigError
from ..merging.inputs import check_names, with_ties
from ..merging.interpolate import interpolate_tensor
from ..objectives.base import figures_of
from ..tensors.modules import restored
from ..types import Progress, State, brief, tell

Evaluate = Callable[[nn.Module], float | Mapping[str, float]]


@brief
@dataclass(frozen=True)
class Curve:
    """Losses (lower is better) and other figures along the line from A to B.

    Attributes:
        lambdas: where it was measured, from 0 (A) to 1 (B).
        losses: the loss there, exactly as measured.
        metrics: whatever else `evaluate` returned, by name, one value for each lambda.
        barrier: max over lambda of loss(lambda) - [(1 - lambda) loss(0) + lambda loss(1)]; never negative.
        barrier_mean: max over lambda of loss(lambda) - [loss(0) + loss(1)] / 2.
        argmax: the lambda where `barrier` is reached.
        seconds: wall time of the whole measurement.
    A loss that is not a number makes both barriers not a number, with `argmax` at the first such lambda.
    """

    lambdas: tuple[float, ...]
    losses: tuple[float, ...]
    metrics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    barrier: float = math.nan
    barrier_mean: float = math.nan
    argmax: float = math.nan
    seconds: float = 0.0

    @classmethod
    def measured(
        cls,
        lambdas: Sequence[float],
        losses: Sequence[float],
        metrics: Mapping[str, Sequence[float]] | None = None,
        seconds: float = 0.0,
    ) -> "Curve":
        """Build a curve from its points; the barriers are computed here.

        Raises ConfigError unless the lambdas rise from 0 to 1 and every series has one value for each of
        them.
        """
        grid = tuple(float(lam) for lam in lambdas)
        values = tuple(float(loss) for loss in losses)
        series = {name: tuple(float(v) for v in column) for name, column in (metrics or {}).items()}
        if len(grid) < 2 or grid[0] != 0 or grid[-1] != 1 or any(b <= a for a, b in pairwise(grid)):
            raise ConfigError("The lambdas of a curve must rise from 0 to 1, both ends included.")
        for name, column in {"loss": values, **series}.items():
            if len(column) != len(grid):
                raise ConfigError(f"The curve has {len(grid)} lambdas but {len(column)} values of '{name}'.")
        excess = [loss - _line(values, lam) for lam, loss in zip(grid, values, strict=True)]
        top = _argmax(excess)
        above_mean = values[_argmax(values)] - (values[0] + values[-1]) / 2
        return cls(grid, values, series, excess[top], above_mean, grid[top], seconds)

    def drop(self, metric: str) -> float:
        """The barrier of a figure that is better when higher (accuracy): max of line minus value, >= 0."""
        if metric not in self.metrics:
            known = ", ".join(self.metrics) or "none"
            raise ConfigError(f"This curve has no metric '{metric}': it has {known}.")
        values = self.metrics[metric]
        gaps = [_line(values, lam) - value for lam, value in zip(self.lambdas, values, strict=True)]
        return gaps[_argmax(gaps)]

    def at(self, lam: float, metric: str | None = None) -> float:
        """The loss, or a metric, at the lambda nearest to `lam`; an odd number of points has the midpoint, 0.5."""
        values = self.losses if metric is None else self.metrics[metric]
        return values[min(range(len(self.lambdas)), key=lambda i: abs(self.lambdas[i] - lam))]


@typed
def barrier(
    model: nn.Module,
    state_a: State,
    state_b: State,
    evaluate: Evaluate,
    points: int = 25,
    progress: Progress | None = None,
    repair: Callable[[State, float], State] | None = None,
) -> Curve:
    """Evaluate `points` equally spaced models on the line from A to B, both endpoints included.

    BatchNorm's running statistics are part of the states and are interpolated with the rest. Each point is
    rounded to A's dtype first, as the saved merge would be, and then loaded into `model`; when this returns,
    or raises, the model's tensors and training flags are as they were.

    Args:
        model: the architecture; its own weights do not matter and do not change.
        state_a, state_b: mappings from the names of `model.state_dict()` to tensors, lazy ones too (each
            tensor is then read once for each point). Names that the model ties to a given one may be absent.
        evaluate: takes the model, returns the loss, or a mapping with "loss" and other figures.
        points: 2 or more; 25 is the paper's.
        progress: called after each point with stage, step, total, lam, loss, seconds.
        repair: makes of each model between the ends, and lambda, the one that is evaluated; see `rebasin.repair`.

    Raises:
        CheckpointError: the states do not fit each other or the model; names the tensor.
        ConfigError: fewer than 2 points, or `evaluate` returns something else.
    """
    if points < 2:
        raise ConfigError(f"A barrier needs at least 2 points (the endpoints), but points={points}.")
    started = time.perf_counter()
    state_a, state_b = with_ties([state_a, state_b])
    check_names(state_a, state_b)
    lambdas = [step / (points - 1) for step in range(points)]
    losses: list[float] = []
    columns: dict[str, list[float]] = {}
    with restored(model) as slots:
        _check_slots(slots, state_a)
        own = {tensor.untyped_storage().data_ptr() for tensor in slots.values()}
        end_a, end_b = _apart(state_a, own), _apart(state_b, own)
        for step, lam in enumerate(lambdas):
            with torch.no_grad():
                for name in state_a:
                    merged = interpolate_tensor(name, end_a[name].to(slots[name].device), end_b[name], lam)
                    if merged.shape != slots[name].shape:  # copy_ would broadcast it without a word
                        raise CheckpointError(
                            f"Tensor '{name}' has shape {tuple(merged.shape)} in the endpoints and "
                            f"{tuple(slots[name].shape)} in the model: give their own architecture."
                        )
                    slots[name].copy_(merged)
                if repair is not None and 0 < lam < 1:
                    whole = {name: slots[name].clone() for name in state_a}
                    for name, tensor in repair(whole, lam).items():
                        slots[name].copy_(tensor)
            figures = figures_of(evaluate(model), "evaluate")
            if step and figures.keys() != {"loss", *columns}:
                raise ConfigError(
                    "evaluate must return the same figures every time, but their names changed."
                )
            losses.append(figures.pop("loss"))
            for name, value in figures.items():
                columns.setdefault(name, []).append(value)
            seconds = time.perf_counter() - started
            tell(progress, "barrier", step + 1, points, lam=lam, loss=losses[-1], seconds=seconds)
    return Curve.measured(lambdas, losses, columns, seconds=time.perf_counter() - started)


def _apart(state: State, own: set[int]) -> State:
    """The state, copied where its tensors are the model's own (`model.state_dict()`), which is written to."""
    if not isinstance(state, dict):  # a lazy mapping reads its tensors from a file
        return state
    return {
        name: tensor.detach().clone()
        if tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in own
        else tensor
        for name, tensor in state.items()
    }


def _line(values: Sequence[float], lam: float) -> float:
    return (1 - lam) * values[0] + lam * values[-1]


def _argmax(values: Sequence[float]) -> int:
    """Where the first one is that is not a number, else the largest."""
    return max(range(len(values)), key=lambda i: (math.isnan(values[i]), values[i]))


def _check_slots(slots: Mapping[str, Tensor], state: State) -> None:
    meta = [name for name, tensor in slots.items() if tensor.is_meta]
    if meta:
        raise CheckpointError(
            f"The model's tensor '{meta[0]}' is on the meta device: give a model with real tensors."
        )
    unknown = [name for name in state if name not in slots]
    if unknown:
        raise CheckpointError(
            f"Tensor '{unknown[0]}' of the endpoints is not in the model: give their own architecture."
        )
    names = set(state)  # `in` would read the tensor of a lazy mapping
    given = {slots[name].data_ptr() for name in names}
    missing = [name for name, slot in slots.items() if name not in names and slot.data_ptr() not in given]
    if missing:
        raise CheckpointError(
            f"The model's tensor '{missing[0]}' is not in the endpoints: give their own architecture."
        )
