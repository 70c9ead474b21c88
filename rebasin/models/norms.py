"""Normalisation over channels that every permutation of the channels commutes with."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["layer", "batch", "group", "none"]


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of (n, channels, height, width), with affine.

    This is what Git Re-Basin's networks use in place of BatchNorm (flax's LayerNorm, epsilon 1e-6). GroupNorm
    with one group is something else: it also averages over the pixels.
    """

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        last = F.layer_norm(input.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return last.movedim(-1, 1)


def norm_of(kind: Norm, channels: int, groups: int = 1) -> nn.Module:
    """A normalisation of images with so many channels."""
    if kind == "group":
        return nn.GroupNorm(groups, channels)
    kinds = {"layer": ChannelLayerNorm, "batch": nn.BatchNorm2d, "none": lambda _: nn.Identity()}
    return kinds[kind](channels)
