"""How a run merges its aligned models: by its config alone, like the matching before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from ..arguments import kind_of
from ..checkpoints.hub import local
from ..errors import ConfigError, shown
from ..integrations.hydra import resolved
from ..merging import BlockWeights, MergedState, Method, block_weights, diagonal_fisher, merge
from ..merging.merged import find_method, try_options
from ..merging.registry import plan_options
from ..tasks import Task
from ..tensors.modules import loaded
from ..types import Progress, State

NUMBERS = kind_of(float | list[float] | None)


@dataclass(frozen=True, eq=False)
class Combination:
    """A merge method with its weights and options; calling it merges aligned models.

    Attributes:
        method: the merge method.
        weights: for all tensors; None: the method's default.
        blocks: weights by block, in place of `weights`; None: there are none.
        base: a model of the task by name, or the path of a safetensors file; None: no base.
        options: of the method, those that were not set with their defaults.
        samples: of training data, for the Fisher information.
    """

    method: Method
    weights: float | list[float] | None
    blocks: BlockWeights | None
    base: str | None
    options: Mapping[str, Any]
    samples: int

    def __call__(
        self,
        task: Task,
        states: Sequence[State],
        *,
        seed: int = 0,
        device: str | None = None,
        progress: Progress | None = None,
    ) -> MergedState:
        """The merge, lazily; a method that looks at data does so now, at the training split."""
        given: dict[str, Any] = {**self.options, "seed": seed, "device": device, "progress": progress}
        objective = task.objective
        if "score" in plan_options(self.method.plan):
            train = task.batches["train"]
            given["score"] = lambda state: objective.evaluate(loaded(task.model, state), train)["loss"]
        if "companions" in self.method.takes:
            data = objective, task.batches["train"]
            given["companions"] = [
                diagonal_fisher(loaded(task.model, state), *data, max_samples=self.samples, progress=progress)
                for state in states
            ]
        base = None if self.base is None else task.load_other(self.base)
        weights = self.weights if self.blocks is None else self.blocks
        return merge(self.method, list(states), base=base, weights=weights, **given)

    @property
    def is_mean(self) -> bool:
        """Whether it is the mean that algorithms for many models have already."""
        plain = self.weights in (None, 0.5) and self.blocks is None
        return plain and self.method.name in ("weighted_sum", "uniform_soup")

    @property
    def share(self) -> float:
        """B's share of two models where numbers for all tensors say it, else a half: for what is merged beside."""
        if isinstance(self.weights, list):
            found = self.method.fit_weights(self.weights, 2) if self.method.weight == "weights" else None
            return found[1] if isinstance(found, list) else 0.5
        return 0.5 if self.weights is None or self.method.one != "b" else float(self.weights)

    @property
    def remark(self) -> str | None:
        """What is legal about the weights and maybe not meant."""
        given = self.weights if isinstance(self.weights, list) else [self.weights]
        numbers = [x for x in given if x is not None] if self.blocks is None else self.blocks.weights.values()
        return self.method.beyond(numbers)

    @property
    def words(self) -> str:
        """The merge in a few words."""
        how = "" if self.weights is None else f" at {self.weights}"
        how = how if self.blocks is None else " with weights by block"
        return f"{self.method.name}{how}{'' if self.base is None else f', base {self.base}'}"

    def record(self) -> dict[str, Any]:
        """Everything about it as plain data, for results.json."""
        rows = [] if self.blocks is None else self.blocks.rows()
        return {
            "method": self.method.name,
            "formula": self.method.formula,
            "weights": self.weights if self.blocks is None else None,
            "base": self.base,
            "options": dict(self.options),
            "blocks": [
                {"block": r.block, "low": r.low, "high": r.high, "mean": r.mean, "set_by": list(r.rules)}
                for r in rows
            ],
            "notes": [*([self.remark] if self.remark else []), *(self.blocks.notes if self.blocks else ())],
            "words": self.words,
        }


def load_combination(cfg: DictConfig, task: Task) -> Combination:
    """The combination of the config group `merge`, checked against the model before any endpoint is loaded.

    Without `merge.weights` a method whose weight is B's share gets `lam`.

    Raises:
        ConfigError: an unknown method, option or block, or weights that do not fit.
    """
    config = resolved(cfg)["merge"]
    method = find_method(str(config["method"]))
    # What the run supplies must not be missed.
    asked = {"score": "the objective on training data"} if "score" in plan_options(method.plan) else {}
    options = method.check_options({**asked, **(config["options"] or {})})
    models = len(task.labels)
    if models < method.least or (isinstance(method.inputs, int) and models != method.inputs):
        takes = method.inputs if isinstance(method.inputs, int) else f"{method.least} or more"
        raise ConfigError(f"merge.method={method.name} takes {takes} models, but this run has {models}.")
    weights = config["weights"]
    if not NUMBERS.fits(weights):
        raise ConfigError(
            f"merge.weights is {shown(weights)}, but it takes a number, a list of numbers, or null."
        )
    if weights is None and method.one == "b" and method.plan is None and models == 2:
        weights = cfg.lam
    if method.needs_base and config["base"] is None:
        known = f"one of {', '.join(task.others)}, or " if task.others else ""
        raise ConfigError(
            f"merge.method={method.name} needs merge.base, the model that both were made from: {known}a safetensors"
            " file."
        )
    blocks = None
    if config["blocks"] is not None:
        if method.weight is None or method.plan is not None:
            raise ConfigError(f"merge.method={method.name} has no weights, so leave out merge.blocks.")
        default = weights if isinstance(weights, int | float) else method.default_weight
        blocks = block_weights(config["blocks"], task.model.state_dict(), default)
    if method.plan is not None and weights is not None:
        raise ConfigError(f"merge.method={method.name} finds the weights itself, so leave out merge.weights.")
    try_options(method, options, models)
    for weight in [weights] if blocks is None else set(blocks.weights.values()):
        method.fit_weights(weight, models)
    base = None if config["base"] is None else str(local(str(config["base"])))
    return Combination(method, weights, blocks, base, options, int(config["samples"]))
