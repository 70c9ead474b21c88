"""How a run calls a matching algorithm: by its config alone, so a new one is one file and one config."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..errors import ConfigError
from ..matching import MatchResult
from ..spec import PermutationSpec
from ..types import Progress, State
from .configuration import resolved
from .resume import Resume

if TYPE_CHECKING:
    from ..tasks import Task
    from ..tasks.prompted import ImageMaker


SUPPLY = (
    "spec", "state_a", "state_b", "model_a", "model_b", "objective", "batches", "pipeline", "captions", "seed",
    "progress",
)  # fmt: skip
"""What a run can give an algorithm, by the name of the argument."""

KEPT = ("checkpoint", "resume_from")
"""What it gives to one that can be continued (see resume.py)."""


@dataclass(frozen=True)
class Algorithm:
    """A matching function and its options.

    `reward`: an objective of its own, the score of images, in the place of the run's.
    """

    name: str
    function: Callable[..., MatchResult]
    options: Mapping[str, Any]
    reward: Mapping[str, Any] | None = None

    def __call__(
        self,
        task: Task,
        spec: PermutationSpec,
        state_a: State,
        state_b: State,
        *,
        seed: int = 0,
        progress: Progress | None = None,
        resume: Resume | None = None,
    ) -> MatchResult:
        """Find the permutation that brings B to A; `resume` keeps what an interrupted search can go on from.

        Raises:
            ConfigError: the algorithm searches by a reward, but the model makes no images of prompts.
        """
        make: dict[str, Callable[[], Any]] = {
            "spec": lambda: spec,
            "state_a": lambda: state_a,
            "state_b": lambda: state_b,
            "model_a": lambda: loaded(task.model, state_a),
            "model_b": lambda: loaded(task.model, state_b),
            "objective": lambda: self._objective(task),
            "batches": lambda: self._batches(task, seed),
            "pipeline": lambda: task.pipeline,
            "captions": lambda: task.captions,
            "seed": lambda: seed,
            "progress": lambda: progress,
        }
        wanted = [name for name in inspect.signature(self.function).parameters if name in SUPPLY]
        kept = resume.arguments(self.function) if resume is not None else {}
        result = self.function(**{name: make[name]() for name in wanted}, **kept, **self.options)
        if resume is not None:
            resume.finish()
        return result

    def _objective(self, task: Task) -> Any:
        """What the search looks at: the run's objective, or the reward."""
        if self.reward is None:
            return task.objective
        from ..tasks.prompted import scorer_of

        options = OmegaConf.create(dict(self.reward))
        return self._maker(task).reward(
            scorer_of(options, "algo.reward"),
            steps=options.steps,
            grad_steps=options.grad_steps,
            guidance=options.guidance,
        )

    def _batches(self, task: Task, seed: int) -> Any:
        """The training batches of that objective."""
        if self.reward is None:
            return task.batches["train"]
        options, maker = OmegaConf.create(dict(self.reward)), self._maker(task)
        prompts = maker.chosen(options.prompts)
        return maker.batches(prompts, count=options.train, batch_size=options.batch_size, seed=seed + 1)

    def _maker(self, task: Task) -> ImageMaker:
        if task.maker is None:
            raise ConfigError(
                f"algo={self.name} searches by a reward, but this model makes no images of prompts; choose another."
            )
        return task.maker


def load_algorithm(algo: DictConfig) -> Algorithm:
    """The algorithm of the config group `algo`.

    `_target_` names its function. Of what a run has (SUPPLY) it will get what its signature asks for; all
    other fields but the name are its options, and `reward` an objective of its own (see configs/algo/ste_reward.yaml).

    Raises:
        ConfigError: an option that the function does not have, or an argument that a run can't supply.
    """
    function = get_method(algo["_target_"])
    takes = {k: v for k, v in inspect.signature(function).parameters.items() if k not in SUPPLY + KEPT}
    options = {
        name: value
        for name, value in resolved(algo).items()
        if name not in ("_target_", "name", "many", "reward")
    }
    unknown = [name for name in options if name not in takes]
    if unknown:
        raise ConfigError(
            f"algo={algo.name} has no option {unknown[0]!r}; it has {', '.join(takes) or 'none'}."
        )
    missing = [name for name, p in takes.items() if p.default is p.empty and name not in options]
    if missing:
        raise ConfigError(f"algo={algo.name} needs {missing[0]!r}, which a run lacks; set algo.{missing[0]}.")
    return Algorithm(algo.name, function, options, resolved(algo).get("reward"))


def loaded(model: nn.Module, state: State) -> nn.Module:
    """A copy of `model` with the weights of `state`."""
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(dict(state))
    return loaded
