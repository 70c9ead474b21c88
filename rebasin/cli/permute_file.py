"""What `rebasin apply` does to each kind of file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..adapters import (
    align_adapter,
    component_of,
    extend,
    is_joint,
    joint_controlnet,
    move_adapter,
    move_controlnet,
    of_component,
    part,
    union,
)
from ..adapters.aligned import maps_at_work
from ..adapters.embeddings import move_embeddings, moves, table_of
from ..adapters.move import changed_by
from ..adapters.union import prefix_of
from ..checkpoints import Checkpoint, component_spec, provenance
from ..checkpoints.architectures import build, fit, published
from ..checkpoints.checkpoint import unwrapped
from ..checkpoints.classes.single_file import probed
from ..checkpoints.components import locate
from ..checkpoints.families import EMBEDDING, NO_MODEL, foreign, identify
from ..checkpoints.output import require_place
from ..errors import AdapterError, CheckpointError, ConfigError, SpecMismatchError, shown
from ..spec import Alignment, Permutation, PermutationSpec
from ..spec.mapped import Rounding
from ..spec.permutation import displaced
from ..tensors.quantised import decoded
from ..types import DerivedState, State, passed
from . import alignment, output
from .inputs import Kind, joined, named, open_each, open_raw, parts

BESIDE = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "up_blocks.")
"""What names begin with that no ControlNet has, but the model that some files hold beside one."""

FOLLOWED = ("unet", "text_encoder", "text_encoder_2")
"""Components whose adapters are moved."""

MOVABLE = "a model, a LoRA or another adapter, or a ControlNet"

WEBUI = "string_to_param."
"""Before the name of a token in the webui's pickles; in safetensors it calls their vectors EMB_PARAMS."""

EMB_PARAMS = "emb_params"


@dataclass(frozen=True, eq=False)
class Moved:
    """What becomes of a file: what it is, its tensors, its header, how many of its neurons moved, and how
    many groups of maps act on it. `roundings` tells what rounding costs as soon as the tensors were read, `marks` what
    the header has to say of codes in it; `checkpoint` is that of a model.
    """

    kind: str
    state: State
    metadata: dict[str, str]
    neurons: int
    maps: int
    roundings: Mapping[str, Rounding]
    marks: Mapping[str, str] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None


def moved(
    kind: Kind,
    file: Path,
    member: Alignment,
    unfold: bool,
    target: Path,
    variant: str | None = None,
    base: Checkpoint | None = None,
) -> Moved:
    """What becomes of a file.

    Args:
        target: what is to be written.
        base: the model that the file is for, whose gains maps are turned by.

    Raises:
        RebasinError: the file and the permutation or alignment do not belong together.
    """
    if kind == "permutation":
        raise CheckpointError(f"{file} is a permutation itself; give a checkpoint, a LoRA or a ControlNet.")
    known = {} if base is None else parts(base, base.components)
    embedding = kind == "model" and not file.is_dir() and foreign(dict.fromkeys(open_raw(file))) == EMBEDDING
    if kind == "model" and not embedding:
        return _moved_model(file, member, target, variant, known)
    state = open_raw(file, variant)
    metadata = dict(getattr(state, "metadata", {}))
    if unfold and kind != "adapter":
        raise ConfigError(
            f"--unfold is for the LoKr and LoHa modules of adapters, but {file} is"
            f" {EMBEDDING if embedding else 'a ControlNet'}; leave it out."
        )
    what = "embedding" if embedding else kind
    rounding = Rounding()
    seen = _in_names_of(member.spec, known)

    def done(state: State, spec: Alignment | Permutation, parameters: Sequence[str]) -> Moved:
        return Moved(
            what, state, metadata, moved_of(spec, parameters), maps_of(spec, parameters), {what: rounding}
        )

    if embedding:
        tables = [table_of(member.spec, key, state[key].shape, file.name) for key in state]
        if not any(table is not None and moves(member, table) for table in tables):
            require_known(file)
        view = maps_at_work(member, seen) if member.maps else None
        with named(file):
            whole = move_embeddings(member, state, view, what=file.name, rounding=rounding)
        whole = {EMB_PARAMS if key.startswith(WEBUI) else key: tensor for key, tensor in whole.items()}
        return done(whole, member, [table for table in tables if table is not None])
    others = set(component_of(member.spec)) - {"vae"}
    if kind == "adapter" and others and not others & set(FOLLOWED):
        raise AdapterError(
            f"{file} is an adapter, and those of {', '.join(component_of(member.spec)) or 'this model'} are not moved"
            " here: it does not fit the aligned model as it is, so merge it into B with its own tools, and align that."
        )
    if kind == "adapter":
        with named(file):
            if member.maps:
                whole = align_adapter(member, state, seen, unfold=unfold, what=file.name, rounding=rounding)
            else:
                whole = move_adapter(member.permutation, state, unfold=unfold, what=file.name)
            own = changed_by(member.spec, state, file.name)
        return done(whole, member, own)
    state = decoded(unwrapped(state, file), file, metadata)
    quantised = getattr(state, "quantised", None)
    if any(name.startswith(BESIDE) for name in state):
        raise CheckpointError(
            f"{file} holds a model besides a ControlNet, and only one of the two can be moved; save the ControlNet"
            " alone (in LDM's names the tensors that begin with control_model.)."
        )
    joint = controlnet_spec(member.spec)
    whole = move_controlnet(member, state, joint, base=seen, what=file.name, rounding=rounding)
    own = [name for name in joint.shapes if name.startswith("controlnet.")]
    found = done(whole, extend(member, joint, base=seen), own)
    if quantised is None:
        return found
    return replace(found, state=quantised.encoded(found.state, target), marks=quantised.metadata)


def _moved_model(
    file: Path, member: Alignment, target: Path, variant: str | None, base: Mapping[str, State]
) -> Moved:
    if not file.is_dir():
        require_known(file)
    checkpoint = open_each([file], variant)[0]
    aligned = [name for name in checkpoint.components if of_component(member, name) is not None]
    if not aligned:
        raise SpecMismatchError(
            f"{file} has {', '.join(checkpoint.components)}, but the permutation moves"
            f" {', '.join(component_of(member.spec)) or 'something else'}."
        )
    carried: dict[str, Alignment] = {}
    for name in aligned if not is_joint(member.spec) else ():
        own = of_component(member, name)
        assert own is not None
        if name in checkpoint.classes:
            _require_same(own, checkpoint, name)
        carried[name] = part(own, component_spec(checkpoint, name))  # legal for this file, too
    if checkpoint.classes and carried:
        member = union(carried)
    roundings: dict[str, Rounding] = {}
    states = alignment.Alignment(member, {}, {}).views(
        parts(checkpoint, checkpoint.components), roundings=roundings, base=base
    )
    whole = output.finished(checkpoint, {name: states[name] for name in aligned})
    require_place(target, checkpoint, checkpoint.raw)
    own = [f"{prefix_of(member.spec, n)}{t}" for n in aligned for t in checkpoint.shapes(n)]
    neurons, maps = moved_of(member, own), maps_of(member, own)
    metadata = dict(provenance.metadata_of(checkpoint))
    return Moved("model", whole, metadata, neurons, maps, roundings, checkpoint=checkpoint)


def _require_same(own: Alignment, checkpoint: Checkpoint, component: str) -> None:
    """Raise `SpecMismatchError` unless a model has the very tensors that a member was found for; axes that no symmetry
    moves may have other sizes, as those of words have where a fine-tune has added some.
    """
    names, acting = own.spec.aliases, {(n, axis) for n, axes in own.spec.axes.items() for axis in axes}
    acting |= {(site.parameter, site.axis) for group in own.spec.continuous for site in group.sites}
    ours, theirs = dict(own.spec.shapes), checkpoint.shapes(component)

    def apart(name: str) -> bool:
        mine, others = ours.get(name), theirs[name]
        if mine is None or len(mine) != len(others):
            return True
        return any(
            m != n and (name, axis) in acting for axis, (m, n) in enumerate(zip(mine, others, strict=True))
        )

    other = next((n for n in theirs if n not in names and apart(n)), None)
    other = other or next((n for n in ours if n not in theirs and n not in names), None)
    if other is not None:
        raise SpecMismatchError(
            f"The permutation was found for another architecture: {shown(other)} has shape"
            f" {ours.get(other, 'none')} there and {theirs.get(other, 'none')} in {checkpoint.path}."
        )


def _in_names_of(spec: PermutationSpec, components: Mapping[str, State]) -> State:
    """A model's components by the names of a spec, which has them in a union or is one component's own."""
    whole = joined(components)
    return DerivedState(
        {
            prefix_of(spec, name) + own: passed(whole, f"{name}.{own}")
            for name in component_of(spec)
            for own in components.get(name, ())
        }
    )


def maps_of(member: Alignment | Permutation, parameters: Sequence[str]) -> int:
    """How many groups have a map that acts on these parameters."""
    if isinstance(member, Permutation):
        return 0
    known = {member.spec.aliases.get(name, name) for name in parameters}
    return sum(
        any(site.parameter in known for site in group.sites)
        for group in member.spec.continuous
        if group.name in member.maps
    )


def moved_of(member: Alignment | Permutation, parameters: Sequence[str]) -> int:
    """How many of the neurons that these parameters have do not stay where they are."""
    spec, permutation = member.spec, member if isinstance(member, Permutation) else member.permutation
    known = {spec.aliases.get(name, name) for name in parameters}
    cells = {cell for name in known for sites in spec.axes.get(name, {}).values() for cell, _ in sites}
    return displaced(permutation.index[cell] for cell in cells)


def require_known(file: Path) -> None:
    """Raise `CheckpointError` if a file is none of those that can be moved; it says what it is."""
    state = open_raw(file)
    if not len(state):
        raise CheckpointError(f"{file} has no tensors, so there is nothing to move; give {MOVABLE}.")
    what = foreign(dict.fromkeys(state))
    if what not in NO_MODEL and probed(state):
        return
    if what == EMBEDDING:
        raise CheckpointError(
            f"{file} is {what}, which no permutation moves: it fits an aligned model as it is, unless that was aligned"
            " with --joint."
        )
    if what is not None or not locate(dict.fromkeys(unwrapped(state, file))):
        raise CheckpointError(f"{file} is {what or 'nothing that is known here'}; give {MOVABLE}.")


def controlnet_spec(spec: PermutationSpec) -> PermutationSpec:
    """The symmetries of a ControlNet and the UNet that `spec` speaks of.

    Raises:
        SpecMismatchError: it speaks of none.
    """
    prefix = prefix_of(spec, "unet")
    shapes = {
        name.removeprefix(prefix): shape for name, shape in spec.shapes.items() if name.startswith(prefix)
    }
    if "unet" not in component_of(spec):
        raise SpecMismatchError("The permutation moves no UNet, so a ControlNet has nothing to follow.")
    family, _ = identify({"unet": shapes}, {}, "the model of this permutation")
    module, args, kwargs = build("unet", fit(published(family)["unet"], "unet", shapes))
    return joint_controlnet(module, *args, **kwargs)  # pyright: ignore[reportArgumentType]
