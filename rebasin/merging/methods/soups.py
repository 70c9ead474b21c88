"""Averages whose weights follow a rule: model soups, averages along one training, and WiSE-FT."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from ...arguments import NonNegativeInt, ShareBelowOne, typed
from ...errors import ConfigError
from ...types import Progress, State, tell
from ..registry import method
from .linear import average

SOUPS = "Wortsman et al. 2022, Model soups, 2203.05482"


@method("sum_i m_i / n", SOUPS)
def uniform_soup(models: Sequence[Tensor]) -> Tensor:
    """The mean of all models, whatever they are worth."""
    return average(models, [1 / len(models)] * len(models))


@typed
def greedy_plan(
    states: Sequence[State],
    score: Callable[[State], float],
    mode: Literal["min", "max"] = "min",
    progress: Progress | None = None,
) -> list[float]:
    """The weights of the greedy soup: models from best to worst, each kept if the mean with it scores no worse.

    Args:
        states: the models.
        score: a merged state -> a number, measured on data that is not the test's; 2 n - 1 calls.
        mode: "min" if lower scores are better (losses, the default), "max" if higher ones are.
        progress: called after each score with stage, step, total, score and kept.
    """
    from ..merged import merge

    sign, total, steps = (1 if mode == "min" else -1), 2 * len(states) - 1, count(1)

    def measure(state: State, kept: Sequence[int]) -> float:
        value = float(score(state))
        if not math.isfinite(value):
            raise ConfigError(
                f"The score of the mean of {len(kept)} models is {value}, but it must be a finite number."
            )
        tell(progress, "soup", next(steps), total, score=value, kept=list(kept))
        return sign * value

    alone = [measure(state, [i]) for i, state in enumerate(states)]
    order = sorted(range(len(states)), key=lambda i: alone[i])
    kept, best = [order[0]], alone[order[0]]
    for i in order[1:]:
        trial = [*kept, i]
        value = measure(merge("uniform_soup", [states[j] for j in trial]), trial)
        if value <= best:
            kept, best = trial, value
    return [1 / len(kept) if i in kept else 0.0 for i in range(len(states))]


@method("sum_{i kept} m_i / n_kept", SOUPS, name="greedy_soup", one="b", plan=greedy_plan)
def _kept(models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of the models that help: from the best on, each is kept if the mean with it scores no worse."""
    return average(models, weights)


@method(
    "e_1 = m_1, e_i = decay e_{i-1} + (1 - decay) m_i, in the order of training",
    "Polyak and Juditsky 1992; Tarvainen and Valpola 2017, Mean teachers, 1703.01780",
)
def ema(models: Sequence[Tensor], decay: ShareBelowOne = 0.9) -> Tensor:
    """The exponential moving average of the checkpoints of one run, given from first to last.

    Options:
        decay: from 0 (the last checkpoint only) to below 1.
    """
    result = models[0]
    for tensor in models[1:]:
        result = torch.lerp(result, tensor, 1 - decay)
    return result


@method(
    "the mean of the last `last` of m_1 ... m_n",
    "Polyak and Juditsky 1992; Izmailov et al. 2018, SWA, 1803.05407",
)
def polyak(models: Sequence[Tensor], last: NonNegativeInt = 0) -> Tensor:
    """The mean of the last checkpoints of one run, given from first to last.

    Options:
        last: how many of them; 0 takes all.
    """
    if last > len(models):
        raise ConfigError(f"The option last of 'polyak' is {last}, but there are {len(models)} checkpoints.")
    tail = models[-last:] if last else models
    return average(tail, [1 / len(tail)] * len(tail))


@method(
    "(1 - alpha) a + alpha b, a the zero-shot and b the fine-tuned model",
    "Wortsman et al. 2022, Robust fine-tuning of zero-shot models, 2109.01903",
    zero="a",
    one="b",
    default=0.5,
)
def wise_ft(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """The line from a model (A) to its own fine-tune (B): often better than both off the fine-tune's data."""
    return torch.lerp(a, b, alpha)
