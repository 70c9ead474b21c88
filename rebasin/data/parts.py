"""Data for two or more trainings that do not see the same: random shares, and shares by class."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch

from ..errors import ConfigError
from .classification import Dataset

Split = Literal["halves", "classes"]
SEED = 123  # as in the paper's code: the split is part of the data, not of a training


def half(data: Dataset, seed: int) -> Dataset:
    """A random half of the training images; other seeds have other, overlapping halves (MergeMany's members)."""
    order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(seed))
    return _training(data, order[: len(order) // 2])


def split(data: Dataset, kind: Split, share: float = 0.8) -> tuple[Dataset, Dataset]:
    """Two disjoint training sets that are the whole together; the test part stays whole.

    "halves": at random. "classes": the first has `share` of the images of the first half of the classes and
    1 - share of those of the second, the other the rest (Git Re-Basin's split of CIFAR-100, share 0.8).

    Raises:
        ConfigError: an unknown kind, or a share that is not between 0 and 1.
    """
    if kind not in get_args(Split) or not 0 <= share <= 1:
        raise ConfigError(
            f"data.split is {kind!r} and data.share {share}, but they take {', '.join(get_args(Split))} (or a"
            " run's random) and a number from 0 to 1."
        )
    order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(SEED))
    first = torch.zeros(len(order), dtype=torch.bool)
    if kind == "halves":
        first[order[: len(order) // 2]] = True
    else:
        for number in range(len(data.classes)):
            own = order[data.train_y[order] == number]
            taken = share if number < len(data.classes) // 2 else 1 - share
            first[own[: round(taken * len(own))]] = True
    return _training(data, first.nonzero()[:, 0]), _training(data, (~first).nonzero()[:, 0])


def _training(data: Dataset, rows: torch.Tensor) -> Dataset:
    return replace(data, train_x=data.train_x[rows], train_y=data.train_y[rows])
