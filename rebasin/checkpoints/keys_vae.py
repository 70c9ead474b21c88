"""Names of a Stable Diffusion VAE's tensors: the original layout and diffusers', both ways.

The original decoder counts its levels from the largest picture, diffusers from the smallest; the original attention
is four 1x1 convolutions [C, C, 1, 1], diffusers' four matrices [C, C].
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from .keys_unet import LAYERS, LEVELS, renamed

ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

DEPRECATED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers called them at first; its published folders still do."""

OUTSIDE = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}


def _resnets(levels: int) -> Iterator[tuple[str, str]]:
    for side in ("encoder", "decoder"):
        for number in (1, 2):
            yield f"{side}.mid.block_{number}", f"{side}.mid_block.resnets.{number - 1}"
    for layer in range(LAYERS + 1):
        for level in range(LEVELS):
            yield f"encoder.down.{level}.block.{layer}", f"encoder.down_blocks.{level}.resnets.{layer}"
        for level in range(levels):
            there = levels - 1 - level
            yield f"decoder.up.{there}.block.{layer}", f"decoder.up_blocks.{level}.resnets.{layer}"


@cache
def _tables(levels: int, back: bool = False) -> tuple[dict[str, str], ...]:
    """Original -> diffusers, or `back`: modules, and what has inside of it the same names in both."""
    resnets = dict(_resnets(levels))
    modules = {f"{old}.nin_shortcut": f"{new}.conv_shortcut" for old, new in resnets.items()}
    for side in ("encoder", "decoder"):
        ends = {"conv_in": "conv_in", "conv_out": "conv_out", "norm_out": "conv_norm_out"}
        modules |= {f"{side}.{old}": f"{side}.{new}" for old, new in ends.items()}
        attention = f"{side}.mid_block.attentions.0"
        modules |= {f"{side}.mid.attn_1.{old}": f"{attention}.{new}" for old, new in ATTENTION.items()}
    for level in range(LEVELS):
        modules[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
    for level in range(levels):
        there = levels - 1 - level
        modules[f"decoder.up.{there}.upsample.conv"] = f"decoder.up_blocks.{level}.upsamplers.0.conv"
    tables = modules, OUTSIDE | resnets
    return tuple({new: old for old, new in table.items()} for table in tables) if back else tables


def to_diffusers(name: str, levels: int) -> str | None:
    """The name in diffusers of a tensor of the original layout (without prefix) with `levels` levels, or None."""
    return renamed(name, *_tables(levels))


def from_diffusers(name: str, levels: int) -> str | None:
    """The name in the original layout of a tensor of diffusers' VAE with `levels` levels, or None."""
    return renamed(name, *_tables(levels, back=True))


def modern(name: str) -> str:
    """The present name of a tensor that may have a deprecated one."""
    found = re.fullmatch(r"(.*\.attentions\.0\.)(query|key|value|proj_attn)\.(\w+)", name)
    return f"{found[1]}{DEPRECATED[found[2]]}.{found[3]}" if found else name
