"""What `rebasin apply` does to each kind of file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..adapters import (
    component_of,
    extend,
    is_joint,
    joint_controlnet,
    move_adapter,
    move_controlnet,
    of_component,
    part,
)
from ..adapters.move import changed_by
from ..adapters.union import prefix_of
from ..checkpoints import component_spec
from ..checkpoints.architectures import build, fit, published
from ..checkpoints.checkpoint import unwrapped
from ..checkpoints.components import locate
from ..checkpoints.families import foreign, identify
from ..errors import CheckpointError, ConfigError, SpecMismatchError
from ..spec import Permutation, PermutationSpec
from ..spec.permutation import displaced
from ..tensors.codes import decoded
from ..types import State
from . import output
from .inputs import Kind, named, open_each, open_raw

BESIDE = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "up_blocks.")
"""What names begin with that no ControlNet has, but the model that some files hold beside one."""

MOVABLE = "a model, a LoRA or another adapter, or a ControlNet"


class Permuted(NamedTuple):
    """A file's tensors in their new order, the metadata of its header, and how many of its neurons moved."""

    state: State
    metadata: dict[str, str]
    neurons: int


def permuted(
    kind: Kind, file: Path, permutation: Permutation, unfold: bool, variant: str | None = None
) -> Permuted:
    """What becomes of a file.

    Raises:
        RebasinError: the file and the permutation do not belong together.
    """
    if kind == "permutation":
        raise CheckpointError(f"{file} is a permutation itself; give a checkpoint, a LoRA or a ControlNet.")
    if kind == "model":
        if not file.is_dir():
            require_known(file)
        checkpoint = open_each([file], variant)[0]
        states: dict[str, State] = {}
        for name in checkpoint.components:
            own = of_component(permutation, name)
            if own is not None:
                if not is_joint(permutation.spec):
                    part(own, component_spec(checkpoint, name))  # legal for this file, too
                states[name] = own.view(checkpoint.component(name))
        if not states:
            raise SpecMismatchError(
                f"{file} has {', '.join(checkpoint.components)}, but the permutation moves"
                f" {', '.join(component_of(permutation.spec)) or 'something else'}."
            )
        own = [f"{prefix_of(permutation.spec, n)}{t}" for n in states for t in checkpoint.shapes(n)]
        whole = output.finished(checkpoint, states)
        return Permuted(whole, dict(checkpoint.metadata), moved_of(permutation, own))
    state = open_raw(file, variant)
    metadata = dict(getattr(state, "metadata", {}))
    if unfold and kind != "adapter":
        raise ConfigError(
            f"--unfold is for the LoKr modules of adapters, but {file} is a ControlNet; leave it out."
        )
    if kind == "adapter":
        with named(file):
            moved = move_adapter(permutation, state, unfold=unfold, what=file.name)
            own = changed_by(permutation.spec, state, file.name)
        return Permuted(moved, metadata, moved_of(permutation, own))
    state = unwrapped(decoded(state, file), file)
    if any(name.startswith(BESIDE) for name in state):
        raise CheckpointError(
            f"{file} holds a model besides a ControlNet, and only one of the two can be moved; save the ControlNet"
            " alone (in LDM's names the tensors that begin with control_model.)."
        )
    joint = controlnet_spec(permutation.spec)
    moved = move_controlnet(permutation, state, joint, what=file.name)
    own = [name for name in joint.shapes if name.startswith("controlnet.")]
    return Permuted(moved, metadata, moved_of(extend(permutation, joint), own))


def moved_of(permutation: Permutation, parameters: Sequence[str]) -> int:
    """How many of the neurons that these parameters have do not stay where they are."""
    spec = permutation.spec
    known = {spec.aliases.get(name, name) for name in parameters}
    cells = {cell for name in known for sites in spec.axes.get(name, {}).values() for cell, _ in sites}
    return displaced(permutation.index[cell] for cell in cells)


def require_known(file: Path) -> None:
    """Raise `CheckpointError` if a file is none of those that can be moved; it says what it is."""
    state = open_raw(file)
    if not len(state):
        raise CheckpointError(f"{file} has no tensors, so there is nothing to move; give {MOVABLE}.")
    what = foreign(dict.fromkeys(state))
    if what == "a textual inversion embedding":
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
