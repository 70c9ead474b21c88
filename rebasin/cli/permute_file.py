"""What `rebasin apply` does to each kind of file."""

from __future__ import annotations

from pathlib import Path

from ..adapters import (
    component_of,
    is_joint,
    joint_controlnet,
    move_adapter,
    move_controlnet,
    of_component,
    part,
)
from ..adapters.union import prefix_of
from ..checkpoints import component_spec
from ..checkpoints.architectures import build, fit, published
from ..checkpoints.families import identify
from ..errors import CheckpointError, SpecMismatchError
from ..spec import Permutation, PermutationSpec
from ..tensors.codes import decoded
from ..types import State
from . import output
from .inputs import Kind, named, open_each, open_raw


def permuted(
    kind: Kind, file: Path, permutation: Permutation, unfold: bool, variant: str | None = None
) -> tuple[State, dict[str, str]]:
    """The file's tensors in their new order, and the metadata of its header.

    Raises:
        RebasinError: the file and the permutation do not belong together.
    """
    if kind == "permutation":
        raise CheckpointError(f"{file} is a permutation itself; give a checkpoint, a LoRA or a ControlNet.")
    if kind == "model":
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
        return output.finished(checkpoint, states), dict(checkpoint.metadata)
    state = open_raw(file)
    metadata = dict(getattr(state, "metadata", {}))
    if kind == "adapter":
        with named(file):
            return move_adapter(permutation, state, unfold=unfold, what=file.name), metadata
    state = decoded(state, file)
    return move_controlnet(permutation, state, controlnet_spec(permutation.spec), what=file.name), metadata


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
