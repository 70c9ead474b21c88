"""`rebasin apply`: move a checkpoint, a LoRA or a ControlNet by a permutation that was found before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .request import command


@command("permutation file output inverse unfold variant overwrite dry_run")
def apply(
    permutation: Annotated[
        Path,
        typer.Argument(
            metavar="PERM",
            help="The permutation that `rebasin align` or `merge` has left.",
            show_default=False,
        ),
    ],
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A checkpoint, LoRA, LyCORIS or ControlNet of B.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="OUT", help="What to write. Default: FILE_aligned.safetensors."
        ),
    ] = None,
    inverse: Annotated[
        bool, typer.Option("--inverse", help="The way back: from aligned B's order to B's own.")
    ] = False,
    unfold: Annotated[
        bool,
        typer.Option(
            "--unfold",
            help="Write LoKr modules that can't carry the permutation as LoRA or full differences (a larger file).",
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

    Kinds: LoRA (kohya, diffusers, PEFT), LoCon, LoHa, LoKr, full differences,
    IA3, each with DoRA or without; ControlNet.
    """
    from ..checkpoints import provenance, save_safetensors
    from ..checkpoints.provenance import sha256_of
    from ..spec import Permutation
    from . import session
    from .inputs import check_output, kind_of_file
    from .permute_file import permuted

    console = session.begin()
    output = output or file.with_name(f"{file.name if file.is_dir() else file.stem}_aligned.safetensors")
    check_output(output, [permutation, file], overwrite or dry_run, (".safetensors", ".sft"))
    kind = kind_of_file(file)
    found = Permutation.load(permutation)
    if inverse:
        found = found.invert()
    if dry_run:
        neurons = permuted(kind, file, found, unfold, variant).neurons
        text = f"Would move the {kind} {file} by {neurons:,} neurons and write {output}. Nothing was done."
        console.console.print(text, markup=False)
        return
    with console.stage("move"):
        state, metadata, neurons = permuted(kind, file, found, unfold, variant)
        followers = "" if kind == "model" else f"{len(state):,} tensors follow "
        console.say(f"{kind}: {followers}{neurons:,} neurons")
    with console.stage("write"):
        recipe = {"command": "apply", "permutation": permutation.name, "inverse": inverse}
        recipe["permutation_sha256"] = sha256_of(permutation)
        header = provenance.header(metadata, [(file, sha256_of(file), metadata)], recipe, None)
        save_safetensors(output, state, header, keep_order=True, finite=True, progress=console.progress)
        console.say(f"{output.name}, {session.size(output.stat().st_size)}")
    session.say_where(console, output)
