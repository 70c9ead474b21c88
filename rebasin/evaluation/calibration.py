"""Whether a classifier is as sure as it is right: reliability by bins of confidence, and the calibration error.

Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks" (2017): samples are put into equal bins by
the largest probability, the confidence; the expected calibration error (ECE) is the mean over samples of
|accuracy - confidence| of their bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..types import brief

BINS = 15


@brief
@dataclass(frozen=True)
class Calibration:
    """What a reliability diagram shows; each list has one entry for each of the bins of (0, 1].

    Attributes:
        share: of the samples, in the bin.
        confidence, accuracy: their means in the bin; 0 where it is empty.
        samples: how many there were.
    """

    share: tuple[float, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    samples: int

    @property
    def gaps(self) -> tuple[float, ...]:
        """Accuracy minus confidence by bin; negative where the model is too sure."""
        return tuple(a - c for a, c in zip(self.accuracy, self.confidence, strict=True))

    @property
    def ece(self) -> float:
        """The expected calibration error, 0 (perfect) to 1."""
        return sum(share * abs(gap) for share, gap in zip(self.share, self.gaps, strict=True))

    @property
    def largest(self) -> float:
        """The largest gap of a bin that is not empty."""
        return max(abs(gap) for share, gap in zip(self.share, self.gaps, strict=True) if share > 0)

    def to_dict(self) -> dict[str, Any]:
        bins = {name: list(getattr(self, name)) for name in ("share", "confidence", "accuracy")}
        return {"ece": self.ece, "samples": self.samples, **bins}


def calibration(
    probabilities: Tensor, labels: Tensor, *, bins: int = BINS, of: Literal["answer", "classes"] = "answer"
) -> Calibration:
    """Reliability by `bins` equal bins (a, b] of confidence.

    Args:
        probabilities: [n, classes], rows with sum 1 (the softmax of logits).
        labels: [n], int64.
        of: "answer" looks at the most likely class of each sample; "classes" at all classes, each against the
            rest, as the figure of Git Re-Basin does.

    Raises:
        DataError: there are no samples, or the rows are no probabilities.
        ConfigError: bins is not positive.
    """
    if bins < 1:
        raise ConfigError(f"bins is {bins}, but a reliability diagram has at least one.")
    if probabilities.ndim != 2 or len(probabilities) != len(labels) or not len(labels):
        raise DataError(
            f"Calibration needs probabilities (n, classes) and labels (n,), not {tuple(probabilities.shape)} and"
            f" {tuple(labels.shape)}."
        )
    p = probabilities.detach().double().cpu()
    labels = labels.detach().cpu()
    sums = p.sum(dim=1)
    if not bool((p >= 0).all() & ((sums - 1).abs() < 1e-3).all()):
        raise DataError(
            "Calibration needs probabilities, rows that sum to 1: take the softmax of logits first."
        )
    if of == "answer":
        confidence, answer = p.max(dim=1)
        right = answer == labels
    else:
        confidence = p.reshape(-1)
        right = torch.nn.functional.one_hot(labels, p.shape[1]).reshape(-1).bool()
    place = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    count = torch.bincount(place, minlength=bins).double()

    def mean(values: Tensor) -> tuple[float, ...]:
        total = torch.zeros(bins, dtype=torch.float64).index_add(0, place, values.double())
        return tuple((total / count.clamp(min=1)).tolist())

    share = tuple((count / len(confidence)).tolist())
    return Calibration(share, mean(confidence), mean(right), len(confidence))
