"""Normalisation over channels that every permutation of the channels commutes with."""

import torch.nn.functional as F
from torch import Tensor, nn


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of (n, channels, height, width), with affine.

    This is what Git Re-Basin's networks use in place of BatchNorm (flax's LayerNorm, epsilon 1e-6). GroupNorm
    with
    one group is something else: it also averages over the pixels.
    """

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        last = F.layer_norm(input.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return last.movedim(-1, 1)
