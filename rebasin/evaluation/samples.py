"""What several models generate from the same prompts and the same noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL.Image import Image

from ..types import brief


@brief
@dataclass(frozen=True)
class Samples:
    """`rows[label][i]` is what the model `label` made from `prompts[i]`; its noise depends on i alone."""

    prompts: Sequence[str]
    rows: Mapping[str, Sequence[Image]]
