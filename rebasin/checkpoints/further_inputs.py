"""UNets with further input channels (inpainting, instruct-pix2pix, depth) beside plain ones of their family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..types import LazyTensor, dtype_of, origin_of, shape_of
from .checkpoint import Checkpoint
from .components import UNET

WEIGHT = "conv_in.weight"


def with_further_inputs(models: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The models, the plain ones with zeros for the inputs that the first alone has, if all others are plain.

    The latents come first in all variants, and the weights of the further channels are 0 in each of these models: they
    compute what they computed, and matching sees nothing of them in these channels. Two such models do not differ
    there, so the difference of a fine-tune from its base leaves the first model's further channels as they are.
    """
    first = models[0]
    if UNET not in first.components or first.variant in ("", "base"):
        return list(models)
    if any(one.family != first.family or one.variant != "base" for one in models[1:]):
        return list(models)
    return [first, *(_widened(one, first) for one in models[1:])]


def _widened(model: Checkpoint, like: Checkpoint) -> Checkpoint:
    name, wanted = model.source(UNET, WEIGHT), like.shapes(UNET)[WEIGHT]
    shape = shape_of(model.raw, name)
    if len(shape) != 4 or (shape[0], *shape[2:]) != (wanted[0], *wanted[2:]):
        return model  # told where shapes are compared
    raw = model.raw

    def make() -> Tensor:
        weight = raw[name]
        more = weight.new_zeros(shape[0], wanted[1] - shape[1], *shape[2:])
        return torch.cat([weight, more], 1)

    own = LazyTensor(tuple(wanted), dtype_of(raw, name), make, origin_of(raw, name))
    return replace(model.with_tensors(UNET, {WEIGHT: own}), variant=like.variant)
