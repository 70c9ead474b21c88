"""All ways of rebasin.merge_many on the same networks: accuracy, loss, barrier, cycle consistency, seconds.

    python -m experiments.merge_many_methods                                     # scikit-learn's digits, minutes
    python -m experiments.merge_many_methods --data mnist --path FOLDER_OR_NPZ --models 8

Networks are trained from different seeds, on all of the data or on random halves (--halves), on first use, and cached.
For every method the table has, on test data, accuracy and loss of the merge; the barrier, that is loss minus the
members' mean loss; loss and barrier after REPAIR; the distance of the members from their mean; the share of neurons
that end elsewhere when brought from one model to a second over a third instead of directly (0 for every method that
has one arrangement for all; "pairs" is the matching of every pair by itself, which gives no merge); and the seconds
that the alignment took. Writes merge_many_methods.json and merge_many_methods.md to --out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from time import perf_counter
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
from rebasin.matching import ManyResult, cycle_error, merge_many, weight_matching
from rebasin.merging.repair import repair
from rebasin.models.cache import Trained
from rebasin.models.train import Recipe
from rebasin.objectives import CrossEntropy
from rebasin.spec import Permutation, PermutationSpec

RECIPES = {
    "digits": Recipe(),
    "mnist": Recipe(epochs=5, batch_size=500),
    "fashion_mnist": Recipe(epochs=5, batch_size=500),
}

METHODS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "naive": ("naive", {}),
    "pivot": ("pivot", {}),
    "pivot, best": ("pivot", {"pivot": "best"}),
    "tree": ("tree", {}),
    "MergeMany": ("mean", {}),
    "MergeMany, progressive": ("mean", {"init": "progressive"}),
    "C2M3": ("cycle_consistent", {}),
    "C2M3 from pivot": ("cycle_consistent", {"init": "pivot"}),
    "C2M3, then MergeMany": ("cycle_consistent", {"polish": True}),
    "activations": ("activations", {}),
    "STE-MM": ("straight_through", {}),
    "STE-MM, fixed mean": ("straight_through", {"lambdas": "fixed"}),
    "STE-MM from MergeMany": ("straight_through", {"init": "mean"}),
    "maps, by the weights": ("maps", {"by": "weights"}),
    "maps, learned": ("maps", {"by": "loss"}),
}
"""Name in the table -> method of `merge_many` and its options."""


@dataclass(frozen=True)
class Line:
    """One method; `plain` and `repaired` are its merge on test data."""

    method: str
    plain: Row | None
    repaired: Row | None = None
    distance: float | None = None
    cycle_error: float | None = None
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        rows = {"plain": self.plain, "repaired": self.repaired}
        return vars(self) | {name: None if row is None else row.to_dict() for name, row in rows.items()}


def pairs_of(permutations: Sequence[Permutation]) -> dict[tuple[int, int], Permutation]:
    """What an arrangement for all says about every pair."""
    numbers = range(len(permutations))
    return {
        (i, j): permutations[i].invert().compose(permutations[j]) for i in numbers for j in numbers if i != j
    }


def matched_pairs(
    spec: PermutationSpec, states: Sequence[Mapping[str, torch.Tensor]], seed: int
) -> dict[tuple[int, int], Permutation]:
    """Every pair matched by itself."""
    found = {}
    for i, j in combinations(range(len(states)), 2):
        found[i, j] = weight_matching(spec, states[i], states[j], init="identity", seed=seed).permutation
        found[j, i] = found[i, j].invert()
    return found


def measure(
    nets: Sequence[Trained], data: Dataset, methods: Sequence[str], steps: int, seed: int
) -> list[Line]:
    """Every line of the table."""
    model = nets[0].model()
    spec = rebasin.trace(model, data.train_x[:2])
    states = [net.state for net in nets]
    train, test = data.batches("train", 500), data.batches("test", 1000)
    few = train[:4]  # 2,000 images: what activations and REPAIR look at
    context: dict[str, dict[str, Any]] = {
        "activations": {"model": model, "batches": few},
        "straight_through": {"model": model, "batches": train, "objective": CrossEntropy(), "steps": steps},
        "maps": {"model": model, "batches": train, "objective": CrossEntropy()},
    }
    results: dict[str, ManyResult] = {}
    merges: dict[str, Mapping[str, torch.Tensor]] = {}
    for name in methods:
        method, options = METHODS[name]
        result = merge_many(spec, states, method=method, seed=seed, **context.get(method, {}), **options)
        results[name] = result
        merges[name] = dict(result.merged)
        members = result.members(states)
        merges[f"{name}, REPAIR"] = repair(spec, model, merges[name], members, few).state
        console.print(f"{name}: {result.seconds:.1f} s", style="dim")
    rows = {row.name: row for row in compare(model, CrossEntropy(), test, states, merges)}
    lines = [Line(name, rows[name]) for name in (MEMBERS, ENSEMBLE)]
    for name, result in results.items():
        error = cycle_error(pairs_of(result.permutations))
        seconds = None if name == "naive" else result.seconds
        lines.append(Line(name, rows[name], rows[f"{name}, REPAIR"], result.distance, error, seconds))
    began = perf_counter()
    pairs = matched_pairs(spec, states, seed)
    lines.append(Line("pairs", None, cycle_error=cycle_error(pairs), seconds=perf_counter() - began))
    return lines


def table(lines: Sequence[Line]) -> str:
    repaired = "loss, REPAIR | barrier, REPAIR"
    head = f"| method | accuracy | loss | barrier | ECE | {repaired} | distance | cycle error | sec. |"
    rows = []
    for line in lines:
        plain, fixed = line.plain, line.repaired
        figures = [
            (plain and plain.accuracy, ".1%"),
            (plain and plain.loss, ".4f"),
            (plain and plain.barrier, ".4f"),
            (plain and plain.ece, ".4f"),
            (fixed and fixed.loss, ".4f"),
            (fixed and fixed.barrier, ".4f"),
            (line.distance, ".2f"),
            (line.cycle_error, ".1%"),
            (line.seconds, ".1f"),
        ]
        rows.append([line.method, *("" if value is None else format(value, how) for value, how in figures)])
    return markdown(head, "|:--|" + "--:|" * 9, rows)


def main(
    data: Data = "digits",
    path: DataPath = None,
    models: Annotated[int, typer.Option(help="how many networks")] = 5,
    width: Annotated[int, typer.Option(help="neurons in each hidden layer")] = 128,
    depth: Annotated[int, typer.Option(help="hidden layers")] = 3,
    halves: Annotated[bool, typer.Option(help="train each on a random half of the data")] = False,
    methods: Annotated[str, typer.Option(help=f"some of: {'; '.join(METHODS)}; with semicolons")] = "",
    steps: Annotated[int, typer.Option(help="gradient steps of STE-MM")] = 200,
    seed: Annotated[int, typer.Option(help="of the matching; network i is trained with seed i")] = 0,
    cache: Cache = None,
    out: Out = Path("outputs/merge_many"),
    threads: Threads = 1,
) -> None:
    """Compare all ways of merging many models on the same networks."""
    torch.set_num_threads(threads)
    chosen = [name.strip() for name in methods.split(";")] if methods else list(METHODS)
    for name in chosen:
        if name not in METHODS:
            raise typer.BadParameter(f"there is no {name!r}; choose of {'; '.join(METHODS)}.")
    with told_as_usage():
        images, recipe = load(data, path), RECIPES[data]
        nets = mlps(images, range(models), width, depth=depth, recipe=recipe, cache=cache, halves=halves)
        lines = measure(nets, images, chosen, steps, seed)
    config = dict(
        data=data, models=models, width=width, depth=depth, halves=halves, recipe=asdict(recipe), seed=seed
    )
    payload = {"config": config | {"steps": steps}, "rows": [line.to_dict() for line in lines]}
    save(out, "merge_many_methods", payload, table(lines))
    console.print(table(lines))
    console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
