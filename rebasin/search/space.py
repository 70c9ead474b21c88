"""What a search may try: plain configuration in, candidates and warm starts out.

    method: [weighted_sum, slerp]          one or several to choose from; [all]: every one that fits
    weights:
      by: blocks                           model, blocks, depth, kinds or selectors: tensors that share a weight
      low: 0                               of methods whose weight is a place between A and B, or a share
      high: 1
      strength: {low: 0, high: 2}          of methods whose weight says how much is added
      points: 5                            of by=depth
      selectors: [attn1, IN00-IN03]        of by=selectors; the language of block weights
      only: [IN04, M00]                    the other groups share one weight; []: every group has its own
    options:                               method -> option -> a value, [choices], or {low, high, step, log}
      ties_sum: {k: {low: 0.1, high: 1}}

Methods with the same meaning of weights share their parameters: what the search learns about `share.IN04` with one
method holds for the next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..errors import ConfigError
from ..merging import METHODS, Method, block_weights
from ..merging.merged import find_method
from .candidate import Candidate, Value
from .groups import REST, Groups, group_tensors, interpolated

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

ALL = "all"
UNFIT = ("greedy_soup", "clip", "fisher", "wise_ft", "uniform_soup", "ema", "polyak")
"""Left out of `all`: they take more than tensors and a weight, are weighted_sum by another name, or are for checkpoints
of one run.
"""


@dataclass(frozen=True)
class Range:
    """Numbers between low and high, both included."""

    low: float
    high: float
    step: float | None = None
    log: bool = False

    def ask(self, trial: BaseTrial, name: str) -> float | int:
        """A value from a trial; whole numbers if both ends (and the step) are."""
        if all(isinstance(number, int) for number in (self.low, self.high, self.step or 0)) and not self.log:
            return trial.suggest_int(name, int(self.low), int(self.high), step=int(self.step or 1))
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)


@dataclass(frozen=True)
class Space:
    """The candidates of a search.

    Attributes:
        methods: to choose from.
        models: how many there are.
        share, strength: ranges of the two kinds of weights.
        by: how tensors are grouped; `groups` are the groups, None for one weight in all.
        points: of by="depth".
        only: groups with a weight of their own; empty: all.
        options: method -> option -> a fixed value, a tuple of choices, or a Range.
    """

    methods: tuple[Method, ...]
    models: int
    share: Range
    strength: Range
    by: str = "model"
    groups: Groups | None = None
    points: int = 5
    only: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, Any]] | None = None

    def suggest(self, trial: BaseTrial) -> Candidate:
        """A candidate whose parameters a trial chooses."""
        name = self.methods[0].name
        if len(self.methods) > 1:
            name = trial.suggest_categorical("method", [method.name for method in self.methods])
        method = find_method(name)
        options = {}
        for option, choice in (self.options or {}).get(name, {}).items():
            label = f"{name}.{option}"
            if isinstance(choice, Range):
                options[option] = choice.ask(trial, label)
            elif isinstance(choice, tuple):
                options[option] = trial.suggest_categorical(label, list(choice))
            else:
                options[option] = choice
        kind, limits = self.meaning(method)
        weight = None
        if kind is not None:
            weight = self._weight(lambda part: self._value(trial, method, f"{kind}{part}", limits))
        return Candidate(name, weight, options)

    def meaning(self, method: Method) -> tuple[str | None, Range]:
        """("share" or "strength", its range): what a method's weight means; (None, ...) if it has none."""
        if method.weight is None:
            return None, self.share
        return ("strength", self.strength) if is_strength(method) else ("share", self.share)

    def parameters(self, value: Callable[[str], float], method: Method) -> dict[str, Any]:
        """The parameters of the candidate with these weights, as near as the space has them: a warm start.

        Options are left to the sampler, which draws what a warm start does not say.

        Args:
            value: group, or "" for the whole model -> weight.
        """
        found: dict[str, Any] = {"method": method.name} if len(self.methods) > 1 else {}
        kind, limits = self.meaning(method)
        if kind is None:
            return found

        def note(part: str) -> float:
            clipped = float(min(max(value(self._group(part)), limits.low), limits.high))
            found.update(dict.fromkeys(self._labels(method, f"{kind}{part}"), clipped))
            return clipped

        self._weight(note)
        return found

    def _group(self, part: str) -> str:
        """The group whose weight a parameter's name ends with; of a point over the depth the one that is nearest."""
        if self.by != "depth" or self.groups is None:
            return part.removeprefix(".")
        place = int(part.removeprefix(".depth")) / (self.points - 1)
        places = self.groups.place
        return min(places, key=lambda group: abs(places[group] - place))

    def _weight(self, ask: Callable[[str], Value]) -> Value | dict[str, Value]:
        """One weight, or one for each group, from `ask`, which takes the end of a parameter's name."""
        if self.groups is None:
            return ask("")
        if self.by == "depth":
            points = [ask(f".depth{i}") for i in range(self.points)]
            return dict(interpolated(cast(list[float], points), self.groups))
        own = self.only or self.groups.order
        once = functools.cache(ask)  # the groups that are not in `only` share one
        return {group: once(f".{group if group in own else REST}") for group in self.groups.order}

    def _value(self, trial: BaseTrial, method: Method, label: str, limits: Range) -> Value:
        labels = self._labels(method, label)
        values = [float(limits.ask(trial, name)) for name in labels]
        if len(labels) == 1:
            return values[0]
        # Shares need not add up to 1, but they must not all be 0.
        return tuple(values) if any(values) else tuple(1.0 for _ in values)

    def _labels(self, method: Method, label: str) -> list[str]:
        """A parameter, or one for each model where the method takes so many weights."""
        if self.models == 2 or method.weight == "alpha":
            return [label]
        first = 1 if method.weight == "weights" else 2
        return [f"{label}.{i}" for i in range(first, self.models + 1)]

    def in_words(self) -> str:
        """A sentence about what is searched."""
        names = [method.name for method in self.methods]
        told = f"{len(names)} methods" if len(names) > 1 else names[0]
        if self.groups is None:
            return f"{told}, one weight for the whole model"
        if self.by == "depth":
            return (
                f"{told}, weights at {self.points} points over the depth of {len(self.groups.order)} blocks"
            )
        number = len(self.only) + 1 if self.only else len(self.groups.order)
        return f"{told}, {number} weights by {self.by}"


def read_space(config: Mapping[str, Any], names: Sequence[str], models: int, has_base: bool) -> Space:
    """The space that the config group `space` describes, for `models` models with tensors of these `names`.

    Raises:
        ConfigError: names the entry of the configuration that can't be, and what it takes.
    """
    weights = dict(config.get("weights") or {})
    by = weights.get("by", "model")
    groups = group_tensors(names, by, weights.get("selectors") or ())
    only = tuple(weights.get("only") or ())
    for group in only:
        if groups is None or group not in groups.order:
            told = ", ".join(groups.order) if groups is not None else "none, as space.weights.by=model"
            raise ConfigError(f"space.weights.only names {group!r}, but the groups are {told}.")
    share = _range({"low": weights.get("low", 0.0), "high": weights.get("high", 1.0)}, "space.weights")
    strength = _range(weights.get("strength") or {"low": 0.0, "high": 1.5}, "space.weights.strength")
    chosen = config.get("method", "weighted_sum")
    tried = [chosen] if isinstance(chosen, str) else list(chosen or ())
    if not tried:
        raise ConfigError(f"space.method names no method; choose some of {', '.join(METHODS)}.")
    if "greedy_soup" in tried:
        raise ConfigError(
            "greedy_soup is a search of its own; take it from `python -m rebasin.compare_methods`."
        )
    methods = tuple(fitting(tried, UNFIT, models, has_base))
    if by == "depth" and models > 2:
        raise ConfigError("space.weights.by=depth is for two models; choose blocks or model for more.")
    points = weights.get("points", 5)
    if not isinstance(points, int) or points < 2:
        raise ConfigError(f"space.weights.points is {points!r}, but it takes a whole number from 2 on.")
    return Space(
        methods, models, share, strength, by, groups, points, only, _options(config.get("options"), methods)
    )


def fitting(
    names: Sequence[str], unfit: Iterable[str], models: int, has_base: bool, companions: bool = False
) -> list[Method]:
    """The methods of these names; [ALL]: those that can merge these models, but the `unfit`.

    Args:
        companions: whether there can be a companion state of each model.

    Raises:
        ConfigError: there is no such method, or it can't merge these models.
    """
    given = models, has_base, companions
    if list(names) == [ALL]:
        return [m for m in METHODS.values() if m.name not in unfit and not _obstacle(m, *given)]
    found = [find_method(name) for name in names]
    for method in found:
        if reason := _obstacle(method, *given):
            raise ConfigError(f"The merge method '{method.name}' {reason}.")
    return found


def is_strength(method: Method) -> bool:
    """Whether a method's weight says how much is added, and not where between the models the merge lies."""
    return method.weight == "scales" or (method.weight == "alpha" and method.default_weight == 1)


def _obstacle(method: Method, models: int, has_base: bool, companions: bool) -> str | None:
    """Why a method can't merge these models, None if it can."""
    if "companions" in method.takes and not companions:
        return "needs a companion state of each model, which a search has not"
    if isinstance(method.inputs, int) and models != method.inputs:
        return f"takes {method.inputs} models, but there are {models}"
    if models < method.least:
        return f"takes {method.least} models or more, but there are {models}"
    if method.needs_base and not has_base:
        return "needs a base: set base=NAME to the model that all were made from"
    return None


def _options(given: Any, methods: Sequence[Method]) -> dict[str, dict[str, Any]]:
    names = {method.name for method in methods}
    found: dict[str, dict[str, Any]] = {}
    for name, options in (given or {}).items():
        if name not in names:
            if name in METHODS:
                continue  # a method that is not tried here; its options do no harm
            raise ConfigError(f"space.options names {name!r}, but there is no such merge method.")
        method = find_method(name)
        method.check_options(options, values=False)
        found[name] = {key: _choice(value, f"space.options.{name}.{key}") for key, value in options.items()}
    return found


def _choice(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return _range(value, where)
    if isinstance(value, (list, tuple)):
        if not value:
            raise ConfigError(f"{where} is an empty list; give values to choose from.")
        return tuple(value)
    return value


def _range(value: Mapping[str, Any], where: str) -> Range:
    unknown = [key for key in value if key not in ("low", "high", "step", "log")]
    if unknown:
        raise ConfigError(f"{where} has {unknown[0]!r}; a range has low, high, step and log.")
    low, high, step = (cast(Any, value.get(key)) for key in ("low", "high", "step"))
    numbers = low, high, 0 if step is None else step
    if not all(isinstance(n, (int, float)) for n in numbers) or not low <= high:
        raise ConfigError(
            f"{where} goes from {low!r} to {high!r}; low and high are numbers, low not above high."
        )
    return Range(low, high, step, bool(value.get("log", False)))


def warm_starts(
    space: Space, names: Sequence[str], settings: Sequence[Any]
) -> list[tuple[str, dict[str, Any]]]:
    """(name, parameters) of the merges to begin with.

    The first method whose weight is a share begins with every setting, each other method with its default: its weight
    for one that adds a difference, the middle for one that goes from A to B.

    Args:
        names: the model's tensors.
        settings: block weights: numbers, names of presets, mappings; see `merging.blocks.block_weights`.

    Raises:
        ConfigError: a setting that can't be read, or does not fit the model.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    weights = [(str(setting), _by_group(space, names, setting)) for setting in settings]
    first = True
    for method in space.methods:
        kind, _ = space.meaning(method)
        if kind == "share" and first:
            first = False
            found += [(f"{method.name} {label}", space.parameters(value, method)) for label, value in weights]
            continue
        default = method.default_weight if method.default_weight is not None else 0.5
        label = method.name if kind is None else f"{method.name} {default:g}"
        found.append((label, space.parameters(lambda _, d=default: d, method)))
    unique: dict[tuple[Any, ...], tuple[str, dict[str, Any]]] = {}
    for label, parameters in found:  # clipping to the ranges can make two of them the same
        unique.setdefault(tuple(sorted(parameters.items(), key=str)), (label, parameters))
    return list(unique.values())


def _by_group(space: Space, names: Sequence[str], setting: Any) -> Callable[[str], float]:
    """Group, or "" for all -> the mean of the weights that a setting gives its tensors."""
    weights = block_weights(setting, names, default=0.5).weights
    whole = sum(weights.values()) / len(weights)
    if space.groups is None:
        return lambda _: whole
    of = space.groups.of

    def mean(group: str) -> float:
        # The groups that share a weight because they are not in `only` are taken together.
        shared = {other for other in of.values() if other not in space.only} if space.only else set()
        taken = {group, *(shared if group == REST else ())}
        inside = [weight for name, weight in weights.items() if of[name] in taken]
        return sum(inside) / len(inside) if inside else whole

    return mean
