"""Cross entropy of a classifier."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import typed
from ..errors import DataError
from .base import mean_over_batches

Batch = tuple[Tensor, Tensor]


@typed
@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross entropy in nats. A batch is (x, y): inputs (n, ...) and class numbers (n,), int64.

    The model returns logits (n, classes), or an output object that has them as `.logits`.
    """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean cross entropy of the batch, a differentiable scalar."""
        x, y = batch
        return _entropy(_logits(model(x)), y)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """{"loss": mean cross entropy in nats, "accuracy": share of right answers, 0 to 1}, all samples."""
        return mean_over_batches(model, batches, _measure)

    def logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(logits (n, classes) float32, labels (n,)): what ensembles and calibration look at."""
        x, y = batch
        return _logits(model(x)).float(), y


def _measure(model: nn.Module, batch: Batch) -> tuple[Mapping[str, Tensor], int]:
    x, y = batch
    logits = _logits(model(x)).float()
    accuracy = (logits.argmax(dim=1) == y).double().mean()
    return {"loss": _entropy(logits, y), "accuracy": accuracy}, len(y)


def _entropy(logits: Tensor, y: Tensor) -> Tensor:
    if y.dtype not in (torch.int64, torch.uint8) and y.shape != logits.shape:
        told = str(y.dtype).removeprefix("torch.")
        raise DataError(
            f"The labels of a batch are {told} of shape {tuple(y.shape)}, but CrossEntropy takes class numbers, int64;"
            " give these, or an objective of your own."
        )
    return F.cross_entropy(logits, y)


def _logits(output: object) -> Tensor:
    logits = getattr(output, "logits", output)
    assert isinstance(logits, Tensor), "a classifier returns a tensor of logits or an output with .logits"
    return logits
