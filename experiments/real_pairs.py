"""Networks that others trained, aligned by every algorithm, without and with the statistics of BatchNorm anew.

    python -m experiments.real_pairs --real FOLDER --mnist mnist.npz --cifar cifar10.npz
    python -m experiments.real_pairs --real FOLDER --mnist mnist.npz --only mnist-ddpm --steps 100

The pairs are `cifar-resnet20` and `mnist-ddpm` of `experiments.pairs`. Barriers are of the loss on held-out data, the
worst of 11 points above the line between the ends' losses. Searches by the loss (STE, Sinkhorn, learned maps) take
`--steps` steps; on BatchNorms they compute with the statistics of the batch. The log is gone on with: what it has is
not measured again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer

import rebasin
from experiments.common import console, markdown
from experiments.pairs import Cifar, Mnist, Pair, Places, Real, available
from rebasin.errors import RebasinError
from rebasin.files import write_text
from rebasin.matching import learned_matching, sinkhorn_matching
from rebasin.matching.activations.hybrids import activation_and_weight, activation_then_weight
from rebasin.types import State

NAMES = ("cifar-resnet20", "mnist-ddpm")


def algorithms(
    pair: Pair, spec: rebasin.PermutationSpec, steps: int, seed: int
) -> dict[str, Callable[[], State]]:
    """What each algorithm makes of B."""
    a, b = pair.models()
    few = pair.learn[:16]

    def permuted(function: Callable[..., Any], *given: Any, **options: Any) -> State:
        return function(spec, *given, seed=seed, **options).permutation.apply(pair.b)

    seen = partial(permuted, objective=pair.objective)
    weights = partial(permuted, rebasin.weight_matching, pair.a, pair.b)
    searched = partial(permuted, steps=steps)
    return {
        "naive": lambda: pair.b,
        "weight_matching": weights,
        "weight_matching, normalize=paper": partial(weights, normalize="paper"),
        "activation_matching": lambda: seen(rebasin.activation_matching, a, b, few),
        "activation_then_weight": lambda: seen(activation_then_weight, a, b, few),
        "activation_and_weight": lambda: seen(activation_and_weight, a, b, few),
        "auto": lambda: permuted(rebasin.auto_matching, a, b, pair.objective, pair.learn),
        "ste": lambda: searched(rebasin.straight_through, a, b, pair.objective, pair.learn, refine=2),
        "sinkhorn": lambda: searched(sinkhorn_matching, a, b, pair.objective, pair.learn, init="best"),
        "learned": lambda: learned_matching(
            spec, a, b, pair.objective, pair.learn, steps=steps, seed=seed
        ).alignment.apply(pair.b),
    }


def measured(pair: Pair, make: Callable[[], State], points: int) -> dict[str, Any]:
    """Seconds and the barriers; or the sentence that says why there is none."""
    began = perf_counter()
    try:
        end = make()
    except RebasinError as error:
        return {"why": str(error)}
    row: dict[str, Any] = {"seconds": round(perf_counter() - began, 2)}
    for name, reset in (("plain", False), ("reset", True)) if pair.fresh else (("plain", False),):
        curve = pair.curve(end, points, reset)
        row[name] = {"barrier": curve.barrier, "losses": [round(loss, 6) for loss in curve.losses]}
    return row


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for pair, rows in found.items():
        for reset in ("plain", "reset"):
            naive = rows["naive"].get(reset)
            for name, row in rows.items() if naive else ():
                label = pair + (", statistics anew" if reset == "reset" else "")
                if "why" in row:
                    lines.append([label, name, "", "", "", row["why"]])
                    continue
                one = row[reset]
                middle = one["losses"][len(one["losses"]) // 2]
                share = f"{one['barrier'] / naive['barrier']:.0%}"
                lines.append(
                    [label, name, f"{one['barrier']:.3f}", share, f"{middle:.3f}", f"{row['seconds']:.1f}"]
                )
    head = "| pair | algorithm | barrier | of naive | loss at the midpoint | seconds |"
    return markdown(head, "|---|---|--:|--:|--:|--:|", lines)


def main(
    real: Real = None,
    mnist: Mnist = None,
    cifar: Cifar = None,
    only: Annotated[str, typer.Option(help="names of pairs, with , between")] = ",".join(NAMES),
    steps: Annotated[int, typer.Option(help="of the searches by the loss")] = 20,
    points: Annotated[int, typer.Option(help="points of the line")] = 11,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    json_file: Annotated[Path, typer.Option("--json", help="the log, which is gone on with")] = Path(
        "docs/experiments/real_pairs.json"
    ),
) -> None:
    """Measure every algorithm on networks that others trained; prints a table."""
    made, missing = available(Places(real, None, mnist, cifar), seed)
    chosen: Sequence[str] = only.split(",")
    for name in chosen:
        if name not in NAMES:
            raise typer.BadParameter(f"There is no pair {name!r}; there are {', '.join(NAMES)}.")
        if name in missing:
            console.print(f"{name} is left out: it needs {missing[name]}")
    settings = {"steps": steps, "points": points, "seed": seed, "torch": torch.__version__}
    log = json.loads(json_file.read_text()) if json_file.exists() else {"settings": settings, "pairs": {}}
    if log["settings"] != settings:
        raise typer.BadParameter(f"{json_file} was made with {log['settings']}: give another file, or these.")
    for name in (n for n in chosen if n in made):
        pair = made[name]()
        rows = log["pairs"].setdefault(name, {})
        for algorithm, make in algorithms(pair, pair.spec(), steps, seed).items():
            if algorithm in rows:
                continue
            rows[algorithm] = measured(pair, make, points)
            kept = {k: rows[algorithm][k]["barrier"] for k in ("plain", "reset") if k in rows[algorithm]}
            console.print(f"{name}, {algorithm}: {kept or rows[algorithm]['why']}")
            write_text(json_file, json.dumps(log, indent=1) + "\n")
    console.print(table(log["pairs"]))


if __name__ == "__main__":
    typer.run(main)
