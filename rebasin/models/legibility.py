"""A real scorer for the embedded diffusion model: does the picture show the digit that the prompt names?"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import classification
from ..data.captioned_digits import ASSET, WORDS
from ..errors import DataError
from .cache import trained

ARCHITECTURE = "vgg"
OPTIONS = {"depth": 11, "width": 8}
NUMBERS = {**{word: n for n, word in enumerate(WORDS)}, **{str(n): n for n in range(len(WORDS))}}


class Legibility:
    """Scores [n] of images [n, 1 or 3, 32, 32] in 0..1 (1 is ink): log p(the prompt's digit | image), at most 0.

    The classifier is trained on the 1,000 embedded images on first use (half a minute on one core) and cached; it
    reads 93 % of the 1,000 held-out images.
    """

    def __init__(self) -> None:
        found = trained(ARCHITECTURE, classification.load("mnist", ASSET), OPTIONS)
        self.model = found.model().requires_grad_(False)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raises DataError for a prompt that does not name exactly one digit."""
        return -F.cross_entropy(*self.judged(images, prompts), reduction="none")

    def judged(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The classifier's logits [n, 10] of the images, and the digits that the prompts name."""
        margin = (images.shape[-1] - 28) // 2
        grey = images.mean(1, keepdim=True)[:, :, margin : margin + 28, margin : margin + 28]
        digits = torch.tensor([digit(prompt) for prompt in prompts], device=images.device)
        return self.model.to(images.device)(grey), digits


class Recognised(Legibility):
    """Scores [n] of such images: 1 where the classifier reads the prompt's digit, else 0; their mean is the share."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raises DataError for a prompt that does not name exactly one digit."""
        logits, digits = self.judged(images, prompts)
        return (logits.argmax(1) == digits).float()


def digit(prompt: str) -> int:
    """The digit that a prompt such as "a bold handwritten seven" names."""
    named = {NUMBERS[word] for word in re.findall(r"\w+", prompt.lower()) if word in NUMBERS}
    if len(named) != 1:
        raise DataError(f"The prompt {prompt!r} must name one digit, for example 'a handwritten seven'.")
    return named.pop()
