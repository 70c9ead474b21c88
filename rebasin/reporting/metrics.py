"""The figures of a run under stable names, for wandb's summary and for tables over many runs; docs/experiments.md has
the names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..evaluation import Curve
from .results import Results

Tables = dict[str, tuple[list[str], list[list[Any]]]]
"""Name -> columns and rows, for a tracker."""


def numbers_of(row: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """What is a number in `row`, under PREFIX/NAME."""
    return {
        f"{prefix}/{name}": value
        for name, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def metrics(results: Results) -> dict[str, float]:
    """name -> value:

    barrier/SPLIT/loss, .../loss_mean      of the aligned line; against the line between A and B, their mean
    barrier/SPLIT/accuracy                 largest loss of accuracy on it (classifiers)
    midpoint/SPLIT/loss, .../accuracy      at lambda 0.5 of the aligned line
    endpoints/SPLIT/loss_a, .../loss_b     of A and of B
    naive/...                              the first five, without aligning
    reward/MODEL, reward_low/MODEL, reward_high/MODEL   mean score of a model's images, and its interval
    match/objective, moved, sweeps, seconds, l2_before, l2_after
    verify/PART                            largest relative change of an output under a random permutation
    seconds/STAGE                          of the run's stages and in total
    """
    found: dict[str, float | None] = {}
    for split, kinds in results["curves"].items():
        for kind, prefix in (("aligned", ""), ("naive", "naive/")):
            curve = _curve(kinds[kind])
            found[f"{prefix}barrier/{split}/loss"] = curve.barrier
            found[f"{prefix}barrier/{split}/loss_mean"] = curve.barrier_mean
            found[f"{prefix}midpoint/{split}/loss"] = curve.at(0.5)
            if "accuracy" in curve.metrics:
                found[f"{prefix}barrier/{split}/accuracy"] = curve.drop("accuracy")
                middle = curve.lambdas.index(min(curve.lambdas, key=lambda lam: abs(lam - 0.5)))
                found[f"{prefix}midpoint/{split}/accuracy"] = curve.metrics["accuracy"][middle]
        ends = curve.losses[0], curve.losses[-1]
        found |= {f"endpoints/{split}/loss_{name}": loss for name, loss in zip("ab", ends, strict=True)}
    for label, score in ((results.get("rewards") or {}).get("models") or {}).items():
        name = label.replace(" ", "_")
        found |= {f"reward/{name}": score["mean"]}
        found |= {f"reward_{side}/{name}": score[side] for side in ("low", "high")}
    match = results["match"]
    found |= {f"match/{key}": match[key] for key in ("objective", "moved", "sweeps", "seconds")}
    distance = results["distance"]
    found |= {"match/l2_before": distance["naive"], "match/l2_after": distance["aligned"]}
    found |= {f"verify/{part}": check["max_relative_error"] for part, check in results["verify"].items()}
    found |= {f"seconds/{stage}": value for stage, value in results["seconds"].items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def _curve(data: dict[str, Any]) -> Curve:
    """The curve of results.json, where null stands for what is not a finite number."""
    series = {
        name: [math.nan if v is None else v for v in values] for name, values in data["metrics"].items()
    }
    losses = [math.nan if loss is None else loss for loss in data["losses"]]
    return Curve.measured(data["lambdas"], losses, series, seconds=data["seconds"])
