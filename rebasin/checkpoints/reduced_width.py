"""Models of reduced width: the same blocks, the same names, fewer channels. A proof on them takes seconds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from .architectures import FULL_WIDTH, embed_dim, published, set_widths
from .components import TEXT, TEXT_2, UNET, VAE
from .families import VARIANTS

Config = dict[str, Any]

CHANNELS = {variant: channels for channels, variant in VARIANTS.items()}

REDUCED_WIDTH = {"sd1": 16, "sd2": 20, "sdxl": 20, "sdxl_refiner": 24}
"""Channels of the first level, reduced, for proofs and tests: the fewest that keep every head apart."""

FEW_TOKENS = 64
"""The vocabulary of a text encoder in a proof."""


def reduced_configs(
    family: str,
    width: int | None = None,
    *,
    variant: str = "base",
    depth: int | None = None,
    vocabulary: int | None = None,
) -> dict[str, Config]:
    """Component -> config of a family, as released or narrower.

    Args:
        width: channels of the UNet's first level; the others, the VAE's and the texts' shrink with it. Heads stay as
            many, so it must be a multiple of 8 for SD1, of 10 for SD2 and SDXL, of 12 for the refiner.
        depth: at most so many transformer layers in a block of the UNet and in the text encoders; None: all.
        vocabulary: tokens that the text encoders know.
    """
    configs = {name: c for name, c in published(family).items() if name in (UNET, VAE, TEXT, TEXT_2)}
    width, full = width or FULL_WIDTH[family], FULL_WIDTH[family]
    own = {name: narrow_text(configs[name], width / full) for name in (TEXT, TEXT_2) if name in configs}
    texts = list(own.values())
    configs |= own
    reads = sum(text["hidden_size"] for text in texts)
    configs[UNET] = narrow_unet(configs[UNET], width, reads, texts[-1]["projection_dim"])
    configs[UNET]["in_channels"] = CHANNELS[variant]
    configs[VAE] = narrow_vae(configs[VAE], width / full)
    if depth is not None:
        layers = configs[UNET].get("transformer_layers_per_block", 1)
        configs[UNET]["transformer_layers_per_block"] = (
            min(layers, depth) if isinstance(layers, int) else [min(n, depth) for n in layers]
        )
        for text in texts:
            text["num_hidden_layers"] = min(text["num_hidden_layers"], depth)
    for text in texts:
        text["vocab_size"] = vocabulary or text["vocab_size"]
    return configs


def narrow(
    config: Mapping[str, Any], component: str, family: str, reads: int = 24, pooled: int = 24
) -> Config:
    """A component's config with so few channels that it can be computed with in float64 in seconds."""
    ratio = REDUCED_WIDTH[family] / FULL_WIDTH[family]
    if component == UNET:
        width = min(REDUCED_WIDTH[family], config["block_out_channels"][0])
        return narrow_unet(config, width, reads, pooled)
    if component == VAE:
        return narrow_vae(config, ratio)
    text = {**narrow_text(config, ratio), "vocab_size": FEW_TOKENS}
    ids = (f"{name}_token_id" for name in ("bos", "eos", "pad"))
    return text | {key: FEW_TOKENS - 1 for key in ids if (text.get(key) or 0) >= FEW_TOKENS}


def narrow_unet(config: Mapping[str, Any], width: int, reads: int, pooled: int) -> Config:
    """A UNet's config with `width` channels at the first level, for texts of width `reads`."""
    config = copy.deepcopy(dict(config))
    full = config["block_out_channels"][0]
    if width == full:
        return config
    set_widths(config, [w * width // full for w in config["block_out_channels"]])
    config["cross_attention_dim"] = reads
    if config.get("addition_time_embed_dim"):
        numbers = 5 if len(config["block_out_channels"]) == 4 else 6
        config["addition_time_embed_dim"] = embed_dim(config["addition_time_embed_dim"], width, full)
        config["projection_class_embeddings_input_dim"] = pooled + numbers * config["addition_time_embed_dim"]
    return config


def narrow_vae(config: Mapping[str, Any], ratio: float) -> Config:
    """A VAE's config with `ratio` of its channels, in steps of 8."""
    config = copy.deepcopy(dict(config))
    if ratio < 1:
        full = config["block_out_channels"][0]
        base = max(1, round(full * ratio / 8)) * 8
        set_widths(config, [w * base // full for w in config["block_out_channels"]])
    return config


def narrow_text(config: Mapping[str, Any], ratio: float) -> Config:
    """A text encoder's config with `ratio` of the width of its heads, at least 4."""
    if ratio >= 1:
        return dict(config)
    heads = config["num_attention_heads"]
    width = heads * max(4, int(config["hidden_size"] // heads * ratio))
    if width == config["hidden_size"]:  # as narrow as that already
        return dict(config)
    return {**config, "hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
