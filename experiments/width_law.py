"""The barrier of diffusion UNets against their width: naive, a permutation, learned maps; and a DiT beside them.

    python -m experiments.width_law        # docs/experiments/width_law.png and the table of docs/results.md

From the logs of `experiments.learned_maps` in docs/experiments/learned_maps, one pair at each width. The command that
made a log is in the table of docs/continuous.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import typer

from rebasin.reporting.style import LOOKS, NAIVE, figure, save_png

LOGS = Path("docs/experiments/learned_maps")


@dataclass(frozen=True)
class Point:
    """One pair: its width, and the barriers of the line between its ends."""

    name: str
    width: int
    naive: float
    permuted: float
    learned: float


PERMUTED = (
    "permutation by both costs", "permutation by activations", "activations, permutation", "both costs, permutation",
)  # fmt: skip
"""Rows of permutations that are found without following the loss."""

LINES, KEYS = ("naive", "permutation, loss not followed", "learned maps"), ("naive", "permuted", "learned")


def points() -> list[Point]:
    """The UNets by width, and the DiT."""
    sources = (
        ("UNet", 16, ("width16",)), ("UNet", 32, ("seed-turns", "seed-distillation")),
        ("UNet", 64, ("wide", "wide-long")), ("DiT", 192, ("dit",)),
    )  # fmt: skip
    found: list[Point] = []
    for name, width, logs in sources:
        rows = [row for log in logs for row in json.loads((LOGS / f"{log}.json").read_text())["rows"].items()]
        own = {key: row["barrier"] for key, row in rows}
        permuted = min(b for k, b in own.items() if k in PERMUTED)
        learned = min(b for k, b in own.items() if k.startswith(("all maps", "learned")))
        found.append(Point(name, width, own["naive"], permuted, learned))
    return found


def draw(found: list[Point], path: Path) -> None:
    with figure(5.4, 3.5) as fig:
        axes = fig.subplots()
        nets, others = [p for p in found if p.name == "UNet"], [p for p in found if p.name != "UNet"]
        looks = (NAIVE, LOOKS[2], LOOKS[0])
        for label, key, (color, marker, dashes) in zip(LINES, KEYS, looks, strict=True):
            look = {"color": color, "marker": marker, "linestyle": dashes}
            axes.plot([p.width for p in nets], [getattr(p, key) for p in nets], label=label, **look)
            for other in others:
                hollow = {**look, "linestyle": "", "fillstyle": "none"}
                axes.plot([other.width], [getattr(other, key)], **hollow)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(
            [p.width for p in found],
            [f"{p.width}" if p.name == "UNet" else f"{p.name} {p.width}" for p in found],
        )
        axes.minorticks_off()
        axes.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5], ["0.02", "0.05", "0.1", "0.2", "0.5"])
        axes.set_xlabel("width (hollow: a DiT, whose adaLN leaves heads and permutations)")
        axes.set_ylabel("barrier of the denoising loss")
        axes.set_title("Diffusion models that were trained apart")
        axes.legend(frameon=False)
        save_png(fig, path)


def markdown(found: list[Point]) -> str:
    head = ["", *(f"{p.name}, width {p.width}" for p in found)]
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * len(found)]
    for label, key in zip(LINES, KEYS, strict=True):
        cells = []
        for p in found:
            value = getattr(p, key)
            share = f" ({value / p.naive:.1%})" if key != "naive" else ""
            cells.append(f"{value:.3f}{share}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    picture = "![Barrier against width, diffusion models](experiments/width_law.png)"
    return "\n".join([*lines, "", picture])


def main() -> None:
    """Draw the figure; `python -m experiments.results_page` puts the table beside it."""
    path = LOGS.parent / "width_law.png"
    draw(points(), path)
    typer.echo(markdown(points()))


if __name__ == "__main__":
    typer.run(main)
