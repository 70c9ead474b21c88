"""Names of a Stable Diffusion VAE's tensors: the original layout and diffusers', both ways.

The original decoder counts its levels from the largest picture, diffusers from the smallest; the original attention
is four 1x1 convolutions [C, C, 1, 1], diffusers' four matrices [C, C].
"""

from __future__ import annotations

import re

ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
ATTENTION_BACK = {new: old for old, new in ATTENTION.items()}

DEPRECATED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers called them at first; its published folders still do."""


def to_diffusers(name: str, levels: int) -> str | None:
    """The name in diffusers of a tensor of the original layout (without prefix) with `levels` levels, or None."""
    if name.startswith(("quant_conv.", "post_quant_conv.")):
        return name
    if found := re.fullmatch(r"(encoder|decoder)\.(conv_in|conv_out|norm_out)\.(\w+)", name):
        return f"{found[1]}.{found[2].replace('norm_out', 'conv_norm_out')}.{found[3]}"
    if found := re.fullmatch(r"(encoder|decoder)\.mid\.(block_[12]|attn_1)\.(.+)", name):
        if found[2] == "attn_1":
            stem, _, leaf = found[3].rpartition(".")
            return (
                f"{found[1]}.mid_block.attentions.0.{ATTENTION[stem]}.{leaf}" if stem in ATTENTION else None
            )
        return f"{found[1]}.mid_block.resnets.{int(found[2][-1]) - 1}.{_shortcut(found[3])}"
    if found := re.fullmatch(r"(encoder\.down|decoder\.up)\.(\d+)\.(.+)", name):
        level, rest = int(found[2]), found[3]
        block = f"encoder.down_blocks.{level}"
        if found[1] == "decoder.up":
            block = f"decoder.up_blocks.{levels - 1 - level}"
        if inner := re.fullmatch(r"block\.(\d+)\.(.+)", rest):
            return f"{block}.resnets.{inner[1]}.{_shortcut(inner[2])}"
        if inner := re.fullmatch(r"(down|up)sample\.conv\.(\w+)", rest):
            return f"{block}.{inner[1]}samplers.0.conv.{inner[2]}"
    return None


def from_diffusers(name: str, levels: int) -> str | None:
    """The name in the original layout of a tensor of diffusers' VAE with `levels` levels, or None."""
    if name.startswith(("quant_conv.", "post_quant_conv.")):
        return name
    if found := re.fullmatch(r"(encoder|decoder)\.(conv_in|conv_out|conv_norm_out)\.(\w+)", name):
        return f"{found[1]}.{found[2].replace('conv_norm_out', 'norm_out')}.{found[3]}"
    if found := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(\w+)", name):
        old = ATTENTION_BACK.get(found[2])
        return f"{found[1]}.mid.attn_1.{old}.{found[3]}" if old else None
    if found := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", name):
        return f"{found[1]}.mid.block_{int(found[2]) + 1}.{_shortcut(found[3], back=True)}"
    if found := re.fullmatch(r"(?:encoder|decoder)\.(down|up)_blocks\.(\d+)\.(.+)", name):
        level, rest = int(found[2]), found[3]
        block = f"encoder.down.{level}" if found[1] == "down" else f"decoder.up.{levels - 1 - level}"
        if inner := re.fullmatch(r"resnets\.(\d+)\.(.+)", rest):
            return f"{block}.block.{inner[1]}.{_shortcut(inner[2], back=True)}"
        if inner := re.fullmatch(r"(down|up)samplers\.0\.conv\.(\w+)", rest):
            return f"{block}.{inner[1]}sample.conv.{inner[2]}"
    return None


def modern(name: str) -> str:
    """The present name of a tensor that may have a deprecated one."""
    found = re.fullmatch(r"(.*\.attentions\.0\.)(query|key|value|proj_attn)\.(\w+)", name)
    return f"{found[1]}{DEPRECATED[found[2]]}.{found[3]}" if found else name


def _shortcut(rest: str, back: bool = False) -> str:
    old, new = ("conv_shortcut", "nin_shortcut") if back else ("nin_shortcut", "conv_shortcut")
    return rest.replace(f"{old}.", f"{new}.", 1) if rest.startswith(f"{old}.") else rest
