"""`python -m rebasin.report RUN_OR_SWEEP ...`: draw figures, tables and page again from stored results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError, RebasinError, shown
from ..files import print_anything


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 after one sentence about what is missing, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m rebasin.report",
        description="Draw figures, tables and report.html again: of a run from its results.json, of a sweep from those"
        " of its runs, or from a sweep.json alone.",
    )
    sources = "the folder of a finished run, the folder of a sweep, or a sweep.json"
    parser.add_argument("source", nargs="+", type=Path, help=sources)
    parser.add_argument(
        "--docs",
        type=Path,
        metavar="PAGE.md",
        help="also replace (or add) the sweep's section in this Markdown file, with figures and sweep.json beside it in"
        " experiments/",
    )
    parser.add_argument("--out", type=Path, help="where a sweep's files go; default: its own folder")
    given = parser.parse_args(arguments)
    print_anything()
    try:
        for source in given.source:
            for path in drawn(source, given.docs, given.out):
                print(path)
    except RebasinError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted; no file is half-written, and the same command draws them all.", file=sys.stderr)
        return 130
    return 0


def drawn(source: Path, docs: Path | None = None, out: Path | None = None) -> list[Path]:
    """The files that were drawn again from what is stored in `source`.

    Raises:
        CheckpointError: it is damaged; pages ask for far more of a file than can be declared.
    """
    try:
        return _draw(source, docs, out)
    except (RebasinError, OSError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"The results in {source} can't be drawn, they are damaged or of another version"
            f" ({type(error).__name__}: {shown(str(error))[1:-1]}); run the job again."
        ) from error


def _draw(source: Path, docs: Path | None, out: Path | None) -> list[Path]:
    from .kinds import draw
    from .results import NAME, load_results
    from .sweep import collect, load
    from .sweep_page import into_docs, leave

    if source.is_dir() and not (source / NAME).is_file() and not any(source.glob(f"*/{NAME}")):
        load_results(source)  # its error says what is missing
    if (source / NAME).is_file() or not source.exists():
        return draw(load_results(source), source)
    sweep = load(source) if source.is_file() else collect(source)
    # A page of results beside which the sweep is stored needs no second copy of everything.
    runs = source if source.is_dir() else None
    written = [] if docs and not out else leave(sweep, out or runs or source.parent, runs)
    if docs is not None:
        written += into_docs(sweep, docs, docs.parent / "experiments")
    return written
