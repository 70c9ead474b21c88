"""Modules for the components of a checkpoint: published configs, fitted to the shapes that the file has.

The configs in `published/` are those of the models as they were released. What a file can tell (channels, widths,
depths, vocabulary) is taken from its shapes, so narrow and extended models work, too; what it can't tell (the number
of attention heads, the groups of its norms) is taken from the release. A diffusers folder brings its own config.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, shown
from .classes.call import call
from .components import TEXT, TEXT_2, UNET, VAE
from .families import TITLES, Shapes, text_width
from .fitting import require_whole
from .folders import own_config

if TYPE_CHECKING:
    from torch import nn

    from .checkpoint import Checkpoint

Config = dict[str, Any]
Built = tuple["nn.Module", tuple[Any, ...], dict[str, Any]]

DEEPEST = 200
"""Layers in a row that a configuration may ask for; the deepest that was released has 32."""

FULL_WIDTH = {"sd1": 320, "sd2": 320, "sdxl": 320, "sdxl_refiner": 384}
"""Channels of the UNet's first level, as released."""

PARTS_OF = {"vae": ("sd1", VAE), "clip_l": ("sd1", TEXT), "clip_h": ("sd2", TEXT), "clip_g": ("sdxl", TEXT_2)}
"""Families of parts alone, and where their release is."""


def published(family: str) -> Config:
    """The configs of a family as released: unet, vae, text encoders, scheduler, pipeline.

    Raises:
        CheckpointError: there is no such family.
    """
    if family not in FULL_WIDTH:
        raise CheckpointError(f"There is no family {family!r}; there are {', '.join(FULL_WIDTH)}.")
    return json.loads((Path(__file__).with_name("published") / f"{family}.json").read_text(encoding="utf-8"))


def component_config(checkpoint: Checkpoint, component: str) -> Config:
    """The config of a component: that of its diffusers folder, or the released one, fitted to its shapes."""
    checkpoint.require(component)
    if component in checkpoint.classes:
        return dict(checkpoint.classes[component].config)
    own = own_config(checkpoint.path, component)
    if own is not None:
        shapes = checkpoint.shapes(component)
        if (
            component == UNET and "in_channels" in own
        ):  # which may be more than its file has (see further_inputs)
            own["in_channels"] = _size(shapes, *SIZES[UNET]["in_channels"], own["in_channels"])
        return own
    family, released = release_of(checkpoint.family, component)
    return fit(published(family)[released], component, checkpoint.shapes(component))


def release_of(family: str, component: str) -> tuple[str, str]:
    """The family, and the component of it, in whose release a component of a file of this family is."""
    if component == VAE and family in PARTS_OF:  # a VAE beside a text encoder, without a UNet
        return PARTS_OF["vae"]
    return PARTS_OF.get(family, (family, component))


TOKENS = "text_model.embeddings.token_embedding.weight"

TEXT_SIZES = {
    "vocab_size": (TOKENS, 0),
    "max_position_embeddings": ("text_model.embeddings.position_embedding.weight", 0),
    "projection_dim": ("text_projection.weight", 0),
}

SIZES = {
    UNET: {
        "in_channels": ("conv_in.weight", 1),
        "out_channels": ("conv_out.weight", 0),
        "projection_class_embeddings_input_dim": ("add_embedding.linear_1.weight", 1),
    },
    VAE: {
        "in_channels": ("encoder.conv_in.weight", 1),
        "out_channels": ("decoder.conv_out.weight", 0),
        "latent_channels": ("post_quant_conv.weight", 0),
    },
    TEXT: TEXT_SIZES,
    TEXT_2: TEXT_SIZES,
}
"""Component -> an entry of its config -> the tensor, and its axis, that tell it."""


def fit(config: Config, component: str, shapes: Shapes) -> Config:
    """A released config with the widths, depths and channels of these shapes."""
    config = copy.deepcopy(config)
    for key, (name, axis) in SIZES[component].items():
        if key in config:
            config[key] = _size(shapes, name, axis, config[key])
    if component == UNET:
        _fit_unet(config, shapes)
    elif component == VAE:
        _fit_widths(config, shapes, "encoder.")
    else:
        _fit_text(config, shapes)
    return config


BUILT = {
    UNET: (
        "down_block_types", "up_block_types", "layers_per_block", "block_out_channels", "norm_num_groups",
        "attention_head_dim", "transformer_layers_per_block", "flip_sin_to_cos", "freq_shift", "act_fn",
    ),
    VAE: (
        "down_block_types", "up_block_types", "layers_per_block", "block_out_channels", "norm_num_groups",
        "scaling_factor", "act_fn",
    ),
    TEXT: ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    TEXT_2: ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
}  # fmt: skip
"""What a module is built by, and what its outputs mean."""


def unlike_release(checkpoint: Checkpoint, component: str) -> str | None:
    """An entry of the config in a folder, and its value, that would be another one if it were taken from the release
    and the shapes, as it is for a single file; None if all are the same.
    """
    own = own_config(checkpoint.path, component)
    if own is None:
        return None
    family, released = release_of(checkpoint.family, component)
    told = fit(published(family)[released], component, checkpoint.shapes(component))
    levels = len(told.get("block_out_channels", ()))

    def plain(value: Any) -> Any:  # one number for all levels, or one for each
        return [value] * levels if isinstance(value, int | float) and levels else value

    both = (key for key in BUILT[component] if key in own and key in told)
    differs = next((key for key in both if plain(own[key]) != plain(told[key])), None)
    return None if differs is None else f"{differs} {shown(own[differs])}"


def _fit_unet(config: Config, shapes: Shapes) -> None:
    released = config["block_out_channels"]
    config["cross_attention_dim"] = text_width(shapes) or config["cross_attention_dim"]
    if "time_embedding.cond_proj.weight" in shapes:  # a distilled model is told its guidance (LCM)
        config["time_cond_proj_dim"] = shapes["time_embedding.cond_proj.weight"][1]
    _fit_widths(config, shapes)
    widths = config["block_out_channels"]
    if widths == released:
        return  # a block that the release has and the file lacks is then found missing
    config["transformer_layers_per_block"] = _depths(config, shapes)
    if "addition_time_embed_dim" in config:
        config["addition_time_embed_dim"] = embed_dim(
            config["addition_time_embed_dim"], widths[0], released[0]
        )


def embed_dim(released: int, width: int, full: int) -> int:
    """Numbers for each sine embedding of a picture's size, reduced: even, as sines and cosines come in pairs."""
    return max(2, released * width // full // 2 * 2)


def _fit_widths(config: Config, shapes: Shapes, prefix: str = "") -> None:
    """The channels of each level; one that is missing is as wide as the others suggest, and reported later."""
    released = config["block_out_channels"]
    base = _size(shapes, f"{prefix}conv_in.weight", 0, released[0])
    widths = (w * base // released[0] for w in released)
    names = (f"{prefix}down_blocks.{i}.resnets.0.conv1.weight" for i in range(len(released)))
    set_widths(config, [_size(shapes, name, 0, w) for name, w in zip(names, widths, strict=True)])


def set_widths(config: Config, widths: list[int]) -> None:
    """Channels of the levels, and as many groups of norms as they allow."""
    config["block_out_channels"] = widths
    config["norm_num_groups"] = norm_groups(widths[0], config["norm_num_groups"])


def norm_groups(width: int, released: int) -> int:
    """Groups of norms at reduced width: the largest power of two that divides `width` in groups of two or more."""
    groups = released
    while width % groups or width // groups < 2:
        groups //= 2
    return groups


def _depths(config: Config, shapes: Shapes) -> list[int]:
    """Transformer layers of each level; where it has none, one (which diffusers ignores)."""

    def depth(block: str) -> int:
        pattern = re.compile(rf"{block}\.attentions\.0\.transformer_blocks\.(\d+)\.")
        return 1 + max((int(f[1]) for f in map(pattern.match, shapes) if f), default=0)

    depths = [depth(rf"down_blocks\.{level}") for level in range(len(config["block_out_channels"]))]
    if "CrossAttn" not in config["down_block_types"][-1]:
        # The middle block has the last level's depth, although that level itself has no attention.
        depths[-1] = depth("mid_block")
    return depths


def _fit_text(config: Config, shapes: Shapes) -> None:
    width = _size(shapes, TOKENS, 1, config["hidden_size"])
    found = (re.match(r"text_model\.encoder\.layers\.(\d+)\.", name) for name in shapes)
    layers = 1 + max((int(f[1]) for f in found if f), default=0)
    if width != config["hidden_size"]:
        first = "text_model.encoder.layers.0.mlp.fc1.weight"
        sizes = {"hidden_size": width, "intermediate_size": _size(shapes, first, 0, 4 * width)}
        config.update(sizes, num_hidden_layers=layers)
    else:  # all 24 layers of OpenCLIP-H, where it is alone
        config["num_hidden_layers"] = max(layers, config["num_hidden_layers"])


def _size(shapes: Shapes, name: str, axis: int, default: int) -> int:
    return shapes[name][axis] if name in shapes and len(shapes[name]) > axis else default


def architecture(what: Checkpoint | str, component: str, device: str | None = "meta") -> Built:
    """A component as a module, with example inputs: (module, args, kwargs), all on `device`.

    `what` is a checkpoint, or a family as released. The module's tensors have the names of
    `Checkpoint.component`. The VAE is called with an image and a latent and returns both halves' outputs, so
    that the latent channels, which the UNet knows, stay in order. With `device=None` only parameters have no numbers.

    Raises:
        CheckpointError: there is no such component, or the file lacks tensors of it, or has them in other shapes.
    """
    if not isinstance(what, str) and component in what.classes:
        return _of_class(what, component, device)
    config = published(what).get(component) if isinstance(what, str) else component_config(what, component)
    if config is None:
        raise CheckpointError(f"{TITLES[str(what)]} has no {component}.")
    try:
        depths = [n for key in config if "layers" in key for n in _numbers(config[key])]
        if max(depths, default=0) > DEEPEST:
            raise ValueError(f"it has {max(depths)} layers")
        built = build(component, config, device)
    except Exception as error:  # what the libraries make of a configuration that is none
        if isinstance(what, str):
            raise
        raise CheckpointError(
            f"The configuration of the {component} of {what.path} describes none that can be built:"
            f" {shown(str(error))}."
        ) from error
    if not isinstance(what, str):
        _require_whole(what, component, built[0])
    return built


def _of_class(checkpoint: Checkpoint, component: str, device: str | None) -> Built:
    """The same of a component that is known by its class."""
    checkpoint.require(component)
    with placed(device):
        made = call(checkpoint.classes[component], checkpoint.path, part=len(checkpoint.classes) > 1)
    if device is None and callable(tie := getattr(made[0], "tie_weights", None)):
        tie()  # which are not one any more where each has lost its numbers
    return made


def placed(device: str | None) -> AbstractContextManager[Any]:
    """Where modules are built: on a device, or, with None, parameters without numbers and the rest on the CPU."""
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False) if device is None else torch.device(device)


def build(component: str, config: Mapping[str, Any], device: str | None = "meta") -> Built:
    """The module of a config, freshly initialised (or without numbers, on "meta"), and example inputs.

    `device=None`: parameters without numbers, to be filled, and everything else on the CPU.
    """
    from . import modules  # late: diffusers and transformers take seconds to import

    with placed(device):
        return modules.build(component, dict(config))


def _numbers(value: Any) -> list[int]:
    if isinstance(value, list):
        return [number for one in value for number in _numbers(one)]
    return [value] if isinstance(value, int) else []


def _require_whole(checkpoint: Checkpoint, component: str, module: nn.Module) -> None:
    def source(name: str) -> str:
        return checkpoint.source(component, name)

    state = checkpoint.component(component)
    require_whole(module, state, component, checkpoint.title, checkpoint.path, source)
