"""Which module of which component an adapter's key means.

Adapters name modules in many ways, but all of them spell the path of the module in the model that was trained:
`unet.down_blocks.0.attentions.0.proj_in` in diffusers, the same with underscores for dots in kohya's files, with
LDM's block numbers instead of diffusers' in kohya's SDXL files. Paths are compared with underscores for dots, so
one table per component serves them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..checkpoints.keys_unet import from_diffusers

PREFIXES = (
    ("lora_te2_", "text_encoder_2"),
    ("lora_te1_", "text_encoder"),
    ("lora_te_", "text_encoder"),
    ("lora_unet_", "unet"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("unet.", "unet"),
    ("te2.", "text_encoder_2"),
    ("te1.", "text_encoder"),
    ("lycoris_", ""),
    ("base_model.model.", ""),
)
"""What a key starts with and the component it means; "" is whichever has such a module."""


def split_prefix(module: str) -> tuple[str | None, str]:
    """(component, rest) of an adapter's name for a module; None if the name doesn't tell the component."""
    component = None
    while known := next((known for known in PREFIXES if module.startswith(known[0])), None):
        module, component = module.removeprefix(known[0]), known[1] or component
    # The attention processors of older diffusers have names of their own.
    module = re.sub(r"\.processor\.(to_\w+)$", r".\1", module)
    module = re.sub(r"(attn\d[._]to_out)$", r"\1.0", module)
    module = re.sub(r"(self_attn[._])to_(q|k|v|out)$", r"\1\2_proj", module)  # so they did in text encoders
    return component, module


UNET = re.compile(
    r"(down|up|input|output)_blocks_\d|(mid|middle)_block_|(time|add|label)_emb|conv_(in|norm_out|out)|out_\d"
)
TEXT = re.compile(r"(text_model_)?(encoder_layers|embeddings|final_layer_norm)_")
TRANSFORMER = re.compile(
    r"(lora_)?(transformer|diffusion_model)_|(single_)?transformer_blocks_\d|(double|single|joint)?_?blocks_\d"
)
"""How the paths of modules begin, flat."""


def part_of(component: str | None, path: str) -> str:
    """What a module is of, for a report: kohya's files say "unet" of newer families' transformers, too, and some
    names say nothing.
    """
    own = path.replace(".", "_").removeprefix("model_diffusion_model_")
    if component not in (None, "unet"):
        return component
    if UNET.match(own.removeprefix("diffusion_model_")):
        return "unet"
    if component is None and TEXT.match(own):
        return "text_encoder"
    return "transformer" if component == "unet" or TRANSFORMER.match(own) else "model"


def flat(path: str) -> str:
    """`path` without what writers of adapters disagree on: dots or underscores, and CLIP's outer module."""
    return path.replace(".", "_").removeprefix("text_model_")


def table(parameters: Iterable[str]) -> dict[str, str]:
    """Flat path -> module, for every module of a component that has parameters of these names.

    A UNet's modules are there under their LDM names, too.
    """
    own = set(parameters)
    found = {flat(module): module for module in dict.fromkeys(name.rpartition(".")[0] for name in own)}
    for name in own:
        theirs = from_diffusers(name, own)
        if theirs is not None:
            found.setdefault(flat(theirs.rpartition(".")[0]), name.rpartition(".")[0])
    return found
