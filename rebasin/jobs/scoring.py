"""`evaluate=image_reward` and `evaluate=reward`: what a scorer thinks of the images of endpoints and midpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig
from torch import nn

from ..errors import ConfigError
from ..evaluation.rewards import Rewards, score_models
from ..merging import interpolate
from ..objectives import Reward
from ..tasks import Task
from ..types import Progress, State

PROMPTS = 10
"""So many of the model's own captions are used where no file of prompts is given."""

A, B, NAIVE, ALIGNED = "A", "B", "naive midpoint", "aligned midpoint"
"""There are as many midpoints as a pair has ends, see `rebasin.jobs.stages.AlignedPair.ends`."""

DIFFERENCES = {
    "aligned - naive midpoint": ((ALIGNED,), (NAIVE,)),
    "naive midpoint - mean of A and B": ((NAIVE,), (A, B)),
    "aligned midpoint - mean of A and B": ((ALIGNED,), (A, B)),
}


@dataclass(frozen=True, eq=False)
class Scoring:
    """A scorer with its prompts: for each seed the batches of the same images."""

    objective: Reward
    batches: Sequence[Sequence[Any]]

    def __call__(
        self, model: nn.Module, a: State, ends: Mapping[str, State], progress: Progress | None = None
    ) -> Rewards:
        """Score A, B and the midpoints between A and each of the `ends`, B as it is, "naive", among them."""
        middles = {f"{kind} midpoint": interpolate(a, end, 0.5) for kind, end in ends.items()}
        states = {A: a, B: ends["naive"], **middles}
        return score_models(model, states, self.objective, self.batches, DIFFERENCES, progress)


def load_scoring(cfg: DictConfig, task: Task) -> Scoring | None:
    """The scoring that `cfg.evaluate` describes; None if it has no scorer.

    Raises:
        ConfigError: the model makes no images of prompts, or the options are impossible.
        CheckpointError, DataError: the scorer's weights or the prompts can't be read.
    """
    options = cfg.evaluate
    if "scorer" not in options:
        return None
    maker = task.maker
    if maker is None:
        raise ConfigError(
            f"evaluate={options.name} scores images of prompts, but model={cfg.model.name} makes none; leave it out."
        )
    prompts = maker.chosen(options.prompts)[: PROMPTS if options.prompts is None else None]
    batches = [
        # Noise that no search has seen.
        maker.batches(prompts, count=None, batch_size=options.batch_size, seed=10_000 * (cfg.seed + 1) + seed)
        for seed in range(options.seeds)
    ]
    return Scoring(maker.scored(options, "evaluate"), batches)


def in_words(rewards: Rewards) -> str:
    """The scores in a few words."""
    found = rewards.models
    return ", ".join(f"{label} {score.mean:.3f}" for label, score in found.items())
