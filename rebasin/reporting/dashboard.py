"""`python -m rebasin.dashboard --entity ME [--project git-rebasin]`: make the project's dashboard at Weights & Biases.

Needs an account, the network, and `pip install 'git-rebasin[dashboard]'`. `build` only describes the dashboard.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ..errors import ConfigError, RebasinError

SECTIONS: dict[str, list[tuple[str, list[str], str | None]]] = {
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
    sections = [
        workspaces.Section(
            name=section,
            is_open=True,
            panels=[
                panels.BarPlot(
                    title=title,
                    metrics=metrics,
                    groupby=f"config.{group}" if group else None,
                    layout=panels.Layout(x=8 * k, w=8, h=7),
                )
                for k, (title, metrics, group) in enumerate(bars)
            ],
        )
        for section, bars in SECTIONS.items()
    ]
    progress = workspaces.Section(
        name="While matching",
        is_open=True,
        panels=[
            panels.LinePlot(title="Objective of weight matching", y=["weight matching/objective"], x="Step"),
            panels.LinePlot(title="STE, loss of the midpoint", y=["straight-through/loss"], x="Step"),
        ],
    )
    pictures = workspaces.Section(
        name="Pictures and tables",
        is_open=True,
        panels=[panels.MediaBrowser(media_keys=["curve", "samples", "reliability", "search"], num_columns=2)],
    )
    return workspaces.Workspace(
        entity=entity, project=project, name=name, sections=[*sections, progress, pictures]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m rebasin.dashboard", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--entity", required=True, help="your user or team at Weights & Biases")
    parser.add_argument("--project", default="git-rebasin")
    parser.add_argument("--name", default="Git Re-Basin", help="of the dashboard")
    given = parser.parse_args(arguments)
    try:
        workspace = build(given.entity, given.project, given.name)
    except RebasinError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"Error: {error}", markup=False)
        return 2
    workspace.save()
    Console(highlight=False, soft_wrap=True).print(workspace.url, markup=False)
    return 0
