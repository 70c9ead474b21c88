"""The multilayer perceptron of Git Re-Basin (2209.04836): in - h - h - h - out with ReLU."""

from itertools import pairwise

from torch import Tensor, nn

from ..errors import ConfigError


class MLP(nn.Module):
    """`depth` hidden layers of `width` neurons each, ReLU after each, no normalisation.

    Takes (n, ...) of `inputs` numbers for each sample, flattened here; returns logits (n, classes). The paper
    has 3 hidden layers of 512.
    """

    def __init__(self, inputs: int = 64, width: int = 128, classes: int = 10, depth: int = 3):
        super().__init__()
        if min(inputs, width, classes, depth) < 1:
            raise ConfigError(
                f"An MLP needs positive sizes, but got {inputs=}, {width=}, {classes=}, {depth=}."
            )
        sizes = [inputs, *[width] * depth, classes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)
