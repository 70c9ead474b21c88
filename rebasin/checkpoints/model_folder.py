"""Writing a folder of transformers or diffusers: like the one that it came from, with other weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import atomic_folder, write_text
from ..tensors.writer import replace_metadata
from ..types import DerivedState, State, dtype_of, passed, shape_of
from .belongings import belongings, copy_into
from .folders import index_of, shards, variants

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

Save = Callable[[Path, State], object]
"""Writes a state into a safetensors file."""

Closing = Callable[[str | None], Mapping[str, str]]


def save_model_folder(
    target: Path, checkpoint: Checkpoint, state: State, save: Save, closing: Closing | None = None
) -> tuple[str, ...]:
    """Write `state`, which has the names of `checkpoint`, as a folder with its shards and all that lies beside them.

    Args:
        closing: asked for the metadata of a component's files when all of them are written.

    Returns: a sentence about each thing that is not copied.
    """
    beside = belongings(checkpoint.path, tuple(checkpoint.classes), ())
    with atomic_folder(target) as temporary:
        for name, place in checkpoint.found.items():
            folder = temporary / place.prefix
            folder.mkdir(exist_ok=True)
            files = _files(checkpoint, place.prefix, state)
            for file, part in files.items():
                save(folder / file, part)
            if closing is not None:
                for file in files:
                    replace_metadata(folder / file, closing(name))
            if len(files) > 1:
                _write(folder / index_of(next(iter(files))), _index(files))
            _write(folder / "config.json", _config(checkpoint, name, files))
        copy_into(temporary, beside)
    return beside.notes


def save_as_folder(
    target: Path,
    checkpoint: Checkpoint,
    parts: Mapping[str, State],
    save: Callable[[Path, State, str], object],
) -> None:
    """Write the only model of a single file as a folder of diffusers, under the names that it has there."""
    ((name, state),) = parts.items()
    with atomic_folder(target) as temporary:
        save(temporary / "diffusion_pytorch_model.safetensors", state, name)
        _write(temporary / "config.json", _config(checkpoint, name, {"": state}))


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def _files(checkpoint: Checkpoint, prefix: str, state: State) -> dict[str, DerivedState]:
    """File -> what of a component goes into it, under the names that it has there."""
    known = {name: file for file, names in _shards(checkpoint, prefix).items() for name in names}
    files: dict[str, dict[str, Any]] = {file: {} for file in dict.fromkeys(known.values())}
    for name in state:
        if name.startswith(prefix):
            own = name.removeprefix(prefix)
            files[known.get(own, next(iter(files)))][own] = passed(state, name)
    return {file: DerivedState(tensors) for file, tensors in files.items() if tensors}


def _shards(checkpoint: Checkpoint, prefix: str) -> dict[str, list[str]]:
    variant = checkpoint.file_variant
    folder = checkpoint.path / prefix
    return shards(folder, variant if variant in variants(folder) else None)


def _index(files: Mapping[str, State]) -> dict[str, Any]:
    """What says which tensor is in which shard."""
    size = sum(
        torch.Size(shape_of(state, name)).numel() * dtype_of(state, name).itemsize
        for state in files.values()
        for name in state
    )
    return {
        "metadata": {"total_size": size},
        "weight_map": {name: file for file, state in files.items() for name in state},
    }


def _config(checkpoint: Checkpoint, component: str, files: Mapping[str, State]) -> dict[str, Any]:
    """A component's configuration, with the type that its weights are written in."""
    config = {k: v for k, v in checkpoint.classes[component].config.items() if k != "quantization_config"}
    types: dict[torch.dtype, int] = {}
    for state in files.values():
        for name in state:
            types[dtype_of(state, name)] = (
                types.get(dtype_of(state, name), 0) + torch.Size(shape_of(state, name)).numel()
            )
    numbers = {
        dtype: count for dtype, count in types.items() if dtype.itemsize > 1
    }  # libraries compute in these
    most = str(max(numbers or {torch.float16: 1}, key=lambda dtype: numbers.get(dtype, 0))).removeprefix(
        "torch."
    )
    return config | {key: most for key in ("dtype", "torch_dtype") if config.get(key) is not None}
