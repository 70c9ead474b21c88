"""What an output's header says about how it was made: names and hashes, no paths."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from .. import __version__
from ..errors import CheckpointError
from ..files import SchemaError, conform, parse
from ..tensors import load_metadata
from ..types import Progress, tell

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

BLOCK = 1 << 22

WEIGHT_FILES = (".safetensors", ".sft", ".bin", ".ckpt", ".pt", ".pth")

KEY = "rebasin"
"""The entry of a safetensors header that holds ours, in JSON."""

STALE = (
    "modelspec.hash_sha256", "_quantization_metadata", "sshs_model_hash", "sshs_legacy_hash", "sd_merge_recipe",
    "sd_merge_models",
)  # fmt: skip
"""What an input's header says of its own bytes, and is no longer true of the output."""


Input = tuple[Path, str, Mapping[str, str]]
"""A file or folder, its sha256, and the metadata of its header."""


def record(path: Path, sha256: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What is kept of an input: its name, sha256 and size in bytes, and what its own header says of how it was made."""
    told = {"name": path.name, "sha256": sha256, "size": size_of(path)}
    made = read(metadata)
    return told | ({"made": made} if made else {})


def metadata_of(checkpoint: Checkpoint) -> Mapping[str, str]:
    """The header of a checkpoint's file; of a folder, that of its components' first safetensors file that can be read:
    all have the same.
    """
    if checkpoint.metadata or not checkpoint.path.is_dir():
        return checkpoint.metadata
    own = (checkpoint.path, *(checkpoint.path / name for name in checkpoint.components))
    for file in weight_files(checkpoint.path):
        if file.suffix == ".safetensors" and file.parent in own:
            with contextlib.suppress(CheckpointError):  # of a variant that is not used
                return load_metadata(file)
    return {}


def told(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Of a recipe in a header what says something: what is on, and that a merge was not aligned."""
    return {
        key: value
        for key, value in recipe.items()
        if not (value is None or value == "" or (value is False and key != "align"))
        and not (isinstance(value, list | dict | tuple) and not value)
    }


def read(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What a header of ours says; None if it is not ours or is damaged."""
    try:
        return understood(parse(metadata[KEY], nan=True))
    except (KeyError, SchemaError):
        return None


class Component(TypedDict):
    """What is kept of one component's alignment."""

    spec: NotRequired[str]
    moved: NotRequired[int]
    neurons: NotRequired[int]
    objective: NotRequired[float]
    distance: NotRequired[float | None]
    distance_before: NotRequired[float | None]
    distance_after: NotRequired[float | None]


class Made(TypedDict):
    """What is shown of it."""

    recipe: NotRequired[Mapping[str, Any]]
    inputs: NotRequired[list[Mapping[str, Any]]]
    alignment: NotRequired[Mapping[str, Component] | None]
    rounding: NotRequired[str]


OPEN = "-.--e---"
"""Stands for a figure like 2.93e-04 that is known when the tensors are written."""


def understood(told: Any) -> dict[str, Any] | None:
    """The same, if it is of the kind that `header` writes; the inputs' own are looked at when they are shown."""
    try:
        conform(Made, told)
    except SchemaError:
        return None
    return told


def header(
    kept: Mapping[str, str],
    inputs: Sequence[Input],
    recipe: Mapping[str, Any],
    alignment: Mapping[str, Any] | None,
    rounding: bool = False,
) -> dict[str, str]:
    """The metadata of an output: those of the first input that still hold, ours, and those that A1111 shows.

    Args:
        kept: the first input's.
        recipe: what was done, with every option that changes the result.
        alignment: component -> spec hash, neurons moved, objective, distances; None if nothing was aligned.
        rounding: keep a place for what rounding costs (see `with_rounding`).
    """
    ours = {
        "version": __version__,
        "inputs": [record(*one) for one in inputs],
        "recipe": dict(recipe),
        "alignment": dict(alignment) if alignment is not None else None,
        **({"rounding": OPEN} if rounding else {}),
    }
    theirs = {
        "sd_merge_recipe": json.dumps({"type": "rebasin", **recipe}),
        "sd_merge_models": json.dumps(
            {sha256: {"name": path.name, "legacy_hash": legacy_hash(path)} for path, sha256, _ in inputs}
        ),
    }
    carried = {key: text for key, text in kept.items() if key not in STALE}
    return {"format": "pt", **carried, **theirs, KEY: json.dumps(ours)}


def with_rounding(metadata: Mapping[str, str], error: float) -> dict[str, str]:
    """The metadata with the relative error that rounding what maps moved has added, in as many letters."""
    place, told = (json.dumps({"rounding": text})[1:-1] for text in (OPEN, f"{error:.2e}"))
    return {**metadata, KEY: metadata[KEY].replace(place, told)}


def legacy_hash(path: Path) -> str | None:
    """The short hash by which older tools know a file: of 64 kB at 1 MB. None of a folder."""
    if path.is_dir():
        return None
    with open(path, "rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def size_of(path: Path) -> int:
    """Bytes of a file, or of the weights in a folder."""
    return sum(file.stat().st_size for file in weight_files(path))


def weight_files(path: Path) -> list[Path]:
    """The file itself, or the weight files of a folder, in the order of their names."""
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in WEIGHT_FILES)


def sha256_of(path: Path, progress: Progress | None = None) -> str:
    """sha256 of a file, as model hubs show it; of a folder, of its weight files' names and hashes."""
    files = weight_files(path)
    total, done = max(1, sum(f.stat().st_size for f in files) >> 20), 0
    hashes = []
    for file in files:
        digest = hashlib.sha256()
        with open(file, "rb", buffering=0) as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
                done += len(block)
                tell(progress, f"hash {path.name}, MB", done >> 20, total)
        hashes.append(digest.hexdigest())
    if not path.is_dir():
        return hashes[0]
    listed = [f"{f.relative_to(path).as_posix()} {h}" for f, h in zip(files, hashes, strict=True)]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()
