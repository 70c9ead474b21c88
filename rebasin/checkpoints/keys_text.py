"""Names of a CLIP text encoder's tensors: OpenCLIP's and transformers', both ways.

OpenCLIP keeps query, key and value in one matrix, rows in this order, and its projection transposed. CLIP-L comes in
transformers' own layout, in some old files without the leading `text_model.`.
"""

from __future__ import annotations

import re

ROOT = "text_model."

ENDS = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
ENDS_BACK = {new: old for old, new in ENDS.items()}

FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""The rows of `attn.in_proj_weight` and `attn.in_proj_bias`, in order."""

LAYER = {
    "ln_1.": ("layer_norm1",),
    "ln_2.": ("layer_norm2",),
    "attn.in_proj_": FUSED,
    "attn.out_proj.": ("self_attn.out_proj",),
    "mlp.c_fc.": ("mlp.fc1",),
    "mlp.c_proj.": ("mlp.fc2",),
}
LAYER_BACK = {new: old for old, parts in LAYER.items() for new in parts}

PROJECTION = "text_projection"


def to_transformers(name: str, layers: int | None = None) -> tuple[str, ...]:
    """The names in transformers of what an OpenCLIP tensor holds: one, three for fused ones, none if unknown.

    With `layers`, further layers and the projection have no name: Stable Diffusion 2 uses neither.
    """
    if name in ENDS:
        return (ROOT + ENDS[name],)
    if name == PROJECTION:
        return (f"{PROJECTION}.weight",) if layers is None else ()
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+[._])(weight|bias)", name)
    if not found or (layers is not None and int(found[1]) >= layers):
        return ()
    layer = f"{ROOT}encoder.layers.{found[1]}"
    return tuple(f"{layer}.{part}.{found[3]}" for part in LAYER.get(found[2], ()))


def from_transformers(name: str) -> tuple[str, int | None] | None:
    """The OpenCLIP tensor that holds a tensor of transformers, and which third of its rows if it is fused."""
    if name == f"{PROJECTION}.weight":
        return PROJECTION, None
    name = name.removeprefix(ROOT)
    if name in ENDS_BACK:
        return ENDS_BACK[name], None
    found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if not found or found[2] not in LAYER_BACK:
        return None
    third = FUSED.index(found[2]) if found[2] in FUSED else None
    return f"transformer.resblocks.{found[1]}.{LAYER_BACK[found[2]]}{found[3]}", third
