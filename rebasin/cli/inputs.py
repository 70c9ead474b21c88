"""Opening what a command is given, and refusing what it can't use before any work starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from torch import Tensor

from ..adapters import is_adapter, is_controlnet
from ..checkpoints import Checkpoint, require_same_family
from ..checkpoints.checkpoint import open_each, require_fitting, unwrapped
from ..checkpoints.classes.folder import classes_in
from ..checkpoints.families import ADAPTER, foreign
from ..checkpoints.folders import load_config, load_weights
from ..checkpoints.further_inputs import with_further_inputs
from ..checkpoints.hub import came_from
from ..checkpoints.output import FILES, is_file
from ..checkpoints.pickled import load_tensors
from ..checkpoints.vocabulary import with_common_words, with_words_of
from ..errors import AdapterError, CheckpointError, ConfigError, shown
from ..spec import Alignment, Permutation
from ..spec.permutation import MAP, is_permutation
from ..tensors import load_safetensors
from ..types import DerivedState, State, is_finite, passed, place_of

Kind = Literal["permutation", "adapter", "controlnet", "model"]


def open_all(
    paths: Sequence[Path],
    only: Sequence[str] = (),
    variant: str | None = None,
    without: str = "",
    resize_vocabulary: bool = False,
    further_inputs: bool = False,
    common_words: bool = False,
) -> tuple[list[Checkpoint], tuple[str, ...]]:
    """The checkpoints of these paths, and the components that they share (see `common`), checked whole.

    Args:
        variant: of the diffusers folders that have it.
        without: a component that does not matter.
        resize_vocabulary: give each further model the first's number of words.
        common_words: of two models leave out the words that only one has.
        further_inputs: plain models may follow one with more inputs (see `checkpoints.further_inputs`).

    Raises:
        CheckpointError: one is missing, damaged, something else, of another family, or has other tensors than the
            first; names it.
    """
    found = open_each(paths, variant)
    if further_inputs:
        found = with_further_inputs(found)
    for other in found[1:]:
        whole = all("unet" in one.components for one in (found[0], other))
        if whole or not only or "unet" in only:  # of parts the tensors are compared
            require_same_family(found[0], other)
    components = tuple(name for name in common(found, only) if name != without)
    if resize_vocabulary:
        found = [found[0], *(with_words_of(found[0], other, components) for other in found[1:])]
    if common_words and len(found) == 2:
        found = list(with_common_words(found[0], found[1], components))
    for other in found[1:]:
        require_fitting(found[0], other, components)
    return found, components


def left_out(models: Sequence[Checkpoint]) -> list[str]:
    """A sentence about what of each model is not in the result: other states in its file, and, of each further one,
    what the first has no place for.
    """
    told = [
        f"Not read from {model.path.name}: the state {shown(model.others[0])} beside the one that is merged."
        for model in models
        if model.others
    ]
    for model in models[1:]:
        if not models[0].classes:  # of these each is told, see `unlike`
            lacking = [name for name in models[0].components if name not in model.components]
            told += [
                f"{model.path.name} has no {name}; in the result that is {models[0].path.name}'s."
                for name in lacking
            ]
        parts = [name for name in model.components if name not in models[0].components]
        for kind, names in model.extras.items():
            lost = [name for name in names if name not in models[0].raw]
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            parts += [f"{shown(lost[0])}{more} ({kind.replace('_', ' ')})"] if lost else []
        if parts:
            told.append(
                f"Left out of {model.path.name}, as {models[0].path.name} has none: {', '.join(parts)}."
            )
    return told


def parts(model: Checkpoint, components: Sequence[str]) -> dict[str, State]:
    """These components of a model."""
    return {name: model.component(name) for name in components}


def copies(
    models: Sequence[Checkpoint], components: Sequence[str], base: Checkpoint | None = None
) -> list[str]:
    """A sentence about each model that is a copy of an earlier one, or of the base (see `merging.inputs.copies`)."""
    from ..merging.inputs import copies  # late: quick commands need no merging

    whole = [joined(parts(model, components)) for model in (*models, *([base] if base else []))]
    return copies(whole[: len(models)], [m.path.name for m in models], whole[-1] if base else None)


def joined(states: Mapping[str, State]) -> State:
    """Components as one state; `component.` stands before each name."""
    return DerivedState(
        {f"{part}.{name}": passed(state, name) for part, state in states.items() for name in state}
    )


def numbers(state: State, name: str, where: object) -> Tensor:
    """A tensor in float32, to be computed with.

    Raises:
        CheckpointError: it has values that are none there; `where` is the file of a state that does not know its own.
    """
    tensor = state[name]
    if is_finite(tensor) and is_finite(wide := tensor.float()):
        return wide
    fault = "NaN or infinite values"
    if is_finite(tensor):
        fault = f"values as large as {float(tensor.abs().max()):.1g}, which float32 can't hold"
    raise CheckpointError(
        f"Tensor {place_of(state, name, str(where))} has {fault}, so nothing can be computed with it: the file is"
        " damaged or its training diverged."
    )


def kind_of_file(path: Path) -> Kind:
    """Permutation, adapter, ControlNet, or else: what `open_checkpoint` may know.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if path.is_dir():
        own = load_config(path) or {}
        return "controlnet" if own.get("_class_name") == "ControlNetModel" else "model"
    if not path.exists():
        raise CheckpointError(f"There is no file {path}.")
    state = load_tensors(path)
    if is_permutation(state, state.metadata):
        return "permutation"
    if is_controlnet(unwrapped(state, path)):
        return "controlnet"
    # The names may tell of an adapter that is not whole; then its own sentence says what it lacks.
    return "adapter" if is_adapter(state) or foreign(dict.fromkeys(state)) == ADAPTER else "model"


def load_member(path: Path) -> Alignment:
    """The permutation or alignment of a file; a permutation is an alignment without maps.

    Raises:
        CheckpointError: it is neither, or damaged.
    """
    if any(name.startswith(MAP) for name in load_safetensors(path)):
        return Alignment.load(path)
    return Alignment.of(Permutation.load(path))


def open_raw(path: Path, variant: str | None = None) -> State:
    """The tensors of an adapter or ControlNet under their own names, lazily; of a folder those of its weights.

    Raises:
        CheckpointError: it is missing or damaged, or has no such variant.
    """
    if variant is not None and not path.is_dir():
        raise CheckpointError(f"{path} is no diffusers folder, so it has no variants; leave out --variant.")
    return load_weights(path, variant) if path.is_dir() else load_tensors(path)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Sentences about an adapter's tensors begin with its file, unless they have its name."""
    try:
        yield
    except AdapterError as error:
        if path.name in str(error):
            raise
        raise AdapterError(f"{path.name}: {error}") from error


def common(checkpoints: Sequence[Checkpoint], only: Sequence[str]) -> tuple[str, ...]:
    """The components that all of them have, or those of `only`.

    Raises:
        CheckpointError: there is none, or one lacks a component of `only`.
    """
    for checkpoint in checkpoints:
        for name in only:
            checkpoint.require(name)
    first = [name for name in checkpoints[0].components if not only or name in only]
    shared = tuple(name for name in first if all(name in other.components for other in checkpoints))
    if not shared:
        told = " and ".join(f"{c.path.name} has {', '.join(c.components)}" for c in checkpoints[:2])
        raise CheckpointError(f"There is nothing to merge: {told}.")
    return shared


def aligned_name(file: Path) -> Path:
    """Where an aligned file goes by default: a file beside it, or for a folder of transformers or diffusers a folder;
    of what is from the Hub into the folder where the command was given.

    Raises:
        CheckpointError: a folder's configuration is damaged, or of an unknown class.
    """
    hub = came_from(file) is not None
    where = Path() if hub else file.parent
    if file.is_dir():
        whole = classes_in(file) is not None
        name = file.name if hub else file.resolve().name
        return where / f"{name}_aligned{'' if whole else '.safetensors'}"
    return where / f"{file.stem}_aligned.safetensors"


def require_place(path: Path, forms: Sequence[str]) -> None:
    """Refuse the name of a file of figures whose ending is none of these, or whose folder is not there.

    Raises:
        ConfigError: one sentence.
    """
    if path.suffix.lower() not in forms:
        raise ConfigError(f"{path} must end in {' or '.join(forms)}.")
    if not path.resolve().parent.is_dir():
        raise ConfigError(f"The folder {path.resolve().parent} does not exist; create it or write elsewhere.")


def check_output(
    output: Path,
    inputs: Sequence[Path],
    overwrite: bool,
    forms: Sequence[str] = FILES,
    resume: bool = False,
) -> None:
    """Refuse an output that can't be written or would destroy something, now and not after hours of work.

    Args:
        forms: what the name of a file may end in; without an ending it is that of a folder, if a model is written.
        resume: a folder may be there, which will be looked at (`stages.made_before`).

    Raises:
        ConfigError: it is an input, or exists, or its folder does not, or its name is none for what is written.
    """
    if output.suffix.lower() not in forms and (forms != FILES or is_file(output)):
        raise ConfigError(
            f"{output} would be a safetensors file, so its name must end in {' or '.join(forms)}."
        )
    folder = output.resolve().parent
    inside = (path for path in inputs if path.is_dir() and path.resolve() in (folder, *folder.parents))
    if within := next((path for path in inside if classes_in(path) is not None), None):
        raise ConfigError(
            f"{output} would be inside {within}, an input, which is never changed; write elsewhere."
        )
    if any(path.exists() and output.exists() and path.samefile(output) for path in inputs):
        raise ConfigError(f"{output} is one of the inputs, which are never changed; choose another name.")
    if not folder.is_dir():
        raise ConfigError(f"The folder {folder} does not exist; create it or write elsewhere.")
    if output.is_dir() and not resume:
        raise ConfigError(
            f"{output} is a folder that exists already, and folders are never replaced; remove it or choose another"
            " name."
        )
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists; add --overwrite to replace it, or choose another name.")
    try:
        probe = folder / f".{output.name}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{folder} can't be written to: {error.strerror or error}.") from error
