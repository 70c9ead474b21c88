"""`rebasin ui`: the page."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

from . import apply as apply_command
from . import compare as compare_command
from . import merge as merge_command

if TYPE_CHECKING:
    from ..ui import Command, Option

KINDS = {bool: "flag", str: "text", float: "number", int: "whole", Path: "path"}


def _folder(text: str) -> Path:
    """A path; an empty text, as a shell makes it of a variable that is not set, would be the current folder."""
    if not text:
        raise typer.BadParameter("it is empty; give a folder.")
    return Path(text).expanduser()


def ui(
    root: Annotated[
        list[Path] | None,
        typer.Option(
            "--root",
            metavar="FOLDER",
            parser=_folder,
            help="A folder that the page may read and write, with all in it; may be repeated. Results go to the first."
            " Default: the current folder.",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Of 127.0.0.1. Default: the first free one from 7860.", min=1, max=65535),
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="How many jobs may run at once; each may want most of the memory.", min=1)
    ] = 1,
    open_it: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    share: Annotated[
        bool,
        typer.Option(
            "--share",
            help="Also make a public link through Gradio's servers, with a password that is printed: whoever has both"
            " may read and write in the folders.",
        ),
    ] = False,
) -> None:
    """A page in the browser, on this machine alone, that compares, merges and applies by clicks.

    Choose two models, see what they are and whether they need aligning, look at
    the plan, and merge. A job is the command that stands beside it, to copy; it
    goes on while the page is closed, and a cancelled one continues when it is
    started again. Ctrl-C here ends the page and what runs.

    \b
        rebasin ui
        rebasin ui --root ~/models --root /data/loras --open

    The page sees these folders and nothing else. It needs Gradio:
        pip install "git-rebasin\\[ui]"
    """
    from ..ui.desk import Desk
    from ..ui.server import require_gradio, serve

    require_gradio()
    from . import inspect as inspect_command  # these load torch
    from .merge_weights import FUNCTIONS

    desk = Desk(
        merge=offered("merge", merge_command.merge),
        compare=offered("compare", compare_command.compare),
        apply=offered("apply", apply_command.apply),
        describe=inspect_command.describe,
        functions=FUNCTIONS,
    )
    serve(desk, root or [], port=port, at_once=jobs, open_it=open_it, share=share)


def offered(name: str, function: Callable[..., None]) -> Command:
    """What a command offers, from its declaration."""
    from ..ui import Command

    parameters = inspect.signature(function).parameters.values()
    declared = (
        one for one in parameters if get_origin(one.annotation) is Annotated
    )  # others are typer's own
    return Command(name, tuple(map(_option, declared)))


def _option(parameter: inspect.Parameter) -> Option:
    from ..ui import Option

    hint, declared = get_args(parameter.annotation)
    hint, many = _plain(hint), False
    if get_origin(hint) is list:
        hint, many = get_args(hint)[0], True
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kind: Any = "choice" if choices else KINDS[hint]
    on, off = "", ""
    if isinstance(declared, typer.models.OptionInfo):
        # In Annotated, typer takes the first spelling for a default and sorts that out later.
        spelt = (one for one in (declared.default, *(declared.param_decls or ())) if isinstance(one, str))
        own = next((one for one in spelt if one.startswith("--")), "")
        dashed = parameter.name.replace("_", "-")
        on, _, off = (own or (f"--{dashed}/--no-{dashed}" if kind == "flag" else f"--{dashed}")).partition(
            "/"
        )
    default = None if parameter.default is inspect.Parameter.empty else parameter.default
    return Option(parameter.name, on, off, declared.help or "", kind, default, many, choices)


def _plain(hint: Any) -> Any:
    """A type without its None."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (one for one in get_args(hint) if one is not NoneType)
    return hint
