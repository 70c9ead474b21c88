"""The paper's networks, built by name, and their training on first use."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..data.classification import Dataset
from ..errors import ConfigError
from ..integrations.torchvision import prepare_torchvision
from ..types import supply
from .library import network as library_network
from .mlp import MLP
from .resnet import ResNet
from .vgg import VGG

prepare_torchvision()  # before a model imports diffusers

CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "vgg": VGG,
    "resnet": ResNet,
    "library": library_network,
}

__all__ = ["CLASSIFIERS", "MLP", "VGG", "ResNet", "build", "fitting_options"]


def build(name: str, **options: Any) -> nn.Module:
    """Build a classifier by name; `options` are its constructor's.

    Raises:
        ConfigError: an unknown name or option, with the valid ones.
    """
    if name not in CLASSIFIERS:
        raise ConfigError(f"There is no classifier '{name}': choose one of {', '.join(CLASSIFIERS)}.")
    return CLASSIFIERS[name](**supply(CLASSIFIERS[name], {}, options, what=f"The model {name!r}"))


def fitting_options(name: str, dataset: Dataset, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`options` plus the sizes that follow from the data: `inputs` or `channels`, and `classes`."""
    _, channels, *size = dataset.train_x.shape
    sizes = {"inputs": channels * math.prod(size)} if name == "mlp" else {"channels": channels}
    return {**sizes, "classes": len(dataset.classes), **(options or {})}
