"""`rebasin compare`: how far apart are two models, and do they share a basin?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .request import A, B, Request, command

PICTURES = (".png", ".svg", ".pdf")


@command("a b maps permutation components variant resize_vocabulary start seed device threads json_file plot")
def compare(
    a: A,
    b: B,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the figures as JSON.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw them (.png, .svg, .pdf).", show_default=False),
    ] = None,
    **given: Any,
) -> None:
    """How far apart two models are, block by block, and the share of neurons that aligning leaves in place.

    Fine-tunes of one base share its basin: hardly any neuron moves, and
    aligning is of no use. Where most neurons move and the distance falls, the
    models were trained apart. With --maps it also tells models that are one
    up to rotations, matrices in heads and scales, which no permutation sees.

    \b
    A table; with a picture and a file; with an alignment that is there already:
        rebasin compare base.safetensors mine.safetensors
        rebasin compare A B --plot apart.png --json apart.json
        rebasin compare A B --permutation AB.permutation.safetensors
        rebasin compare A B --maps
    """
    import json
    import os
    import tempfile
    from dataclasses import asdict, replace

    from ..files import write_text
    from . import session
    from .alignment import Aligning, specs_of
    from .basin import by_block, draw, shared_basin
    from .inputs import require_place
    from .stages import expect, read, require_maps

    for path, forms in ((plot, PICTURES), (json_file, (".json",))):
        if path is not None:
            require_place(path, forms)
    request = Request((a, b), Path(os.devnull), **given)  # writes no model
    require_maps(request)
    console = session.begin(request.device, request.threads)
    models, components = read(console, request)
    expect(console, request, models, components)
    with console.stage("spec"):
        specs = specs_of(models[0], components, joint=False)
        console.say(", ".join(f"{name} {spec.neurons:,} neurons" for name, spec in specs.items()))
    with console.stage("align"):
        with tempfile.TemporaryDirectory() as folder:
            ways = [
                replace(request, output=Path(folder) / "found", maps=way)
                for way in sorted({False, request.maps})
            ]
            found, *others = (
                Aligning(models, specs, way, ("a", "b"), console.progress).alignments()[0] for way in ways
            )
        mapped = others[0] if others else found if found.mapped else None
        maps = "" if mapped is None else f", {mapped.mapped:,} groups have maps"
        console.say(f"{found.moved:,} neurons would move{maps}")
    with console.stage("measure"):
        blocks = by_block(models[0], models[1], components, found, console.progress, mapped)
    console.console.print()
    rows = [
        (
            block.component,
            block.name,
            f"{block.neurons:,}",
            f"{100 * block.stay:.1f}%" if block.neurons else "",
            f"{block.before:.3g}",
            f"{block.after:.3g}",
            *(() if block.mapped is None else (f"{block.mapped:.3g}",)),
        )
        for block in blocks
    ]
    aligned = ("aligned",) if mapped is None else ("permuted", "by maps")
    titles = ("component", "block", "neurons", "stay in place", "|A-B|/|A|", *aligned)
    console.console.print(session.table(titles, rows, words=2))
    console.console.print()
    short, tone, text = shared_basin(blocks)
    session.answer(console, "Do they share a basin?", short, tone, text)
    told = {
        "a": a.name,
        "b": b.name,
        "blocks": [asdict(block) for block in blocks],
        "answer": f"{short}. {text}",
    }
    if json_file is not None:
        write_text(json_file, json.dumps(told, indent=2) + "\n")
    if plot is not None:
        draw(blocks, (a.name, b.name), plot)
    written = [path for path in (json_file, plot) if path is not None]
    if written:
        session.say_where(console, *written)
