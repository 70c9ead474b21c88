"""Which inner product should weight matching maximise, so that it helps on every pair and not only on most?

    python -m experiments.matching_objectives                                       # the pairs that need no files
    python -m experiments.matching_objectives --real FOLDER --pairs FOLDER --mnist mnist.npz --cifar cifar10.npz

The paper's counts every number alike, so that a tensor of large numbers decides what all others are for. Each candidate
is the paper's objective on states that are made from A and B: scaled, centred, or with tensors left out.

    paper       as it is
    tensor      each tensor over its norm
    rms         each tensor over its root mean square: every number counts alike, whatever its unit
    deviation   the same, over the deviation of its neurons from their mean
    noise       w = tr S / tr S^2, S the covariance of a tensor's slices over neurons: what it tells of who is who,
                over the noise that it makes (rebasin/matching/weights/noise.py). Numbers that rise and fall together
                (the gains of a LayerNorm over all pixels) count as the few that they are
    effective   the part of it that is not the unit: (tr S)^2 / tr S^2, the number of coordinates that are of their own,
                over the number of coordinates; 1 for a tensor of independent numbers, as the paper has it
    repeats     `effective` where that is below a tenth and a tensor has one permuted axis, else the paper's: the least
                change that counts what is repeated once (added last, see docs/weight_matching.md)
    half        the root of the product of the two: over the deviation instead of over the variance, so that larger
                numbers, which training made, still count for more (added when the others had been seen on eight pairs)
    outliers    tensors of far larger numbers than most count at most as much as all ordinary ones together
                (`activation_and_weight` does that)
    centred     each neuron's slice minus the mean over neurons, along every axis that is permuted
    rows        each neuron's slice of a tensor with one such axis minus the mean of its own numbers
    affines     gains and shifts of norms left out
    vectors     biases left out, too: all tensors that hold one number a neuron, and gains and shifts of norms
    buffers     buffers left out
    affines+rms, rows+effective, ...    both

**The rule, written down before the figures were seen.** Each pair counts once, with the statistics of BatchNorm anew
where it has BatchNorm, by its barrier as a share of naive's (no share below 1 %), the mean over `--seeds` descents that
differ in their orders. An objective may be the default if it is above naive on no pair (1.05 of naive allowed for
noise); of these the one with the lowest geometric mean is. One within 3 % of the paper's is no reason to leave the
paper. What is above naive on one pair need not be measured on others (`--objectives`). `--seed` trains other pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import rebasin
from experiments.common import console, markdown
from experiments.pairs import Cifar, Mnist, Pair, Pairs, Places, Real, available
from rebasin.files import write_text
from rebasin.matching.activations.joint import balanced
from rebasin.matching.weights.endpoints import Endpoints
from rebasin.matching.weights.noise import noise_weight, repeats_weight
from rebasin.spec import PermutationSpec

States = tuple[dict[str, Tensor], dict[str, Tensor]]
Weigh = Callable[[PermutationSpec, nn.Module, dict[str, Tensor], dict[str, Tensor]], Mapping[str, float]]

FLOOR, NOISE = 0.01, 1.05


def scaled(weigh: Weigh) -> Callable[[PermutationSpec, nn.Module, States], States]:
    """Both states times the root of each tensor's weight."""

    def made(spec: PermutationSpec, model: nn.Module, states: States) -> States:
        weights = weigh(spec, model, *states)
        a, b = ({n: t * weights.get(n, 1.0) ** 0.5 for n, t in state.items()} for state in states)
        return a, b

    return made


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def over_norm(
    spec: PermutationSpec, model: nn.Module, a: dict[str, Tensor], b: dict[str, Tensor]
) -> dict[str, float]:
    norms = {n: float(a[n].double().norm() * b[n].double().norm()) for n in counted(spec)}
    return {n: 1 / norm if norm else 0.0 for n, norm in norms.items()}


def over_rms(
    spec: PermutationSpec, model: nn.Module, a: dict[str, Tensor], b: dict[str, Tensor]
) -> dict[str, float]:
    sizes = {n: rms(a[n]) * rms(b[n]) for n in counted(spec)}
    return {n: 1 / size if size else 0.0 for n, size in sizes.items()}


def counted(spec: PermutationSpec) -> list[str]:
    return [n for n in spec.axes if n not in spec.buffers]


def traces(x: Tensor, axis: int) -> tuple[float, float, int]:
    """tr S and tr S^2 of the covariance of the slices along `axis`, without bias, and their number of coordinates.

    The second is that of Himeno and Yamada (2014), which holds where there are far more coordinates than slices.
    """
    rows = x.double().movedim(axis, 0).flatten(1) if x.dim() > 1 else x.double()[:, None]
    n, d = rows.shape
    rows = rows - rows.mean(dim=0)
    gram = rows @ rows.T
    first = float(gram.trace()) / (n - 1) if n > 1 else 0.0
    if n < 4:
        return first, first**2 / d, d
    square, fourth = (
        float(gram.square().sum()) / (n - 1) ** 2,
        float(gram.diagonal().square().sum()) / (n - 1),
    )
    second = (n - 1) / (n * (n - 2) * (n - 3)) * ((n - 1) * (n - 2) * square + first**2 - n * fourth)
    return first, min(max(second, first**2 / d), first**2), d


def by_axes(figure: Callable[[float, float, int], float]) -> Weigh:
    """The least over a tensor's permuted axes of the geometric mean of A's and B's `figure`."""

    def weigh(
        spec: PermutationSpec, model: nn.Module, a: dict[str, Tensor], b: dict[str, Tensor]
    ) -> dict[str, float]:
        found = {}
        for name in counted(spec):
            each = [
                math.sqrt(math.prod(figure(*traces(s[name], k)) for s in (a, b))) for k in spec.axes[name]
            ]
            found[name] = min(each)
        return found

    return weigh


half = by_axes(lambda first, second, d: first / second * math.sqrt(first / d) if second else 0.0)
effective = by_axes(lambda first, second, d: first**2 / second / d if second else 0.0)
deviation = by_axes(lambda first, second, d: d / first if first else 0.0)


def noise(
    spec: PermutationSpec, model: nn.Module, a: dict[str, Tensor], b: dict[str, Tensor]
) -> dict[str, float]:
    return {name: noise_weight(a[name], b[name], spec.axes[name]) for name in counted(spec)}


def repeats(
    spec: PermutationSpec, model: nn.Module, a: dict[str, Tensor], b: dict[str, Tensor]
) -> dict[str, float]:
    return {name: repeats_weight(a[name], b[name], spec.axes[name]) for name in counted(spec)}


def outliers(
    spec: PermutationSpec, model: nn.Module, a: dict[str, Tensor], b: dict[str, Tensor]
) -> dict[str, float]:
    return balanced(Endpoints(spec, a, b))[0]


def norms(model: nn.Module) -> set[str]:
    """Gains and shifts: parameters of modules that are called norms."""
    modules = [(name, m) for name, m in model.named_modules() if "Norm" in type(m).__name__]
    return {f"{name}.{own}" for name, m in modules for own, _ in m.named_parameters(recurse=False)}


def without(chosen: Callable[[PermutationSpec, nn.Module], set[str]]) -> Weigh:
    return lambda spec, model, a, b: dict.fromkeys(chosen(spec, model), 0.0)


def affines(spec: PermutationSpec, model: nn.Module) -> set[str]:
    return norms(model)


def vectors(spec: PermutationSpec, model: nn.Module) -> set[str]:
    return norms(model) | {n for n in spec.axes if len(spec.shapes[n]) == 1}


def buffers(spec: PermutationSpec, model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_buffers()}


def centred(spec: PermutationSpec, model: nn.Module, states: States) -> States:
    def made(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = dict(state)
        for name in counted(spec):
            for axis in spec.axes[name]:
                state[name] = state[name] - state[name].mean(dim=axis, keepdim=True)
        return state

    a, b = map(made, states)
    return a, b


def rows(spec: PermutationSpec, model: nn.Module, states: States) -> States:
    def made(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = dict(state)
        for name in counted(spec):
            others = [k for k in range(state[name].dim()) if k not in spec.axes[name]]
            if len(spec.axes[name]) == 1 and math.prod(state[name].shape[k] for k in others) > 1:
                state[name] = state[name] - state[name].mean(dim=others, keepdim=True)
        return state

    a, b = map(made, states)
    return a, b


STEPS: dict[str, Callable[[PermutationSpec, nn.Module, States], States]] = {
    "paper": lambda spec, model, states: states,
    "tensor": scaled(over_norm),
    "rms": scaled(over_rms),
    "deviation": scaled(deviation),
    "noise": scaled(noise),
    "repeats": scaled(repeats),
    "half": scaled(half),
    "effective": scaled(effective),
    "outliers": scaled(outliers),
    "centred": centred,
    "rows": rows,
    "affines": scaled(without(affines)),
    "vectors": scaled(without(vectors)),
    "buffers": scaled(without(buffers)),
}
COMBINED = ("affines+rms", "vectors+rms", "rows+rms", "rows+effective", "centred+rms")
OBJECTIVES = (*STEPS, *COMBINED)


def prepared(name: str, pair: Pair, spec: PermutationSpec) -> States:
    """The states whose inner product this objective is."""
    states: States = dict(pair.a), dict(pair.b)
    for step in name.split("+"):
        states = STEPS[step](spec, pair.model, states)
    return states


def changed(pair: Pair, spec: PermutationSpec) -> bool:
    """Whether a pair has a tensor that repeats its numbers; else the paper's descent is the same."""
    return any(weight != 1 for weight in repeats(spec, pair.model, dict(pair.a), dict(pair.b)).values())


def figures(curve: rebasin.Curve) -> dict[str, Any]:
    return {"barrier": curve.barrier, "losses": [round(loss, 6) for loss in curve.losses]}


def measured(pair: Pair, spec: PermutationSpec, name: str, points: int, seeds: int) -> dict[str, Any]:
    """One objective on one pair: the barriers of each seed, without and with fresh statistics."""
    runs = []
    for seed in range(seeds if name != "naive" else 1):
        began, moved, end = perf_counter(), 0, pair.b
        if name != "naive":
            found = rebasin.weight_matching(
                spec, *prepared(name, pair, spec), seed=seed, normalize="paper"
            ).permutation
            moved, end = found.moved(), found.apply(pair.b)
        seconds = perf_counter() - began
        run = {"moved": moved, "seconds": round(seconds, 3), "plain": figures(pair.curve(end, points))}
        if pair.fresh:
            run["reset"] = figures(pair.curve(end, points, reset=True))
        runs.append(run)
    return {"runs": runs}


def barrier_of(row: Mapping[str, Any], reset: bool) -> float:
    return fmean(run["reset" if reset and "reset" in run else "plain"]["barrier"] for run in row["runs"])


def shares_of(found: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, float]:
    """Pair -> the barrier that an objective leaves as a share of naive's, where it was measured."""
    return {
        pair: barrier_of(kept[name], True) / barrier_of(kept["naive"], True)
        for pair, kept in found.items()
        if name in kept
    }


def mean(shares: Iterable[float]) -> float:
    """The geometric mean, no share below the floor."""
    return math.exp(fmean(math.log(max(share, FLOOR)) for share in shares))


def cell(kept: Mapping[str, Any], name: str, reset: bool, naive: float) -> str:
    return f"{barrier_of(kept[name], reset) / naive:.3f}" if name in kept else ""


def table(found: Mapping[str, Mapping[str, Any]], show: Sequence[str] = OBJECTIVES) -> str:
    """Shares of naive, pairs down and objectives across; below, the means of the pairs that an objective has."""
    names = [n for n in show if any(n in kept for kept in found.values())]
    lines = []
    for pair, kept in found.items():
        for reset in (False, True) if "reset" in kept["naive"]["runs"][0] else (False,):
            naive = barrier_of(kept["naive"], reset)
            label = pair + (", statistics anew" if reset else "")
            lines.append([label, f"{naive:.3f}", *(cell(kept, name, reset, naive) for name in names)])
    shares = {name: shares_of(found, name) for name in names}
    paper = shares.get("paper", {})
    for label, figure in (
        ("geometric mean", lambda name: mean(shares[name].values())),
        ("the paper's on the same pairs", lambda name: mean(paper[p] for p in shares[name] if p in paper)),
        ("worst", lambda name: max(shares[name].values())),
    ):
        lines.append([label, "", *(f"{figure(name):.3f}" for name in names)])
    lines.append(["pairs", "", *(str(len(shares[name])) for name in names)])
    return markdown(
        "| pair | naive barrier | " + " | ".join(names) + " |", "|---|--:|" + "--:|" * len(names), lines
    )


def told(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What the rule says of the objectives that were measured on all pairs."""
    shares = {name: shares_of(found, name) for name in OBJECTIVES}
    whole = {name: mean(kept.values()) for name, kept in shares.items() if len(kept) == len(found)}
    for name in sorted(whole, key=whole.__getitem__):
        above = [pair for pair, share in shares[name].items() if share > NOISE]
        yield f"{name}: {whole[name]:.3f}, " + (
            f"above naive on {', '.join(above)}" if above else "may be the default"
        )


def main(
    real: Real = None,
    pairs: Pairs = None,
    mnist: Mnist = None,
    cifar: Cifar = None,
    only: Annotated[str, typer.Option(help="names of pairs, with , between; default: all there are")] = "",
    objectives: Annotated[str, typer.Option(help="the same of objectives")] = "",
    points: Annotated[int, typer.Option(help="points of the line")] = 11,
    seeds: Annotated[int, typer.Option(help="descents of each objective")] = 1,
    seed: Annotated[int, typer.Option(help="of the trainings and the data")] = 0,
    show: Annotated[str, typer.Option(help="objectives in the table; default: all")] = "",
    json_file: Annotated[Path, typer.Option("--json", help="the log, which is gone on with")] = Path(
        "docs/experiments/matching_objectives.json"
    ),
) -> None:
    """Measure each objective on each pair; prints a table and what the rule chooses."""
    made, missing = available(Places(real, pairs, mnist, cifar), seed)
    for name, why in missing.items():
        console.print(f"{name} is left out: it needs {why}")
    log = json.loads(json_file.read_text()) if json_file.exists() else {"pairs": {}}
    settings = {"points": points, "seeds": seeds, "torch": torch.__version__}
    if log.setdefault("settings", settings) != settings:
        raise typer.BadParameter(f"{json_file} was made with {log['settings']}: give another file, or these.")
    chosen: Sequence[str] = only.split(",") if only else list(made)
    for name in chosen:
        if name not in made:
            raise typer.BadParameter(f"There is no pair {name!r}; there are {', '.join(made)}.")
        key = name if not seed else f"{name}, seed {seed}"
        kept = log["pairs"].setdefault(key, {})
        todo = [n for n in ("naive", *(objectives.split(",") if objectives else OBJECTIVES)) if n not in kept]
        if not todo:
            continue
        pair = made[name]()
        spec = pair.spec()
        for objective in todo:
            same = objective == "repeats" and "paper" in kept and not changed(pair, spec)
            kept[objective] = kept["paper"] if same else measured(pair, spec, objective, points, seeds)
            naive = barrier_of(kept["naive"], True)
            run, now = kept[objective]["runs"][0], barrier_of(kept[objective], True)
            share = f"{now:.4f}, {now / naive:.1%} of naive"
            console.print(f"{key}, {objective}: {share}, {run['moved']} moved, {run['seconds']:.1f} s")
            write_text(json_file, json.dumps(log, indent=1) + "\n")
    console.print(table(log["pairs"], show.split(",") if show else OBJECTIVES))
    for sentence in told(log["pairs"]):
        console.print(sentence)


if __name__ == "__main__":
    typer.run(main)
