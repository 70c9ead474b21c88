"""`rebasin verify`: do two files compute the same?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .request import Request, command

if TYPE_CHECKING:
    from ..spec import Alignment as Member
    from ..types import State


@command("a b components variant resize_vocabulary joint seed threads")
def verify(
    a: Annotated[
        Path,
        typer.Argument(metavar="A", help="A model, or a permutation or alignment file.", show_default=False),
    ],
    b: Annotated[
        Path,
        typer.Argument(
            metavar="B",
            help="What A was aligned to become, or the model that the permutation is for.",
            show_default=False,
        ),
    ],
    joint: Annotated[
        bool,
        typer.Option("--joint", help="Text encoders and UNet as one, for what was aligned with --joint."),
    ] = False,
    **given: Any,
) -> None:
    """Is an alignment legal? Computes with both files, on the same random inputs, and compares the outputs.

    An aligned model must compute what it computed before, up to rounding (of
    half precision where its header says that maps were rounded to that).
    Weights are read layer by layer, so a model of any size fits into memory.
    The exit code is 1 if the two differ.

    \b
    B before and after aligning:
        rebasin verify B.safetensors B_aligned.safetensors
    Would this permutation be legal for that model?
        rebasin verify B_aligned.permutation.safetensors C.safetensors
    """
    from ..adapters import is_joint, of_component, part, union
    from ..checkpoints import component_spec
    from ..checkpoints.joint import PARTS
    from ..errors import CheckpointError, RebasinError
    from ..types import tell
    from . import session
    from .alignment import Alignment
    from .function import STACKED, TOLERANCE, compare_chains, compare_functions, rounding_in
    from .inputs import kind_of_file, load_member, open_all, parts

    request = Request((a, b), Path(os.devnull), **given)  # writes nothing
    console = session.begin(threads=request.threads)
    rows: list[tuple[str, str, str]] = []
    failures: list[str] = []
    carried: dict[str, Member] = {}  # component -> what acts on it, by its own spec

    def check(name: str, difference: float) -> None:
        same = difference < tolerance
        rows.append((name, f"{difference:.1e}", "yes" if same else "no"))
        if not same:
            failures.append(f"the {name} computes something else (relative difference {difference:.2g})")

    def counterpart(name: str) -> State:
        """A component of the other model, or of the model under the permutation."""
        if member is None:
            return models[1].component(name)
        known = parts(models[0], models[0].components)
        return Alignment(carried.get(name, member), {}, {}).views({name: known[name]}, wide=True, base=known)[
            name
        ]

    with console.stage("read"):
        member = load_member(a) if kind_of_file(a) == "permutation" else None
        inputs = [a, b] if member is None else [b]
        models, names = open_all(
            inputs, request.components, request.variant, common_words=request.resize_vocabulary
        )
        tolerance = max(TOLERANCE, STACKED * max(map(rounding_in, models)))
        console.say(f"{models[0].title}: {', '.join(names)}")
    whole = member is not None and is_joint(member.spec)
    with console.stage("compute"):
        together = [name for name in names if name in PARTS] if joint or whole else []
        if "unet" in together and len(together) > 1:
            others = {name: counterpart(name) for name in together}
            check("texts and unet", compare_chains(models[0], others, request.seed))
            names = tuple(name for name in names if name not in together)
        for number, name in enumerate(names):
            tell(console.progress, name, number, len(names))
            if member is not None and not whole:
                own = of_component(member, name)
                if own is None:
                    continue
                try:
                    carried[name] = union({name: part(own, component_spec(models[0], name))})
                except RebasinError as error:
                    failures.append(f"{name}: {error}")
                    continue
            other = models[1] if member is None else None
            check(name, compare_functions(models[0], name, counterpart(name), request.seed, other))
    if not rows and not failures:
        raise CheckpointError(f"{a} moves none of the components of {b}.")
    console.console.print()
    titles = ("component", "largest relative difference", "same function")
    console.console.print(session.table(titles, rows, words=1))
    console.console.print()
    if failures:
        session.answer(console, "Do they compute the same?", "No", "red", "; ".join(failures) + ".")
        raise typer.Exit(1)
    session.answer(console, "Do they compute the same?", "Yes", "green", "The differences are rounding.")
