"""The figures of a run under stable names, for wandb's summary and for tables over many runs; docs/experiments.md has
the names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluation import Curve
from .results import Results

Tables = dict[str, tuple[list[str], list[list[Any]]]]
"""Name -> columns and rows, for a tracker."""


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of `rows`, in the order in which they come, but for those that have no single values."""
    found = (key for row in rows for key, value in row.items() if not isinstance(value, (list, dict)))
    return list(dict.fromkeys(found))


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
    endpoints/SPLIT/loss_a, .../loss_b     of A and of B; accuracy_a, accuracy_b
    naive/..., permuted/...                the first five, without aligning, and with the permutation alone that
                                           learned maps were started from
    naive_repaired/..., aligned_repaired/...   the same with each model on the line repaired (repair=...)
    reward/MODEL, reward_low/MODEL, reward_high/MODEL   mean score of a model's images, and its interval
    match/objective, moved, sweeps, seconds, l2_before, l2_after
    verify/PART                            largest relative change of an output under a random permutation
    seconds/STAGE                          of the run's stages and in total
    """
    found: dict[str, float | None] = {}
    for split, kinds in results["curves"].items():
        for kind, data in kinds.items():
            prefix, curve = "" if kind == "aligned" else f"{kind}/", _curve(data)
            found[f"{prefix}barrier/{split}/loss"] = curve.barrier
            found[f"{prefix}barrier/{split}/loss_mean"] = curve.barrier_mean
            found[f"{prefix}midpoint/{split}/loss"] = curve.at(0.5)
            if "accuracy" in curve.metrics:
                found[f"{prefix}barrier/{split}/accuracy"] = curve.drop("accuracy")
                found[f"{prefix}midpoint/{split}/accuracy"] = curve.at(0.5, "accuracy")
                ends = curve.metrics["accuracy"]
                found |= {f"endpoints/{split}/accuracy_{name}": ends[k] for k, name in ((0, "a"), (-1, "b"))}
        found |= {f"endpoints/{split}/loss_a": curve.losses[0], f"endpoints/{split}/loss_b": curve.losses[-1]}
    for label, score in ((results.get("rewards") or {}).get("models") or {}).items():
        for prefix, side in (("reward", "mean"), ("reward_low", "low"), ("reward_high", "high")):
            found[f"{prefix}/{label.replace(' ', '_')}"] = score[side]
    match, distance = results["match"], results["distance"]
    found |= {f"match/{key}": match[key] for key in ("objective", "moved", "sweeps", "seconds")}
    found |= {"match/l2_before": distance["naive"], "match/l2_after": distance["aligned"]}
    found |= {f"verify/{part}": check["max_relative_error"] for part, check in results["verify"].items()}
    found |= {f"seconds/{stage}": value for stage, value in results["seconds"].items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def _curve(data: dict[str, Any]) -> Curve:
    """The curve of results.json, where null stands for what is not a finite number."""
    series = {name: np.asarray(values, dtype=float).tolist() for name, values in data["metrics"].items()}
    losses = np.asarray(data["losses"], dtype=float).tolist()
    return Curve.measured(data["lambdas"], losses, series, seconds=data["seconds"])
