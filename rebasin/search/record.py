"""A search as results.json has it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .evaluator import Setup
from .study import finished, seconds_of
from .trials import SAME
from .verdict import Finalist

if TYPE_CHECKING:
    import optuna


def figures(
    setup: Setup,
    base: str | None,
    study: optuna.Study,
    baseline: Mapping[str, Sequence[float]],
    ranked: Sequence[Finalist],
    judged: Sequence[Mapping[str, Any]],
    resumed: int,
) -> dict[str, Any]:
    """Everything about a search as plain data; losses throughout, also where an objective's `sign` is -1.

    Args:
        base: the name of the base.
        baseline: known merges on the data of the search.
        ranked: the finalists, the winner first.
        judged: `verdict.assess` of the winner.
        resumed: how many trials there were before.
    """
    done = sorted(finished(study), key=lambda trial: trial.number)
    by_label = {f"trial {trial.number}": trial for trial in done}
    winner, objectives = ranked[0], setup.evaluator.objectives

    def searched(label: str) -> list[float]:
        return list(by_label[label].values if label in by_label else baseline.get(label, ()))

    return {
        "labels": list(setup.inputs.labels),
        "base": base,
        "space": setup.space.in_words(),
        "parameters": sorted({name for trial in done for name in trial.params}),
        "aims": [
            {"name": one.name, "sign": one.sign, "batches": len(one.search), "choosing": len(one.choose)}
            for one in objectives
        ],
        "trials": [
            {
                "number": trial.number,
                # Optuna calls the last batch of a trial that was given up its value.
                "values": list(trial.values) if trial.state.name == "COMPLETE" else [],
                "parameters": dict(trial.params),
                "start": trial.user_attrs.get("start"),
                "batches": trial.user_attrs.get("batches"),
                "same_as": trial.user_attrs.get(SAME),
                "error": trial.user_attrs.get("error"),
                "seconds": trial.duration.total_seconds() if trial.duration is not None else None,
            }
            for trial in done
        ],
        "resumed": resumed,
        "spent": seconds_of(done),
        "baseline": {label: list(values) for label, values in baseline.items()},
        "finalists": [
            {
                "label": finalist.label,
                "words": str(finalist.candidate),
                "search": searched(finalist.label),
                "chosen": list(finalist.chosen),
                "front": finalist.front,
            }
            for finalist in ranked
        ],
        "winner": {
            "label": winner.label,
            "words": str(winner.candidate),
            "candidate": winner.candidate.to_dict(),
            "parameters": dict(by_label[winner.label].params) if winner.label in by_label else {},
        },
        "judged": [dict(one) for one in judged],
        "importance": {one.name: _importance(study, i) for i, one in enumerate(objectives)},
    }


def _importance(study: optuna.Study, objective: int) -> dict[str, float]:
    """How much each parameter matters among the better trials (PED-ANOVA, Watanabe et al. 2023); {} for too few."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is about low values: they are losses
            found = get_param_importances(
                study, evaluator=PedAnovaImportanceEvaluator(), target=lambda trial: trial.values[objective]
            )
    except (ValueError, RuntimeError, ZeroDivisionError):
        return {}
    return {name: float(value) for name, value in found.items()}
