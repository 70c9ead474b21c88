"""A ControlNet follows its UNet: what it adds to the UNet's streams must arrive at the neurons' new places."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..spec import Permutation, PermutationSpec
from ..types import State
from .union import extend

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


LDM = (
    (r"^(?:control_model\.)?zero_convs\.(\d+)\.0\.", r"controlnet_down_blocks.\1."),
    (r"^(?:control_model\.)?middle_block_out\.0\.", "controlnet_mid_block."),
)
"""LDM's names for the layers between a ControlNet and its UNet, and diffusers'; no other layer moves."""


ADDS = ("controlnet.controlnet_down_blocks.", "controlnet.controlnet_mid_block.")
"""What the names of these layers begin with beside a UNet."""


def is_controlnet(names: Iterable[str]) -> bool:
    """Whether a file with tensors of these names is a ControlNet, in diffusers' layout or LDM's."""
    begins = ("controlnet_mid_block.", "middle_block_out.0.")
    return any(name.startswith(begins) or ".middle_block_out.0." in name for name in names)


def joint_controlnet(unet: UNet2DConditionModel, *args: Any, **kwargs: Any) -> PermutationSpec:
    """The symmetries of `unet` together with a ControlNet, as `unet.*` and `controlnet.*`.

    Args:
        unet: of the architecture in question; on the meta device it costs nothing.
        args, kwargs: example inputs of the UNet: latents [n, c, h, w], timesteps, hidden states of the text
            [n, tokens, width], and what else it needs by name.
    """
    from ..tracing import compose, trace

    sample, timestep, text, *rest = args
    weight = next(unet.parameters())
    with torch.device(weight.device):
        from diffusers import ControlNetModel

        control = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        nn.Module.to(control, dtype=weight.dtype)
        source = nn.Linear(1, text.shape[-1], dtype=weight.dtype)
        hint = torch.zeros(sample.shape[0], 3, sample.shape[2] * 8, sample.shape[3] * 8, dtype=weight.dtype)
        seen = torch.zeros(*text.shape[:-1], 1, dtype=weight.dtype)

    joint = compose(partial(_steered, rest, kwargs), source=source, controlnet=control, unet=unet)
    return trace(joint, sample, timestep, seen, hint)


def _steered(
    rest: Sequence[Any],
    kwargs: Mapping[str, Any],
    source: nn.Module,
    cn: nn.Module,
    un: nn.Module,
    *given: Tensor,
) -> Tensor:
    """What the UNet `un` predicts when the ControlNet `cn` adds to it."""
    x, t, seen, hint = given
    hidden = source(seen)  # a text encoder may reorder its output; both read it
    down, middle = cn(x, t, hidden, hint, return_dict=False, **kwargs)
    added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    return un(x, t, hidden, *rest, **added, **kwargs).sample


def move_controlnet(
    permutation: Permutation, controlnet: State, joint: PermutationSpec, *, what: str = "the ControlNet"
) -> dict[str, Tensor]:
    """A ControlNet that is to the permuted UNet what `controlnet` is to the UNet.

    Args:
        permutation: what was applied to the UNet: its own, or one of several components.
        controlnet: name -> tensor in diffusers' layout or LDM's (`control_model.*`). Never changed.
        joint: `joint_controlnet` of the architecture.

    Raises:
        AdapterError: the ControlNet belongs to another architecture.
        SpecMismatchError: so does the permutation.
    """
    carried = extend(permutation, joint, "unet.")
    moved, there = {}, set()
    for name in controlnet:
        inner = name
        for theirs, ours in LDM:
            inner = re.sub(theirs, ours, inner)
        inner = f"controlnet.{inner}"
        there.add(inner)
        tensor = controlnet[name]
        shape = joint.shapes.get(inner)
        if shape is None and inner.startswith(ADDS):
            raise AdapterError(
                f"Tensor {name!r} of {what} adds to a place that the aligned UNet has not: it was trained for another"
                " architecture."
            )
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise AdapterError(
                f"Tensor {name!r} of {what} has shape {tuple(tensor.shape)}, but the aligned UNet needs"
                f" {tuple(shape)}: it was trained for another architecture."
            )
        moved[name] = carried.apply_to(inner, tensor) if shape is not None else tensor
    missing = [
        name
        for name in joint.shapes
        if name.startswith("controlnet.") and carried.axes_of(name) and name not in there
    ]
    if missing:
        raise AdapterError(
            f"{what} has no tensor {missing[0].removeprefix('controlnet.')!r}, which would have to move."
        )
    return moved
