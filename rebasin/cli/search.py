"""`rebasin search` and `rebasin compare-methods`: the Hydra jobs of these names, in their GROUP=CHOICE language."""

from __future__ import annotations

import sys

import typer

PASSED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Everything behind the command is Hydra's, --help too."""


def search(context: typer.Context) -> None:
    """Search for the merge that is best by an objective: methods, options, block weights.

    Takes GROUP=CHOICE and OPTION=VALUE, as `python -m rebasin.search` does; `rebasin search --help` lists them.
    """
    from ..jobs.commands import SEARCH

    sys.argv = ["rebasin search", *context.args]
    SEARCH.main()


def compare_methods(context: typer.Context) -> None:
    """Measure all merge methods beside each other on held-out data, without and with aligning.

    Takes GROUP=CHOICE and OPTION=VALUE, as `python -m rebasin.compare_methods` does; `rebasin compare-methods --help`
    lists them.
    """
    from ..jobs.commands import COMPARE_METHODS

    sys.argv = ["rebasin compare-methods", *context.args]
    COMPARE_METHODS.main()
