"""ResNets for small images, laid out as the ResNet20 of Git Re-Basin (2209.04836)."""

from typing import Literal, get_args

from torch import Tensor, nn

from ..errors import ConfigError
from .norms import norm_of

Norm = Literal["layer", "batch", "group"]


class ResNet(nn.Module):
    """ResNet20: three stages of three blocks, 16, 32, 64 channels times `width`, norm after convolution.

    Takes images (n, channels, height, width) of any size, returns logits (n, classes). The first block of
    stages 2 and 3 halves the image, and its shortcut is a 3x3 convolution with stride 2 and a norm, as in the
    paper's code (He et al. have 1x1 or padding). Convolutions have no bias.

    `norm`: "layer" over the channels of each pixel (the paper's), "batch", or "group" with `groups` groups.
    `width` may be a fraction, 0.5 has 8, 16, 32 channels. `blocks` in each stage:
    3 is ResNet20, 1 is ResNet8.
    """

    def __init__(
        self,
        width: float = 1,
        norm: Norm = "layer",
        channels: int = 3,
        classes: int = 10,
        blocks: int = 3,
        groups: int = 4,
    ):
        super().__init__()
        sizes = [round(base * width) for base in (16, 32, 64)]
        if norm not in get_args(Norm) or min(*sizes, channels, classes, blocks) < 1:
            raise ConfigError(
                f"A ResNet has norm {', '.join(get_args(Norm))} and positive sizes, "
                f"but got {width=}, {norm=}, {channels=}, {classes=}, {blocks=}."
            )
        if norm == "group" and any(size % groups for size in sizes):
            raise ConfigError(
                f"A ResNet with channels {sizes} cannot have {groups} groups: they must divide them."
            )
        self.stem = _ConvNorm(channels, sizes[0], 1, norm, groups)
        self.blocks = nn.ModuleList()
        size = sizes[0]
        for stage, outputs in enumerate(sizes):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                self.blocks.append(_Block(size, outputs, stride, norm, groups))
                size = outputs
        self.head = nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, groups: int):
        super().__init__()
        self.first = _ConvNorm(inputs, outputs, stride, norm, groups)
        self.second = _ConvNorm(outputs, outputs, 1, norm, groups)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _ConvNorm(inputs, outputs, stride, norm, groups)

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x).relu()) + self.shortcut(x)).relu()


class _ConvNorm(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, groups: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        self.norm = norm_of(norm, outputs, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))
