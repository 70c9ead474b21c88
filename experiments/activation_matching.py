"""Activation matching measured: the figures of docs/activation_matching.md.

    python -m experiments.activation_matching diffusion     # the tiny diffusion pair, every variant, ten minutes
    python -m experiments.activation_matching digits        # MLPs of three widths, three pairs each, minutes
    python -m experiments.activation_matching digits --scale 16     # the same on raw pixels from 0 to 16
    python -m experiments.activation_matching cost          # what the statistics add to the forward passes
    python -m experiments.activation_matching large         # a planted permutation of an SD1.5-size UNet, 11 GB

Each command prints its table while it grows and leaves it as JSON and Markdown in --out. Networks are trained on first
use and cached.
"""

from __future__ import annotations

import statistics as means
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from torch import nn

import rebasin
from experiments.common import Diffusion, console, markdown, mlps, peak_memory, save
from rebasin.data import classification
from rebasin.matching import activation_and_weight, activation_statistics, match_statistics
from rebasin.matching.activations.hook_sites import find_hook_sites
from rebasin.matching.activations.statistics import Reads
from rebasin.models import tiny_sd
from rebasin.objectives import CrossEntropy, Denoising
from rebasin.spec import Permutation

PAIRS = ((0, 1), (2, 3), (4, 5))
REFERENCE = {
    "naive": {32: 2.26, 128: 1.28, 512: 0.83},
    "inner_product, behind": {32: 0.33, 128: 0.077, 512: 0.013},
    "weight": {32: 0.50, 128: 0.112, 512: 0.055},
}
"""An independent implementation's train-loss barriers on the same kind of networks; pixels from 0 to 16."""

app = typer.Typer(help=__doc__, rich_markup_mode=None, no_args_is_help=True, add_completion=False)
Out = Annotated[Path, typer.Option(help="folder for the table as JSON and Markdown")]
DEFAULT_OUT = Path("outputs/activation_matching")


@app.command()
def diffusion(
    a: Annotated[str, typer.Option(help="one of the embedded UNets: seed0, seed1, low, high")] = "seed0",
    b: str = "seed1",
    heldout: Annotated[int, typer.Option(help="held-out images")] = 500,
    points: Annotated[int, typer.Option(help="of each curve")] = 13,
    out: Out = DEFAULT_OUT,
) -> None:
    """Every variant on a pair of the embedded diffusion UNets: held-out denoising barrier."""
    torch.set_num_threads(1)
    one, other = tiny_sd.load_unet(a), tiny_sd.load_unet(b)
    parts = Diffusion.load()
    train = parts.batches("train", 500, 100, seed=1)
    held = parts.batches("test", heldout, 100, seed=0)
    objective = Denoising(alphas_cumprod=parts.scheduler.alphas_cumprod)
    spec = rebasin.trace(one, *parts.inputs(train[0]))
    state_a, state_b = ({n: t.clone() for n, t in m.state_dict().items()} for m in (one, other))
    rows: list[dict[str, Any]] = []

    def measure(method: str, found: Permutation, seconds: float) -> None:
        evaluate = lambda model: objective.evaluate(model, held)  # noqa: E731
        curve = rebasin.barrier(one, state_a, found.apply(state_b), evaluate, points=points)
        row = {"method": method, "midpoint": curve.at(0.5), "barrier": curve.barrier, "moved": found.moved()}
        rows.append(row | {"seconds": seconds})
        console.print(
            f"{method:<44} midpoint {curve.at(0.5):.4f}  barrier {curve.barrier:.4f}  {seconds:.1f} s"
        )

    measure("naive", spec.identity(), 0.0)
    for init in ("identity", "forward"):
        result = rebasin.weight_matching(spec, state_a, state_b, init=init)
        measure(f"weight matching from {init}", result.permutation, result.seconds)
    for reads in get_args(Reads):
        seen = activation_statistics(spec, one, other, train, objective=objective, reads=reads, tokens=None)
        for statistic in ("inner_product", "covariance", "pearson"):
            match = match_statistics(seen, state_a, state_b, statistic=statistic)
            measure(f"{statistic}, {reads}", match.permutation, seen.seconds + match.seconds)
            if reads == "inputs":
                result = rebasin.weight_matching(spec, state_a, state_b, init=match.permutation)
                measure(
                    f"{statistic}, {reads}, then weight", result.permutation, seen.seconds + result.seconds
                )
    seen = activation_statistics(spec, one, other, train, objective=objective, sites="last", tokens=None)
    match = match_statistics(seen, state_a, state_b)
    measure("pearson, inputs, last of residual streams", match.permutation, seen.seconds + match.seconds)
    for seed in (0, 1, 2):
        joint = activation_and_weight(spec, one, other, train, objective=objective, tokens=16, seed=seed)
        measure(f"activations and weights, seed {seed}", joint.permutation, joint.seconds)
    keep(out, f"diffusion_{a}_{b}", rows)


@app.command()
def digits(
    widths: Annotated[str, typer.Option(help="neurons a layer, with commas")] = "32,128,512",
    scale: Annotated[float, typer.Option(help="the pixels' largest value; scikit-learn's own is 16")] = 1.0,
    out: Out = DEFAULT_OUT,
) -> None:
    """MLPs 64-h-h-h-10 on scikit-learn's digits, three pairs each: train-loss barrier."""
    torch.set_num_threads(1)
    data = classification.load("digits")
    data = replace(data, train_x=data.train_x * scale, test_x=data.test_x * scale)
    batches, objective = data.batches("train", 500), CrossEntropy()
    rows: list[dict[str, Any]] = []
    for width in map(int, widths.split(",")):
        found: dict[str, list[float]] = {}
        for pair in PAIRS:
            ends = mlps(data, pair, width)
            one, other = (end.model() for end in ends)
            spec = rebasin.trace(one, batches[0][0][:2])
            for method, permutation in variants(spec, one, other, batches):
                state_b = permutation.apply(ends[1].state)
                evaluate = lambda model: objective.evaluate(model, batches)  # noqa: E731
                curve = rebasin.barrier(one, ends[0].state, state_b, evaluate, points=25)
                found.setdefault(method, []).append(curve.barrier)
        for method, values in found.items():
            row = {"width": width, "scale": scale, "method": method, "barrier": means.mean(values)}
            row |= {"pairs": " ".join(f"{v:.4f}" for v in values), "reference": ""}
            if scale == 16 and method in REFERENCE:
                row["reference"] = REFERENCE[method].get(width, "")
            rows.append(row)
            console.print(
                f"h {width:<5} {method:<32} {row['barrier']:.4f}  ({row['pairs']})  {row['reference']}"
            )
    keep(out, f"digits_{scale:g}", rows)


def variants(
    spec: rebasin.PermutationSpec, one: nn.Module, other: nn.Module, batches: list[Any]
) -> Iterator[tuple[str, Permutation]]:
    a, b = one.state_dict(), other.state_dict()
    yield "naive", spec.identity()
    yield "weight", rebasin.weight_matching(spec, a, b, init="identity").permutation
    places: tuple[tuple[Reads, str], ...] = (("inputs", "behind"), ("outputs", "before"))  # the ReLU
    for reads, told in places:
        seen = activation_statistics(spec, one, other, batches, reads=reads, tokens=None)
        for statistic in ("inner_product", "covariance", "pearson"):
            match = match_statistics(seen, a, b, statistic=statistic)
            yield f"{statistic}, {told}", match.permutation
            if reads == "inputs" and statistic != "covariance":
                then = rebasin.weight_matching(spec, a, b, init=match.permutation)
                yield f"{statistic}, then weight", then.permutation
    yield "activations and weights", activation_and_weight(spec, one, other, batches, tokens=None).permutation


@app.command()
def cost(
    repeats: Annotated[int, typer.Option(help="the quickest of so many counts")] = 7, out: Out = DEFAULT_OUT
) -> None:
    """CPU seconds of the statistics against those of the plain forward passes, tiny UNet, 500 images.

    `places`, where the neurons can be seen, is found once before the first batch; `statistics` is the whole pass.
    """
    torch.set_num_threads(1)
    one, other = tiny_sd.load_unet("seed0"), tiny_sd.load_unet("seed1")
    parts = Diffusion.load()
    train = parts.batches("train", 500, 100, seed=1)
    objective = Denoising(alphas_cumprod=parts.scheduler.alphas_cumprod)
    spec = rebasin.trace(one, *parts.inputs(train[0]))

    def plain() -> None:
        with torch.no_grad():
            for batch in train:
                objective.loss(one, batch)
                objective.loss(other, batch)

    few = {name: tensor[:2] for name, tensor in train[0].items()}

    def places() -> None:
        find_hook_sites(spec, one, lambda model: objective.loss(model, few))

    rows: list[dict[str, Any]] = []
    for tokens in (8, 16, 32, 0):
        taken: dict[str, list[float]] = {"plain": [], "places": [], "statistics": []}
        for _ in range(repeats):
            taken["plain"].append(cpu(plain))
            taken["places"].append(cpu(places))
            taken["statistics"].append(
                cpu(
                    lambda n=tokens: activation_statistics(
                        spec, one, other, train, objective=objective, tokens=n
                    )
                )
            )
        best = {key: min(values) for key, values in taken.items()}
        once = best["places"] / best["plain"]
        added = best["statistics"] / best["plain"] - 1
        rows.append({"tokens": tokens or "all", **best, "added once": once, "added a batch": added - once})
        console.print(rows[-1])
    keep(out, "cost", rows)


@app.command()
def large(
    latents: Annotated[int, typer.Option(help="side of the latents")] = 64,
    samples: Annotated[int, typer.Option(help="one timestep each")] = 10,
    tokens: Annotated[int, typer.Option(help="positions of each sample that are looked at")] = 64,
    threads: int = 2,
    out: Out = DEFAULT_OUT,
) -> None:
    """A hidden permutation of a random UNet of Stable Diffusion 1.5's size, found again by its activations."""
    from experiments.benchmark_matching import CASES, traced

    torch.set_num_threads(threads)
    case = CASES["sd15"]
    spec, _ = traced(case)
    torch.manual_seed(0)
    one = case.build().eval()
    with torch.no_grad():
        for parameter in one.parameters():
            if parameter.ndim == 1:
                parameter.add_(
                    torch.randn_like(parameter) * 0.1
                )  # fresh norms and biases tell no neurons apart
    hidden = spec.random(3)
    with torch.device("meta"):
        other = case.build().eval()
    other = other.to_empty(device="cpu")
    own, theirs = one.state_dict(), other.state_dict()
    with torch.no_grad():
        for name in own:
            theirs[name].copy_(hidden.apply_to(name, own[name]))
    generator = torch.Generator().manual_seed(1)
    batches = [
        (
            torch.randn(1, 4, latents, latents, generator=generator),
            torch.tensor([int(t)]),
            torch.randn(1, 77, 768, generator=generator),
        )
        for t in torch.linspace(990, 10, samples)
    ]
    began = time.perf_counter()
    result = rebasin.activation_matching(
        spec, one, other, batches, tokens=tokens, progress=lambda event: console.print(dict(event))
    )
    answer = hidden.invert()
    right = sum(int((result.permutation.index[cell] == index).sum()) for cell, index in answer.index.items())
    row = {"neurons": spec.neurons, "recovered": right, "statistics_gb": result.statistics_bytes / 1e9}
    row |= {
        "seconds": time.perf_counter() - began,
        "peak_gb": peak_memory() / 1e9,
    }
    console.print(row)
    keep(out, "large", [row])


def cpu(job: Callable[[], object]) -> float:
    began = time.process_time()
    job()
    return time.process_time() - began


def keep(out: Path, name: str, rows: list[dict[str, Any]]) -> None:
    shown = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    save(out, name, rows, markdown("| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0]), shown))
    console.print(f"Written to {out / name}.json and .md")


if __name__ == "__main__":
    app()
