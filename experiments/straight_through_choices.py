"""What each choice of the straight-through estimator gives: starts, projection, optimizer, verified passes.

    python -m experiments.straight_through_choices                    # MLPs on scikit-learn's digits, half a minute
    python -m experiments.straight_through_choices --model tiny_sd    # the embedded diffusion pair, some minutes

Every variant changes one thing of the first line. The figures are losses at the midpoint minus the mean of the
endpoints' losses, on data that the search has not seen: of the start (or of the first projection, if the selecting
batches prefer that), and of what was found; means over the pairs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

import rebasin
from experiments.common import Diffusion, Threads, console, markdown, mlps, save, told_as_usage
from rebasin.matching.straight_through.estimator import straight_through
from rebasin.objectives import CrossEntropy, Denoising, Objective
from rebasin.spec import Permutation, PermutationSpec
from rebasin.tensors.modules import loaded

BASE: dict[str, Any] = dict(
    init="activation_and_weight", optimizer="adam", lr=2e-3, schedule="constant", project_every=1, refine=0
)
CHOICES: dict[str, dict[str, Any]] = {
    "the first line: activations and weights, Adam 2e-3": {},
    "start: identity": {"init": "identity"},
    "start: weight matching": {"init": "weight_matching"},
    "start: activations, then weights": {"init": "activation_then_weight"},
    "SGD 1e-2, momentum 0.9 (the paper's)": {"optimizer": "sgd", "lr": 1e-2},
    "Adam 5e-4": {"lr": 5e-4},
    "Adam 1e-2": {"lr": 1e-2},
    "cosine schedule": {"schedule": "cosine"},
    "a projection every 4 steps": {"project_every": 4},
    "one sweep in a projection": {"projection_sweeps": 1},
    "weights represent the midpoint": {"represents": "midpoint"},
    "weights represent the midpoint, L2": {"represents": "midpoint", "projection": "l2"},
    "12 verified passes at the end": {"refine": 12},
    "12 verified passes alone": {"steps": 1, "lr": 0.0, "refine": 12},
    "bfloat16": {"autocast": "bf16"},
}


@dataclass(frozen=True)
class Problem:
    """Two trained models, what is good, and data."""

    a: nn.Module
    b: nn.Module
    spec: PermutationSpec
    objective: Objective
    batches: list[Any]
    heldout: list[Any]

    def excess(self, permutation: Permutation) -> float:
        """The loss at the midpoint minus the endpoints' mean, on held-out data."""
        state_a, aligned = self.a.state_dict(), permutation.apply(self.b.state_dict())
        losses = []
        for state in (state_a, aligned, rebasin.interpolate(state_a, aligned, 0.5)):
            losses.append(self.objective.evaluate(loaded(self.a, state), self.heldout)["loss"])
        return losses[2] - (losses[0] + losses[1]) / 2


@dataclass(frozen=True)
class Row:
    choice: str
    start: float
    found: float
    share: float
    seconds: float


def digits(width: int, pairs: int) -> Iterator[Problem]:
    """MLPs with three hidden layers, trained from different seeds and cached."""
    from rebasin.data.classification import load

    data = load("digits")
    for pair in range(pairs):
        a, b = (net.model() for net in mlps(data, (2 * pair, 2 * pair + 1), width))
        spec = rebasin.trace(copy.deepcopy(a), data.train_x[:2])
        yield Problem(a, b, spec, CrossEntropy(), data.batches("train", 250), data.batches("test", 1000))


def tiny_sd(images: int) -> Iterator[Problem]:
    """The embedded UNets seed0 and seed1; `images` training images and 250 held-out ones."""
    from rebasin.models import tiny_sd as tiny

    parts = Diffusion.load()
    a, b = (tiny.load_unet(name) for name in ("seed0", "seed1"))
    batches = parts.batches("train", images, images // 5, seed=1)
    heldout = parts.batches("test", 250, 125, seed=0)
    spec = rebasin.trace(a, *parts.inputs(batches[0]))
    yield Problem(a, b, spec, Denoising("epsilon", parts.scheduler.alphas_cumprod), batches, heldout)


def compare(problems: list[Problem], choices: dict[str, dict[str, Any]], steps: int, seed: int) -> list[Row]:
    """A line for each choice."""
    naive = [problem.excess(problem.spec.identity()) for problem in problems]
    console.print(f"naive: {np.mean(naive):.4f}", style="dim")
    rows = []
    for name, choice in choices.items():
        options = {**BASE, "steps": steps, "seed": seed, **choice}
        starts, ends, seconds = [], [], 0.0
        for problem in problems:
            began = time.perf_counter()
            arguments = problem.spec, problem.a, problem.b, problem.objective, problem.batches
            first: list[Permutation] = []

            def listen(event: dict[str, Any], first: list[Permutation] = first) -> None:
                if event["step"] == 0:
                    first.append(event["permutation"])

            found = straight_through(*arguments, progress=listen, evaluate_every=2, **options)
            seconds += time.perf_counter() - began
            starts.append(problem.excess(first[0]))
            ends.append(problem.excess(found.permutation))
        mean = float(np.mean(ends))
        rows.append(
            Row(name, float(np.mean(starts)), mean, mean / float(np.mean(naive)), seconds / len(problems))
        )
        console.print(f"{name}: {rows[-1].start:.4f} -> {mean:.4f}, {rows[-1].seconds:.1f} s", style="dim")
    return rows


def table(rows: list[Row]) -> str:
    lines = [
        [r.choice, f"{r.start:.4f}", f"{r.found:.4f}", f"{r.share:.1%}", f"{r.seconds:.1f}"] for r in rows
    ]
    return markdown("| choice | start | found | share of naive | seconds |", "|:--|--:|--:|--:|--:|", lines)


def main(
    model: Annotated[str, typer.Option(help="mlp or tiny_sd")] = "mlp",
    width: Annotated[int, typer.Option(help="of the MLP's layers")] = 32,
    pairs: Annotated[int, typer.Option(help="of MLPs")] = 3,
    images: Annotated[int, typer.Option(help="training images for tiny_sd")] = 250,
    steps: Annotated[int | None, typer.Option(help="of the gradient; default 100 for MLPs, else 40")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="a word in the choices to try; may be repeated")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the searches")] = 0,
    out: Annotated[Path | None, typer.Option(help="a folder for table and JSON")] = None,
    threads: Threads = 1,
) -> None:
    """One line for each choice: what it started from, what it found, and how long it took."""
    torch.set_num_threads(threads)
    if model not in ("mlp", "tiny_sd"):
        raise typer.BadParameter(f"there is no model {model!r} here: choose mlp or tiny_sd.")
    choices = {name: c for name, c in CHOICES.items() if not only or any(word in name for word in only)}
    with told_as_usage():
        problems = list(digits(width, pairs) if model == "mlp" else tiny_sd(images))
        rows = compare(problems, choices, steps or (100 if model == "mlp" else 40), seed)
    console.print(table(rows))
    if out is not None:
        save(out, f"straight_through_choices_{model}", [asdict(row) for row in rows], table(rows))


if __name__ == "__main__":
    typer.run(main)
