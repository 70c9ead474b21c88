"""`python -m rebasin.report RUN_FOLDER ...`: draw a run's curve.png and report.html again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .errors import RebasinError


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one sentence about what is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m rebasin.report",
        description="Draw curve.png and report.html again from a run's results.json.",
    )
    parser.add_argument("folder", nargs="+", type=Path, help="the folder of a finished run")
    folders = parser.parse_args(arguments).folder

    from .reporting.draw import draw
    from .reporting.results import load_results

    try:
        for folder in folders:
            for path in draw(load_results(folder), folder):
                Console(highlight=False, soft_wrap=True).print(str(path), markup=False)
    except RebasinError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"Error: {error}", markup=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
