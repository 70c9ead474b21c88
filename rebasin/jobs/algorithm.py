"""How a job calls a matching algorithm: by its config alone, so a new one is one file and one config."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from ..arguments import check_values
from ..errors import ConfigError, SpecMismatchError
from ..integrations.hydra import function_of, resolved
from ..matching import LearnedResult, ManyMapsResult, MapsResult
from ..matching.many.maps import check_maps_options
from ..matching.many.mean import match_options
from ..matching.many.result import ManyResult
from ..matching.naive import measured
from ..matching.result import Found
from ..spec import Alignment, Permutation, PermutationSpec
from ..tasks import Task
from ..tensors.modules import lent, loaded
from ..types import Maker, Progress, State, arguments_of, check_options, supply
from .resume import Resume, state_type

SUPPLY = (
    "spec", "state_a", "state_b", "model_a", "model_b", "states", "model", "objective", "batches", "pipeline",
    "captions", "seed", "progress", "checkpoint", "resume_from",
)  # fmt: skip
"""What a job can give an algorithm, by the name of the argument; the last two to one that can be continued."""

PYTHONS = ("heldout", "forward")
"""Arguments that are no options of a job: what they take can only be made in Python."""

OWN = ("_target_", "name", "many", "reward", "maps", "with_maps")
"""Fields of an algorithm's config that are no options of its function."""


@dataclass(frozen=True)
class Algorithm:
    """A matching function, of two models or of any number, and its options.

    `reward`: an objective of its own, the score of images, in the place of the run's.
    """

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any]
    reward: Mapping[str, Any] | None = None

    @cached_property
    def takes(self) -> frozenset[str]:
        """The names of the function's arguments."""
        return frozenset(arguments_of(self.function))

    @property
    def continues(self) -> bool:
        """Whether it can go on after an interruption."""
        return state_type(self.function) is not None

    @property
    def maps(self) -> bool:
        """Whether it finds maps, too, by the type that it says it returns."""
        try:
            kind = typing.get_type_hints(self.function).get("return")
        except (NameError, TypeError):
            return False
        with_maps = MapsResult | LearnedResult | ManyMapsResult
        return kind is Alignment or (isinstance(kind, type) and issubclass(kind, with_maps))

    def __call__(
        self,
        task: Task,
        spec: PermutationSpec,
        *states: State,
        seed: int = 0,
        device: str | None = None,
        progress: Progress | None = None,
        resume: Resume | None = None,
    ) -> Any:
        """Align the models to the first: the function's result.

        Args:
            device: where to compute; an option `device` of the algorithm itself wins.
            resume: keeps what an interrupted matching can go on from.

        Raises:
            ConfigError: the algorithm looks at a reward, but the model makes no images of prompts.
        """
        a, b = states[0], states[-1]
        offered = {
            "spec": spec,
            "states": states,
            "state_a": a,
            "state_b": b,
            "model": task.model,
            "model_a": Maker(lambda: lent(task.model, a, b)),  # its own weights do not matter
            "model_b": Maker(lambda: loaded(task.model, b)),
            **self._aim(task, seed),
            "pipeline": task.pipeline,
            "captions": task.captions,
            "seed": seed,
            "progress": progress,
            **({} if device is None else {"device": device}),
            **({} if resume is None else resume.arguments(self.function)),
        }
        result = self.function(**supply(self.function, offered, self.options, what=f"algo={self.name}"))
        if resume is not None:
            resume.finish()
        return self._checked(result, spec, states)

    def _checked(self, result: Any, spec: PermutationSpec, states: Sequence[State]) -> Any:
        """What the function returned; a permutation or an alignment alone gets the figures that go with it.

        Raises:
            ConfigError: it is nothing that a job can use.
            SpecMismatchError: it is of another spec.
        """
        many, told = _of_many(self.function), f"{_path(self.function)} of algo={self.name} returned"
        if not isinstance(result, ManyResult if many else (Found, Permutation, Alignment)):
            wanted = (
                "a ManyResult (rebasin.matching)"
                if many
                else "a Permutation, an Alignment or a MatchResult (rebasin.matching)"
            )
            raise ConfigError(f"{told} a value of type {type(result).__name__}, but it must return {wanted}.")
        if isinstance(result, ManyResult):
            found = result.permutations
        else:
            found = (result if isinstance(result, Permutation) else result.permutation,)
            whole = result.as_alignment if isinstance(result, Found) else result
            if isinstance(whole, Alignment) and whole.maps and whole.spec.maps_hash != spec.maps_hash:
                found = ()
        if not found or not all(map(spec.contains, found)):
            raise SpecMismatchError(
                f"{told} a permutation that is none of this run's spec: it was made for another architecture, or breaks"
                " a block structure; make it of the spec that the function gets."
            )
        if isinstance(result, Permutation | Alignment):
            return measured(result, states[0], states[-1])
        return result

    def _aim(self, task: Task, seed: int) -> dict[str, Any]:
        """What it looks at: the run's objective and its training batches, or those of the reward."""
        if self.reward is None:
            return {"objective": task.objective, "batches": Maker(lambda: task.batches.get("train", ()))}
        options, maker = OmegaConf.create(dict(self.reward)), task.maker
        if maker is None:
            raise ConfigError(
                f"algo={self.name} searches by a reward, but this model makes no images of prompts; choose another."
            )
        return {
            "objective": Maker(lambda: maker.scored(options, "algo.reward")),
            "batches": Maker(lambda: maker.prompted(options, options.train, seed + 1)),
        }


def load_algorithm(algo: DictConfig, several: bool = False) -> Algorithm:
    """The algorithm of the config group `algo`.

    `_target_` names its function, `many` the one for `several` models, if that is another, and `with_maps` the one for
    `maps=true`. Of what a job has (SUPPLY) it will get what its signature asks for; the other fields are its options,
    but for the name, `repair` of the job on many models, and `reward`, an objective of its own (see
    configs/algo/ste_reward.yaml).

    Raises:
        ConfigError: there is no such function; an option that it does not have, or an argument that a job can't supply.
    """
    function = _function(algo)
    if several and not _of_many(function):
        function = _function(algo, "many")
    if algo.get("maps"):
        if algo.get("with_maps") is None or several:
            raise ConfigError(
                f"algo={algo.name} finds no maps{' for several models' * several}; leave out algo.maps."
            )
        function = _function(algo, "with_maps")
    if not arguments_of(function).keys() & set(SUPPLY):
        raise ConfigError(
            f"{_path(function)} of algo={algo.name} takes nothing that a run has, so it can't align; it must take some"
            f" of {', '.join(SUPPLY)}."
        )
    own = (*OWN, "repair") if _of_many(function) else OWN
    options = {name: value for name, value in resolved(algo).items() if name not in own}
    known = arguments_of(function, (*SUPPLY, *PYTHONS))
    if function is not _function(algo):
        where = "for several models" if several else "with maps"
        options = _common(algo.name, options, arguments_of(_function(algo), SUPPLY), known, where)
    check_options(f"algo={algo.name}", options, known)
    if options.get("device") in (None, known.get("device")):
        options.pop("device", None)  # that of the run, if there is one
    check_values(function, options, f"algo={algo.name}", "algo.")
    if isinstance(match := options.get("match"), Mapping):
        if "by" in options:
            check_maps_options(options["by"], match)
        elif function.__module__.startswith("rebasin."):
            match_options(match)
    return Algorithm(algo.name, function, options, resolved(algo).get("reward"))


def require_models(algorithm: Algorithm, models: int) -> None:
    """Refuse options of an algorithm for so many models that name others, or not as many.

    Raises:
        ConfigError: names the option.
    """
    weights = algorithm.options.get("weights")
    if weights is not None and (len(weights) != models or not all(0 < w < math.inf for w in weights)):
        raise ConfigError(
            f"algo.weights is {weights}, but it takes {models} positive numbers, one for each model."
        )
    for name in ("anchor", "pivot"):
        value = algorithm.options.get(name)
        if isinstance(value, int) and not 0 <= value < models:
            raise ConfigError(f"algo.{name} is {value}, but the models are 0 to {models - 1}.")


def _common(
    name: str, options: Mapping[str, Any], plain: Mapping[str, Any], known: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Of the options of the plain matching those that the one with maps, or for several models, has, too.

    Raises:
        ConfigError: another one was set.
    """
    end = f", or algo={name} algo.maps=false" if where == "with maps" else ""
    for option, value in options.items():
        if option not in known and option in plain and value != plain[option]:
            raise ConfigError(f"algo.{option}={value} has no effect {where}: leave it out{end}.")
    return {option: value for option, value in options.items() if option in known or option not in plain}


def is_many(cfg: DictConfig) -> bool:
    """Whether the chosen algorithm is to merge more than two models, or is one for any number.

    Raises:
        ConfigError: there are other than two models, but the algorithm aligns two, or there is one.
    """
    chosen = _networks(cfg)
    several = isinstance(chosen, ListConfig) and len(chosen) != 2
    if _of_many(_function(cfg.algo)):
        return True
    if several and not cfg.algo.get("many"):
        raise ConfigError(
            f"There are {len(chosen or ())} networks, but algo={cfg.algo.name} aligns two: choose"
            f" algo=merge_many, or algo=naive for their plain mean."
        )
    return several


def load_pairwise(cfg: DictConfig) -> Algorithm:
    """The algorithm with which a job brings one model after another to the first.

    Raises:
        ConfigError: it is one for any number of models, or there is one network; else what `load_algorithm` raises.
    """
    _networks(cfg)
    algorithm = load_algorithm(cfg.algo)
    if _of_many(algorithm.function):
        raise ConfigError(
            f"algo={cfg.algo.name} merges all models by itself, but here each of them is aligned to the first; choose"
            " an algorithm that aligns two, such as algo=weight_matching."
        )
    return algorithm


def _networks(cfg: DictConfig) -> Any:
    """The networks that the configuration lists, None if it lists none."""
    chosen = next((cfg.model.get(field) for field in ("files", "seeds") if cfg.model.get(field)), None)
    if isinstance(chosen, ListConfig) and len(chosen) == 1:
        field = "files" if cfg.model.get("files") else "seeds"
        raise ConfigError(
            f"model.{field} is {list(chosen)}, one network alone; give two to align, or more to merge them all."
        )
    return chosen


def _function(algo: DictConfig, field: str = "_target_") -> Callable[..., Any]:
    """The function that a field of the algorithm's config names."""
    function = function_of(algo, f"algo.{field}", f"algo={algo.name}")
    try:
        arguments_of(function)
    except (TypeError, ValueError) as error:  # one of C
        raise ConfigError(
            f"{_path(function)} of algo={algo.name} has no signature to tell its arguments; name a function of Python."
        ) from error
    return function


def _path(function: Any) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _of_many(function: Callable[..., Any]) -> bool:
    return "states" in arguments_of(function)
