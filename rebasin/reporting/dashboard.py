"""`python -m rebasin.dashboard --entity ME [--project git-rebasin]`: make the project's dashboard at Weights & Biases.

Needs an account, the network, and `pip install 'git-rebasin[dashboard]'`. `build` only describes the dashboard.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, RebasinError

SECTIONS: dict[str, list[tuple[str, list[str], str]]] = {
    "Did it help": [
        ("Barrier, aligned and naive", ["barrier/heldout/loss", "naive/barrier/heldout/loss"], "algo.name"),
        ("Loss at the midpoint", ["midpoint/heldout/loss", "naive/midpoint/heldout/loss"], "algo.name"),
        (
            "Accuracy at the midpoint",
            ["midpoint/heldout/accuracy", "naive/midpoint/heldout/accuracy"],
            "algo.name",
        ),
    ],
    "Is it legal": [("Relative error of a random permutation", ["verify/mlp", "verify/unet"], "model.name")],
    "What did it cost": [
        ("Seconds", ["seconds/align", "seconds/evaluate", "seconds/total"], "algo.name"),
        ("Neurons moved", ["match/moved"], "algo.name"),
    ],
}
"""Section -> panels: title, metrics (docs/experiments.md has all names), and the option that runs are grouped by."""


def build(entity: str, project: str, name: str = "Git Re-Basin") -> Any:
    """The workspace: bars of the final figures by section, the matching's progress, and tables and pictures of runs.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels  # pyright: ignore[reportMissingImports]
        import wandb_workspaces.workspaces as workspaces  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "A dashboard needs wandb-workspaces: pip install 'git-rebasin[dashboard]'."
        ) from error

    def bar(place: int, title: str, metrics: list[str], group: str) -> Any:
        layout = panels.Layout(x=8 * place, w=8, h=7)
        return panels.BarPlot(title=title, metrics=metrics, groupby=f"config.{group}", layout=layout)

    shown = {section: [bar(k, *one) for k, one in enumerate(bars)] for section, bars in SECTIONS.items()}
    shown["While matching"] = [
        panels.LinePlot(title=title, y=[column], x="Step")
        for title, column in (
            ("Objective of weight matching", "weight matching/objective"),
            ("STE, loss of the midpoint", "straight-through/loss"),
        )
    ]
    media = ["curve", "samples", "reliability", "search"]
    shown["Pictures and tables"] = [panels.MediaBrowser(media_keys=media, num_columns=2)]
    sections = [workspaces.Section(name=name, is_open=True, panels=own) for name, own in shown.items()]
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one sentence."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m rebasin.dashboard", description=about)
    parser.add_argument("--entity", required=True, help="your user or team at Weights & Biases")
    parser.add_argument("--project", default="git-rebasin")
    parser.add_argument("--name", default="Git Re-Basin", help="of the dashboard")
    given = parser.parse_args(arguments)
    try:
        workspace = build(given.entity, given.project, given.name)
    except RebasinError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    workspace.save()
    print(workspace.url)
    return 0
