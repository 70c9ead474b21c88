"""Names of a Stable Diffusion VAE's tensors: the original layout and diffusers', both ways.

The original decoder counts its levels from the largest picture, diffusers from the smallest; the original attention
is four 1x1 convolutions [C, C, 1, 1], diffusers' four matrices [C, C].
"""

from __future__ import annotations

import re
from functools import cache

from .keys_unet import LAYERS, LEVELS, renamed

ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

DEPRECATED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers called them at first; its published folders still do."""

OUTSIDE = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}


ENDS = {"conv_in": "conv_in", "conv_out": "conv_out", "norm_out": "conv_norm_out"}


@cache
def _tables(levels: int, back: bool = False) -> tuple[dict[str, str], ...]:
    """Original -> diffusers, or `back`: modules, and what has inside of it the same names in both."""
    places = [(f"encoder.down.{level}", f"encoder.down_blocks.{level}", "down") for level in range(LEVELS)]
    places += [(f"decoder.up.{levels - 1 - i}", f"decoder.up_blocks.{i}", "up") for i in range(levels)]
    modules, resnets = {}, {}
    for old, new, way in places:
        modules[f"{old}.{way}sample.conv"] = f"{new}.{way}samplers.0.conv"
        resnets |= {f"{old}.block.{n}": f"{new}.resnets.{n}" for n in range(LAYERS + 1)}
    for side in ("encoder", "decoder"):
        resnets |= {f"{side}.mid.block_{n + 1}": f"{side}.mid_block.resnets.{n}" for n in (0, 1)}
        modules |= {f"{side}.{old}": f"{side}.{new}" for old, new in ENDS.items()}
        attention = f"{side}.mid_block.attentions.0"
        modules |= {f"{side}.mid.attn_1.{old}": f"{attention}.{new}" for old, new in ATTENTION.items()}
    modules |= {f"{old}.nin_shortcut": f"{new}.conv_shortcut" for old, new in resnets.items()}
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
