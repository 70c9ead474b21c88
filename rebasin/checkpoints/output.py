"""Writing a checkpoint out as a single file or a diffusers folder, whichever it came as."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, ConfigError
from ..files import PathLike, atomic_folder, atomic_path, write_text
from ..tensors import save_safetensors
from ..tensors.gguf_files import GGUFTensors
from ..tensors.quantised import EncodedState
from ..tensors.writer import convert, require_space, target_dtype
from ..types import (
    DerivedState,
    LazyTensor,
    Lost,
    Progress,
    State,
    dtype_of,
    is_finite,
    origin_of,
    passed,
    shape_of,
    tell,
)
from .architectures import PARTS_OF, component_config, published, unlike_release
from .belongings import Belongings, belongings, copy_into
from .classes.single_file import probed
from .components import TEXT, TEXT_2, UNET, VAE
from .folders import INDEX
from .key_map import component_state, sources
from .layouts import single_file
from .model_folder import save_as_folder, save_model_folder
from .pipeline import pipeline_class, pipeline_index, pipeline_options
from .schedulers import own_scheduler, released_scheduler
from .tokenizers import TOKENIZERS, clip_files, clip_merges, padding, vocabulary_of

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

Types = torch.dtype | Callable[[str, torch.dtype], torch.dtype] | None

FILES = (".safetensors", ".sft", ".ckpt", ".gguf")
"""What a single file may end in, in small or capital letters; a name without such an ending is that of a folder."""


@dataclass(frozen=True)
class Saved:
    """What was written, in bytes, and what could not be kept, a sentence each."""

    path: Path
    bytes: int
    notes: tuple[str, ...]


def save_checkpoint(
    path: PathLike,
    checkpoint: Checkpoint,
    state: State | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: Types = None,
    closing: Callable[[str | None], Mapping[str, str]] | None = None,
    lost: Lost | None = None,
    progress: Progress | None = None,
) -> Saved:
    """Write `state`, which has the names of `checkpoint`, under `path`, whose form decides the layout.

    Args:
        path: NAME.safetensors, NAME.sft or NAME.ckpt is one file: in the names that the checkpoint came with, or, if
            it came as a diffusers folder, in the original layout. A name without an ending is a new diffusers folder.
            A .ckpt is a plain dictionary of tensors and is put together in memory. NAME.gguf is for checkpoints that
            came as GGUF.
        state: `checkpoint.restore(...)`, a merge, or None for the checkpoint itself; may lack or add tensors.
        metadata: for the headers.
        dtype: as of `save_safetensors`; a function is asked with the names of `checkpoint`. None: as `checkpoint` has
            them, with codes and scales where it has such, if this is a single file as that is; else these in float16.
        closing: as of `save_safetensors`, asked with the component whose file is written in a folder, or with None.
        lost: is told what was to be written and what codes it has become, weight by weight.

    Raises:
        CheckpointError: one sentence; nothing was written.
    """
    target = Path(path)
    state = checkpoint.raw if state is None else state
    require_place(target, checkpoint, state, dtype)
    if target.exists() and checkpoint.path.exists() and target.samefile(checkpoint.path):
        raise CheckpointError(f"{target} is an input; choose another name for the result.")
    if isinstance(checkpoint.quantised, GGUFTensors) and is_gguf(target):
        checkpoint.quantised.save(target, state, metadata or {}, dtype, progress, lost)
        return Saved(target, target.stat().st_size, ())
    whole = as_written(target, checkpoint, state, dtype, lost)
    notes: list[str] = []
    told: Mapping[str, str] = {}
    if checkpoint.quantised is not None and isinstance(whole, EncodedState):
        told = checkpoint.quantised.metadata
    elif checkpoint.quantised is not None and dtype is None:
        notes.append(_as_numbers(checkpoint))
    header = {"format": "pt", **(metadata or {}), **told}

    def save(path: Path, state: State, part: str | None = None) -> Path:
        last = None if closing is None else partial(_closed, closing, part, told)
        return save_safetensors(
            path, state, header, keep_order=True, finite=True, closing=last, progress=progress
        )

    def save_plain(path: Path, state: State) -> Path:
        return save_safetensors(path, state, header, keep_order=True, finite=True, progress=progress)

    if checkpoint.classes and not is_file(target):
        require_space(target, bytes_of(whole))
        if checkpoint.path.is_dir():
            notes += save_model_folder(target, checkpoint, whole, save_plain, closing)
        else:
            notes += _without_place(checkpoint, state, "a diffusers folder")
            save_as_folder(target, checkpoint, parts(checkpoint, whole), save)
        return Saved(target, size_of_folder(target), tuple(notes))
    if not is_file(target):
        return _save_folder(target, checkpoint, whole, save, notes)
    if checkpoint.path.is_dir():
        notes += _without_place(checkpoint, state, "a single file")
        whole = _one_file(checkpoint, whole)
        if checkpoint.classes and not probed(whole):
            notes.append(
                f"{target.name} does not tell of which class it is, so no command reads it; name a folder for a result"
                " to go on with."
            )
    if target.suffix.lower() == ".ckpt":
        _save_pickle(target, whole, progress)
    else:
        save(target, whole)
    return Saved(target, target.stat().st_size, tuple(notes))


def _closed(
    closing: Callable[[str | None], Mapping[str, str]], part: str | None, told: Mapping[str, str]
) -> dict[str, str]:
    return {"format": "pt", **closing(part), **told}


def _as_numbers(checkpoint: Checkpoint) -> str:
    return (
        f"What {checkpoint.path.name} has as codes and scales is written as float16, as a result of this form holds"
        " numbers."
    )


def is_file(target: Path) -> bool:
    """Whether this is the name of a single file, not of a folder.

    Raises:
        ConfigError: it has another ending, by mistake or for a format that is not written.
    """
    if target.suffix.lower() in FILES:
        return True
    if re.match(r"\.[A-Za-z]", target.suffix):  # no ending are the digits of model-v1.5
        raise ConfigError(
            f"{target} ends in {target.suffix!r}, but a model is written as NAME{', NAME'.join(FILES)}, or as a folder,"
            " whose name has no such ending."
        )
    return False


def is_gguf(target: Path) -> bool:
    """Whether this is the name of a GGUF file."""
    return target.suffix.lower() == ".gguf"


def require_place(target: Path, checkpoint: Checkpoint, state: State, dtype: Types = None) -> None:
    """Raise a `RebasinError` if a state with the names of `checkpoint` can't be written as this; nothing is read."""
    if is_gguf(target):
        if not isinstance(checkpoint.quantised, GGUFTensors):
            raise ConfigError(
                f"{target} would be a GGUF file, whose types and entries come from the model that is written, but"
                f" {checkpoint.path} is none; name a .safetensors file for the result."
            )
        checkpoint.quantised.require_writable(target, dtype)
    if is_file(target) and checkpoint.path.is_dir():
        _one_file(checkpoint, state)


def stored(checkpoint: Checkpoint) -> Types:
    """The types of a checkpoint's tensors as numbers: its own, and half precision for what it has as codes."""
    if checkpoint.quantised is None:
        return None
    codes = checkpoint.quantised.codes
    return lambda name, own: torch.float16 if name in codes else own


def as_written(
    target: Path, checkpoint: Checkpoint, state: State, dtype: Types, lost: Lost | None = None
) -> State:
    """`state`, which has the names of `checkpoint`, in the types in which `target` is to have it; see
    `save_checkpoint`. What has codes and scales is an `EncodedState`.
    """
    quantised = checkpoint.quantised
    if dtype is not None or quantised is None:
        return cast(state, dtype, target)
    if isinstance(quantised, GGUFTensors):
        return cast(state, stored(checkpoint), target)
    pickled = is_file(target) and target.suffix.lower() == ".ckpt"
    if checkpoint.path.is_dir() or not is_file(target) or (pickled and quantised.metadata):
        return cast(state, stored(checkpoint), target)
    return quantised.encoded(state, target, lost)


def parts(checkpoint: Checkpoint, state: State) -> dict[str, State]:
    """Component -> its tensors in diffusers' names, out of a state that has the names of `checkpoint`."""
    keys = {
        name: [k for k in checkpoint.key_map[name] if all(p.source in state for p in k.pieces)]
        for name in checkpoint.components
    }
    return {name: component_state(state, own) for name, own in keys.items()}


def _one_file(checkpoint: Checkpoint, state: State) -> State:
    """A folder's components as one file in the original layout.

    Raises:
        CheckpointError: they are built unlike those of the release, which a single file can't tell.
    """
    if checkpoint.classes:
        if len(checkpoint.classes) > 1:
            raise CheckpointError(
                f"{checkpoint.path} is a {checkpoint.title} of several models, which no single file holds; name a"
                " folder for the result."
            )
        return state
    own = parts(checkpoint, state)
    for name in own:
        if differs := unlike_release(checkpoint, name):
            raise CheckpointError(
                f"The {name} of {checkpoint.path} has {differs}, which no single file tells; name a folder for the"
                " result."
            )
    if checkpoint.family in PARTS_OF:
        return DerivedState({name: passed(s, name) for s in own.values() for name in s})
    return single_file(checkpoint.family, own)


def _without_place(checkpoint: Checkpoint, state: State, where: str) -> list[str]:
    """The sentence about tensors that belong to no component, if there are any."""
    known = sources(checkpoint.key_map)
    left = sum(name not in known for name in state)
    return [f"{left} tensors that belong to no component have no place in {where}."] if left else []


def cast(state: State, dtype: Types, where: object) -> State:
    """`state` in other types, tensor by tensor when they are asked for; a value that does not fit is an error."""
    if dtype is None:
        return state

    def lazy(name: str) -> LazyTensor:
        stored = target_dtype(name, dtype_of(state, name), dtype)
        origin = origin_of(state, name)
        return LazyTensor(
            shape_of(state, name), stored, lambda: convert(state[name], stored, name, where), origin
        )

    return DerivedState({name: lazy(name) for name in state})


def _save_pickle(target: Path, state: State, progress: Progress | None) -> None:
    """A .ckpt as the original code wrote it: {"state_dict": tensors}."""
    require_space(target, bytes_of(state))
    tensors = {}
    for step, name in enumerate(getattr(state, "together", state), 1):
        tensors[name] = state[name].detach().cpu().contiguous()
        if not is_finite(tensors[name]):
            raise CheckpointError(
                f"Tensor {origin_of(state, name) or repr(name)} has values that are infinite or no numbers, so"
                f" {target} was not written."
            )
        tell(progress, "save", step, len(state), name=name)
    with atomic_path(target) as temporary:
        try:
            torch.save({"state_dict": {name: tensors[name] for name in state}}, temporary)
        except RuntimeError as error:  # torch's writer hides the system's error
            raise CheckpointError(
                f"{target} can't be written: {str(error).splitlines()[0][:100]}."
            ) from error


def size_in(target: Path, checkpoint: Checkpoint, state: State, dtype: Types) -> int:
    """Bytes of the tensors of `state` in `target`; none is read."""
    if isinstance(checkpoint.quantised, GGUFTensors) and is_gguf(target):
        return checkpoint.quantised.size(state, dtype)
    return bytes_of(as_written(target, checkpoint, state, dtype))


def bytes_of(state: State) -> int:
    """Bytes of all tensors; none is read."""
    return sum(torch.Size(shape_of(state, name)).numel() * dtype_of(state, name).itemsize for name in state)


WEIGHTS = {UNET: "diffusion_pytorch_model", VAE: "diffusion_pytorch_model", TEXT: "model", TEXT_2: "model"}

CLASSES = {
    UNET: ("diffusers", "UNet2DConditionModel"),
    VAE: ("diffusers", "AutoencoderKL"),
    TEXT: ("transformers", "CLIPTextModel"),
    TEXT_2: ("transformers", "CLIPTextModelWithProjection"),
}


def _save_folder(
    target: Path, checkpoint: Checkpoint, state: State, save: Callable[..., Path], notes: list[str]
) -> Saved:
    require_space(target, bytes_of(state))
    own = parts(checkpoint, state)
    notes += _without_place(checkpoint, state, "a diffusers folder")
    # Looked for before anything is written, as the result may lie in the folder.
    beside = belongings(checkpoint.path) if checkpoint.path.is_dir() else Belongings({})
    notes += beside.notes
    alone = (checkpoint.path / "config.json").is_file()  # the folder of one component
    with atomic_folder(target) as temporary:
        for name, part in own.items():
            folder = temporary if alone else temporary / name
            folder.mkdir(exist_ok=True)
            config = component_config(checkpoint, name)
            config.pop("quantization_config", None)  # numbers are written, not codes
            write_json(folder / "config.json", config)
            save(folder / f"{WEIGHTS[name]}.safetensors", part, name)
        if not alone:
            _save_index(temporary, checkpoint, own, beside, notes)
        copy_into(temporary, beside)
    return Saved(target, size_of_folder(target), tuple(notes))


def size_of_folder(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _save_index(
    folder: Path, checkpoint: Checkpoint, own: Iterable[str], beside: Belongings, notes: list[str]
) -> None:
    """model_index.json, the scheduler and the tokenizers: those of a folder, or those of the release."""
    if checkpoint.family in PARTS_OF:
        return
    family, found = checkpoint.family, checkpoint.prediction
    scheduler = own_scheduler(checkpoint) or released_scheduler(family, found.kind, found.zero_snr)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index: dict[str, Any] = {"_class_name": pipeline_class(checkpoint) or published(family)["pipeline"]}
    index["_diffusers_version"] = version(
        "diffusers"
    )  # which it asks for when it loads an inpainting pipeline
    for key, value in pipeline_options(checkpoint).items():
        if key != "add_watermarker":
            index[key] = [None, None] if value is None else value
    index |= {name: list(CLASSES[name]) for name in own} | _classes(checkpoint, beside)
    if index.get("safety_checker", [None])[0] is not None:
        index["requires_safety_checker"] = True
    index["scheduler"] = ["diffusers", scheduler.get("_class_name")]
    for name, tokenizer in TOKENIZERS.items():
        if name in index and _save_tokenizer(folder / tokenizer, checkpoint, name):
            index[tokenizer] = _tokenizer_class(checkpoint, tokenizer)
        elif name in index:
            index[tokenizer] = [None, None]
            notes.append(
                f"The folder has no {tokenizer}, as its {name} does not read CLIP's tokens and no tokenizer came with"
                " it; add its own to load it as a pipeline."
            )
    write_json(folder / INDEX, index)


def _classes(checkpoint: Checkpoint, beside: Belongings) -> dict[str, list[str]]:
    """The parts of a pipeline whose folders are copied as they are, and their classes."""
    copied = {place.partition("/")[0] for place in beside.files if "/" in place}
    known = {"scheduler", *CLASSES, *TOKENIZERS.values()}
    renamed = {"CLIPFeatureExtractor": "CLIPImageProcessor"}  # the libraries have dropped the old name
    return {
        name: [renamed.get(str(one), str(one)) for one in told]
        for name, told in pipeline_index(checkpoint).items()
        if name in copied - known and isinstance(told, list) and len(told) == 2 and None not in told
    }


def _tokenizer_class(checkpoint: Checkpoint, tokenizer: str) -> list[str]:
    told = pipeline_index(checkpoint).get(tokenizer)
    return (
        told if isinstance(told, list) and told[:1] == ["transformers"] else ["transformers", "CLIPTokenizer"]
    )


def _save_tokenizer(target: Path, checkpoint: Checkpoint, component: str) -> bool:
    """The tokenizer of the checkpoint's folder, else CLIP's if the encoder has as many tokens; False if neither is."""
    source = checkpoint.path / target.name
    if source.is_dir():
        target.mkdir()
        for file in source.iterdir():
            if file.is_file() and file.suffix in (".json", ".txt", ".model"):
                shutil.copyfile(file, target / file.name)
        return True
    if component_config(checkpoint, component).get("vocab_size") != len(vocabulary_of(clip_merges())):
        return False
    target.mkdir()
    for name, text in clip_files(padding(component, checkpoint.family)).items():
        write_text(target / name, text)
    return True


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a config as diffusers does."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
