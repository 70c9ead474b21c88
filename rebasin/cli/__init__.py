"""The command `rebasin`: aligning, merging and examining checkpoints, one command a file.

Only what every command needs is imported here: `rebasin --help` must not wait for torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import RebasinError
from ..files import print_anything
from . import align, apply, compare, doctor, inspect, merge, methods, search, ui, verify

HELP = """
Align the neurons of models before merging them, and see what it did.

\b
Align B to A, then average:
    rebasin merge A.safetensors B.safetensors -o merged.safetensors
Do they need aligning at all?
    rebasin compare A.safetensors B.safetensors
What is this file, and how was it made?
    rebasin inspect merged.safetensors
The same by clicks, in the browser:
    rebasin ui

Models are single files of Stable Diffusion, Flux, Qwen-Image, Wan and their
like (.safetensors, .ckpt, .gguf), or folders of any class of transformers and
diffusers; adapters follow Stable Diffusion 1, 2 and XL. Inputs are never
changed, and a command that was interrupted continues where it stopped when it
is given again. Every command explains itself: rebasin COMMAND --help
"""


class Commands(TyperGroup):
    """The commands; Ctrl-C ends them with what to do next, not with click's bare "Aborted!"."""

    def invoke(self, ctx: Any) -> Any:  # a Context of the click that typer brings along
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print(
                "\nInterrupted. No input was changed and no output is half-written; the same command continues where"
                " it stopped.",
                file=sys.stderr,
            )
            raise typer.Exit(130) from None


app = typer.Typer(
    name="rebasin",
    cls=Commands,
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("merge")(merge.merge)
app.command("align")(align.align)
app.command("compare")(compare.compare)
app.command("verify")(verify.verify)
app.command("apply")(apply.apply)
app.command("inspect")(inspect.inspect)
app.command("methods")(methods.methods)
app.command("ui")(ui.ui)
app.command("doctor")(doctor.doctor)
app.command("search", context_settings=search.PASSED)(search.search)
app.command("compare-methods", context_settings=search.PASSED)(search.compare_methods)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rebasin {__version__}")
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def guarded(job: Callable[[], None]) -> None:
    """Do a job; what the user got wrong ends in one sentence on stderr and exit code 2."""
    print_anything()
    try:
        job()
    except RebasinError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before or after a command
        sys.exit(130)


def main() -> None:
    """The entry point of `rebasin` and of `python -m rebasin`."""
    guarded(app)
