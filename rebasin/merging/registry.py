"""What a merge method is, and the registry of those there are.

A method is a pure function on the tensors of one name. Its signature says what it takes:

    a, b          the two tensors that it combines, or
    models        two or more of them, a sequence
    base          the tensor of the common ancestor (None as default: optional)
    alpha         one weight
    weights       a share for each model, together 1
    scales        a factor for each model but the first
    companions    a tensor that goes with each model (a Fisher information)
    generator     random numbers that depend on seed and tensor name only
    name          the tensor's name

Every other argument has a default and is an option of the method.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ..arguments import check_values
from ..errors import ConfigError
from ..types import REQUIRED, arguments_of, check_options

SUPPLY = ("a", "b", "models", "base", "alpha", "weights", "scales", "companions", "generator", "name")

WeightKind = Literal["alpha", "weights", "scales"]

Weights = float | Sequence[float] | Callable[[str], float | Sequence[float]] | None
"""One number, one for each model, or a function of the tensor's name that gives either: block weights."""


@dataclass(frozen=True, eq=False)
class Method:
    """A merge method: its function on tensors, and what the function promises.

    Attributes:
        name: what users call it.
        function: takes tensors of one name, float32 or wider, and gives a tensor of their shape.
        description: one sentence.
        formula: in plain text; a, b are the models, c is the base.
        reference: where it comes from.
        inputs: 2, or "N" for two or more.
        least: the smallest number of models.
        needs_base: it can't do without a base; `takes_base`: it can use one.
        weight: how it takes weights (see above), None if it has none. `default_weight` is its default.
        options: its own options and their defaults.
        zero: what it returns at alpha or scales 0, bit for bit: "a", "base" or None.
        one: what it returns at alpha 1, bit for bit: "b" or None. Methods with `weights` return a model
            bit for bit where that has the weight 1, and `one` is "b".
        self_any_base: merging a model with itself gives the model, whatever the base (and weights in [0, 1]).
            Every method gives the model where the base equals it, too.
        plan: finds the weights from the whole states before any tensor is merged.
        bounded: weights outside [0, 1] mean nothing; of other methods they extrapolate.
    """

    name: str
    function: Callable[..., Tensor]
    description: str
    formula: str
    reference: str
    inputs: int | str
    least: int
    needs_base: bool
    takes_base: bool
    weight: WeightKind | None
    default_weight: float | None
    options: Mapping[str, Any]
    zero: Literal["a", "base"] | None = None
    one: Literal["b"] | None = None
    self_any_base: bool = True
    plan: Callable[..., Any] | None = None
    bounded: bool = False
    takes: frozenset[str] = field(default_factory=frozenset)

    def check_options(self, options: Mapping[str, Any], values: bool = True) -> dict[str, Any]:
        """The options with their defaults filled in.

        Args:
            values: whether these are values; a search has what they are drawn from in their place.

        Raises:
            ConfigError: an option that the method does not have, or can't have this value, or one that it needs is
                missing.
        """
        what, known = f"The merge method {self.name!r}", {**self.options, **plan_options(self.plan)}
        filled = check_options(what, options, known)
        for function in (self.function, self.plan):
            if function is not None and values:
                filled = check_values(function, filled, what)
        return filled

    def fit_weights(self, given: Any, models: int, name: str = "") -> float | list[float] | None:
        """What the method gets as its weight for one tensor, from what the user gave.

        Raises:
            ConfigError: the weights do not fit method and models, or are not finite.
        """
        where = f" for tensor '{name}'" if name else ""
        if self.weight is None:
            return None
        given = self.default_weight if given is None else given
        if given is None:
            return [1 / models] * models  # shares; other kinds have a default
        many = isinstance(given, Sequence)
        numbers = [float(x) for x in given] if many else [float(given)]
        for number in numbers:
            if not math.isfinite(number):
                raise ConfigError(f"A weight{where} is {number}, but weights must be finite numbers.")
            if abs(number) > LARGEST_WEIGHT:
                raise ConfigError(f"A weight{where} is {number:g}, so large that nothing else would be left.")
            if self.bounded and not many and not 0 <= number <= 1:
                raise ConfigError(f"'{self.name}' takes a weight from 0 to 1, not {number:g}{where}.")
        if self.weight == "alpha":
            if len(numbers) != 1:
                raise ConfigError(f"'{self.name}' takes one weight{where}, but got {len(numbers)}.")
            return numbers[0]
        if self.weight == "scales":
            numbers = numbers if many else numbers * (models - 1)
            if len(numbers) != models - 1:
                raise ConfigError(
                    f"'{self.name}' got {len(numbers)} weights{where}: give one for each of the {models - 1} models"
                    " after the first."
                )
            return numbers
        if not many:
            if models != 2:
                raise ConfigError(
                    f"'{self.name}' of {models} models got one weight{where}: give a list of {models}, or none for"
                    " equal shares."
                )
            return [1 - numbers[0], numbers[0]]
        if len(numbers) != models:
            raise ConfigError(
                f"There are {models} models but {len(numbers)} weights{where}: give one for each."
            )
        if min(numbers) < 0 or sum(numbers) <= 0:
            raise ConfigError(f"The weights {numbers}{where} must not be negative, nor all be 0.")
        return [number / sum(numbers) for number in numbers]

    def beyond(self, weights: Iterable[float]) -> str | None:
        """A sentence about weights outside 0 to 1, which are legal and seldom meant; None if there are none."""
        outside = [float(weight) for weight in weights if not 0 <= weight <= 1]
        if not outside:
            return None
        worst = max(outside, key=lambda weight: abs(weight - 0.5))
        meaning = (
            "0 is A and 1 is B, so this is beyond both"
            if self.one == "b"
            else "1 adds all that is to be added, 0 nothing"
        )
        return f"The weight {worst:g} is outside 0 to 1: with '{self.name}' {meaning}."


LARGEST_WEIGHT = 1e6
"""Beyond it 1 - weight has no digits of the 1 that float32 could hold."""

METHODS: dict[str, Method] = {}
"""All methods by name, in the order of the documentation."""


def method(
    formula: str,
    reference: str,
    *,
    name: str | None = None,
    default: float | None = None,
    least: int = 2,
    **promises: Any,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function as a merge method: its signature says what it takes, the first paragraph of its docstring
    what it does. `promises` are further fields of `Method`: zero, one, self_any_base, plan, bounded.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        called, takes = name or function.__name__, arguments_of(function)
        if called in METHODS:
            raise ConfigError(f"There is a merge method '{called}' already; choose another name.")
        kinds: tuple[WeightKind, ...] = ("alpha", "weights", "scales")
        METHODS[called] = Method(
            name=called,
            function=function,
            description=(inspect.getdoc(function) or called).split("\n\n")[0].replace("\n", " "),
            formula=formula,
            reference=reference,
            inputs="N" if "models" in takes else 2,
            least=least,
            needs_base=takes.get("base") is REQUIRED,
            takes_base="base" in takes,
            weight=next((k for k in kinds if k in takes), None),
            default_weight=default,
            options=arguments_of(function, SUPPLY),
            takes=frozenset(takes) & frozenset(SUPPLY),
            **promises,
        )
        return function

    return register


def plan_options(plan: Callable[..., Any] | None) -> dict[str, Any]:
    """The options of a plan: what it takes beyond states and base."""
    return {} if plan is None else arguments_of(plan, ("states", "base", "progress"))
