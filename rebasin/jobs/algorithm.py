"""How a run calls a matching algorithm: by its config alone, so a new one is one file and one config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError
from ..matching import MatchResult
from ..modules import loaded
from ..spec import PermutationSpec
from ..types import Maker, Progress, State, arguments_of, check_options, supply
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
        offered = {
            "spec": spec,
            "state_a": state_a,
            "state_b": state_b,
            "model_a": Maker(lambda: loaded(task.model, state_a)),
            "model_b": Maker(lambda: loaded(task.model, state_b)),
            "objective": Maker(lambda: self._objective(task)),
            "batches": Maker(lambda: self._batches(task, seed)),
            "pipeline": task.pipeline,
            "captions": task.captions,
            "seed": seed,
            "progress": progress,
            **(resume.arguments(self.function) if resume is not None else {}),
        }
        result = self.function(**supply(self.function, offered, self.options, what=f"algo={self.name}"))
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
    options = {
        name: value
        for name, value in resolved(algo).items()
        if name not in ("_target_", "name", "many", "reward")
    }
    check_options(f"algo={algo.name}", options, arguments_of(function, SUPPLY + KEPT))
    return Algorithm(algo.name, function, options, resolved(algo).get("reward"))
