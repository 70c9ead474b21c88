"""What goes with the UNets of the tiny Stable Diffusion, whoever trained them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.captioned_digits import PLAIN_TEMPLATES, WORDS
from ..models import tiny_sd
from ..objectives.reward import Embed
from .around import Around

TEXTS = ["a handwritten seven", ""]
"""Of the example call."""

CAPTIONS = [template.format(digit=word) for template in PLAIN_TEMPLATES for word in WORDS]
"""The prompts that the models were made for."""

SHOWN = [f"a handwritten {word}" for word in WORDS]
"""The prompts of the samples, digit by digit."""


def digits_pipeline(unet: Any, root: Path | None = None, device: torch.device | None = None) -> Around:
    """The other parts of the pipeline, from the package or the folder `root`, around a UNet; all UNets share them."""
    return Around(tiny_sd.load_pipeline(unet, path=root), device=device)


def example(around: Around, embed: Embed) -> tuple[Tensor, Tensor, Any]:
    """A call of the UNet, or of what has it inside, which is told what `embed` says of two prompts."""
    noise = torch.randn(2, *around.shape, generator=torch.Generator().manual_seed(0))
    return noise, torch.tensor([10, 500]), embed(TEXTS)
