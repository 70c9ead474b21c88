"""Methods beside each other: endpoints and merges, without and with aligning, by every objective, on held-out data."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import RebasinError
from ..merging import METHODS, Method, diagonal_fisher, merge
from ..merging.registry import plan_options
from ..reporting.methods import ALIGNED, ENDPOINT, NAIVE, PLAIN
from ..types import Progress, State, tell
from .assessment import bootstrap, difference, sizes_of, units_of
from .evaluator import Bench
from .objectives import Aim


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Attributes:
        name: of the method, or of the model that is an endpoint.
        kind: ENDPOINT, NAIVE or ALIGNED.
        weight: its share or strength; None where the method has none.
        aims: aim -> mean, low, high, and difference, difference_low, difference_high to the plain average, all losses.
        seconds: to merge.
        error: why there is no merge.
    """

    name: str
    kind: str
    weight: float | None = None
    aims: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Trials:
    """What a method is tried with: `shares` and `strengths` are weights, `options` method -> option -> value."""

    shares: Sequence[float] = (0.5,)
    strengths: Sequence[float] = (1.0, 0.5)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    samples: int = 256


def compare(
    bench: Bench,
    aims: Sequence[Aim],
    sets: Mapping[str, tuple[Sequence[State], State | None]],
    labels: Sequence[str],
    methods: Sequence[Method],
    trials: Trials,
    *,
    objective: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Row]:
    """Merge with every method and measure.

    Args:
        bench: of the models' architecture.
        sets: NAIVE, and ALIGNED if something moved -> the models and the base in that arrangement.
        labels: of the models.
        objective: what a Fisher information is of; None leaves out methods that need one.

    Returns:
        The endpoints and the base, then the plain average, then the methods in their order, naive before aligned.
    """
    first = next(iter(sets.values()))[0]
    total = len(first) + len(sets) * len(methods)
    step = 0

    def told(what: str) -> None:
        nonlocal step
        step += 1
        tell(progress, what, step, total)

    measured: dict[tuple[str, str], tuple[list[list[float]], float | None, float]] = {}
    errors: dict[tuple[str, str], str] = {}
    for label, state in zip(labels, first, strict=True):
        model = bench.load_state(state)
        measured[label, ENDPOINT] = [aim.losses(model, "heldout") for aim in aims], None, 0.0
        told(label)
    ancestor = next(iter(sets.values()))[1]
    if ancestor is not None:
        model = bench.load_state(ancestor)
        measured["base", ENDPOINT] = [aim.losses(model, "heldout") for aim in aims], None, 0.0
    for kind, (states, base) in sets.items():
        companions: list[State] | None = None
        for method in methods:
            try:
                if "companions" in method.takes and companions is None:
                    companions = _fisher(bench, states, objective, aims[0].search, trials.samples)
                measured[method.name, kind] = _best(
                    bench, aims, method, states, base, companions, trials, seed
                )
            except RebasinError as error:
                errors[method.name, kind] = str(error)
            told(f"{method.name}, {kind}")

    plain = measured.get((PLAIN, NAIVE))
    rows = []
    for key in [*measured, *errors]:
        if key in errors:
            rows.append(Row(*key, error=errors[key]))
            continue
        losses, weight, seconds = measured[key]
        rows.append(Row(*key, weight, _figures(aims, losses, plain[0] if plain else None, seed), seconds))
    order = {name: i for i, name in enumerate([*labels, "base", *(method.name for method in methods)])}
    return sorted(rows, key=lambda row: (order[row.name], row.kind != ENDPOINT, row.kind == ALIGNED))


def fitting(names: Sequence[str], models: int, has_base: bool, gradients: bool) -> list[Method]:
    """The methods of these names, plain averaging first; ["all"]: those that can merge these models by themselves.

    Raises:
        ConfigError: there is no such method, or it can't merge these models.
    """
    from ..errors import ConfigError
    from ..merging.merged import find_method
    from .space import UNFIT, obstacle

    if list(names) == ["all"]:
        skipped = {*UNFIT} - {"fisher", "greedy_soup"}
        found = [m for m in METHODS.values() if m.name not in skipped]
        found = [
            m for m in found if not obstacle(m, models, has_base) or ("companions" in m.takes and gradients)
        ]
    else:
        found = [find_method(name) for name in names]
        for method in found:
            reason = obstacle(method, models, has_base)
            if reason and not ("companions" in method.takes and gradients):
                raise ConfigError(f"The merge method '{method.name}' {reason}.")
    plain = METHODS[PLAIN]
    return [plain, *(method for method in found if method is not plain)]


def _best(
    bench: Bench,
    aims: Sequence[Aim],
    method: Method,
    states: Sequence[State],
    base: State | None,
    companions: Sequence[State] | None,
    trials: Trials,
    seed: int,
) -> tuple[list[list[float]], float | None, float]:
    """Held-out losses of each aim at the weight that is best on other data, that weight, the seconds of a merge."""
    from .space import is_strength

    options: dict[str, Any] = dict(trials.options.get(method.name, {}))
    if "score" in plan_options(method.plan):
        options["score"] = lambda state: aims[0].mean(
            aims[0].losses(bench.load_state(state), "choose"), "choose"
        )
    weights: Sequence[float | None] = [None]
    if method.weight is not None and method.plan is None:
        weights = trials.strengths if is_strength(method) else trials.shares
        if not is_strength(method) and len(states) > 2 and method.weight == "weights":
            weights = [None]  # all alike
        if method.default_weight == 0:
            weights = [0.0]
    merges = []
    for weight in weights:
        began = time.perf_counter()
        merged = dict(
            merge(
                method,
                states,
                base=base if method.takes_base else None,
                weights=weight,
                seed=seed,
                companions=companions if "companions" in method.takes else None,
                **options,
            )
        )
        seconds = time.perf_counter() - began
        score = 0.0
        if len(weights) > 1:
            losses = aims[0].losses(bench.load_state(merged), "choose")
            score = aims[0].mean(losses, "choose")
        merges.append((score, seconds, weight, merged))
    _, seconds, weight, merged = min(merges, key=lambda entry: entry[0])
    model = bench.load_state(merged)
    return [aim.losses(model, "heldout") for aim in aims], weight, seconds


def _fisher(
    bench: Bench, states: Sequence[State], objective: Any, batches: Sequence[Any], samples: int
) -> list[State]:
    found: list[State] = []
    for state in states:
        model = bench.load_state(state).requires_grad_(True)
        found.append(diagonal_fisher(model, objective, batches, max_samples=samples))
        model.requires_grad_(False)
    return found


def _figures(
    aims: Sequence[Aim], losses: Sequence[Sequence[float]], plain: Sequence[Sequence[float]] | None, seed: int
) -> dict[str, dict[str, float]]:
    found = {}
    for i, aim in enumerate(aims):
        sizes, units = sizes_of(aim.heldout), units_of(aim.heldout)
        own = bootstrap(losses[i], sizes, units, seed)
        found[aim.name] = {"mean": own.mean, "low": own.low, "high": own.high}
        if plain is not None:
            gap = difference(losses[i], plain[i], sizes, units, seed)
            found[aim.name] |= {
                "difference": gap.mean,
                "difference_low": gap.low,
                "difference_high": gap.high,
            }
    return found


def figures(
    labels: Sequence[str], base: str | None, moved: str, aims: Sequence[Aim], rows: Sequence[Row]
) -> dict[str, Any]:
    """A comparison as results.json has it; losses throughout, also where an aim's `sign` is -1."""
    return {
        "labels": list(labels),
        "base": base,
        "moved": moved,
        "aims": [{"name": aim.name, "sign": aim.sign, "units": len(aim.heldout)} for aim in aims],
        "rows": [asdict(row) for row in rows],
    }
