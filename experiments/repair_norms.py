"""What a reset of statistics, REPAIR and REPAIR in closed form do for a merge of two, by the network's norms.

    python -m experiments.repair_norms                                  # scikit-learn's digits: minutes of one core
    python -m experiments.repair_norms --data mnist --path FOLDER_OR_NPZ --pairs 3

ResNet8s with BatchNorm, GroupNorm and LayerNorm over channels, and an MLP without norms, are trained in pairs from
different seeds on first use, and cached. B is aligned by `auto_matching` on training data. For each the table has, on
test data and as the mean over pairs, the midpoint's accuracy and the barrier of the line, naive and aligned, as it is
and repaired. Writes repair_norms.json and repair_norms.md to --out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer

import rebasin
from experiments.common import Cache, Data, DataPath, Out, Threads, console, markdown, save, told_as_usage
from rebasin.data.classification import Dataset, load
from rebasin.merging.repair import REPAIRS, How, unfit
from rebasin.models.cache import Trained, trained
from rebasin.models.train import Recipe
from rebasin.objectives import CrossEntropy

NETWORKS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "BatchNorm": ("resnet", {"norm": "batch", "blocks": 1}),
    "GroupNorm": ("resnet", {"norm": "group", "blocks": 1}),
    "LayerNorm": ("resnet", {"norm": "layer", "blocks": 1}),
    "no norm (MLP)": ("mlp", {"width": 32, "depth": 3}),
}
"""Row of the table -> the classifier and its options."""

Row = dict[str, Any]


def measure(name: str, nets: tuple[Trained, Trained], data: Dataset, points: int) -> list[Row]:
    """One pair: naive and aligned, as it is and by each repair that changes something of the network."""
    a, b = (net.model() for net in nets)
    train, test = data.batches("train", 200), data.batches("test", 1000)
    spec = rebasin.trace(a, data.train_x[:2])
    auto = rebasin.auto_matching(spec, a, b, CrossEntropy(), train)
    states: dict[str, dict[str, torch.Tensor]] = {"naive": dict(nets[1].state)}
    states["aligned"] = auto.permutation.apply(nets[1].state)
    rows = []
    for merge, end in states.items():
        ways: list[How | None] = [None, *(how for how in REPAIRS if unfit(spec, a, how) is None)]
        for how in ways:
            each: Callable[..., Any] | None = None
            if how is not None:
                each = partial(repaired, spec, a, (nets[0].state, end), train, how)
            curve = rebasin.barrier(
                a,
                nets[0].state,
                end,
                partial(CrossEntropy().evaluate, batches=test),
                points=points,
                repair=each,
            )
            middle = {"accuracy": curve.at(0.5, "accuracy"), "loss": curve.at(0.5), "barrier": curve.barrier}
            ends = (curve.metrics["accuracy"][0] + curve.metrics["accuracy"][-1]) / 2
            rows.append({"norm": name, "merge": merge, "repair": how or "none", "ends": ends, **middle})
    console.print(f"{name}: {auto.chosen}", style="dim")
    return rows


def repaired(
    spec: rebasin.PermutationSpec, model: torch.nn.Module, ends: Any, batches: Any, how: How, merged: Any, lam: float
) -> Any:  # fmt: skip
    return rebasin.repair(spec, model, merged, ends, batches, how=how, weights=[1 - lam, lam]).state


def table(rows: list[Row]) -> str:
    """The mean over pairs: a row for each norm, a column for each repair, accuracy of the midpoint (barrier)."""
    head = (
        "| norm | A and B | merge | none | reset | rescale (REPAIR) | closed form | least squares | ZipIt |"
    )
    lines = []
    for norm in NETWORKS:
        for merge in ("naive", "aligned"):
            own = [row for row in rows if (row["norm"], row["merge"]) == (norm, merge)]
            cells = []
            for how in ("none", *REPAIRS):
                found = [row for row in own if row["repair"] == how]
                told = (
                    f"{mean(r['accuracy'] for r in found):.1%} ({mean(r['barrier'] for r in found):.3f})"
                    if found
                    else "–"
                )
                cells.append(told)
            lines.append([norm, f"{mean(row['ends'] for row in own):.1%}", merge, *cells])
    return markdown(head, "|:--|--:|:--|" + "--:|" * (1 + len(REPAIRS)), lines)


def main(
    data: Data = "digits",
    path: DataPath = None,
    pairs: Annotated[int, typer.Option(help="of networks, for each norm")] = 2,
    epochs: Annotated[
        int, typer.Option(help="of each training of a ResNet; an MLP has three times as many")
    ] = 10,
    points: Annotated[int, typer.Option(help="on the line")] = 5,
    cache: Cache = None,
    out: Out = Path("outputs/repair_norms"),
    threads: Threads = 1,
) -> None:
    """Compare repairs by norm."""
    torch.set_num_threads(threads)
    rows: list[Row] = []
    with told_as_usage():
        images = load(data, path)
        for name, (kind, options) in NETWORKS.items():
            recipe = Recipe(
                epochs=epochs if kind == "resnet" else 3 * epochs, learning_rate=3e-3, schedule="cosine"
            )
            for pair in range(pairs):
                first, second = (
                    trained(kind, images, options, recipe, seed, cache) for seed in (2 * pair, 2 * pair + 1)
                )
                rows += measure(name, (first, second), images, points)
    config = dict(data=data, pairs=pairs, epochs=epochs, points=points)
    save(out, "repair_norms", {"config": config, "rows": rows}, table(rows))
    console.print(table(rows))
    console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
