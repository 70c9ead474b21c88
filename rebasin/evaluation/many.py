"""How good a merge of many models is, beside its members, their plain mean, and the ensemble of their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import typed
from ..merging.neuron_moments import member_weights
from ..objectives import LossFunction, Objective, checked
from ..tensors.modules import eval_mode, with_weights
from ..types import State, brief
from .calibration import Calibration, calibration

MEMBERS, ENSEMBLE = "members", "ensemble"


@brief
@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Attributes:
        name: "members" (figures averaged over them), "ensemble" (the mean of their logits: N times the work), or
            that of a merge.
        loss: the objective's.
        barrier: loss minus the (weighted) mean loss of the members: what merging costs; negative where it gains.
        accuracy: 0 to 1; None for objectives without classes.
        calibration: None likewise; for the members that of all their answers together.
    """

    name: str
    loss: float
    barrier: float
    accuracy: float | None = None
    calibration: Calibration | None = None

    @property
    def ece(self) -> float | None:
        return None if self.calibration is None else self.calibration.ece

    def to_dict(self) -> dict[str, Any]:
        reliability = None if self.calibration is None else self.calibration.to_dict()
        return vars(self) | {"ece": self.ece, "calibration": reliability}


@typed
def compare(
    model: nn.Module,
    objective: Objective | LossFunction,
    batches: Sequence[Any],
    members: Sequence[State],
    merges: Mapping[str, State],
    *,
    weights: Sequence[float] | None = None,
) -> list[Row]:
    """Measure members and merges on the same batches; one of them is in memory at a time.

    An objective with a method `logits(model, batch)` (CrossEntropy has it) gives accuracy, calibration and the
    ensemble as well. `model` lends its architecture; its weights are not touched. `weights` are those of the
    members in the ensemble and in the mean of their losses.
    """
    own: Objective = checked(objective)
    raw = member_weights(members, weights)
    shares = [w / fsum(raw) for w in raw]
    if not hasattr(own, "logits"):
        losses = [_loss(model, own, batches, state) for state in members]
        mean = fsum(share * loss for share, loss in zip(shares, losses, strict=True))
        found = {name: _loss(model, own, batches, state) for name, state in merges.items()}
        return [Row(MEMBERS, mean, 0.0), *(Row(name, loss, loss - mean) for name, loss in found.items())]
    singles: list[Row] = []
    probabilities: list[Tensor] = []
    total, labels = torch.zeros(()), torch.zeros(0)
    for share, state in zip(shares, members, strict=True):
        logits, labels = _answers(model, own, batches, state)
        singles.append(_row(MEMBERS, logits, labels, 0.0))
        probabilities.append(logits.softmax(dim=1))
        total = total + share * logits
    mean = fsum(share * row.loss for share, row in zip(shares, singles, strict=True))
    pooled = calibration(torch.cat(probabilities), labels.repeat(len(members)))
    accuracy = fsum(share * (row.accuracy or 0.0) for share, row in zip(shares, singles, strict=True))
    rows = [Row(MEMBERS, mean, 0.0, accuracy, pooled), _row(ENSEMBLE, total, labels, mean)]
    for name, state in merges.items():
        logits, labels = _answers(model, own, batches, state)
        rows.append(_row(name, logits, labels, mean))
    return rows


def _row(name: str, logits: Tensor, labels: Tensor, mean: float) -> Row:
    loss = float(F.cross_entropy(logits, labels))
    accuracy = float((logits.argmax(dim=1) == labels).double().mean())
    finite = bool(torch.isfinite(logits).all())  # a broken merge may overflow; its loss says so
    reliability = calibration(logits.softmax(dim=1), labels) if finite else None
    return Row(name, loss, loss - mean, accuracy, reliability)


def _answers(model: nn.Module, objective: Any, batches: Sequence[Any], state: State) -> tuple[Tensor, Tensor]:
    """Logits [samples, classes], float32, and labels [samples], on the CPU."""
    with torch.no_grad(), eval_mode(model), with_weights(model, state):
        found = [objective.logits(model, batch) for batch in batches]
    logits, labels = zip(*found, strict=True)
    return torch.cat(logits).cpu(), torch.cat(labels).cpu()


def _loss(model: nn.Module, objective: Objective, batches: Sequence[Any], state: State) -> float:
    with with_weights(model, state):
        return objective.evaluate(model, batches)["loss"]
