"""Names of a Stable Diffusion UNet's tensors: the original (LDM, SGM) layout and diffusers', both ways.

The original code numbers its blocks in one row, diffusers by level: with two ResNets a level, input block 3 i + j + 1
is ResNet j of level i and input block 3 i + 3 its downsampler; output block 3 i + j is ResNet j of level i, and an
upsampler hangs on the last of them, after the attention if there is one.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Mapping

LAYERS = 2
"""ResNets a level on the way down, one more on the way up, in every Stable Diffusion of this layout."""

LEVELS = 16
"""More than any model has: the tables of names are made for so many."""

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}

ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj",  # a distilled model's guidance (LCM)
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def _blocks() -> Iterator[tuple[str, str, str, str]]:
    """A ResNet in the original layout and in diffusers', and the attention behind it in both."""
    for level, layer in itertools.product(range(LEVELS), range(LAYERS + 1)):
        number = (LAYERS + 1) * level + layer
        sides = [("output", number, "up"), ("input", number + 1, "down")]
        for theirs, place, ours in sides[: 2 if layer < LAYERS else 1]:
            old, new = f"{theirs}_blocks.{place}", f"{ours}_blocks.{level}"
            yield f"{old}.0", f"{new}.resnets.{layer}", f"{old}.1", f"{new}.attentions.{layer}"
    yield "middle_block.0", "mid_block.resnets.0", "middle_block.1", "mid_block.attentions.0"
    yield "middle_block.2", "mid_block.resnets.1", "middle_block.1", "mid_block.attentions.0"


ATTENTIONS = {old: new for _, _, old, new in _blocks()}
"""Whatever is in them has the same names in both."""

MODULES = ENDS | {
    f"{old}.{inner}": f"{new}.{RESNET[inner]}" for old, new, _, _ in _blocks() for inner in RESNET
}
for _level in range(LEVELS):
    _last = (LAYERS + 1) * _level + LAYERS
    MODULES[f"input_blocks.{_last + 1}.0.op"] = f"down_blocks.{_level}.downsamplers.0.conv"
    for _slot in (2, 1):  # behind an attention, or not: the way back without one is the last of them
        MODULES[f"output_blocks.{_last}.{_slot}.conv"] = f"up_blocks.{_level}.upsamplers.0.conv"

ATTENTIONS_BACK = {new: old for old, new in ATTENTIONS.items()}
MODULES_BACK = {new: old for old, new in MODULES.items()}


def to_diffusers(name: str) -> str | None:
    """The name in diffusers of a tensor of the original layout (without prefix), None if there is none."""
    return renamed(name, MODULES, ATTENTIONS)


def from_diffusers(name: str, names: Container[str]) -> str | None:
    """The name in the original layout of a tensor of diffusers' UNet that has `names`, None if there is none."""
    old = renamed(name, MODULES_BACK, ATTENTIONS_BACK)
    block, upsampler, _ = name.partition(".upsamplers.0.")
    if old and upsampler and f"{block}.attentions.{LAYERS}.norm.weight" in names:
        return old.replace(".1.conv.", ".2.conv.")
    return old


def renamed(name: str, modules: Mapping[str, str], parts: Mapping[str, str]) -> str | None:
    """The tensor `name` of one of `modules`, or of something inside of one of `parts`, under its other name."""
    head = module = name.rpartition(".")[0]
    if module in modules:
        return modules[module] + name[len(module) :]
    while head and head not in parts:
        head = head.rpartition(".")[0]
    return parts[head] + name[len(head) :] if head else None
