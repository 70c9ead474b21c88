"""Networks of other libraries by name, with their own initialisation: ResNet18 and ResNet50 of torchvision or timm."""

from __future__ import annotations

from importlib.util import find_spec

from torch import nn

from ..errors import ConfigError

LIBRARIES = ("torchvision", "timm")


def network(library: str, network: str, channels: int = 3, classes: int = 1000) -> nn.Module:
    """A network without trained weights.

    Args:
        library: "torchvision" or "timm"; both have BatchNorm in their ResNets.
        network: its name there, say resnet18, resnet50 or vgg11_bn.
        channels: of the images; torchvision's networks take 3.
        classes: the size of the last layer.

    Raises:
        ConfigError: the library is not installed, or has no such network.
    """
    if library not in LIBRARIES:
        raise ConfigError(f"model.library is {library!r}; choose {' or '.join(LIBRARIES)}.")
    if find_spec(library) is None:
        raise ConfigError(f"{library} is not installed: pip install {library}.")
    if library == "timm":
        import timm  # pyright: ignore[reportMissingImports]

        if network not in timm.list_models():
            raise ConfigError(f"timm has no network {network!r}: timm.list_models() has all names.")
        return timm.create_model(network, pretrained=False, in_chans=channels, num_classes=classes)

    from ..integrations.torchvision import prepare_torchvision

    prepare_torchvision()
    import torchvision  # pyright: ignore[reportMissingImports]

    if channels != 3:
        raise ConfigError(f"torchvision's networks take 3 channels, not {channels}: model.library=timm.")
    if network not in torchvision.models.list_models(torchvision.models):
        raise ConfigError(f"torchvision has no network {network!r}: model.network=resnet50, for example.")
    return torchvision.models.get_model(network, weights=None, num_classes=classes)
