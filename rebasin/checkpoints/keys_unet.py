"""Names of a Stable Diffusion UNet's tensors: the original (LDM, SGM) layout and diffusers', both ways.

The original code numbers its blocks in one row, diffusers by level: with two ResNets a level, input block 3 i + j + 1
is ResNet j of level i and input block 3 i + 3 its downsampler; output block 3 i + j is ResNet j of level i, and an
upsampler hangs on the last of them, after the attention if there is one.
"""

from __future__ import annotations

import re
from collections.abc import Container

LAYERS = 2
"""ResNets a level on the way down, one more on the way up, in every Stable Diffusion of this layout."""

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
RESNET_BACK = {new: old for old, new in RESNET.items()}

ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
ENDS_BACK = {new: old for old, new in ENDS.items()}


def to_diffusers(name: str) -> str | None:
    """The name in diffusers of a tensor of the original layout (without prefix), None if there is none."""
    stem, _, leaf = name.rpartition(".")
    if stem in ENDS:
        return f"{ENDS[stem]}.{leaf}"
    if found := re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)", name):
        side, number, slot, rest = found[1], int(found[2]), int(found[3]), found[4]
        if side == "input":
            level, layer = divmod(number - 1, LAYERS + 1)
            if layer == LAYERS:
                ends = {"op.weight": "conv.weight", "op.bias": "conv.bias"}
                return (
                    f"down_blocks.{level}.downsamplers.0.{ends[rest]}" if slot == 0 and rest in ends else None
                )
            block = f"down_blocks.{level}"
        else:
            level, layer = divmod(number, LAYERS + 1)
            block = f"up_blocks.{level}"
            if slot in (1, 2) and rest in ("conv.weight", "conv.bias"):
                return f"{block}.upsamplers.0.{rest}"
        return _inner(f"{block}.resnets.{layer}", f"{block}.attentions.{layer}", slot, rest)
    if found := re.fullmatch(r"middle_block\.([012])\.(.+)", name):
        slot = int(found[1])
        return _inner(f"mid_block.resnets.{slot // 2}", "mid_block.attentions.0", slot % 2, found[2])
    return None


def _inner(resnet: str, attention: str, slot: int, rest: str) -> str | None:
    if slot == 1:
        return f"{attention}.{rest}"
    stem, _, leaf = rest.rpartition(".")
    return f"{resnet}.{RESNET[stem]}.{leaf}" if slot == 0 and stem in RESNET else None


def from_diffusers(name: str, names: Container[str]) -> str | None:
    """The name in the original layout of a tensor of diffusers' UNet that has `names`, None if there is none."""
    stem, _, leaf = name.rpartition(".")
    if stem in ENDS_BACK:
        return f"{ENDS_BACK[stem]}.{leaf}"
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
        side, level, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        if kind == "downsamplers":
            return f"input_blocks.{(LAYERS + 1) * (level + 1)}.0.{rest.replace('conv.', 'op.', 1)}"
        if kind == "upsamplers":
            slot = 2 if f"up_blocks.{level}.attentions.{LAYERS}.norm.weight" in names else 1
            return f"output_blocks.{(LAYERS + 1) * level + LAYERS}.{slot}.{rest}"
        number = (LAYERS + 1) * level + layer
        block = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
        return _outer(block, kind, 0, 1, rest)
    if found := re.fullmatch(r"mid_block\.(\w+)\.(\d+)\.(.+)", name):
        return _outer("middle_block", found[1], 2 * int(found[2]), 1, found[3])
    return None


def _outer(block: str, kind: str, resnet: int, attention: int, rest: str) -> str | None:
    if kind == "attentions":
        return f"{block}.{attention}.{rest}"
    stem, _, leaf = rest.rpartition(".")
    return (
        f"{block}.{resnet}.{RESNET_BACK[stem]}.{leaf}" if kind == "resnets" and stem in RESNET_BACK else None
    )
