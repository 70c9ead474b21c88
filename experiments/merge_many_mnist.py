"""The paper's experiment with many models (Git Re-Basin, section 5.4): N networks, each trained on a random half of
the data, become one by MergeMany.

    python -m experiments.merge_many_mnist                                     # scikit-learn's digits, minutes
    python -m experiments.merge_many_mnist --data mnist --path FOLDER_OR_NPZ   # the paper's data
    python -m experiments.merge_many_mnist --sizes 2,4,8 --width 512

For every N the table has

    members      the N networks themselves, averaged over them
    naive mean   the mean of their weights as they come
    ensemble     the mean of their logits: N times the work, the reference from above
    MergeMany    the mean of their weights after rebasin.merge_many; "progressive" with that start
    pivot        the mean after matching each to the first

with accuracy and loss on training and test data, the expected calibration error (ECE: the mean, over samples, of
|accuracy - confidence| in 10 equal bins of the largest probability) on test data, the distance of the members from
their mean, and the seconds that the alignment took. Networks are trained on first use and cached. Writes
merge_many.json, merge_many.md and merge_many_reliability.png to --out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call

import rebasin
from rebasin.checkpoints import write_text
from rebasin.data.classification import Dataset, load
from rebasin.errors import RebasinError
from rebasin.matching.many import match_to_pivot, merge_many
from rebasin.matching.many_result import ManyResult
from rebasin.models.cache import Trained, trained
from rebasin.models.train import Recipe
from rebasin.reporting.style import figure, save_png

State = Mapping[str, Tensor]
BINS = 10
EPOCHS_AND_BATCH = {
    "digits": (60, 64),
    "mnist": (100, 500),
    "fashion_mnist": (100, 500),
}  # the paper's: 100, 500
console = Console()


@dataclass(frozen=True)
class Row:
    """One method at one N; losses in nats, accuracies and ECE from 0 to 1."""

    models: int
    method: str
    train_accuracy: float
    train_loss: float
    test_accuracy: float
    test_loss: float
    ece: float
    distance: float | None = None
    passes: int | None = None
    converged: bool | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Bins:
    """Share of the samples [10], mean confidence and accuracy (NaN where empty) by confidence."""

    share: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def ece(self) -> float:
        return float((self.share * (self.accuracy - self.confidence).abs()).nan_to_num().sum())


def reliability(logits: Tensor, y: Tensor) -> Bins:
    """The 10 equal bins of confidence, the largest probability of each sample; logits [n, classes], y [n]."""
    confidence, answer = logits.double().softmax(dim=1).max(dim=1)
    right = (answer == y).double()
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    count = torch.bincount(place, minlength=BINS).double()

    def mean(values: Tensor) -> Tensor:
        return torch.zeros(BINS, dtype=torch.float64).index_add(0, place, values) / count

    return Bins(count / len(y), mean(confidence), mean(right))


@torch.no_grad()
def logits_of(model: nn.Module, state: State, x: Tensor) -> Tensor:
    """[n, classes] of `model` with the weights `state`."""
    parts = [functional_call(model, dict(state), (part,)) for part in x.split(1000)]
    return torch.cat(parts)


def half(data: Dataset, seed: int) -> Dataset:
    """`data` with a random half of its training samples."""
    order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(seed))
    chosen = order[: len(order) // 2].sort().values
    return replace(data, train_x=data.train_x[chosen], train_y=data.train_y[chosen])


def row(
    n: int, method: str, data: Dataset, train: Tensor, test: Tensor, result: ManyResult | None = None
) -> Row:
    """Measure logits [samples, classes] on the whole training part and the test part."""
    told = {}
    if result is not None:
        told = {"distance": result.distance, "passes": result.passes, "converged": result.converged}
        told |= {"seconds": result.seconds}
    return Row(
        models=n,
        method=method,
        train_accuracy=float((train.argmax(1) == data.train_y).double().mean()),
        train_loss=float(F.cross_entropy(train, data.train_y)),
        test_accuracy=float((test.argmax(1) == data.test_y).double().mean()),
        test_loss=float(F.cross_entropy(test, data.test_y)),
        ece=reliability(test, data.test_y).ece,
        **told,
    )


def mean_row(n: int, rows: list[Row]) -> Row:
    names = ("train_accuracy", "train_loss", "test_accuracy", "test_loss", "ece")
    means = {name: sum(getattr(r, name) for r in rows) / len(rows) for name in names}
    return replace(rows[0], models=n, method="members", **means)


def table(rows: list[Row]) -> str:
    lines = [
        "| N | method | train acc. | train loss | test acc. | test loss | ECE | distance | passes | seconds |",
        "|--:|:--|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        distance = "" if r.distance is None else f"{r.distance:.2f}"
        passes = "" if r.passes is None else f"{r.passes}" if r.converged else f"{r.passes} (not converged)"
        seconds = "" if r.seconds is None else f"{r.seconds:.1f}"
        lines.append(
            f"| {r.models} | {r.method} | {r.train_accuracy:.1%} | {r.train_loss:.4f} | {r.test_accuracy:.1%} |"
            f" {r.test_loss:.4f} | {r.ece:.4f} | {distance} | {passes} | {seconds} |"
        )
    return "\n".join(lines) + "\n"


def draw(bins: Mapping[str, Bins], n: int, path: Path) -> None:
    """Accuracy against confidence; the marker's area is the share of the samples."""
    fig = figure(5.6, 4.6)
    ax = fig.add_subplot()
    ax.plot([0, 1], [0, 1], color="#6b7280", linestyle=":", linewidth=1.2, label="perfectly calibrated")
    looks = zip(
        ("#6b7280", "#D55E00", "#009E73", "#0072B2"),
        ("v", "o", "^", "s"),
        ("-.", "--", "-", "-"),
        strict=True,
    )
    for (name, one), (color, marker, line) in zip(bins.items(), looks, strict=True):
        seen = one.share > 0
        x, y = one.confidence[seen].numpy(), one.accuracy[seen].numpy()
        ax.plot(x, y, color=color, linestyle=line, linewidth=1.4, label=f"{name} (ECE {one.ece:.3f})")
        ax.scatter(x, y, s=8 + 160 * one.share[seen].numpy(), color=color, marker=marker, alpha=0.8)
    ax.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy (test)")
    ax.set_title(f"Reliability of {n} networks, each trained on half of the data")
    ax.legend(loc="upper left", fontsize=8.5)
    save_png(fig, path)


def members_of(
    data: Dataset, n: int, width: int, depth: int, recipe: Recipe, cache: Path | None
) -> list[Trained]:
    found = []
    for seed in range(n):
        one = trained("mlp", half(data, seed), {"width": width, "depth": depth}, recipe, seed, cache)
        told = "from the cache" if one.cached else f"trained in {one.seconds:.1f} s"
        console.print(f"network {seed + 1} of {n}: {told}", style="dim", highlight=False)
        found.append(one)
    return found


def main(
    data: Annotated[
        str, typer.Option(help="digits (comes with scikit-learn), mnist or fashion_mnist")
    ] = "digits",
    path: Annotated[
        Path | None, typer.Option(help="for the latter two: an .npz file or a folder with the IDX files")
    ] = None,
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
    cache: Annotated[Path | None, typer.Option(help="where trained networks are kept")] = None,
    out: Annotated[Path, typer.Option(help="the folder for the table, the JSON and the figure")] = Path(
        "outputs/merge_many"
    ),
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
) -> None:
    """Merge N networks, each trained on a random half of the data, and compare with members, mean and ensemble."""
    torch.set_num_threads(threads)
    try:
        counts = sorted({int(n) for n in sizes.split(",")})
    except ValueError as error:
        raise typer.BadParameter(f"{sizes!r} is no list of numbers such as 2,4,8.") from error
    if not counts or counts[0] < 1:
        raise typer.BadParameter("every number of models must be at least 1.")
    try:
        images = load(data, path, download=download)
        usual_epochs, batch = EPOCHS_AND_BATCH[data]
        recipe = Recipe(epochs=epochs or usual_epochs, batch_size=batch)
        nets = members_of(images, counts[-1], width, depth, recipe, cache)
        rows, bins = compare(nets, images, counts, seed)
    except RebasinError as error:
        raise typer.BadParameter(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    config = dict(data=data, width=width, depth=depth, recipe=asdict(recipe), seed=seed, sizes=counts)
    payload = {"config": config, "samples": [len(images.train_y), len(images.test_y)]}
    write_text(out / "merge_many.json", json.dumps(payload | {"rows": [asdict(r) for r in rows]}, indent=1))
    write_text(out / "merge_many.md", table(rows))
    draw(bins, counts[-1], out / "merge_many_reliability.png")
    console.print(table(rows), highlight=False, soft_wrap=True)
    console.print(f"written to {out}")


def compare(
    nets: list[Trained], data: Dataset, counts: list[int], seed: int
) -> tuple[list[Row], dict[str, Bins]]:
    """The rows for every N, and the reliability of the methods at the last one."""
    model = nets[0].model()
    spec = rebasin.trace(model, data.train_x[:2])
    states = [net.state for net in nets]
    outputs = [(logits_of(model, s, data.train_x), logits_of(model, s, data.test_x)) for s in states]
    single = [row(1, "member", data, *both) for both in outputs]
    rows: list[Row] = []
    bins: dict[str, Bins] = {}
    for n in counts:
        some = states[:n]
        naive = {name: torch.stack([state[name] for state in some]).mean(dim=0) for name in some[0]}
        results = {
            "MergeMany": merge_many(spec, some, seed=seed),
            "MergeMany, progressive": merge_many(spec, some, seed=seed, init="progressive"),
            "pivot": match_to_pivot(spec, some, seed=seed),
        }
        train, test = (torch.stack([o[k] for o in outputs[:n]]) for k in (0, 1))
        rows.append(mean_row(n, single[:n]))
        of_naive = logits_of(model, naive, data.train_x), logits_of(model, naive, data.test_x)
        rows.append(
            replace(row(n, "naive mean", data, *of_naive), distance=results["MergeMany"].distance_before)
        )
        rows.append(row(n, "ensemble", data, train.mean(dim=0), test.mean(dim=0)))
        merged_test: dict[str, Tensor] = {}
        for name, result in results.items():
            merged_test[name] = logits_of(model, result.merged, data.test_x)
            rows.append(
                row(n, name, data, logits_of(model, result.merged, data.train_x), merged_test[name], result)
            )
        bins = {
            "members, pooled": reliability(test.flatten(0, 1), data.test_y.repeat(n)),
            "naive mean": reliability(of_naive[1], data.test_y),
            "ensemble": reliability(test.mean(dim=0), data.test_y),
            "MergeMany": reliability(merged_test["MergeMany"], data.test_y),
        }
        console.print(f"N = {n}: {results['MergeMany'].passes} passes", style="dim", highlight=False)
    return rows, bins


if __name__ == "__main__":
    typer.run(main)
