"""`rebasin inspect`: what is this file, and how was it made?"""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CheckpointError

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint


def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A checkpoint, adapter or permutation.", show_default=False)
    ],
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="WORD", help="Of a diffusers folder with several, e.g. fp16.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    hashed: Annotated[bool, typer.Option("--hash", help="Compute the file's sha256, too.")] = False,
) -> None:
    """What a file is: family, components, types, and, if rebasin wrote it, from what and how.

    Only the header is read, so it takes no time for a file of any size.

    \b
        rebasin inspect merged.safetensors
        rebasin inspect merged.permutation.safetensors
        rebasin inspect lora.safetensors --json
    """
    from ..checkpoints.hub import local
    from ..checkpoints.provenance import sha256_of
    from . import session

    file = local(file, variant)
    console = session.begin().console
    told = describe(file, variant)
    if hashed:
        told["sha256"] = sha256_of(file)
    if as_json:
        print(json.dumps(told, indent=2))
        return
    parts = told.pop("components", [])
    made = told.pop("made", None)
    told["bytes"] = f"{told['bytes']:,} ({session.size(told['bytes'])})"
    for key, value in told.items():
        if value not in (None, {}, [], ""):
            console.print(f"{key.replace('_', ' '):<12} {_text(value)}", markup=False)
    if parts:
        console.print()
        rows = [[_text(value) for value in part.values()] for part in parts]
        console.print(session.table(list(parts[0]), rows, words=2 if "type" in parts[0] else 1))
    if made:
        console.print("\nMade by rebasin " + str(made.get("version")), markup=False)
        for line in _lineage(made, "  "):
            console.print(line, markup=False)


def describe(file: Path, variant: str | None = None) -> dict[str, Any]:
    """What `rebasin inspect --json` prints.

    Raises:
        RebasinError: the file is missing, damaged or none that is known.
    """
    from ..checkpoints.provenance import size_of
    from .inputs import kind_of_file

    kind = kind_of_file(file)
    told: dict[str, Any] = {"file": file.name, "kind": kind, "bytes": size_of(file)}
    return told | (_model(file, variant) if kind == "model" else KINDS[kind](file))


def _model(file: Path, variant: str | None) -> dict[str, Any]:
    from ..checkpoints import provenance
    from .inputs import open_each

    try:
        checkpoint = open_each([file], variant)[0]
    except CheckpointError:
        if (ours := _ours(file)) is None:
            raise
        return ours
    predicted = checkpoint.prediction
    has_unet = "unet" in checkpoint.components
    metadata = provenance.metadata_of(checkpoint)
    return {
        "what": checkpoint.title,
        "layout": _of_class(checkpoint) if checkpoint.classes else _layout(checkpoint.layout == "ldm"),
        "predicts": f"{predicted.kind or 'unknown'}: {predicted.reason}" if has_unet else None,
        "tensors": len(checkpoint.raw),
        "also_has": {kind: len(names) for kind, names in checkpoint.extras.items()},
        "metadata": sorted(k for k in metadata if k != provenance.KEY),
        "components": [_component(checkpoint, name) for name in checkpoint.components],
        "made": provenance.read(metadata),
    }


def _ours(file: Path) -> dict[str, Any] | None:
    """What the header says of a file that we wrote, though its tensors are of no model that is known from them alone;
    None of another.
    """
    from ..checkpoints import provenance
    from ..checkpoints.pickled import load_tensors

    if not file.is_file():
        return None
    found = load_tensors(file)
    if (made := provenance.read(found.metadata)) is None:
        return None
    return {
        "what": "tensors of a model, without the configuration that says of which class",
        "tensors": len(found),
        "metadata": sorted(key for key in found.metadata if key != provenance.KEY),
        "made": made,
    }


def _component(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    state = checkpoint.component(name)
    types = Counter(checkpoint.stored_as(name, n) for n in state)
    return {
        "component": name,
        "type": ", ".join(types),
        "tensors": len(state),
        "parameters": sum(prod(state.shape_of(n)) for n in state),
    }


def _permutation(file: Path) -> dict[str, Any]:
    from ..adapters.union import component_of, prefix_of
    from ..spec import displaced
    from .alignment import figures_of
    from .inputs import load_member
    from .permute_file import maps_of

    member = load_member(file)
    permutation, spec = member.permutation, member.spec
    figures = figures_of(file)
    rows = []
    for name in component_of(spec) or ("",):
        prefix = prefix_of(spec, name)
        cells = [c for c in spec.cells.values() if any(s.parameter.startswith(prefix) for s in c.sites)]
        moved = displaced(permutation.index[c.name] for c in cells)
        row = {"component": name or "model", "neurons": sum(c.size for c in cells), "moved": moved}
        own = [parameter for parameter in spec.shapes if parameter.startswith(prefix)]
        rows.append(row | ({"maps": maps_of(member, own)} if member.maps else {}))
    return {
        "what": f"{'an alignment' if member.maps else 'a permutation'}, legal by its own spec",
        "spec": spec.hash,
        "moved": f"{permutation.moved():,} of {spec.neurons:,} neurons in {len(spec)} groups",
        **({"maps": f"of {len(member.maps):,} of {len(spec.continuous):,} groups"} if member.maps else {}),
        "found": {
            n: {k: f[k] for k in ("distance_before", "distance_after") if k in f} for n, f in figures.items()
        },
        "components": rows,
    }


def _adapter(file: Path) -> dict[str, Any]:
    from ..adapters import describe_adapter
    from ..checkpoints import provenance
    from .inputs import named, open_raw

    state = open_raw(file)
    with named(file):
        info = describe_adapter(state)
    metadata = dict(getattr(state, "metadata", {}))
    return {
        "what": "an adapter: " + ", ".join(f"{n} x {kind}" for kind, n in info.kinds.items()),
        "naming": info.naming,
        "ranks": list(info.ranks),
        "tensors": len(state),
        "components": [{"component": name, "modules": n} for name, n in info.components.items()],
        "base_model": metadata.get("ss_sd_model_name") or metadata.get("modelspec.architecture"),
        "made": provenance.read(metadata),
    }


def _controlnet(file: Path) -> dict[str, Any]:
    from ..checkpoints import provenance
    from .inputs import open_raw

    state = open_raw(file)
    ldm = any(name.startswith("control_model.") for name in state)
    return {
        "what": "a ControlNet",
        "layout": _layout(ldm),
        "tensors": len(state),
        "made": provenance.read(getattr(state, "metadata", {})),
    }


KINDS = {"permutation": _permutation, "adapter": _adapter, "controlnet": _controlnet}


def _layout(ldm: bool) -> str:
    return "single file (LDM)" if ldm else "diffusers"


def _of_class(checkpoint: Checkpoint) -> str:
    """The layout of what is known by its class."""
    names = {"ldm": "in the names of its own code", "diffusers": "in diffusers' names"}
    told = names.get(checkpoint.layout)
    return f"single file, {told}" if told else "a folder"


def _text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


def _lineage(made: dict[str, Any], indent: str) -> list[str]:
    """The recipe and its inputs, and theirs, indented."""
    from ..checkpoints.provenance import told, understood

    recipe = told(made.get("recipe", {}))
    lines = [indent + ", ".join(f"{key} {_text(value)}" for key, value in recipe.items())]
    if made.get("rounding"):
        lines.append(f"{indent}rounding what maps moved has cost {made['rounding']}, relative")
    for name, figures in (made.get("alignment") or {}).items():
        spec = str(figures.get("spec", ""))[:12]
        moved = f"{figures.get('moved', 0):,} of {figures.get('neurons', 0):,} neurons moved"
        before, after = figures.get("distance_before"), figures.get("distance_after", figures.get("distance"))
        apart = f", distance {before:.4g} to {after:.4g}" if before is not None and after is not None else ""
        objective = f", objective {figures['objective']:.6g}" if "objective" in figures else ""
        lines.append(f"{indent}{name}: {moved}{apart}{objective}, spec {spec}")
    for one in made.get("inputs", []):
        lines.append(f"{indent}from {one.get('name')}  sha256 {one.get('sha256')}")
        if (before := understood(one.get("made"))) is not None:
            lines += _lineage(before, indent + "    ")
    return lines
