"""What a scorer thinks of several models' images: the same prompts, the same noise, intervals over seeds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from torch import nn

from ..errors import ConfigError
from ..objectives import Reward
from ..tensors.modules import loaded
from ..types import Progress, State, brief, tell

CONFIDENCE = 0.95


@brief
@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and Student's interval for it; the interval is not a number for a single seed.

    The seeds are those of the noise: the interval tells how much another draw of noise would change the mean on these
    prompts, not on others, and nothing about other trainings.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From one value for each seed."""
        n, mean = len(values), float(np.mean(values))
        if n < 2:
            return cls(mean, math.nan, math.nan, tuple(values))
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
        return cls(mean, mean - half, mean + half, tuple(values))


@brief
@dataclass(frozen=True)
class Rewards:
    """Mean scores of models by label, and differences, which are paired: seed by seed, on the same noise.

    Attributes:
        models: label -> its mean score.
        differences: "X - Y" -> how much better X is.
        images: for each model.
        seconds: wall time.
    """

    models: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    images: int
    seconds: float


def score_models(
    model: nn.Module,
    states: Mapping[str, State],
    objective: Reward,
    batches: Sequence[Sequence[Any]],
    differences: Mapping[str, tuple[Sequence[str], Sequence[str]]] | None = None,
    progress: Progress | None = None,
) -> Rewards:
    """Score the images that `model` makes with each of `states`.

    Args:
        model: the architecture; it is copied.
        batches: for each seed the batches of `objective`.
        differences: name -> labels whose mean is taken, and labels whose mean is taken away.
        progress: called after each seed of each model with stage, step, total.

    Raises:
        ConfigError: there are no seeds.
    """
    if not batches:
        raise ConfigError("Scores need at least one seed.")
    began = time.perf_counter()
    found: dict[str, tuple[float, ...]] = {}
    for number, (label, state) in enumerate(states.items()):
        own = loaded(model, state)
        values = []
        for seed, problems in enumerate(batches):
            values.append(objective.evaluate(own, problems)["reward"])
            step = number * len(batches) + seed + 1
            tell(progress, f"scoring {label}", step, len(states) * len(batches))
        found[label] = tuple(values)
    told = {}
    for name, (plus, minus) in (differences or {}).items():
        ahead, behind = (np.mean([found[label] for label in labels], axis=0) for labels in (plus, minus))
        told[name] = Estimate.of((ahead - behind).tolist())
    return Rewards(
        models={label: Estimate.of(values) for label, values in found.items()},
        differences=told,
        images=sum(len(batch["prompts"]) for problems in batches for batch in problems),
        seconds=time.perf_counter() - began,
    )
