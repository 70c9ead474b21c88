"""Where the components of a Stable Diffusion model lie among the names of a file, and how they are linked to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..types import shape_of
from . import keys_text, keys_unet, keys_vae
from .key_map import KeyMapping, matrix, rows, same, transposed

UNET, VAE, TEXT, TEXT_2 = "unet", "vae", "text_encoder", "text_encoder_2"


@dataclass(frozen=True)
class Found:
    """A component, the prefix of its tensors in the file, and the layout of the names behind the prefix."""

    component: str
    prefix: str
    layout: str  # "ldm", "diffusers", "openclip" or "transformers"


PLACES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    (
        UNET, "ldm", "input_blocks.0.0.weight",
        ("model.diffusion_model.", "diffusion_model.", ""),
    ),
    (UNET, "diffusers", "time_embedding.linear_1.weight", ("unet/", "unet.", "")),
    (
        VAE, "ldm", "decoder.mid.block_1.conv1.weight",
        ("first_stage_model.", "vae.", ""),
    ),
    (VAE, "diffusers", "decoder.mid_block.resnets.0.conv1.weight", ("vae/", "vae.", "")),
    (
        TEXT, "transformers", "encoder.layers.0.self_attn.q_proj.weight",
        (
            "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.",
            "conditioner.embedders.0.transformer.text_model.", "text_encoder/text_model.", "text_encoder/",
            "text_encoder.text_model.", "text_model.", "",
        ),
    ),
    (TEXT, "openclip", "transformer.resblocks.0.ln_1.weight", ("cond_stage_model.model.", "")),
    (
        TEXT_2, "openclip", "transformer.resblocks.0.ln_1.weight",
        ("conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
    ),
    (
        TEXT_2, "transformers", "encoder.layers.0.self_attn.q_proj.weight",
        ("text_encoder_2/text_model.", "text_encoder_2/", "text_encoder_2.text_model."),
    ),
)  # fmt: skip
"""Component, layout, a tensor that it always has, and the prefixes under which files have it, the likeliest first."""


def locate(names: Mapping[str, object]) -> dict[str, Found]:
    """The components that are in a file with these tensor names, in the order unet, vae, text encoders."""
    found: dict[str, Found] = {}
    for component, layout, probe, prefixes in PLACES:
        for prefix in prefixes:
            if component not in found and prefix + probe in names:
                found[component] = Found(component, prefix, layout)
    return found


OWN = {
    UNET: r"(conv_in|conv_out|conv_norm_out|time_embedding|add_embedding|\w+_blocks?)\.",
    VAE: r"(encoder|decoder|quant_conv|post_quant_conv)\.",
}
"""What is part of a component in diffusers' layout, where other things may lie beside it."""


def key_map(found: Found, raw: Mapping[str, Tensor]) -> list[KeyMapping]:
    """One key for each tensor of a component, in the order of the file; what is no part of it is left out."""
    maker = _image if found.component in OWN else _text
    sources = {name.removeprefix(found.prefix): name for name in raw if name.startswith(found.prefix)}
    return list(maker(found, sources, raw))


def _image(found: Found, sources: Mapping[str, str], raw: Mapping[str, Tensor]) -> Iterable[KeyMapping]:
    levels = vae_levels(sources)
    for own, source in sources.items():
        if found.layout == "diffusers":
            name = keys_vae.modern(own) if re.match(OWN[found.component], own) else None
        elif found.component == UNET:
            name = keys_unet.to_diffusers(own)
        else:
            name = keys_vae.to_diffusers(own, levels)
        if name is None:
            continue
        flat = found.component == VAE and ".attentions." in name and name.endswith("weight")
        shape = shape_of(raw, source)
        yield matrix(name, source, shape) if flat and len(shape) > 1 else same(name, source, shape)


def vae_levels(names: Iterable[str]) -> int:
    """The number of levels of a VAE with these tensor names, in either layout."""
    found = [re.match(r"decoder\.up(?:_blocks)?\.(\d+)\.", name) for name in names]
    return 1 + max((int(f[1]) for f in found if f), default=-1)


def _text(found: Found, sources: Mapping[str, str], raw: Mapping[str, Tensor]) -> Iterable[KeyMapping]:
    if found.layout == "transformers":
        for own, source in sources.items():
            if keys_text.from_transformers(keys_text.ROOT + own):  # position ids are none
                yield same(keys_text.ROOT + own, source, shape_of(raw, source))
        projection = found.prefix.removesuffix(keys_text.ROOT) + "text_projection.weight"
        if found.component == TEXT_2 and projection in raw:
            yield same("text_projection.weight", projection, shape_of(raw, projection))
        return
    layers = _used_layers(found, raw)
    for own, source in sources.items():
        names, shape = keys_text.to_transformers(own, layers), shape_of(raw, source)
        if own == keys_text.PROJECTION:
            yield from (transposed(name, source, shape) for name in names)
        else:
            yield from (rows(name, source, shape, part, len(names)) for part, name in enumerate(names))


def _used_layers(found: Found, raw: Mapping[str, Tensor]) -> int | None:
    """How many layers of an OpenCLIP encoder count: Stable Diffusion 2 reads its texts before the last one."""
    if found.prefix != "cond_stage_model.model.":
        return None
    pattern = re.compile(re.escape(found.prefix) + r"transformer\.resblocks\.(\d+)\.")
    layers = 1 + max(int(f[1]) for f in map(pattern.match, raw) if f)
    # A file that was converted from diffusers lacks the layer that is not used, and the projection.
    return layers - 1 if layers == 24 or found.prefix + keys_text.PROJECTION in raw else layers
