"""What the nodes do, on states and files: names of ComfyUI's become parts that rebasin knows, and the way back.

Nothing of ComfyUI is imported here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rebasin.checkpoints.checkpoint import checkpoint_of
from rebasin.cli import apply, loaded, pipeline, recipe_run, session
from rebasin.cli.request import Request
from rebasin.errors import CheckpointError, ConfigError
from rebasin.merging import METHODS
from rebasin.types import DerivedState, State, passed

DENOISER = "diffusion_model."
"""What the names of a MODEL begin with."""

ENCODERS = ("clip_l", "clip_g", "clip_h", "t5xxl")
"""The text encoders of a CLIP; its names are `clip_l.transformer.text_model...`."""

AS_A = "as A"
"""The type of what is written: A's own."""

NONE = "none"
"""No file."""


def parts_of(model: State, clip: State | None = None) -> dict[str, State]:
    """A MODEL's and a CLIP's tensors by part, in the names of a single file."""
    found = {"unet": _under(DENOISER, model)}
    for name in ENCODERS if clip is not None else ():
        found[name] = _under(f"{name}.transformer.", clip)  # type: ignore[arg-type]
    return {name: state for name, state in found.items() if len(state)}


def _under(prefix: str, state: State) -> State:
    own = [name for name in state if name.startswith(prefix)]
    return DerivedState({name.removeprefix(prefix): passed(state, name) for name in own})


def known(parts: Mapping[str, State]) -> dict[str, State]:
    """Those that rebasin knows; a text encoder that it does not (T5) stays as it is."""
    found = {}
    for name, state in parts.items():
        try:
            checkpoint_of(state, name)
        except CheckpointError:
            if name == "unet":
                raise
            continue
        found[name] = state
    return found


def names_of(parts: Mapping[str, State]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a MODEL and of a CLIP in ComfyUI's names, out of parts; read when they are asked for."""
    model = {f"{DENOISER}{name}": (parts["unet"], name) for name in parts.get("unet", ())}
    clip = {
        f"{part}.transformer.{name}": (parts[part], name)
        for part in ENCODERS
        if part in parts
        for name in parts[part]
    }
    return model, clip


def changed(new: Mapping[str, State], old: Mapping[str, State]) -> dict[str, State]:
    """Of each part the tensors that are not what they were."""

    def differs(part: str, name: str) -> bool:
        one, other = new[part][name], old[part][name]
        return one.shape != other.shape or not torch.equal(one, other)

    return {
        part: DerivedState({name: passed(state, name) for name in state if differs(part, name)})
        for part, state in new.items()
    }


def whole_of(saved: State, model: State) -> State:
    """A checkpoint as ComfyUI names it, with the denoiser's tensors of `model`, which has its patches.

    Raises:
        ConfigError: ComfyUI saves the denoiser under other names.
    """
    own = {f"model.{name}": name for name in model if name.startswith(DENOISER)}
    if missing := [name for name in own if name not in saved]:
        raise ConfigError(
            f"This kind of model is saved under other names ({missing[0]} is none of them); save it with ComfyUI's own"
            " node, or merge its files."
        )
    return DerivedState(
        {name: passed(model, own[name]) if name in own else passed(saved, name) for name in saved}
    )


def report(found: loaded.Compared) -> str:
    """The comparison as text."""
    width = max((len(f"{one.component} {one.name}") for one in found.blocks), default=5)
    lines = [f"{'block':{width}}  neurons  in place  |A-B|/|A|  aligned"]
    for one in found.blocks:
        stay = f"{100 * one.stay:.1f}%" if one.neurons else ""
        name = f"{one.component} {one.name}"
        lines.append(f"{name:{width}}  {one.neurons:7,}  {stay:>8}  {one.before:9.3g}  {one.after:7.3g}")
    return "\n".join([*lines, "", f"Do they share a basin? {found.short}. {found.text}"])


def output_of(folder: Path, name: str) -> Path:
    """Where a result of this name goes, in a folder of results.

    Raises:
        ConfigError: it would be elsewhere.
    """
    path = folder / name
    path = path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")
    if not path.resolve().is_relative_to(folder.resolve()) or path == folder:
        raise ConfigError(
            f"The name {name!r} leads out of the folder of results; give a name below {folder}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def merge_files(
    models: Sequence[Path],
    output: Path,
    *,
    base: Path | None = None,
    weights: str = "",
    dtype: str = AS_A,
    alpha: float | None = None,
    **fields: Any,
) -> Path:
    """`rebasin merge` of files; `fields` are further ones of `Request`."""
    request = Request(
        tuple(models),
        output,
        base=base,
        weights=weights.strip() or None,
        alpha=None if alpha is None else alpha_of(fields.get("method", "weighted_sum"), alpha),
        dtype=None if dtype == AS_A else dtype,
        **fields,
    )
    recipe_run.plain(session.begin(request.device, request.threads), request)
    return output


def align_files(a: Path, b: Path, output: Path, **fields: Any) -> tuple[Path, Path]:
    """`rebasin align` of files: the aligned B, and the permutation or alignment beside it."""
    request = Request((a, b), output, **fields)
    pipeline.align(session.begin(request.device, request.threads), request)
    return output, request.kept


def apply_to_file(
    permutation: Path | loaded.Aligned,
    file: Path,
    output: Path,
    *,
    unfold: bool = False,
    overwrite: bool = False,
) -> Path:
    """`rebasin apply`: an adapter that follows its model, by a file, or by what an align node has found."""
    with tempfile.TemporaryDirectory() as folder:
        path = permutation
        if isinstance(permutation, loaded.Aligned):
            path = Path(folder) / "aligned.permutation.safetensors"
            permutation.save(path)
        apply.apply(
            permutation=path, file=file, output=output, base=None, inverse=False, unfold=unfold, variant=None,
            overwrite=overwrite, dry_run=False,
        )  # fmt: skip
    return output


def alpha_of(method: str, alpha: float) -> float | None:
    """The slider's share; None for a method that takes none."""
    found = METHODS.get(method)
    return None if found is not None and (found.weight is None or found.plan is not None) else alpha


def require_free(path: Path, overwrite: bool) -> None:
    """Raise `ConfigError` if a file is there that may not be replaced."""
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; switch overwrite on to replace it, or choose another name.")


def one_of(alignment: loaded.Aligned | None, path: str) -> loaded.Aligned | Path:
    """The alignment of a node, or else the file of one.

    Raises:
        ConfigError: neither is given.
    """
    if alignment is not None:
        return alignment
    if not path.strip():
        raise ConfigError("Connect an alignment, or give the path of a permutation that rebasin has left.")
    return Path(path.strip()).expanduser()


def made_of(*made: loaded.Aligned | loaded.Merged | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe and the figures of a model that was aligned, then merged, for its header."""
    recipe: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    for one in made:
        if one is not None:
            figures |= one.figures
            recipe = {**one.recipe, **({"aligned": recipe} if recipe else {})}
    return recipe, figures
