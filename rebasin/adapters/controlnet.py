"""A ControlNet follows its UNet: what it adds to the UNet's streams must arrive at the neurons' new places."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..spec import Alignment, Permutation, PermutationSpec, PermutedState
from ..spec.mapped import MappedState, Rounding
from ..types import DerivedState, State, passed
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
        pooled = dict(kwargs.get("added_cond_kwargs") or {}).get("text_embeds")
        sources = {"source": source}
        if pooled is not None:
            sources["pooled"] = nn.Linear(1, pooled.shape[-1], dtype=weight.dtype)

    joint = compose(partial(_steered, rest, kwargs, len(sources)), **sources, controlnet=control, unet=unet)
    return trace(joint, sample, timestep, seen, hint)


def _steered(rest: Sequence[Any], kwargs: Mapping[str, Any], sources: int, *given: Any) -> Tensor:
    """What a UNet predicts when a ControlNet adds to it, of texts from `sources` modules."""
    (source, *pooled), (cn, un, x, t, seen, hint) = given[:sources], given[sources:]
    hidden = source(seen)  # a text encoder may reorder its output; both read it
    if pooled:
        added = {**kwargs["added_cond_kwargs"], "text_embeds": pooled[0](seen[:, 0])}
        kwargs = {**kwargs, "added_cond_kwargs": added}
    down, middle = cn(x, t, hidden, hint, return_dict=False, **kwargs)
    added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    return un(x, t, hidden, *rest, **added, **kwargs).sample


def move_controlnet(
    member: Permutation | Alignment,
    controlnet: State,
    joint: PermutationSpec,
    *,
    base: State | None = None,
    what: str = "the ControlNet",
    rounding: Rounding | None = None,
) -> dict[str, Tensor]:
    """A ControlNet that is to the moved UNet what `controlnet` is to the UNet.

    Its own neurons stay, as do its own streams: what moves is what it shares with the UNet.

    Args:
        member: the permutation or alignment that was applied to the UNet: its own, or one of several components.
        controlnet: name -> tensor in diffusers' layout or LDM's (`control_model.*`). Never changed.
        joint: `joint_controlnet` of the architecture.
        base: see `extend`.
        rounding: is told what rounding to the file's types costs.

    Raises:
        AdapterError: the ControlNet belongs to another architecture.
        SpecMismatchError: so does the permutation or alignment.
    """
    carried = extend(member, joint, "unet.", base)
    permutation = carried if isinstance(carried, Permutation) else carried.permutation
    there: dict[str, str] = {}
    for name in controlnet:
        inner = name
        for theirs, ours in LDM:
            inner = re.sub(theirs, ours, inner)
        there[name] = inner = f"controlnet.{inner}"
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
    own = DerivedState({inner: passed(controlnet, name) for name, inner in there.items()})
    maps = {} if isinstance(carried, Permutation) else carried.maps
    view = MappedState(joint.continuous, maps, joint.aliases, PermutedState(permutation, own))
    view.rounding = rounding or view.rounding
    missing = [
        name
        for name in joint.shapes
        if name.startswith("controlnet.")
        and name not in own
        and (permutation.axes_of(name) or any(view.acting(name, a) for a in range(len(joint.shapes[name]))))
    ]
    if missing:
        raise AdapterError(
            f"{what} has no tensor {missing[0].removeprefix('controlnet.')!r}, which would have to move."
        )
    return {name: view[inner] if inner in joint.shapes else controlnet[name] for name, inner in there.items()}
