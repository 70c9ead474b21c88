"""Which block of a model a tensor belongs to, in the names that people who merge Stable Diffusion use.

Those are BASE, IN00 to IN11, M00, OUT00 to OUT11 for Stable Diffusion 1 and 2 (26 blocks), and BASE, IN00 to IN08,
M00, OUT00 to OUT08 and VAE for SDXL (21). They number the UNet's stages in the original layout; diffusers' modules map
onto them. BASE is everything before the UNet's stages: text encoders and time embedding (and the VAE, in SD 1 and 2).
In a model of another kind every layer is a block of its own, in the model's order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SD1 = ("BASE", *(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12)))
SDXL = ("BASE", *(f"IN{i:02}" for i in range(9)), "M00", *(f"OUT{i:02}" for i in range(9)), "VAE")

_LDM = re.compile(
    r"^(?:model\.diffusion_model\.)?(input_blocks|middle_block|output_blocks|out|time_embed|label_emb)\.(\d+)?"
)
_DIFFUSERS = re.compile(
    r"^(?:unet\.)?(?:(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\."
    r"|(mid_block|conv_in|conv_norm_out|conv_out|time_embedding|add_embedding|class_embedding)\.)"
)
_VAE = re.compile(r"^(?:first_stage_model|vae)\.")


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model.

    Attributes:
        of: tensor name -> block.
        order: the blocks from input to output; BASE first and VAE last.
        kind: "sd1", "sdxl", "unet" (another UNet of this design) or "layers" (any other model).
    """

    of: Mapping[str, str]
    order: tuple[str, ...]
    kind: str

    @property
    def depth(self) -> tuple[str, ...]:
        """The blocks that have a depth: all but BASE and VAE."""
        without = () if self.kind == "layers" else ("BASE", "VAE")
        return tuple(block for block in self.order if block not in without)


def find_blocks(names: Iterable[str]) -> Blocks:
    """The blocks of the model whose tensors have these names, in the original or in diffusers' layout.

    The names may be those of a UNet alone, of a whole checkpoint file, or of a pipeline's components, each with the
    component and a dot before it ("unet.", "vae.", "text_encoder.").
    """
    names = list(names)
    if any("output_blocks." in name for name in names):
        stage = {name: _ldm_stage(name) for name in names}
    elif any(re.match(r"^(?:unet\.)?up_blocks\.\d", name) for name in names):
        stage = _diffusers_stages(names)
    else:
        layers = {name: name.rpartition(".")[0] or name for name in names}
        return Blocks(layers, tuple(dict.fromkeys(layers.values())), "layers")

    inputs = sorted({s for s in stage.values() if s.startswith("IN")})
    outputs = sorted({s for s in stage.values() if s.startswith("OUT")})
    last = outputs[-1] if outputs else "OUT00"
    kind = {(12, 12): "sd1", (9, 9): "sdxl"}.get((len(inputs), len(outputs)), "unet")
    # The community's 26 blocks have none for the VAE.
    means = {"END": last, "VAE": "BASE" if kind == "sd1" else "VAE"}
    of = {name: means.get(found, found) for name, found in stage.items()}
    present = set(of.values())
    order = [b for b in ("BASE", *inputs, "M00", *outputs, "VAE") if b in present]
    return Blocks(of, tuple(order), kind)


def _ldm_stage(name: str) -> str:
    found = _LDM.match(name)
    if found is None:
        return "VAE" if _VAE.match(name) else "BASE"
    part, number = found[1], int(found[2] or 0)
    if part in ("input_blocks", "output_blocks"):
        return f"{'IN' if part == 'input_blocks' else 'OUT'}{number:02}"
    return {"middle_block": "M00", "out": "END"}.get(part, "BASE")


def _diffusers_stages(names: list[str]) -> dict[str, str]:
    """IN00 is conv_in; then come each block's layers (a resnet with its attention) and its downsampler."""
    parsed = {name: _DIFFUSERS.match(name) for name in names}
    layers = {"down_blocks": 0, "up_blocks": 0}
    for found in parsed.values():
        if found and found[3] == "resnets":
            layers[found[1]] = max(layers[found[1]], int(found[4]) + 1)
    stages = {}
    for name, found in parsed.items():
        if found is None:
            stages[name] = "VAE" if _VAE.match(name) else "BASE"
        elif found[5]:
            single = {"mid_block": "M00", "conv_in": "IN00", "conv_norm_out": "END", "conv_out": "END"}
            stages[name] = single.get(found[5], "BASE")
        elif found[1] == "down_blocks":
            within = layers["down_blocks"] if found[3] == "downsamplers" else int(found[4])
            stages[name] = f"IN{1 + int(found[2]) * (layers['down_blocks'] + 1) + within:02}"
        else:
            # An upsampler closes the stage of its block's last layer.
            within = layers["up_blocks"] - 1 if found[3] == "upsamplers" else int(found[4])
            stages[name] = f"OUT{int(found[2]) * layers['up_blocks'] + within:02}"
    return stages
