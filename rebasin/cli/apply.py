"""`rebasin apply`: move a checkpoint or what belongs to one by a permutation or alignment that was found before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from .request import command


@command("permutation file output base inverse unfold variant overwrite dry_run")
def apply(
    permutation: Annotated[
        Path,
        typer.Argument(
            metavar="PERM",
            help="The permutation or alignment that `rebasin align` or `merge` has left.",
            show_default=False,
        ),
    ],
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A checkpoint, LoRA, LyCORIS, ControlNet or textual inversion of B.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="What to write. Default: FILE_aligned.safetensors; of a model's folder a folder.",
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="B",
            help="The model that FILE is for, for maps that are turned by its norms' gains; with --inverse the"
            " aligned one.",
        ),
    ] = None,
    inverse: Annotated[
        bool, typer.Option("--inverse", help="The way back: from aligned B's order to B's own.")
    ] = False,
    unfold: Annotated[
        bool,
        typer.Option(
            "--unfold",
            help="Write LoKr and LoHa modules that can't follow as LoRA or full differences (a larger file).",
        ),
    ] = False,
    *,
    variant: str | None,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Adapters follow their model: a LoRA that was trained on B works on the aligned B after this.

    \b
    Align B; its LoRA, its ControlNet and another fine-tune of it follow:
        rebasin align A.safetensors B.safetensors -o aligned.safetensors
        rebasin apply aligned.permutation.safetensors lora.safetensors
        rebasin apply aligned.permutation.safetensors controlnet.safetensors
        rebasin apply aligned.permutation.safetensors B2.safetensors

    What was aligned with --maps has left an alignment; adapters may need B then:
        rebasin apply aligned.alignment.safetensors lora.safetensors --base B.safetensors

    Kinds: LoRA (kohya, diffusers, PEFT), LoCon, LoHa, LoKr, full differences,
    IA3, each with DoRA or without; ControlNet; textual inversions.
    """
    from ..checkpoints import provenance, save_checkpoint, save_safetensors
    from ..checkpoints.output import FILES
    from ..checkpoints.provenance import sha256_of, size_of
    from ..spec.mapped import Rounding
    from . import session
    from .alignment import CODES, not_the_model, rounding_of
    from .inputs import aligned_name, check_output, kind_of_file, load_member, open_each
    from .permute_file import moved

    console = session.begin()
    output = output or aligned_name(file)
    given = [permutation, file, *([base] if base is not None else [])]
    forms = (".safetensors", ".sft", *([".gguf"] if file.suffix.lower() == ".gguf" else []))
    kind = kind_of_file(file)
    folder = kind == "model" and not output.suffix
    check_output(output, given, overwrite or dry_run, FILES if folder else forms)
    found = load_member(permutation)
    if inverse:
        found = found.invert()
    like = None if base is None else open_each([base])[0]
    if dry_run:
        done = moved(kind, file, found, unfold, output, variant, like)
        maps = f" and {done.maps:,} maps" if done.maps else ""
        text = f"Would move the {done.kind} {file} by {done.neurons:,} neurons{maps} and write {output}."
        text += " Nothing was done."
        console.console.print(text, markup=False)
        return
    if base is not None and found.maps and not inverse:
        session.remark(console, not_the_model(permutation, base, sha256_of(base)))
    with console.stage("move"):
        done = moved(kind, file, found, unfold, output, variant, like)
        followers = "" if kind == "model" else f"{len(done.state):,} tensors follow "
        maps = f" and {done.maps:,} maps" if done.maps else ""
        console.say(f"{done.kind}: {followers}{done.neurons:,} neurons{maps}")
    with console.stage("write"):
        recipe = {"command": "apply", "permutation": permutation.name, "inverse": inverse}
        recipe["permutation_sha256"] = sha256_of(permutation)
        recipe |= {} if base is None else {"base": base.name}
        rounds, codes = bool(found.maps), Rounding()
        header = provenance.header(
            done.metadata, [(file, sha256_of(file), done.metadata)], recipe, None, rounding=rounds
        )

        def closing(part: str | None = None) -> Mapping[str, str]:
            own = {name: one for name, one in done.roundings.items() if part in (None, name)}
            return provenance.with_rounding(header, rounding_of({**own, CODES: codes}).error)

        last, progress = closing if rounds else None, console.progress
        if done.checkpoint is not None:
            saved = save_checkpoint(
                output, done.checkpoint, done.state, header, closing=last,
                lost=codes.note if rounds else None, progress=progress,
            )  # fmt: skip
            session.remark(console, saved.notes)
        else:
            save_safetensors(
                output,
                done.state,
                {**header, **done.marks},
                keep_order=True,
                finite=True,
                closing=last,
                progress=progress,
            )
        console.say(f"{output.name}, {session.size(size_of(output))}")
    lost = {**done.roundings, **({CODES: codes} if codes.squares else {})}
    session.say_rounding(console, lost if rounds else None)
    session.say_where(console, output)
