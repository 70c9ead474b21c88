"""Is a low line of learned scales B's doing? The paper's MLPs, and a B whose weights are shuffled beside the real one.

    python -m experiments.learned_control                                       # scikit-learn's digits, a minute
    python -m experiments.learned_control --data mnist --path FOLDER_OR_NPZ --widths 32,128

Maps that are learned by the loss between A and B are trained parameters of the midpoint. How good does it become if B
is none: the same, so that it says nothing of B, or worse, so that B has its part in it? `experiments.learned_maps
--study control` and `experiments.learned_transformers --control` ask the same of UNets and transformers.
Figures are of test data. Writes learned_control_DATA.json and .md to --out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import rebasin
from experiments.common import Cache, Data, DataPath, Out, Threads, console, markdown, mlps, save
from experiments.streams import shuffled
from rebasin.data.classification import load
from rebasin.matching import learned_matching, weight_matching
from rebasin.models.train import Recipe
from rebasin.objectives import CrossEntropy
from rebasin.spec.continuous import KINDS
from rebasin.tensors.modules import loaded


def main(
    data: Data = "digits",
    path: DataPath = None,
    widths: Annotated[str, typer.Option(help="of the three hidden layers, with commas")] = "32,128",
    steps: Annotated[int, typer.Option(help="gradient steps of the scales")] = 400,
    seed: Annotated[int, typer.Option(help="of everything random; seed + 1 trains B")] = 0,
    cache: Cache = None,
    out: Out = Path("outputs"),
    threads: Threads = 1,
) -> None:
    """Learn scales between A and B, and between A and B shuffled; prints a table."""
    torch.set_num_threads(threads)
    images, objective = load(data, path), CrossEntropy()
    recipe = Recipe(epochs=60, batch_size=64) if data == "digits" else Recipe(epochs=8, batch_size=250)
    order = torch.randperm(len(images.train_y), generator=torch.Generator().manual_seed(seed))[:20000]
    learn = [(images.train_x[i], images.train_y[i]) for i in order.split(250)]
    held = list(zip(images.test_x.split(1000), images.test_y.split(1000), strict=True))
    figures, lines = [], []
    for width in map(int, widths.split(",")):
        a, b = mlps(images, (seed, seed + 1), width, recipe=recipe, cache=cache)
        model = a.model()
        spec = rebasin.trace(model, images.train_x[:2])
        for name, state in (("B", b.state), ("B shuffled", shuffled(spec, b.state, seed, KINDS))):
            start = weight_matching(spec, a.state, state, seed=seed).permutation
            end = loaded(b.model(), state).eval()
            found = learned_matching(spec, model, end, objective, learn, init=start, steps=steps, seed=seed)
            for row, moved in (("weights", start.apply(state)), ("scales", found.alignment.apply(state))):
                curve = rebasin.barrier(
                    model, a.state, moved, lambda m: objective.evaluate(m, held), points=21
                )
                middle = {"loss": curve.losses[10], "accuracy": curve.metrics["accuracy"][10]}
                ends = {"loss of A": curve.losses[0], "loss of B": curve.losses[-1]}
                line = {"losses": list(curve.losses)}
                figures.append({"width": width, "end": name, "row": row, **middle, **ends, **line})
                cells = (
                    f"{middle['loss']:.3f}",
                    f"{middle['accuracy']:.1%}",
                    *(f"{x:.3f}" for x in ends.values()),
                )
                lines.append((str(width), name, row, *cells))
                console.print(" ".join(lines[-1]))
    head = "| width | end | by | loss at the midpoint | accuracy there | loss of A | loss of B |"
    table = markdown(head, "|--:|---|---|--:|--:|--:|--:|", lines)
    save(
        out,
        f"learned_control_{data}",
        {"steps": steps, "seed": seed, "rows": figures},
        table,
    )


if __name__ == "__main__":
    typer.run(main)
