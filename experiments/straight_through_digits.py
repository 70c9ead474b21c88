"""The straight-through estimator on the paper's MLPs: does it end at or below the weight matching it starts from?

    python -m experiments.straight_through_digits                                  # scikit-learn's digits, minutes
    python -m experiments.straight_through_digits --data mnist --path FOLDER_OR_NPZ --evaluate-every 4 --pairs 1

For each width, pairs of networks trained from different seeds (cached after the first time), and for each pair

    naive            no permutation
    forward start    weight matching from a first guess made layer by layer, what a run does by default
    weight matching  as in the paper, from the identity; STE starts here
    STE              rebasin.straight_through from there, with verified passes at the end (--refine)

with the barrier of the cross entropy on test data (25 points, against the line between the endpoints), the barrier
on training data, the accuracy at the midpoint on test data, and the seconds. The estimator's candidates are
compared on the last fifth of the training data; nothing is chosen by test data.
Writes straight_through_DATA.json, .md and .png to --out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

import rebasin
from experiments.common import Cache, Data, DataPath, Out, Threads, console, mlps, save
from rebasin.data.classification import Dataset, load
from rebasin.errors import RebasinError
from rebasin.matching.straight_through.estimator import straight_through
from rebasin.models.cache import Trained
from rebasin.models.train import Recipe
from rebasin.objectives import CrossEntropy
from rebasin.reporting.style import figure, save_png
from rebasin.spec import Permutation, PermutationSpec

RECIPES = {
    "digits": Recipe(epochs=60, batch_size=64),
    "mnist": Recipe(epochs=10, batch_size=500),
    "fashion_mnist": Recipe(epochs=10, batch_size=500),
}
BATCH = {"digits": 250, "mnist": 1000, "fashion_mnist": 1000}
LOOKS = {
    "naive": ("#6b7280", "v"),
    "forward start": ("#E69F00", "s"),
    "weight matching": ("#D55E00", "o"),
    "STE": ("#0072B2", "^"),
}
OBJECTIVE = CrossEntropy()


@dataclass(frozen=True)
class Row:
    """One method on one pair; losses in nats, accuracy from 0 to 1."""

    width: int
    pair: int
    method: str
    barrier: float
    train_barrier: float
    accuracy: float
    endpoints_accuracy: float
    moved: int
    seconds: float


def compare(a: Trained, b: Trained, data: Dataset, pair: int, options: dict[str, Any]) -> list[Row]:
    """Every method on one pair."""
    model_a, model_b = a.model(), b.model()
    spec = rebasin.trace(model_a, data.train_x[:2])

    def match(**how: Any) -> Callable[[], Permutation]:
        return lambda: rebasin.weight_matching(spec, a.state, b.state, **how).permutation

    batches = data.batches("train", BATCH[data.name])
    found: dict[str, Permutation] = {}

    def search() -> Permutation:
        start = found["weight matching"]
        result = straight_through(spec, model_a, model_b, OBJECTIVE, batches, init=start, **options)
        return result.permutation

    methods = {
        "naive": spec.identity,
        "forward start": match(init="forward"),
        "weight matching": match(init="identity"),
        "STE": search,
    }
    rows = []
    for name, method in methods.items():
        began = time.perf_counter()
        found[name] = method()
        seconds = time.perf_counter() - began
        rows.append(measure(name, found[name], a, b, data, pair, seconds, spec))
        console.print(
            f"width {rows[-1].width}, pair {pair}: {name} {rows[-1].barrier:.4f}, {seconds:.1f} s",
            style="dim",
        )
    return rows


def measure(
    name: str,
    permutation: Permutation,
    a: Trained,
    b: Trained,
    data: Dataset,
    pair: int,
    seconds: float,
    spec: PermutationSpec,
) -> Row:
    """The barriers on test and training data, and the accuracy at the midpoint."""
    aligned = permutation.apply(b.state)
    curves = {}
    parts = {"test": (data.batches("test", 1000), 25), "train": (data.batches("train", 1000), 11)}
    for split, (batches, points) in parts.items():

        def loss(model: nn.Module, batches: Any = batches) -> dict[str, float]:
            return OBJECTIVE.evaluate(model, batches)

        curves[split] = rebasin.barrier(a.model(), a.state, aligned, loss, points=points)
    accuracy = curves["test"].metrics["accuracy"]
    return Row(
        width=int(a.options["width"]),
        pair=pair,
        method=name,
        barrier=curves["test"].barrier,
        train_barrier=curves["train"].barrier,
        accuracy=accuracy[len(accuracy) // 2],
        endpoints_accuracy=(accuracy[0] + accuracy[-1]) / 2,
        moved=permutation.moved(),
        seconds=seconds,
    )


def table(rows: list[Row]) -> str:
    """One line for each pair, and the means over the pairs."""
    lines = [
        f"| width | pair | {' | '.join(LOOKS)} | STE / its start | accuracy at the midpoint,"
        " weight matching / STE (endpoints) | seconds of STE |",
        "|--:|:--|" + "--:|" * (len(LOOKS) + 3),
    ]
    for width in sorted({row.width for row in rows}):
        pairs = sorted({row.pair for row in rows if row.width == width})
        for pair in [*pairs, None] if len(pairs) > 1 else pairs:
            found = {
                name: [r for r in rows if (r.width, r.method) == (width, name) and pair in (r.pair, None)]
                for name in LOOKS
            }

            def mean(name: str, field: str, found: dict[str, list[Row]] = found) -> float:
                return float(np.mean([getattr(row, field) for row in found[name]]))

            start, end = mean("weight matching", "barrier"), mean("STE", "barrier")
            lines.append(
                f"| {width} | {'mean' if pair is None else pair} | "
                + " | ".join(f"{mean(name, 'barrier'):.4f}" for name in LOOKS)
                + f" | {f'{end / start:.0%}' if start > 0 else '–'}"
                + f" | {mean('weight matching', 'accuracy'):.1%} / {mean('STE', 'accuracy'):.1%}"
                + f" ({mean('STE', 'endpoints_accuracy'):.1%}) | {mean('STE', 'seconds'):.0f} |"
            )
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], name: str, path: Path) -> None:
    """Barrier against width: the pairs as points, their means as lines."""
    with figure(6.4, 4.2) as fig:
        ax = fig.add_subplot()
        widths = sorted({row.width for row in rows})
        for place, (method, (color, marker)) in enumerate(LOOKS.items()):
            shift = 1.02 ** (place - 1.5)
            chosen = [row for row in rows if row.method == method]
            x, y = [row.width * shift for row in chosen], [row.barrier for row in chosen]
            ax.scatter(x, y, color=color, marker=marker, s=26, alpha=0.7, zorder=3)
            means = [
                float(np.mean([row.barrier for row in chosen if row.width == width])) for width in widths
            ]
            ax.plot([width * shift for width in widths], means, color=color, label=method, linewidth=1.3)
        ax.set_xscale("log", base=2)
        ax.set_xticks(widths, [str(width) for width in widths])
        ax.minorticks_off()
        ax.set_yscale("symlog", linthresh=0.01)
        ax.set_ylim(bottom=-0.001)
        ax.set_yticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
        ax.set(xlabel="width of the hidden layers", ylabel="barrier on test data (cross entropy)")
        ax.set_title(f"MLPs on {name}: naive, weight matching, straight-through estimator")
        ax.legend(fontsize=8.5)
    save_png(fig, path)


def main(
    data: Data = "digits",
    path: DataPath = None,
    widths: Annotated[str, typer.Option(help="of the three hidden layers, with commas")] = "32,128,512",
    pairs: Annotated[int, typer.Option(help="pairs for each width, of seeds 0 and 1, 2 and 3, ...")] = 3,
    epochs: Annotated[
        int | None, typer.Option(help="of the trainings; default 60 on digits, else 10")
    ] = None,
    steps: Annotated[int, typer.Option(help="of STE's gradient")] = 200,
    lr: Annotated[float, typer.Option(help="of STE")] = 2e-3,
    project_every: Annotated[int, typer.Option(help="steps between STE's projections")] = 1,
    evaluate_every: Annotated[int, typer.Option(help="steps between looks at the last fifth")] = 1,
    refine: Annotated[int, typer.Option(help="STE's verified passes at the end")] = 12,
    seed: Annotated[int, typer.Option(help="of STE")] = 0,
    cache: Cache = None,
    out: Out = Path("outputs/straight_through"),
    threads: Threads = 1,
) -> None:
    """Barriers on test data of naive merging, weight matching and the straight-through estimator."""
    torch.set_num_threads(threads)
    began = time.perf_counter()
    options: dict[str, Any] = dict(steps=steps, lr=lr, project_every=project_every, refine=refine, seed=seed)
    options["schedule"] = "cosine"
    options["evaluate_every"] = evaluate_every
    rows: list[Row] = []
    try:
        images = load(data, path)
        recipe = RECIPES[data]
        recipe = Recipe(epochs=epochs or recipe.epochs, batch_size=recipe.batch_size)
        for width in sorted(int(width) for width in widths.split(",")):
            for pair in range(pairs):
                a, b = mlps(images, (2 * pair, 2 * pair + 1), width, recipe=recipe, cache=cache)
                rows += compare(a, b, images, pair, options)
    except (RebasinError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    seconds = time.perf_counter() - began
    payload = dict(data=data, recipe=asdict(recipe), options=options, seconds=seconds)
    save(out, f"straight_through_{data}", payload | {"rows": [asdict(row) for row in rows]}, table(rows))
    draw(rows, data, out / f"straight_through_{data}.png")
    console.print(table(rows))
    console.print(f"written to {out} after {seconds:.0f} s")


if __name__ == "__main__":
    typer.run(main)
