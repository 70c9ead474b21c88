"""The paper's experiment with many models (Git Re-Basin, section 5.4): N networks, each trained on a random half of
the data, become one by MergeMany.

    python -m experiments.merge_many_mnist                                     # scikit-learn's digits, minutes
    python -m experiments.merge_many_mnist --data mnist --path FOLDER_OR_NPZ   # the paper's data
    python -m experiments.merge_many_mnist --sizes 2,4,8 --width 512

For every N the table has

    members      the N networks themselves, averaged over them
    ensemble     the mean of their logits: N times the work, the reference from above
    naive        the mean of their weights as they come
    MergeMany    the mean of their weights after rebasin.merge_many
    pivot        the mean after matching each to the first

with accuracy and loss on training and test data, the barrier on test data (loss minus the members' mean loss), the
expected calibration error (ECE, 15 bins) on test data, the distance of the members from their mean, and the seconds
that the alignment took; the merges as they are and after REPAIR with the goals of the permuted members. Networks are
trained on first use and cached. Writes merge_many.json, merge_many.md and merge_many_reliability.png to --out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import rebasin
from experiments.common import (
    Cache,
    Data,
    DataPath,
    Out,
    Threads,
    console,
    markdown,
    mlps,
    save,
    told_as_usage,
)
from rebasin.data.classification import Dataset, load
from rebasin.evaluation.many import ENSEMBLE, MEMBERS, Row, compare
from rebasin.matching import ManyResult, match_to_pivot, merge_many, naive_mean
from rebasin.merging.repair import repair
from rebasin.models.cache import Trained
from rebasin.models.train import Recipe
from rebasin.objectives import CrossEntropy
from rebasin.reporting.reliability import draw_reliability
from rebasin.reporting.style import save_png

EPOCHS_AND_BATCH = {
    "digits": (60, 64),
    "mnist": (100, 500),
    "fashion_mnist": (100, 500),
}  # the paper's: 100, 500


@dataclass(frozen=True)
class Line:
    """One method at one N; losses in nats, accuracies and ECE from 0 to 1."""

    models: int
    method: str
    train: Row
    test: Row
    distance: float | None = None
    passes: int | None = None
    converged: bool | None = None
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        plain = {key: value for key, value in vars(self).items() if key not in ("train", "test")}
        return plain | {"train": self.train.to_dict(), "test": self.test.to_dict()}


def table(lines: list[Line]) -> str:
    head = "| N | method | train acc. | train loss | test acc. | test loss | barrier | ECE | distance | passes | sec. |"
    rows = []
    for line in lines:
        distance = "" if line.distance is None else f"{line.distance:.2f}"
        passes = "" if line.passes is None else f"{line.passes}{'' if line.converged else ' (not converged)'}"
        seconds = "" if line.seconds is None else f"{line.seconds:.1f}"
        train, test = line.train, line.test
        ece = "" if test.ece is None else f"{test.ece:.4f}"
        learnt = f"{train.accuracy:.1%}", f"{train.loss:.4f}"
        shown = f"{test.accuracy:.1%}", f"{test.loss:.4f}", f"{test.barrier:.4f}", ece
        rows.append([str(line.models), line.method, *learnt, *shown, distance, passes, seconds])
    return markdown(head, "|--:|:--|" + "--:|" * 9, rows)


def members_of(
    data: Dataset, n: int, width: int, depth: int, recipe: Recipe, cache: Path | None
) -> list[Trained]:
    found = []
    for seed in range(n):
        (one,) = mlps(data, [seed], width, depth=depth, recipe=recipe, cache=cache, halves=True)
        told = "from the cache" if one.cached else f"trained in {one.seconds:.1f} s"
        console.print(f"network {seed + 1} of {n}: {told}", style="dim")
        found.append(one)
    return found


def lines_for(
    nets: list[Trained], data: Dataset, n: int, seed: int, max_passes: int, repair_samples: int
) -> list[Line]:
    """Every line for the first n networks."""
    model = nets[0].model()
    spec = rebasin.trace(model, data.train_x[:2])
    states = [net.state for net in nets[:n]]
    found: dict[str, ManyResult] = {
        "naive": naive_mean(spec, states),
        "MergeMany": merge_many(spec, states, seed=seed, max_passes=max_passes),
        "pivot": match_to_pivot(spec, states, seed=seed),
    }
    batches = list(data.train_x[:repair_samples].split(1000))
    merges: dict[str, Mapping[str, torch.Tensor]] = {}
    for name, result in found.items():
        merges[name] = dict(result.merged)
        merges[f"{name}, REPAIR"] = repair(spec, model, merges[name], result.members(states), batches).state
    train, test = (
        {row.name: row for row in compare(model, CrossEntropy(), data.batches(split), states, merges)}
        for split in ("train", "test")
    )
    lines = []
    for name in (MEMBERS, ENSEMBLE, *merges):
        line = Line(n, name, train[name], test[name])
        result = found.get(name)
        if result is not None:
            told: dict[str, Any] = {"distance": result.distance}
            if name != "naive":
                told |= {"passes": result.passes, "converged": result.converged, "seconds": result.seconds}
            line = replace(line, **told)
        lines.append(line)
    many = found["MergeMany"]
    console.print(f"N = {n}: {many.passes} passes, {many.seconds:.1f} s", style="dim")
    return lines


def main(
    data: Data = "digits",
    path: DataPath = None,
    download: Annotated[
        bool, typer.Option(help="fill the folder PATH from the public address first")
    ] = False,
    sizes: Annotated[str, typer.Option(help="the numbers of models, with commas")] = "2,4,8,16,32",
    width: Annotated[int, typer.Option(help="neurons in each hidden layer; the paper has 512")] = 256,
    depth: Annotated[int, typer.Option(help="hidden layers")] = 3,
    epochs: Annotated[
        int | None, typer.Option(help="by default 60 on the digits, else the paper's 100")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the matching; network i is trained with seed i")] = 0,
    max_passes: Annotated[int, typer.Option(help="of MergeMany, which mostly converges much earlier")] = 100,
    repair_samples: Annotated[int, typer.Option(help="training samples that REPAIR looks at")] = 10_000,
    cache: Cache = None,
    out: Out = Path("outputs/merge_many"),
    threads: Threads = 1,
) -> None:
    """Merge N networks, each trained on a random half of the data, and compare with members, mean and ensemble."""
    torch.set_num_threads(threads)
    try:
        counts = sorted({int(n) for n in sizes.split(",")})
    except ValueError as error:
        raise typer.BadParameter(f"{sizes!r} is no list of numbers such as 2,4,8.") from error
    if not counts or counts[0] < 1:
        raise typer.BadParameter("every number of models must be at least 1.")
    with told_as_usage():
        images = load(data, path, download=download)
        usual_epochs, batch = EPOCHS_AND_BATCH[data]
        recipe = Recipe(epochs=epochs or usual_epochs, batch_size=batch)
        nets = members_of(images, counts[-1], width, depth, recipe, cache)
        lines: list[Line] = []
        for n in counts:
            lines += lines_for(nets, images, n, seed, max_passes, repair_samples)
    config = dict(data=data, width=width, depth=depth, recipe=asdict(recipe), seed=seed, sizes=counts)
    payload = {"config": config, "samples": [len(images.train_y), len(images.test_y)]}
    save(out, "merge_many", payload | {"rows": [x.to_dict() for x in lines]}, table(lines))
    shown = (MEMBERS, ENSEMBLE, "naive", "MergeMany", "MergeMany, REPAIR")
    last = {x.method: x.test.calibration for x in lines if x.models == counts[-1]}
    curves = {name: one for name in shown if (one := last[name]) is not None}
    title = f"{counts[-1]} networks, each trained on half of {data}"
    save_png(draw_reliability(curves, title), out / "merge_many_reliability.png")
    console.print(table(lines))
    console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
