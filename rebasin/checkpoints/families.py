"""What a file is, from the names and shapes of its tensors alone: a family of Stable Diffusion, or something else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .components import TEXT, TEXT_2, UNET, VAE, Found

Shapes = Mapping[str, tuple[int, ...]]

TITLES = {
    "sd1": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "sdxl": "Stable Diffusion XL",
    "sdxl_refiner": "the refiner of Stable Diffusion XL",
    "vae": "a VAE of Stable Diffusion",
    "clip_l": "a CLIP-L text encoder",
    "clip_h": "an OpenCLIP-H text encoder",
    "clip_g": "an OpenCLIP-bigG text encoder",
}
"""The families, as a sentence names them."""

EXPECTED = (
    "a model of Stable Diffusion 1, 2, XL or 3, Flux, Chroma, Lumina 2, Z-Image, Qwen-Image, Krea 2 or Wan, or a folder"
    " of transformers or diffusers was expected"
)

VARIANTS = {4: "base", 9: "inpainting", 8: "instruct-pix2pix", 5: "depth"}
"""By the UNet's input channels."""


def title(family: str, variant: str) -> str:
    """A family and its variant, as a sentence names them."""
    return TITLES[family] if variant in ("base", "") else f"{TITLES[family]} ({variant})"


def identify(
    components: Mapping[str, Shapes],
    found: Mapping[str, Found],
    where: object,
    config: Mapping[str, Any] | None = None,
) -> tuple[str, str]:
    """The family and the variant of the components with these shapes, in diffusers' names.

    Args:
        config: of the UNet, where a diffusers folder brings it. It may then have any size and any number of levels: it
            is of the family that it is built like.

    Raises:
        CheckpointError: they belong to no family that is known here, or to different ones.
    """
    if UNET not in components:
        if VAE in components and len(components) == 1:
            return "vae", ""
        encoder = next(c for c in components if c != VAE)
        return _text_family(components[encoder], found[encoder]), ""
    shapes = components[UNET]
    family = _unet_family(shapes) or (_built_like(components, config) if config else None)
    if family is None:
        raise CheckpointError(f"{where} is {_other(shapes)}, but {EXPECTED}.")
    _check_texts(family, components, where)
    channels = shapes["conv_in.weight"][1] if "conv_in.weight" in shapes else 4
    return family, VARIANTS.get(channels, f"{channels} input channels")


def _unet_family(shapes: Shapes) -> str | None:
    """The family that has a UNet with as many levels as this."""
    levels, attends, vector = _levels(shapes), _attends(shapes), _vector(shapes)
    if vector and not attends and levels in (3, 4):
        return "sdxl" if levels == 3 else "sdxl_refiner"
    if not vector and attends and levels == 4:
        return "sd2" if _linear(shapes) else "sd1"
    return None


def _built_like(components: Mapping[str, Shapes], config: Mapping[str, Any]) -> str | None:
    """The family whose UNet is called like this one: with text states, and perhaps sizes and a pooled text."""
    other = ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type")
    kind = config.get("addition_embed_type")
    if config.get("_class_name") != "UNet2DConditionModel" or any(config.get(key) for key in other):
        return None
    shapes = components[UNET]
    if text_width(shapes) is None or kind not in (None, "text_time"):
        return None
    if kind is not None:
        return "sdxl_refiner" if TEXT_2 in components and TEXT not in components else "sdxl"
    return "sd2" if _linear(shapes) else "sd1"


def _levels(shapes: Shapes) -> int:
    blocks = [re.match(r"down_blocks\.(\d+)\.", name) for name in shapes]
    return 1 + max((int(f[1]) for f in blocks if f), default=-1)


def _attends(shapes: Shapes) -> bool:
    return "down_blocks.0.attentions.0.proj_in.weight" in shapes


def _vector(shapes: Shapes) -> bool:
    return "add_embedding.linear_1.weight" in shapes


def _linear(shapes: Shapes) -> bool:
    """Whether matrices, not convolutions, stand before the transformers."""
    return len(next((s for n, s in shapes.items() if n.endswith("attentions.0.proj_in.weight")), ())) == 2


def _other(shapes: Shapes) -> str:
    if _vector(shapes) and _attends(shapes):
        return "Stable Diffusion unCLIP"
    return f"another UNet, of {_levels(shapes)} levels"


def _check_texts(family: str, components: Mapping[str, Shapes], where: object) -> None:
    width = text_width(components[UNET])
    widths = {
        name: components[name][key][1]
        for name in (TEXT, TEXT_2)
        if name in components and (key := "text_model.embeddings.token_embedding.weight") in components[name]
    }
    needed = {"sdxl": {TEXT, TEXT_2}, "sdxl_refiner": {TEXT_2}}.get(family, {TEXT})
    if set(widths) - needed or (set(widths) == needed and sum(widths.values()) != width):
        texts = ", ".join(f"{name} of width {n}" for name, n in widths.items())
        raise CheckpointError(
            f"{where} mixes two families: its UNet is {TITLES[family]} and reads texts of width {width}, but it"
            f" has {texts}."
        )


def text_width(shapes: Shapes) -> int | None:
    """The width of the texts that a UNet reads: columns of the keys of its cross attention."""
    return next((s[1] for n, s in shapes.items() if n.endswith("attn2.to_k.weight")), None)


def _text_family(shapes: Shapes, found: Found) -> str:
    width = shapes.get("text_model.embeddings.token_embedding.weight", (0, 0))[1]
    if width >= 1280 or found.component == TEXT_2:
        return "clip_g"
    return "clip_h" if width == 1024 or found.layout == "openclip" else "clip_l"


ADAPTER = "a LoRA or another adapter"

EMBEDDING = "a textual inversion embedding"

FOREIGN = {
    ADAPTER: r"\.lora_(down|up|A|B|mid)\b|\.lora[_.](linear|unet|te)|^lora_"
    r"|\.(hada_w|lokr_w|oft_|diff_b)|^(unet|text_encoder):\d+:(up|down)$|\.on_input$|\.(diff|dora_scale)$"
    r"|^bundle_emb\.",
    "a ControlNet": r"input_hint_block\.|controlnet_cond_embedding\.|^control_model\."
    r"|(^|\.)(controlnet_(blocks|x_embedder)|control_(layers|noise_refiner|all_x_embedder))\.",
    "a T2I or IP adapter": r"^(image_proj|ip_adapter)\.|^adapter\.body\.",
    "a motion module (AnimateDiff)": r"motion_modules\.",
    "a video model": r"time_stack\.|temporal_transformer_blocks\.",
    "a part of Stable Diffusion 3": r"joint_blocks\.|transformer_blocks\.\d+\.attn\.add_q_proj",
    "a part of Flux": r"double_blocks\.|single_transformer_blocks\.",
    "Stable Cascade": r"clip_txt_mapper\.|channelwise\.0\.",
    "a PixArt or DiT model": r"adaln_single\.|^(model\.)?blocks\.\d+\.(cross_attn|adaLN)",
    EMBEDDING: r"^emb_params$|^string_to_param|^clip_[lg]$|^<.*>$",
    "a hypernetwork": r"^(768|1024|320|640|1280)\.\d",
    "an upscaler (ESRGAN)": r"RDB\d\.conv|^model\.0\.weight$",
}
"""What people mistake for a model, by the names of its tensors."""

NO_MODEL = (ADAPTER, "a ControlNet", "a T2I or IP adapter", "a motion module (AnimateDiff)", EMBEDDING)
"""What belongs to a model and is none."""

INSTEAD = {
    ADAPTER: "rebasin apply PERMUTATION FILE moves one of Stable Diffusion 1, 2 or XL along; merge any other into"
    " its model",
    "a ControlNet": "rebasin apply PERMUTATION FILE moves it along with its model",
    EMBEDDING: "it fits an aligned model as it is, unless that was aligned with --joint",
    "a permutation that rebasin wrote": "--permutation FILE and rebasin apply take it",
}
"""What to do with it."""


def no_model(where: object, what: str | None) -> CheckpointError:
    """The error for a file that is something else, or unknown (None)."""
    if what == ADAPTER:
        return CheckpointError(f"{where} is {what} and no model; {INSTEAD[what]}.")
    instead = f"; {INSTEAD[what]}" if what in INSTEAD else ""
    if what is None and isinstance(where, Path) and (where / "config.json").is_file():
        instead = "; its config.json names no class (architectures, model_type or _class_name)"
    elif what is None and isinstance(where, Path) and (where.parent / "config.json").is_file():
        instead = "; a config.json lies beside it: give the folder"
    return CheckpointError(f"{where} is {what or 'no model that is known here'}, but {EXPECTED}{instead}.")


def foreign(names: Mapping[str, object]) -> str | None:
    """What a file is that has none of the components, or has an adapter's tensors; None if that is unknown."""
    return next(
        (t for t, pattern in FOREIGN.items() if any(re.search(pattern, name) for name in names)), None
    )
