"""VGG networks for small images, laid out as in Git Re-Basin (2209.04836)."""

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .norms import norm_of

Norm = Literal["layer", "batch", "none"]

# Convolutions in each of the five stages.
PLANS = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3)}


class VGG(nn.Module):
    """VGG11 or VGG16: five stages of (3x3 convolution with bias, norm, ReLU), pooling; three linear layers.

    Takes images (n, channels, height, width) of any size, returns logits (n, classes). Stages have w, 2w, 4w,
    8w, 8w channels and the two hidden linear layers 8w neurons, w = `width` (64 is the paper's 1x). The
    poolings round up, so that 8x8 images work too; images up to 32x32 end as one pixel, where the final mean
    changes nothing.

    `norm`: "layer" over the channels of each pixel (the paper's), "batch", or "none".
    """

    def __init__(
        self, depth: int = 16, width: int = 64, norm: Norm = "layer", channels: int = 3, classes: int = 10
    ):
        super().__init__()
        if depth not in PLANS or norm not in get_args(Norm) or min(width, channels, classes) < 1:
            raise ConfigError(
                f"A VGG has depth 11 or 16, norm {', '.join(get_args(Norm))} and positive sizes, "
                f"but got {depth=}, {width=}, {norm=}, {channels=}, {classes=}."
            )
        self.stages = nn.ModuleList()
        size = channels
        for number, repeats in zip((1, 2, 4, 8, 8), PLANS[depth], strict=True):
            stage = nn.Sequential()
            for _ in range(repeats):
                stage.append(_ConvNormRelu(size, size := number * width, norm))
            self.stages.append(stage)
        self.hidden = nn.ModuleList(nn.Linear(size, size) for _ in range(2))
        self.head = nn.Linear(size, classes)
        for layer in self.modules():
            # Without a norm, sixteen layers of torch's default start would let the signal fade.
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer is not self.head:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType] (all of them have one)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = F.max_pool2d(stage(x), 2, ceil_mode=True)
        x = x.mean(dim=(2, 3))
        for layer in self.hidden:
            x = layer(x).relu()
        return self.head(x)


class _ConvNormRelu(nn.Module):
    def __init__(self, inputs: int, outputs: int, norm: Norm):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = norm_of(norm, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()
