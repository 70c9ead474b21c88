"""The leaderboard and the tables of docs/results.md, from the logs that are stored in docs/experiments.

    python -m experiments.results_page            # writes docs/results.md anew between its marks
    python -m experiments.results_page --check    # exits with 1 if the page is not what the logs say

Nothing is computed here but means and shares. `<!-- table: NAME -->` is the table and the first figure of the sweep of
that name, as `python -m rebasin.report` makes them; `leaderboard` has a line for each pair below, `width_law` is
that of `experiments.width_law`, `readme` that of `experiments.readme_figures`.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from rebasin.files import write_text
from rebasin.reporting.sweep import load
from rebasin.reporting.sweep_tables import table

from . import readme_figures, width_law

LOGS, PAGE = Path("docs/experiments"), Path("docs/results.md")
MARK = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- /table -->", re.S)

ALGORITHMS = {
    "weight_matching": "weights",
    "activation_matching": "activations",
    "activation_and_weight": "both",
    "auto": "auto",
    "sinkhorn": "Sinkhorn",
    "ste": "STE",
    "weight_alignment": "maps by weights",
    "learned": "learned maps",
}

QUICK = {"ste_quick": "ste"}
"""Shorter searches that stand in the column of the long one; the pair's name says so."""

Found = dict[str, tuple[float, float, int]]
"""Algorithm -> barrier, seconds to align, how many pairs these are means of; "naive" among them."""


@dataclass(frozen=True)
class Pair:
    """A line of the leaderboard: who it is, where its figures are, and the command that makes them."""

    name: str
    figures: Callable[[], Found]
    command: str


def sweep(
    name: str,
    where: Mapping[str, Any],
    naive: str = "naive/barrier/heldout/loss",
    aligned: str = "barrier/heldout/loss",
) -> Callable[[], Found]:
    """The runs of a stored sweep whose options are these, a mean for each algorithm; none of one that is not stored."""

    def read() -> Found:
        file = LOGS / f"{name}.json"
        stored = load(file).rows if file.exists() else ()
        rows = [row for row in stored if all(row.get(k) == v for k, v in where.items())]
        groups: dict[str, list[Any]] = {}
        for row in rows:
            algorithm = str(row["algo.name"])
            groups.setdefault(QUICK.get(algorithm, algorithm), []).append(row)
        found: Found = {}
        for algorithm, own in groups.items():
            barriers = [row[aligned] for row in own]
            seconds = [row["seconds/align"] for row in own]
            found[algorithm] = statistics.fmean(barriers), statistics.fmean(seconds), len(own)
        every = [row[naive] for row in next(iter(groups.values()))] if groups else []
        return {**found, "naive": (statistics.fmean(every), 0.0, len(every))} if every else {}

    return read


def log(name: str, rows: Mapping[str, str]) -> Callable[[], Found]:
    """Rows of a log of one pair: algorithm -> the name of its row."""

    def read() -> Found:
        own = json.loads((LOGS / f"{name}.json").read_text())["rows"]
        there = {"naive": "naive", **rows}
        return {
            algorithm: (own[row]["barrier"], own[row]["seconds"], 1)
            for algorithm, row in there.items()
            if row in own
        }

    return read


def single(name: str, algorithm: str) -> Callable[[], Found]:
    """The results of one run, by this algorithm."""

    def read() -> Found:
        own = json.loads((LOGS / f"{name}.json").read_text())
        return {algorithm: (own["curves"]["heldout"]["aligned"]["barrier"], own["seconds"]["align"], 1)}

    return read


def joined(*parts: Callable[[], Found]) -> Callable[[], Found]:
    """One pair's figures from several logs: of an algorithm, and of naive, the first that has it."""

    def read() -> Found:
        found: Found = {}
        for part in parts:
            found = {**part(), **found}
        return found

    return read


def real(name: str, statistics: str = "plain") -> Callable[[], Found]:
    """The rows of a pair of `experiments.real_pairs`; with "reset": BatchNorm's statistics anew at each point."""

    def read() -> Found:
        own = json.loads((LOGS / "real_pairs.json").read_text())["pairs"].get(name, {})
        there = [a for a in ("naive", *ALGORITHMS) if statistics in own.get(a, {})]
        return {a: (own[a][statistics]["barrier"], own[a]["seconds"], 1) for a in there}

    return read


BOTH, ALL = "permutation by both costs", "all maps, {} steps"
LEADERBOARD = (
    Pair(
        "MLP of width 16, digits (2 pairs)", sweep("algorithms-small", {"model.width": 16}),
        "python -m rebasin.run +experiment=algorithms size=small",
    ),
    Pair("MLP of width 32, digits (2 pairs)", sweep("algorithms-small", {"model.width": 32}), "the same"),
    Pair("MLP of width 64, digits (2 pairs)", sweep("algorithms-small", {"model.width": 64}), "the same"),
    Pair("MLP of width 512, MNIST (3 pairs)", sweep("curves-full", {}), "python -m rebasin.run +experiment=curves"),
    Pair(
        "UNet of width 32, seed1 beside low", sweep("algorithms_diffusion-small", {"model.b": "seed1"}),
        "python -m rebasin.run +experiment=algorithms_diffusion size=small",
    ),
    Pair(
        "UNet of width 32, two fine-tunes of one base", sweep("algorithms_diffusion-small", {"model.b": "high"}),
        "the same",
    ),
    Pair(
        "UNet of width 16", log("learned_maps/width16", {
            "activation_and_weight": BOTH, "activation_matching": "permutation by activations",
            "weight_alignment": "permutation and maps by weights", "learned": ALL.format(800),
        }), "python -m experiments.learned_maps --pair FOLDER/unet16 --width 16 --steps 800",
    ),
    Pair(
        "UNet of width 64", joined(
            log("learned_maps/wide-long", {"learned": ALL.format(1500)}),
            log("learned_maps/wide", {
                "activation_and_weight": "both costs, permutation", "activation_matching": "activations, permutation",
                "weight_alignment": "weights, permutation and maps",
            }),
        ), "python -m experiments.learned_maps --pair wide --steps 1500",
    ),
    Pair(
        "DiT of width 192", log("learned_maps/dit", {
            "activation_and_weight": BOTH, "activation_matching": "permutation by activations",
            "weight_alignment": "permutation and maps by weights", "learned": ALL.format(300),
        }), "python -m experiments.learned_maps --pair FOLDER/dit192 --kind dit",
    ),
    Pair(
        "ViT, Fashion-MNIST", joined(
            log("learned_vit-whole_line", {"learned": "whole line, from weights and maps"}),
            log("learned_vit-fashion_mnist", {
                "weight_matching": "weights", "activation_matching": "activations",
                "activation_and_weight": "both costs", "ste": "STE", "weight_alignment": "weights, maps",
            }),
        ), "python -m experiments.learned_transformers vit --data fashion_mnist",
    ),
    Pair(
        "MNIST diffusion model, two public trainings", real("mnist-ddpm"),
        "python -m experiments.real_pairs --real FOLDER --mnist mnist.npz",
    ),
    Pair(
        "ResNet20, CIFAR-10, two public trainings", real("cifar-resnet20"),
        "python -m experiments.real_pairs --real FOLDER --cifar cifar10.npz",
    ),
    Pair("the same, BatchNorm's statistics anew", real("cifar-resnet20", "reset"), "the same"),
    Pair(
        "the same, all test images, learned: 2,400 steps", log("learned_resnet20", {
            "activation_matching": "activations", "learned": "activations, scales",
        }), "python -m experiments.learned_scales",
    ),
    Pair(
        "ResNet20 of width 1, CIFAR-10, 10 epochs (STE: 20 steps)",
        joined(sweep("curves_resnet20-short", {}), single("learned_cifar_resnet20_10", "learned")),
        "python -m rebasin.run +experiment=curves_resnet20 size=short",
    ),
    Pair(
        "VGG16 of width 16, CIFAR-10, 4 epochs (STE: 20 steps)",
        joined(sweep("curves_vgg16-short", {}), single("learned_cifar_vgg16", "learned")),
        "python -m rebasin.run +experiment=curves_vgg16 size=short",
    ),
    Pair(
        "ResNet18 of torchvision, CIFAR-10, 4 epochs", sweep("curves_resnet18-short", {}),
        "python -m rebasin.run +experiment=curves_resnet18 size=short",
    ),
    Pair(
        "the same ResNet18, BatchNorm's statistics anew",
        sweep(
            "curves_resnet18-short", {}, "naive_repaired/barrier/heldout/loss", "aligned_repaired/barrier/heldout/loss"
        ),
        "the same",
    ),
    Pair(
        "GPT, the language reference of Python", log("learned_gpt", {
            "weight_matching": "weights", "weight_alignment": "weights, maps",
            "learned": "whole line, from weights and maps",
        }), "python -m experiments.learned_transformers gpt",
    ),
)  # fmt: skip


def leaderboard() -> str:
    """Pair x algorithm: the barrier as a share of the naive one, and seconds to align."""
    head = ["pair", "naive barrier", *ALGORITHMS.values()]
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
    measured = [(pair, found) for pair in LEADERBOARD if "naive" in (found := pair.figures())]
    for pair, found in measured:
        naive = found["naive"][0]
        shares = {name: found[name][0] / naive for name in ALGORITHMS if name in found and naive > 0}
        best = min(shares.values(), default=0.0)
        cells = [pair.name, f"{naive:.3g}"]
        for name in ALGORITHMS:
            if name not in found:
                cells.append("")
            elif name not in shares:
                cells.append(f"{found[name][0]:.3g} ({seconds(found[name][1])})")
            else:
                told = f"{shares[name]:.0%}" if shares[name] >= 0.095 else f"{shares[name]:.1%}"
                strong = "**" if shares[name] <= best + 0.005 else ""
                cells.append(f"{strong}{told}{strong} ({seconds(found[name][1])})")
        lines.append(f"| {' | '.join(cells)} |")
    commands = [f"- {pair.name}: `{pair.command}`" for pair, _ in measured if pair.command != "the same"]
    return "\n".join([*lines, "", *commands])


def seconds(number: float) -> str:
    return f"{number:.2g} s" if number < 10 else f"{number:.0f} s"


def of_sweep(name: str) -> str:
    """The table of a stored sweep, and its first figure."""
    stored = load(LOGS / f"{name}.json")
    found = table(stored)
    drawn = sorted(LOGS.glob(f"{name}-*.png"))
    declared = [figure["name"] for figure in stored.declaration.get("figures", [])]
    chosen = next((path for one in declared for path in drawn if path.stem == f"{name}-{one}"), None)
    picture = f"![{stored.declaration['title']}](experiments/{chosen.name})" if chosen is not None else ""
    return "\n\n".join(part for part in (found.markdown().rstrip() if found else "", picture) if part)


def written(text: str) -> str:
    """The page with the tables that the logs give."""

    def one(match: re.Match[str]) -> str:
        own = {
            "leaderboard": leaderboard,
            "width_law": lambda: width_law.markdown(width_law.points()),
            "readme": lambda: readme_figures.table(readme_figures.read()).rstrip(),
        }
        made = own[match[1]]() if match[1] in own else of_sweep(match[1])
        return f"<!-- table: {match[1]} -->\n{made}\n<!-- /table -->"

    return MARK.sub(one, text)


def main(
    check: Annotated[bool, typer.Option(help="only tell whether the page is up to date")] = False,
) -> None:
    """Write the tables of docs/results.md."""
    before = PAGE.read_text(encoding="utf-8")
    after = written(before)
    if check:
        raise typer.Exit(before != after)
    write_text(PAGE, after)
    typer.echo(f"{PAGE}: {len(after.splitlines())} lines")


if __name__ == "__main__":
    typer.run(main)
