"""Diffusers folders: which files in them are the weights, variants and shards included.

File names are looked up in the folder; names that stand in an index or a config are never opened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import SchemaError, conform, parse
from ..tensors import JoinedState
from ..types import DerivedState, State, passed
from .components import TEXT, TEXT_2, UNET, VAE
from .pickled import load_tensors

PARTS = (UNET, VAE, TEXT, TEXT_2)

INDEX = "model_index.json"
"""What a pipeline's folder says of its parts."""

WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?"
    r"(?:-(?P<shard>\d{5})-of-(?P<shards>\d{5}))?(?:\.(?P<late>[\w-]+))?\.(?P<suffix>safetensors|bin)"
)


def load_folder(folder: Path, variant: str | None = None) -> State:
    """The tensors of a diffusers folder, lazily, named `component/tensor`; of a component's own folder, `tensor`.

    Raises:
        CheckpointError: the folder has no weights, an incomplete set of shards, or no such variant.
    """
    parts = [name for name in PARTS if (folder / name).is_dir()]
    if not parts:
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder} is no diffusers folder: it has neither a config.json nor one of {', '.join(PARTS)}."
            )
        return load_weights(folder, variant)
    states = {name: load_weights(folder / name, variant) for name in parts}
    return DerivedState({f"{part}/{n}": passed(s, n) for part, s in states.items() for n in s})


def load_weights(folder: Path, variant: str | None = None) -> State:
    """The tensors of one component's folder, lazily; safetensors are preferred to pickles.

    `variant` is the word in file names such as model.fp16.safetensors; None: the file without one, or the only one.
    """
    sets: dict[tuple[str, str], dict[int, Path]] = {}
    shards: dict[tuple[str, str], int] = {}
    for path in sorted(folder.iterdir()):
        if found := WEIGHTS.fullmatch(path.name):
            key = (found["suffix"], found["variant"] or found["late"] or "")
            sets.setdefault(key, {})[int(found["shard"] or 0)] = path
            shards[key] = int(found["shards"] or 0)
    if not sets:
        raise CheckpointError(
            f"{folder} has no weights: no file such as diffusion_pytorch_model.safetensors."
        )
    suffix, chosen = _choose(folder, list(sets), variant)
    files, count = sets[suffix, chosen], shards[suffix, chosen]
    missing = [n for n in range(1, count + 1) if n not in files]
    if missing:
        raise CheckpointError(f"{folder} is incomplete: part {missing[0]} of {count} is missing.")
    states = [load_tensors(files[n]) for n in sorted(files)]
    return states[0] if len(states) == 1 else JoinedState(states)


def variants(folder: Path) -> set[str]:
    """The words in the file names of a folder's weights, and of its components', such as "fp16"."""
    found = (WEIGHTS.fullmatch(path.name) for path in folder.glob("**/*.*"))
    return {one["variant"] or one["late"] for one in found if one and (one["variant"] or one["late"])}


def _choose(folder: Path, keys: list[tuple[str, str]], variant: str | None) -> tuple[str, str]:
    names = sorted({v for _, v in keys if v})
    fits = [k for k in keys if (k[1] == variant if variant is not None else not k[1] or len(names) == 1)]
    if fits:
        return next((k for k in fits if k[0] == "safetensors"), fits[0])
    if variant is None:
        raise CheckpointError(f"{folder} has the variants {', '.join(names)}; say which one.")
    raise CheckpointError(
        f"{folder} has no variant {variant!r}; it has {', '.join(names) or 'only the one without a name'}."
    )


def own_config(where: Path, component: str) -> dict[str, Any] | None:
    """The config of a component in a diffusers folder, which may be that of a pipeline or the component's own; None if
    it has none, or is a file.

    Raises:
        CheckpointError: it is no JSON object.
    """
    if not where.is_dir():
        return None
    found = load_config(where / component)
    return load_config(where) if found is None else found


def load_config(folder: Path, name: str = "config.json") -> dict[str, Any] | None:
    """A folder's configuration of this name, None if it has none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    path = folder / name
    if not path.is_file():
        return None
    try:
        return dict(conform(Mapping[str, Any], parse(path.read_bytes())))
    except (SchemaError, OSError) as error:
        raise CheckpointError(f"{path} is no readable configuration: {error}.") from error
