"""A Stable Diffusion checkpoint as people have it, whatever its layout: opened, understood, and put together again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from ..errors import CheckpointError, shown
from ..files import PathLike
from ..spec.permutation import is_permutation
from ..tensors.gguf_files import GGUFState, GGUFTensors
from ..tensors.quantised import Quantised, decoded
from ..types import WRAPPER, DerivedState, LazyTensor, State, dtype_of, passed
from . import components, folders
from .classes.folder import STRUCTURE, TRANSFORMER, classes_in, differences
from .classes.known import Known
from .classes.names import names_in_files
from .classes.single_file import Single, beside, single
from .components import UNET, Found
from .families import EXPECTED, NO_MODEL, TITLES, Shapes, foreign, identify, no_model, title
from .folder_checks import require_sound
from .key_map import KeyMapping, component_state, replaced, same, shapes_of, sources
from .pickled import load_tensors
from .prediction_type import Prediction, prediction
from .vocabulary import vocabulary_sentence


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A file or folder whose components are known; nothing of its tensors is in memory.

    Attributes:
        path: the file or folder.
        family: "sd1", "sd2", "sdxl", "sdxl_refiner", or of parts alone "vae", "clip_l", "clip_h", "clip_g".
        variant: "base", "inpainting", "instruct-pix2pix" or "depth"; "" for parts without a UNet.
        layout: "ldm" (the original one, of single files), "diffusers", or "folder" (of models known by their classes).
        raw: its tensors under their own names, in their own order and types, lazily.
        metadata: of the file's header.
        found: component -> where it lies.
        key_map: component -> how its tensors lie in the file.
        classes: component -> its class, of a folder of transformers or diffusers that is none of Stable Diffusion, and
            of files of newer families; `family` is then the class of the model or pipeline.
        file_variant: the word in the names of the files of weights that was asked for ("fp16").
        others: names of further states in the same file, which are not read.
        quantised: how the file has those of `raw` as codes that it does not have as numbers; None without.
    """

    path: Path
    family: str
    variant: str
    layout: str
    raw: State
    metadata: Mapping[str, str]
    found: Mapping[str, Found] = field(repr=False)
    key_map: Mapping[str, Sequence[KeyMapping]] = field(repr=False)
    others: tuple[str, ...] = ()
    classes: Mapping[str, Known] = field(default_factory=dict, repr=False)
    file_variant: str | None = None
    quantised: Quantised | GGUFTensors | None = field(default=None, repr=False)

    @property
    def components(self) -> tuple[str, ...]:
        """The names of its components: of "unet", "vae", "text_encoder", "text_encoder_2" those that it has."""
        return tuple(self.found)

    @property
    def title(self) -> str:
        """What it is, for a sentence."""
        if self.classes:
            return next(iter(self.classes.values())).title if len(self.classes) == 1 else self.family
        return title(self.family, self.variant)

    def component(self, name: str) -> DerivedState:
        """A component in diffusers' (or transformers') names, lazily.

        Raises:
            CheckpointError: the checkpoint has no such component; names those that it has.
        """
        self.require(name)
        return component_state(self.raw, self.key_map[name])

    def restore(self, states: Mapping[str, State], keep_dtype: bool = True) -> DerivedState:
        """The whole checkpoint under its own names, in its own order, with these components replaced.

        Everything else is passed through. Types are those of the file, or with `keep_dtype=False` those of the
        new tensors (a merge in fp32 of a file in fp16 that is saved in fp32 is then not rounded in between).
        """
        for name in states:
            self.require(name)
        return replaced(self.raw, self.key_map, states, keep_dtype)

    def with_tensors(self, component: str, tensors: Mapping[str, LazyTensor]) -> Checkpoint:
        """The checkpoint with other tensors, maybe of other shapes, in the place of some of a component's, which are
        each a whole tensor of the file.
        """
        keys = [
            same(key.name, key.source, tensors[key.name].shape) if key.name in tensors else key
            for key in self.key_map[component]
        ]
        own = {key.source: tensors[key.name] for key in self.key_map[component] if key.name in tensors}
        raw = DerivedState({name: own.get(name) or passed(self.raw, name) for name in self.raw})
        return replace(self, raw=raw, key_map={**self.key_map, component: keys})

    def require(self, name: str) -> None:
        """Raise `CheckpointError` if there is no component of this name."""
        if name not in self.found:
            raise CheckpointError(f"{self.path} has no {name}; it has {', '.join(self.components)}.")

    def stored_as(self, component: str, name: str) -> str:
        """The type of a component's tensor in the file, in a word: "float16", "nvfp4", "Q8_0", ..."""
        source, quantised = self.source(component, name), self.quantised
        if quantised is not None and source in quantised.codes:
            return quantised.kind(source)
        return str(dtype_of(self.raw, source)).removeprefix("torch.")

    def source(self, component: str, name: str) -> str:
        """The file's own name of a component's tensor, for messages."""
        return next((key.source for key in self.key_map[component] if key.name == name), name)

    @cached_property
    def extras(self) -> dict[str, list[str]]:
        """The tensors that belong to no component, by kind: "ema", "position_ids", "schedule", "unused", "other"."""
        known = sources(self.key_map)
        kinds: dict[str, list[str]] = {}
        for name in self.raw:
            if name not in known:
                kinds.setdefault(_extra(name, self.found), []).append(name)
        return kinds

    @cached_property
    def prediction(self) -> Prediction:
        """What the UNet predicts, as far as the file tells, and how that is known."""
        return prediction(self.path, self.family, self.raw, self.metadata)

    @property
    def strange(self) -> list[str]:
        """Tensors of the UNet that no rule knows, which may change what it computes."""
        prefix = self.found[UNET].prefix if UNET in self.found else "/"
        found = (*self.extras.get("unused", ()), *self.extras.get("other", ()))
        return [name for name in found if name.startswith(prefix) and name.rpartition(".")[0] not in MARKED]

    def shapes(self, component: str) -> Shapes:
        """Name in diffusers -> shape."""
        return shapes_of(component_state(self.raw, self.key_map[component]))


SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
    "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    "lvlb_weights", "logvar", "denoiser.sigmas",
)  # fmt: skip


def _extra(name: str, found: Mapping[str, Found]) -> str:
    if name.startswith("model_ema."):
        return "ema"
    if name.endswith("position_ids"):
        return "position_ids"
    if name in SCHEDULE:
        return "schedule"
    return "unused" if any(f.prefix and name.startswith(f.prefix) for f in found.values()) else "other"


def open_checkpoint(path: PathLike, variant: str | None = None) -> Checkpoint:
    """Open a checkpoint: .safetensors, .ckpt, or a diffusers folder; what it is is told by its tensors alone.

    Args:
        variant: of a diffusers folder with several, for example "fp16".

    Raises:
        CheckpointError: the file is missing or damaged, or is something else; one sentence says what it is and
            what was expected.
    """
    where = Path(path)
    if where.is_dir() and (found := classes_in(where)) is not None:
        return _open_folder(where, *found, variant)
    return _understood(where, folders.load_folder(where, variant) if where.is_dir() else load_tensors(where))


def checkpoint_of(state: State, name: str) -> Checkpoint:
    """What a state in memory is, in the names of a single file: a whole checkpoint, or one component.

    Args:
        name: what sentences call it.

    Raises:
        CheckpointError: it is nothing that is known.
    """
    return _understood(Path(name), state)


def _understood(where: Path, raw: State) -> Checkpoint:
    metadata, others = dict(getattr(raw, "metadata", {})), getattr(raw, "others", ())
    file, whole = raw, decoded(unwrapped(raw, where), where, metadata)
    names = dict.fromkeys(whole)
    if not where.is_dir() and foreign(names) not in NO_MODEL and (own := single(whole, where)) is not None:
        quantised = _in_codes(file, whole, whole)
        return _of_today(where, whole, metadata, own, others, quantised)
    raw = whole if where.is_dir() else without_prefix(whole)
    quantised = _in_codes(file, whole, raw)
    names = dict.fromkeys(raw)
    other = "a permutation that rebasin wrote" if is_permutation(raw, metadata) else foreign(names)
    found = components.locate(names)
    if not found or other is not None:
        raise no_model(where, other)
    try:
        key_map = {name: components.key_map(place, raw) for name, place in found.items()}
        shapes = {name: shapes_of(component_state(raw, own)) for name, own in key_map.items()}
        family, kind = identify(shapes, found, where, folders.own_config(where, UNET))
    except IndexError as error:
        raise CheckpointError(
            f"{where} has tensors of shapes that no known model has; {EXPECTED}."
        ) from error
    if where.is_dir():
        require_sound(where, family, shapes)
        prediction(where, family, raw, metadata)
    diffusers = any(place.layout == "diffusers" or "/" in place.prefix for place in found.values())
    layout = "diffusers" if diffusers or where.is_dir() else "ldm"
    return Checkpoint(where, family, kind, layout, raw, metadata, found, key_map, others, quantised=quantised)


Codes = Quantised | GGUFTensors
"""How a file has tensors as codes."""


def _in_codes(file: State, whole: State, raw: State) -> Codes | None:
    """How `file` has as codes what `whole` has as numbers, by the names of `raw`, which are shorter or the same."""
    if isinstance(file, GGUFState):
        return GGUFTensors(file, dict(zip(raw, file, strict=True)), {})
    quantised = getattr(whole, "quantised", None)
    if quantised is not None and raw is not whole:
        return quantised.without(next(iter(whole)).removesuffix(next(iter(raw))))
    return quantised


def _of_today(
    where: Path,
    raw: State,
    metadata: Mapping[str, str],
    own: Single,
    others: tuple[str, ...],
    quantised: Codes | None,
) -> Checkpoint:
    """A single file of one of today's families."""
    found = {TRANSFORMER: Found(TRANSFORMER, own.prefix, "ldm")}
    keys, classes = {TRANSFORMER: own.keys}, {TRANSFORMER: own.known}
    return Checkpoint(
        where, own.family.kind, "", own.layout, raw, metadata, found, keys, others, classes, None, quantised
    )


def _open_folder(where: Path, family: str, classes: Mapping[str, Known], variant: str | None) -> Checkpoint:
    """A folder of transformers or diffusers whose models are of these classes."""
    if not classes:
        raise CheckpointError(
            f"{where} has no model: no folder in it has a config.json and weights of a known class."
        )
    whole = not (where / folders.INDEX).is_file()
    raw = folders.load_weights(where, variant) if whole else folders.load_parts(where, classes, variant)
    raw = decoded(unwrapped(raw, where), where, {})
    found, key_map = {}, {}
    for name, known in classes.items():
        found[name] = Found(name, "" if whole else f"{name}/", "folder")
        key_map[name] = names_in_files(known, raw, found[name].prefix, name, where)
    return Checkpoint(
        where, family, "", "folder", raw, {}, found, key_map, (), classes, variant, _in_codes(raw, raw, raw)
    )


def open_each(
    paths: Sequence[Path], variant: str | None = None, option: str = "--variant"
) -> list[Checkpoint]:
    """The checkpoints of these paths, of diffusers folders the variant, if they have it; `option` asked for it.

    Raises:
        CheckpointError: one is missing, damaged or something else, or none has the variant.
    """
    has = {path: path.is_dir() and variant in folders.variants(path) for path in paths}
    if variant is not None and not any(has.values()):
        raise CheckpointError(
            f"None of the inputs is a diffusers folder with the variant {shown(variant)} ({option})."
        )
    return [open_checkpoint(path, variant if has[path] else None) for path in paths]


def several_variants(models: Sequence[Checkpoint], variant: str | None) -> list[str]:
    """A sentence about each diffusers folder that has weights in several variants, of which one was taken unasked."""
    where = [model.path for model in models if model.path.is_dir()]
    told = [folders.taken(path, variant if variant in folders.variants(path) else None) for path in where]
    return [sentence for sentence in told if sentence]


MARKED = ("", "edm_vpred")
"""Where loaders look for marks of what a model predicts."""


def unwrapped(state: State, where: object) -> State:
    """`state` without what torch.compile, DataParallel and their like put into its names.

    Raises:
        CheckpointError: the file, `where`, has a tensor with and without that.
    """
    names: dict[str, str] = {}
    for name in state:
        own = WRAPPER.sub("", name)
        if (other := names.setdefault(own, name)) != name:
            raise CheckpointError(
                f"{where} has both {shown(other)} and {shown(name)}, so it holds two models in one; save the one that"
                " is meant alone."
            )
    if all(own == name for own, name in names.items()):
        return state
    return DerivedState({own: passed(state, name) for own, name in names.items()})


def without_prefix(state: State) -> State:
    """`state` without words that stand before all of its names ("net.", "model."), if a model is known by the rest.

    The words of something else (a ControlNet's "control_model.") stay.
    """
    found = state
    for _ in range(3):
        if foreign(dict.fromkeys(found)):
            return state
        first, dot, _ = next(iter(found), "").partition(".")
        prefix = first + dot
        if components.locate(dict.fromkeys(found)):
            return found
        if not dot or not all(name.startswith(prefix) for name in found):
            return state
        found = DerivedState({name.removeprefix(prefix): passed(found, name) for name in found})
    return found if components.locate(dict.fromkeys(found)) else state


def require_same_family(a: Checkpoint, b: Checkpoint) -> None:
    """Raise `CheckpointError`, in one sentence, unless two checkpoints can be aligned and merged."""
    if a.classes or b.classes:
        shared = [name for name in a.classes if name in b.classes]
        if not shared or any(a.classes[name].name != b.classes[name].name for name in shared):
            raise _apart(a, b, "they have different architectures")
        return _require_alike(a, b)
    if a.family == b.family and a.variant == b.variant:
        return
    if (UNET in a.components) != (UNET in b.components):
        raise _parts_alone(*((a, b) if UNET in a.components else (b, a)))
    if a.family in TITLES and b.family in TITLES and a.family != b.family:
        reason = "they have different architectures and can't be merged"
    elif a.family == b.family and "base" in (a.variant, b.variant):
        reason = (
            "their UNets have different inputs, so only what the plain one has learnt since a plain base can be added"
            " to the other: rebasin merge with --method add_difference and --base, the one with more inputs first"
        )
    else:
        reason = "their UNets have different inputs and can't be merged"
    raise _apart(a, b, reason)


def _apart(a: Checkpoint, b: Checkpoint, reason: str) -> CheckpointError:
    return CheckpointError(f"{a.path} is {a.title} and {b.path} is {b.title}; {reason}.")


def _require_alike(a: Checkpoint, b: Checkpoint) -> None:
    """Models of one class may be other networks by their configurations, of the same tensors even."""
    for name in a.classes.keys() & b.classes.keys():
        for key, (one, other) in differences(a.classes[name].config, b.classes[name].config).items():
            if STRUCTURE.search(key):
                raise CheckpointError(
                    f"The {name} of {a.path} has {key} {shown(one)} and that of {b.path} {shown(other)}; they are"
                    " different networks and can't be merged."
                )


KNOWN_LEFT = re.compile(r"inv_freq$|position_ids$|masked_bias$|attn\.bias$|num_batches_tracked$|rotary_emb")
"""What files of older libraries have besides the weights."""


def unlike(models: Sequence[Checkpoint]) -> list[str]:
    """Sentences about folders: tensors that their class does not read, parts of the first that another lacks, and
    configurations with other numbers than the first's.
    """
    told = []
    for model in models:
        left = [name for kind in ("unused", "other") for name in model.extras.get(kind, ())]
        left = [
            name for name in left if model.path.is_dir() and model.classes and not KNOWN_LEFT.search(name)
        ]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            told.append(
                f"Not read from {model.path.name}, as its configuration ({model.title}) has no place for it, so not"
                f" merged: {shown(left[0])}{more}."
            )
    for model in models[1:]:
        lacking = [name for name in models[0].classes if name not in model.components]
        if lacking:
            told.append(
                f"{model.path.name} has no {', '.join(lacking)} that could be read; in the result that is"
                f" {models[0].path.name}'s."
            )
    for model in models[1:]:
        for name in models[0].classes.keys() & model.classes.keys():
            found = differences(models[0].classes[name].config, model.classes[name].config)
            if found:
                listed = ", ".join(
                    f"{key} {shown(one)} and {shown(other)}" for key, (one, other) in found.items()
                )
                told.append(
                    f"The configurations of {models[0].path.name} and {model.path.name} differ: {listed}; the result"
                    " has the first's."
                )
    return told


def kept_beside(model: Checkpoint) -> list[str]:
    """A sentence about what a single file of today's families has beside its transformer, which a merge leaves as it
    is.
    """
    if not model.classes or model.path.is_dir():
        return []
    prefix = model.found[TRANSFORMER].prefix
    counts: dict[str, dict[str, int]] = {}
    for name in (name for names in model.extras.values() for name in names):
        if name.startswith(prefix) and (prefix or beside(name) is None):
            continue  # of the transformer itself, which does not use it
        where = name.partition(".")[0]
        own = counts.setdefault(beside(name) or "something else", {})
        own[where] = own.get(where, 0) + 1
    if not counts:
        return []
    listed = [f"{sum(own.values())} of {what} ({', '.join(own)})" for what, own in counts.items()]
    more = " and ".join([", ".join(listed[:-1]), listed[-1]] if listed[1:] else listed)
    return [f"Not merged, and in the result as in {model.path.name}, are other tensors: {more}."]


def _parts_alone(whole: Checkpoint, part: Checkpoint) -> CheckpointError:
    """The error for two of which one has no UNet."""
    shared = [n for n in whole.components if n in part.components and whole.shapes(n) == part.shapes(n)]
    lacking = ", ".join(name for name in whole.components if name not in part.components)
    instead = "so there is nothing to merge"
    if shared:
        instead = (
            f"so merge only what both have: rebasin merge with {' '.join(f'--only {n}' for n in shared)}"
        )
    return CheckpointError(f"{part.path} has no {lacking}, which {whole.path} has, {instead}.")


def require_fitting(a: Checkpoint, b: Checkpoint, components: Sequence[str]) -> None:
    """The same tensors in the same shapes, in all these components; nothing is read but for a sentence.

    Raises:
        CheckpointError: names the first tensor that differs as the file has it, and the file.
    """
    for name in components:
        ours, theirs = a.component(name), b.component(name)
        if told := vocabulary_sentence(a, b, name):
            raise CheckpointError(told)
        for one, other, mine, others in ((a, b, ours, theirs), (b, a, theirs, ours)):
            if missing := next((own for own in mine if own not in others), None):
                raise CheckpointError(
                    f"{other.path} has no tensor {shown(one.source(name, missing))}, which the {name} of {one.path}"
                    f" has{_apart_by(a, b, name, missing)}."
                )
        for own in ours:
            if ours.shape_of(own) != theirs.shape_of(own):
                raise CheckpointError(
                    f"Tensor {shown(b.source(name, own))} of {b.path} has shape {theirs.shape_of(own)}, but"
                    f" {ours.shape_of(own)} in {a.path}{_apart_by(a, b, name)}."
                )
            for checkpoint, state in ((a, ours), (b, theirs)):
                if not state.dtype_of(own).is_floating_point:
                    raise CheckpointError(
                        f"Tensor {shown(checkpoint.source(name, own))} of {checkpoint.path} has type"
                        f" {str(state.dtype_of(own)).removeprefix('torch.')}, but weights are floating point numbers."
                    )
        for one, other in ((a, b), (b, a)) if name == UNET else ():
            if strange := next((x for x in one.strange if x not in other.raw), None):
                raise CheckpointError(
                    f"{one.path} has the tensor {shown(strange)} in its unet, which is not known here and which"
                    f" {other.path} has not."
                )


def _apart_by(a: Checkpoint, b: Checkpoint, component: str, missing: str = "") -> str:
    """What the configurations of two models say about their tensors, as a part of a sentence; "" without any."""
    if component not in a.classes or component not in b.classes:
        return ""
    ours, theirs = a.classes[component].config, b.classes[component].config
    told = differences(ours, theirs)
    tied = [config.get("tie_word_embeddings") for config in (ours, theirs)]
    apart = tied[0] != tied[1]
    told |= {"tie_word_embeddings": (tied[0], tied[1])} if apart else {}
    listed = ", ".join(
        f"{key} {shown(one)} and {shown(other)}" for key, (one, other) in list(told.items())[:4]
    )
    instead = "; untie the one that is tied (transformers: tie_word_embeddings=False) and save it again"
    both = tied[0] is True and tied[1] is True and missing.endswith("lm_head.weight")
    copied = ""
    if both and _has_a_copy(a if missing in a.component(component) else b, component, missing):
        copied = "; the other file has a copy of a tied tensor: load it with transformers and save it again, without it"
    elif both:
        copied = (
            "; it is no copy of the embeddings, so that model is not tied, whatever its configuration says: untie the"
            " other one (transformers: tie_word_embeddings=False) and save it again"
        )
    return f" ({listed})" * bool(listed) + instead * apart + copied


def _has_a_copy(model: Checkpoint, component: str, name: str) -> bool:
    """Whether a component has the same numbers as this tensor's under another name, too."""
    state = model.component(name=component)
    alike = [other for other in state if other != name and state.shape_of(other) == state.shape_of(name)]
    return any(torch.equal(state[other], state[name]) for other in alike)


def require_same_prediction(checkpoints: Sequence[Checkpoint], option: str = "--mix-predictions") -> None:
    """Raise `CheckpointError` if one of these predicts the noise and another the velocity, as far as they tell;
    `option` allows that.
    """
    told = {c.prediction.kind: c for c in checkpoints if "unet" in c.found and c.prediction.kind is not None}
    if len(told) > 1:
        (one, a), (other, b) = list(told.items())[:2]
        raise CheckpointError(
            f"{a.path} predicts {one} ({a.prediction.reason}) and {b.path} {other} ({b.prediction.reason}): their"
            f" merge would make neither; add {option} if you know better."
        )
