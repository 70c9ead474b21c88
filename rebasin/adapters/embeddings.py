"""Textual inversions: vectors in the stream of a text encoder's tokens, which follow its token embedding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import AdapterError, shown
from ..spec import Alignment, Permutation, PermutationSpec
from ..spec.mapped import MappedState, Rounding
from ..types import State, shape_of, widened
from .union import component_of, prefix_of

TEXT, TEXT_2 = "text_encoder", "text_encoder_2"

TOKENS = "text_model.embeddings.token_embedding.weight"

CLIP: Mapping[str, str] = {"clip_l": TEXT, "clip_g": TEXT_2}
"""The ends of names that tell which of two encoders is meant."""


def move_embeddings(
    member: Permutation | Alignment,
    embeddings: State,
    view: MappedState | None = None,
    *,
    what: str = "the embedding",
    rounding: Rounding | None = None,
) -> dict[str, Tensor]:
    """Vectors of tokens, [width] or [tokens, width], that are to the moved text encoder what they were to it.

    Args:
        member: what was applied to the text encoder: a permutation, or an alignment, of which `view` shows the maps.
        embeddings: under any names; one that ends in clip_l or clip_g is for the first or second encoder.

    Raises:
        AdapterError: no text encoder of the member has vectors of that width.
    """
    permutation = member if isinstance(member, Permutation) else member.permutation
    moved: dict[str, Tensor] = {}
    for key in embeddings:
        tensor = embeddings[key]
        table = table_of(member.spec, key, shape_of(embeddings, key), what)
        moved[key] = tensor
        if table is None:
            continue
        axis = tensor.ndim - 1
        index = dict(permutation.axes_of(table)).get(1)
        if index is not None:
            moved[key] = tensor.index_select(axis, torch.from_numpy(index)).contiguous()
        if view is not None and view.acting(table, 1):
            wide = view.act(table, 1, moved[key].to(widened(tensor.dtype)), axis)
            moved[key] = (rounding or view.rounding).rounded(key, wide, tensor.dtype)
    return moved


def table_of(
    spec: PermutationSpec, key: str, shape: tuple[int, ...], what: str = "the embedding"
) -> str | None:
    """The token embedding, as the spec names it, that vectors of this name and shape are for; None if the spec does not
    speak of its encoder.

    Raises:
        AdapterError: the spec has text encoders, but none of that width.
    """
    tables = {
        name: f"{prefix_of(spec, name)}{TOKENS}" for name in component_of(spec) if name in (TEXT, TEXT_2)
    }
    tables = {name: table for name, table in tables.items() if table in spec.shapes}
    told = next((component for end, component in CLIP.items() if key.endswith(end)), None)
    if told is not None and told not in tables:
        return None
    width = shape[-1] if shape else 0
    fitting = [t for name, t in tables.items() if told in (None, name) and spec.shapes[t][1] == width]
    if tables and not fitting:
        raise AdapterError(
            f"{what} has vectors {shown(key)} of width {width}, but the aligned text encoder needs"
            f" {' or '.join(str(spec.shapes[t][1]) for t in tables.values())}: it was trained for another model."
        )
    return fitting[0] if fitting else None


def moves(member: Permutation | Alignment, table: str) -> bool:
    """Whether the vectors of a token embedding move at all."""
    permutation = member if isinstance(member, Permutation) else member.permutation
    maps = {} if isinstance(member, Permutation) else member.maps
    acting = (
        site.parameter == table and site.axis == 1
        for group in member.spec.continuous
        if group.name in maps
        for site in group.sites
    )
    return dict(permutation.axes_of(table)).get(1) is not None or any(acting)
