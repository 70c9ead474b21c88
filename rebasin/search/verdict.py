"""After the trials: the winner among the best, chosen on data of its own, and judged on held-out data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..reporting.search_figures import AVERAGE, beats
from ..types import Progress, tell
from .assessment import bootstrap, difference
from .candidate import Candidate
from .evaluator import Evaluator
from .study import finished

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Finalist:
    """A candidate that could win.

    Attributes:
        label: "trial 12", or what it is called as a known merge.
        chosen: its losses on the data that chooses, one for each objective.
        front: no other finalist is as good in all objectives and better in one.
    """

    label: str
    candidate: Candidate
    chosen: tuple[float, ...]
    front: bool = True


def references(labels: Sequence[str], has_base: bool = False) -> dict[str, Candidate]:
    """What every merge is compared with: the plain average, each model alone, and the base."""
    n = len(labels)
    weights = [float(i) if n == 2 else tuple(float(i == j) for j in range(n)) for i in range(n)]
    alone = {label: Candidate("weighted_sum", own) for label, own in zip(labels, weights, strict=True)}
    middle = Candidate("weighted_sum", 0.5 if n == 2 else tuple(1.0 for _ in labels))
    # TIES with the strength 0 is the base, bit for bit.
    return {AVERAGE: middle, **alone, **({"base": Candidate("ties_sum", 0.0)} if has_base else {})}


def best_trials(study: optuna.Study, number: int) -> list[Any]:
    """The trials that were measured in full and found best: the front of several objectives."""
    several = len(study.directions) > 1
    best = study.best_trials if several else finished(study, "COMPLETE")
    complete = [trial for trial in best if all(map(math.isfinite, trial.values))]
    unique: dict[str, Any] = {}
    for trial in sorted(complete, key=lambda trial: (trial.values[0], trial.number)):
        unique.setdefault(repr(trial.user_attrs["candidate"]), trial)
    found = list(unique.values())
    return _spread(found, number) if several else found[:number]


def finals(
    evaluator: Evaluator, trials: Sequence[Any], known: dict[str, Candidate], progress: Progress | None = None
) -> list[Finalist]:
    """Measure the best trials and the known merges on the data that chooses; the winner comes first.

    The winner by several objectives is the one nearest to the best of each, all counted from the best (0) to the worst
    (1) of the front.
    """
    entries = dict(known)
    for trial in trials:
        candidate = Candidate.from_dict(trial.user_attrs["candidate"])
        if candidate not in entries.values():  # two trials may be one merge
            entries[f"trial {trial.number}"] = candidate
    chosen: dict[str, tuple[float, ...]] = {}
    for number, (label, candidate) in enumerate(entries.items()):
        chosen[label] = tuple(evaluator.means(candidate, "choose"))
        tell(progress, "finalist", number + 1, len(entries))
    ranked = [
        Finalist(label, entries[label], own, not any(beats(other, own) for other in chosen.values()))
        for label, own in chosen.items()
    ]
    front = [finalist.chosen for finalist in ranked if finalist.front]
    return sorted(ranked, key=lambda finalist: (not finalist.front, _distance(finalist.chosen, front)))


def assess(
    evaluator: Evaluator,
    winner: Candidate,
    known: dict[str, Candidate],
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """The winner and the known merges on held-out data, one entry for each objective.

    Each has `name`, `sign`, `units`, `models` (label -> mean with its interval) and `differences` (label -> winner
    minus that, paired), as plain data; losses, so lower is better.
    """
    entries = {"winner": winner, **known}
    losses: dict[str, list[list[float]]] = {}
    for number, (label, candidate) in enumerate(entries.items()):
        same = next((other for other in losses if entries[other] == candidate), None)
        losses[label] = losses[same] if same is not None else evaluator.measure(candidate, "heldout")
        tell(progress, "judging", number + 1, len(entries))
    told = []
    for i, objective in enumerate(evaluator.objectives):
        sizes, units = drawn = objective.units
        own = {label: of_each[i] for label, of_each in losses.items()}
        models = {label: bootstrap(x, *drawn, seed).figures() for label, x in own.items()}
        gaps = {label: difference(own["winner"], own[label], *drawn, seed).figures() for label in known}
        size = {"units": len(set(units)), "samples": sum(sizes)}
        found = {"models": models, "differences": gaps}
        told.append({"name": objective.name, "sign": objective.sign, **size, **found})
    return told


def _spread(trials: list[Any], number: int) -> list[Any]:
    """`number` of them, evenly along the front."""
    if len(trials) <= number:
        return trials
    return [trials[round(i * (len(trials) - 1) / max(1, number - 1))] for i in range(number)]


def _distance(values: Sequence[float], front: Sequence[Sequence[float]]) -> float:
    if len(values) == 1:
        return values[0]
    total = 0.0
    for i, value in enumerate(values):
        low, high = min(other[i] for other in front), max(other[i] for other in front)
        total += ((value - low) / (high - low)) ** 2 if high > low else 0.0
    return math.sqrt(total)
