"""Methods beside each other: endpoints and merges, without and with aligning, by every objective, on held-out data."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from ..errors import RebasinError
from ..merging import METHODS, Method, diagonal_fisher, merge
from ..merging.registry import plan_options
from ..reporting.methods import ALIGNED, ENDPOINT, NAIVE, PLAIN
from ..types import Progress, State, tell
from . import space
from .assessment import bootstrap, difference
from .evaluator import Evaluator, Inputs
from .objectives import SearchObjective
from .space import UNFIT, is_strength


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Attributes:
        name: of the method, or of the model that is an endpoint.
        kind: ENDPOINT, NAIVE or ALIGNED.
        losses: held-out, for each objective.
        weight: its share or strength, the one that was best; None where the method has none.
        seconds: to merge.
        error: why there is no merge.
    """

    name: str
    kind: str
    losses: Sequence[Sequence[float]] = ()
    weight: float | None = None
    seconds: float = 0.0
    error: str | None = None


def compare(
    evaluator: Evaluator,
    sets: Mapping[str, Inputs],
    methods: Sequence[Method],
    tried: Mapping[str, Any],
    *,
    objective: Any,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Row]:
    """Merge with every method and measure by every objective.

    Args:
        evaluator: of the models' architecture.
        sets: NAIVE, and ALIGNED if something moved -> the models and the base in that arrangement.
        tried: what with, as in the config group `methods`: `shares` and `strengths` are weights, `options` method ->
            option -> value, `samples` those of a Fisher information.
        objective: what that is of.

    Returns:
        The endpoints and the base, then the plain average, then the methods in their order, naive before aligned.
    """
    ends = next(iter(sets.values())).named
    total = len(ends) + len(sets) * len(methods)
    step = itertools.count(1)
    rows = []
    for label, state in ends.items():
        rows.append(Row(label, ENDPOINT, evaluator.losses(evaluator.load_state(state), "heldout")))
        tell(progress, label, next(step), total)
    for kind, inputs in sets.items():
        fisher = cache(partial(_fisher, evaluator, inputs.states, objective, tried["samples"]))
        for method in methods:
            try:
                rows.append(Row(method.name, kind, *_best(evaluator, method, inputs, fisher, tried, seed)))
            except RebasinError as error:
                rows.append(Row(method.name, kind, error=str(error)))
            tell(progress, f"{method.name}, {kind}", next(step), total)
    order = {name: i for i, name in enumerate([*ends, *(method.name for method in methods)])}
    return sorted(rows, key=lambda row: (order[row.name], row.kind != ENDPOINT, row.kind == ALIGNED))


def fitting(names: Sequence[str], models: int, has_base: bool, gradients: bool) -> list[Method]:
    """The methods of these names, plain averaging first; ["all"]: those that can merge these models by themselves.

    Raises:
        ConfigError: there is no such method, or it can't merge these models.
    """
    unfit = {*UNFIT} - {"fisher", "greedy_soup"}
    plain, found = METHODS[PLAIN], space.fitting(names, unfit, models, has_base, gradients)
    return [plain, *(method for method in found if method is not plain)]


def _best(
    evaluator: Evaluator,
    method: Method,
    inputs: Inputs,
    fisher: Callable[[], list[State]],
    tried: Mapping[str, Any],
    seed: int,
) -> tuple[list[list[float]], float | None, float]:
    """Held-out losses, weight and seconds of the merge that is best on other data than the held-out."""
    objective = evaluator.objectives[0]

    def score(state: State) -> float:
        return objective.mean(objective.losses(evaluator.load_state(state), "choose"), "choose")

    options: dict[str, Any] = dict(tried["options"].get(method.name, {}))
    if "score" in plan_options(method.plan):
        options["score"] = score
    weights: Sequence[float | None] = [None]
    if method.weight is not None and method.plan is None:
        if method.default_weight == 0:
            weights = [0.0]
        elif is_strength(method):
            weights = tried["strengths"]
        elif len(inputs.states) == 2 or method.weight != "weights":  # else all alike
            weights = tried["shares"]
    options["base"] = inputs.base if method.takes_base else None
    options["companions"] = fisher() if "companions" in method.takes else None
    merges = []
    for weight in weights:
        began = time.perf_counter()
        merged = dict(merge(method, inputs.states, weights=weight, seed=seed, **options))
        seconds = time.perf_counter() - began
        merges.append((score(merged) if len(weights) > 1 else 0.0, seconds, weight, merged))
    _, seconds, weight, merged = min(merges, key=lambda entry: entry[0])
    return evaluator.losses(evaluator.load_state(merged), "heldout"), weight, seconds


def _fisher(evaluator: Evaluator, states: Sequence[State], objective: Any, samples: int) -> list[State]:
    found: list[State] = []
    for state in states:
        model = evaluator.load_state(state).requires_grad_(True)
        batches = evaluator.objectives[0].search
        found.append(diagonal_fisher(model, objective, batches, max_samples=samples))
        model.requires_grad_(False)
    return found


def figures(
    labels: Sequence[str],
    base: str | None,
    moved: str,
    objectives: Sequence[SearchObjective],
    rows: Sequence[Row],
    seed: int,
) -> dict[str, Any]:
    """A comparison as results.json has it; losses throughout, also where an objective's `sign` is -1.

    The `aims` of a row: objective -> mean, low, high, and difference, difference_low, difference_high to plain
    averaging.
    """
    plain = next((row.losses for row in rows if (row.name, row.kind) == (PLAIN, NAIVE)), ())

    def aims(row: Row) -> dict[str, dict[str, float]]:
        found = {}
        for i, losses in enumerate(row.losses):
            name, drawn = objectives[i].name, objectives[i].units
            found[name] = bootstrap(losses, *drawn, seed).figures()
            if plain:
                gap = difference(losses, plain[i], *drawn, seed)
                ends = {"": gap.mean, "_low": gap.low, "_high": gap.high}
                found[name] |= {f"difference{end}": value for end, value in ends.items()}
        return found

    told = ("name", "kind", "weight", "seconds", "error")
    return {
        "labels": list(labels),
        "base": base,
        "moved": moved,
        "aims": [{"name": one.name, "sign": one.sign, "units": len(one.heldout)} for one in objectives],
        "rows": [{**{key: getattr(row, key) for key in told}, "aims": aims(row)} for row in rows],
    }
