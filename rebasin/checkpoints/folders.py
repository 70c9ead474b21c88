"""Diffusers folders: which files in them are the weights, variants and shards included.

File names are looked up in the folder; names that stand in an index or a config are never opened, but those of an
index are compared with what is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shown
from ..files import SchemaError, conform, parse
from ..tensors import JoinedState
from ..types import DerivedState, State, passed
from .components import TEXT, TEXT_2, UNET, VAE
from .pickled import load_tensors

PARTS = (UNET, VAE, TEXT, TEXT_2)

INDEX = "model_index.json"
"""What a pipeline's folder says of its parts."""

ADAPTER_CONFIG = "adapter_config.json"
"""What PEFT has in an adapter's folder."""

WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?"
    r"(?:-(?P<shard>\d{5})-of-(?P<shards>\d{5}))?(?:\.(?P<late>[\w-]+))?\.(?P<suffix>safetensors|bin)"
)


SHARD_INDEX = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?"
    r"\.(?P<suffix>safetensors|bin)\.index(?:\.(?P<late>[\w-]+))?\.json"
)

CHOOSE = "choose with --variant, in a run with model.variant"


def load_folder(folder: Path, variant: str | None = None) -> State:
    """The tensors of a diffusers folder, lazily, named `component/tensor`; of a component's own folder, `tensor`.

    Raises:
        CheckpointError: the folder has no weights, an incomplete set of shards, or no such variant.
    """
    parts = [name for name in PARTS if (folder / name).is_dir()]
    if not parts:
        if (folder / ADAPTER_CONFIG).is_file():
            raise CheckpointError(
                f"{folder} is a LoRA or another adapter of PEFT, and no model: merge it into its model (PEFT:"
                " merge_and_unload) and give that; of one for Stable Diffusion rebasin apply moves the file in it,"
                " adapter_model.safetensors."
            )
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder} is no diffusers folder: it has neither a config.json nor one of {', '.join(PARTS)}."
            )
        return load_weights(folder, variant)
    return load_parts(folder, parts, variant)


def load_parts(folder: Path, parts: Iterable[str], variant: str | None = None) -> State:
    """The tensors of these components' folders, lazily, named `component/tensor`.

    Raises:
        CheckpointError: one has no weights, an incomplete set of shards, or no such variant.
    """
    parts = list(parts)
    # One that lacks the variant, as VAEs often do, is taken as it is, unless all lack it.
    has = [name for name in parts if variant in variants(folder / name)] or parts
    states = {name: load_weights(folder / name, variant if name in has else None) for name in parts}
    return DerivedState({f"{part}/{n}": passed(s, n) for part, s in states.items() for n in s})


def load_weights(folder: Path, variant: str | None = None) -> State:
    """The tensors of one component's folder, lazily; safetensors are preferred to pickles.

    `variant` is the word in file names such as model.fp16.safetensors; None: the file without one, or the only one.
    """
    sets, shards = _sets(folder)
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
    state = states[0] if len(states) == 1 else JoinedState(states)
    if count:
        shard_of = {files[n].name: own for n, own in zip(sorted(files), states, strict=True)}
        _check_index(folder, suffix, chosen, shard_of)
    return state


def shards(folder: Path, variant: str | None = None) -> dict[str, list[str]]:
    """File -> its tensors, as `load_weights` reads them, under the names that safetensors without a variant have."""
    sets, _ = _sets(folder)
    files = sets[_choose(folder, list(sets), variant)]
    return {_plain(files[n].name): list(load_tensors(files[n])) for n in sorted(files)}


def _plain(name: str) -> str:
    """The name of a file of weights as safetensors, without a variant."""
    found = WEIGHTS.fullmatch(name)
    assert found is not None
    stem = "model" if found["stem"] == "pytorch_model" else found["stem"]
    part = f"-{found['shard']}-of-{found['shards']}" if found["shard"] else ""
    return f"{stem}{part}.safetensors"


def index_of(name: str) -> str:
    """The name of the index of the shards of which one is called so."""
    return re.sub(r"-\d{5}-of-\d{5}\.safetensors$", ".safetensors.index.json", name)


Key = tuple[str, str]
"""Suffix and variant of weights."""


def _sets(folder: Path) -> tuple[dict[Key, dict[int, Path]], dict[Key, int]]:
    """The files of each set of weights by their number, 0 for one that is whole, and how many there should be."""
    sets: dict[Key, dict[int, Path]] = {}
    shards: dict[Key, int] = {}
    for path in sorted(folder.iterdir()):
        if found := WEIGHTS.fullmatch(path.name):
            key = (found["suffix"], found["variant"] or found["late"] or "")
            sets.setdefault(key, {})[int(found["shard"] or 0)] = path
            shards[key] = int(found["shards"] or 0)
    return sets, shards


def is_weights(name: str) -> bool:
    """Whether a file of this name is, or belongs to, weights of a component, in any form."""
    return bool(WEIGHTS.fullmatch(name) or SHARD_INDEX.fullmatch(name)) or name.endswith(
        (".msgpack", ".onnx")
    )


def weights_set(name: str) -> tuple[str, str] | None:
    """Suffix and variant of the weights that a file of this name belongs to, an index of shards too; None: to none."""
    found = WEIGHTS.fullmatch(name) or SHARD_INDEX.fullmatch(name)
    return (found["suffix"], found["variant"] or found["late"] or "") if found else None


def _check_index(folder: Path, suffix: str, variant: str, shards: Mapping[str, State]) -> None:
    """Compare the index of these shards (file -> tensors), if there is one, with what they are.

    Raises:
        CheckpointError: it is damaged, or names a file or a tensor that is not there.
    """
    for path in sorted(folder.iterdir()):
        found = SHARD_INDEX.fullmatch(path.name)
        if found is None or (found["suffix"], found["variant"] or found["late"] or "") != (suffix, variant):
            continue
        told = load_config(folder, path.name) or {}
        try:
            places = conform(Mapping[str, str], told.get("weight_map"))
        except SchemaError as error:
            raise CheckpointError(
                f"{path} is no index of shards: its weight_map is damaged ({error}); get it again."
            ) from error
        if lost := next((file for file in places.values() if file not in shards), None):
            raise CheckpointError(
                f"{folder} is incomplete: {path.name} names the shard {shown(lost)}, which is not there."
            )
        for name, file in places.items():
            if name in shards[file]:
                continue
            if other := next((one for one, state in shards.items() if name in state), None):
                raise CheckpointError(
                    f"{path} says that the tensor {shown(name)} is in {file}, but it is in {other}; get the folder"
                    " again."
                )
            raise CheckpointError(
                f"{folder} is incomplete: {path.name} names the tensor {shown(name)}, which is in none of its shards."
            )


def taken(folder: Path, variant: str | None = None) -> str | None:
    """A sentence about which weights of a diffusers folder are taken, where it has several and none was asked for."""
    parts = [folder / name for name in PARTS if (folder / name).is_dir()] or [folder]
    told: dict[str, list[str]] = {}
    for part in parts if variant is None else ():
        sets, _ = _sets(part)
        if len({one for _, one in sets}) > 1:
            others = sorted({one for _, one in sets if one})
            told.setdefault(", ".join(others), []).append(part.name)
    if not told:
        return None
    which = "; ".join(f"{', '.join(parts)}: not {others}" for others, parts in told.items())
    return f"Of several variants in {folder.name} the one without a name is taken ({which}); {CHOOSE}."


def variants(folder: Path) -> set[str]:
    """The words in the file names of a folder's weights, and of its components', such as "fp16"."""
    found = (WEIGHTS.fullmatch(path.name) for path in folder.glob("**/*.*"))
    return {one["variant"] or one["late"] for one in found if one and (one["variant"] or one["late"])}


def _choose(folder: Path, keys: list[Key], variant: str | None) -> Key:
    names = sorted({v for _, v in keys if v})
    wanted = variant
    if variant is None:
        wanted = names[0] if len(names) == 1 and all(v for _, v in keys) else ""
    fits = [k for k in keys if k[1] == wanted]
    if fits:
        return next((k for k in fits if k[0] == "safetensors"), fits[0])
    if variant is None:
        raise CheckpointError(f"{folder} has the variants {', '.join(names)}; {CHOOSE}.")
    raise CheckpointError(
        f"{folder} has no variant {variant!r}; it has {', '.join(names) or 'only the one without a name'}."
    )


def own_config(where: Path, component: str) -> dict[str, Any] | None:
    """The config of a component in a diffusers folder, which may be that of a pipeline or the component's own; None if
    it has none, or is a file.

    Raises:
        CheckpointError: it is no JSON object.
    """
    return load_config(config_file(where, component).parent) if where.is_dir() else None


def config_file(where: Path, component: str, name: str = "config.json") -> Path:
    """Where the config of a component is or would be: in the folder of a pipeline, or of the component itself."""
    pipeline = any((where / part).is_dir() for part in PARTS)
    return (where / component if pipeline else where) / name


def load_config(folder: Path, name: str = "config.json") -> dict[str, Any] | None:
    """A folder's configuration of this name, None if it has none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    path = folder / name
    if not path.exists() and not path.is_symlink():
        return None
    try:
        # Older configurations have constants that are no JSON (Mamba's largest step of time: Infinity).
        return dict(conform(Mapping[str, Any], parse(path.read_bytes(), nan=True)))
    except (SchemaError, OSError) as error:
        fault = (error.strerror or error) if isinstance(error, OSError) else error
        raise CheckpointError(f"{path} is no readable configuration: {fault}; get it again.") from error
