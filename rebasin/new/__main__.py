"""The command line of `python -m rebasin.new`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import RebasinError
from .study import Kind, create


def new(
    folder: Annotated[Path, typer.Argument(help="where to; its last part is the study's name")],
    kind: Annotated[Kind, typer.Option(help="of the network to begin with")] = Kind.resnet,
) -> None:
    """Write a study of your own: study.py with network, data, loss and training, a config, and commands."""
    try:
        made = create(folder, kind)
    except (RebasinError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    for file in made:
        print(file)
    name = folder.absolute().name
    print(f"\nRun it:  cd {folder} && python -m rebasin.run --config-dir conf model={name}")


def main() -> None:
    """The command line."""
    typer.run(new)


if __name__ == "__main__":
    main()
