"""What a diffusers folder says of itself, compared with its tensors when it is opened.

Its configurations are what a result is written from, and what pictures are made by: damage must not be found at the
end of the work, or be overlooked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shown
from .architectures import SIZES, TOKENS
from .components import TEXT, TEXT_2, UNET, VAE
from .families import TITLES, Shapes
from .folders import INDEX, config_file, load_config
from .pipeline import KINDS, PIPELINES
from .prediction_type import SCHEDULER

CLASS_WORDS = {UNET: "UNet", VAE: "Autoencoder"}
"""Component -> what is in the names of all classes that have its tensors."""

LEVELS = {UNET: "down_blocks.{}.resnets.0.conv1.weight", VAE: "encoder.down_blocks.{}.resnets.0.conv1.weight"}
"""Component -> the tensor of each level that has its channels."""


def require_sound(where: Path, family: str, components: Mapping[str, Shapes]) -> None:
    """Read every configuration of a folder.

    Raises:
        CheckpointError: one is damaged, or contradicts the tensors; names it and the entry.
    """
    for component, shapes in components.items():
        file = config_file(where, component)
        config = load_config(file.parent)
        if config is not None:
            _require_fitting(file, config, component, shapes)
    load_config(where / SCHEDULER.parent, SCHEDULER.name)
    index = load_config(where, INDEX) or {}
    told = index.get("_class_name")
    kinds = {kind for (kind, _), classes in PIPELINES.items() if told in classes}
    if family in KINDS and kinds and KINDS[family] not in kinds:
        raise CheckpointError(
            f"{where / INDEX} says {told}, but the tensors are those of {TITLES[family]}; the folder is mixed of two"
            " models, so get it again."
        )


def _require_fitting(file: Path, config: Mapping[str, Any], component: str, shapes: Shapes) -> None:
    told, word = config.get("_class_name"), CLASS_WORDS.get(component, "")
    if told is not None and word not in str(told):
        raise CheckpointError(
            f"{file} is of class {shown(told)}, but the tensors beside it are those of a {component}; get the folder"
            " again."
        )
    for key, fact in _facts(component, shapes).items():
        if key in config and config[key] != fact:
            raise CheckpointError(
                f"{file} says {key} {shown(config[key])}, but the tensors beside it have {fact}; get the folder again."
            )


def _facts(component: str, shapes: Shapes) -> dict[str, Any]:
    """Entries of a component's configuration that its tensors tell."""
    facts: dict[str, Any] = {
        key: shapes[name][axis]
        for key, (name, axis) in SIZES[component].items()
        if name in shapes and len(shapes[name]) > axis
    }
    if component in (TEXT, TEXT_2) and len(shapes.get(TOKENS, ())) == 2:
        facts["hidden_size"] = shapes[TOKENS][1]
    if component in LEVELS:
        widths = []
        while (name := LEVELS[component].format(len(widths))) in shapes:
            widths.append(shapes[name][0])
        facts["block_out_channels"] = widths
    return facts
