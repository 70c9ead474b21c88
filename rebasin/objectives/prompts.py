"""Batches for objectives that judge images: prompts, their text states, and fixed noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.batches import batched
from ..errors import ConfigError

Embed = Callable[[Sequence[str]], Tensor]
"""n prompts -> text states [n, tokens, width]."""


def prompt_batches(
    prompts: Sequence[str],
    embed: Embed,
    shape: tuple[int, ...],
    *,
    count: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """`count` problems for `Reward`, by default one for each prompt; more repeat the prompts with other noise.

    Args:
        embed: the pipeline's text states; it is also asked for the empty prompt's.
        shape: of the latents of one image.
        seed: of the noise. Image i of a seed has the same noise whatever the prompts, `count` and the batch size are.

    Raises:
        ConfigError: there is nothing to make.
    """
    count = len(prompts) if count is None else count
    if count < 1 or batch_size < 1 or not prompts:
        raise ConfigError(
            f"Images need at least one prompt and one image, but there are {len(prompts)} prompts, {count} images and"
            f" batches of {batch_size}."
        )
    generator = torch.Generator().manual_seed(seed)
    noise = torch.stack([torch.randn(shape, generator=generator) for _ in range(count)])
    texts = [prompts[i % len(prompts)] for i in range(count)]
    states, empty = embed(texts), embed([""])
    batches = batched(batch_size, noise=noise.to(states.device), condition=states, prompts=texts)
    return [{**batch, "unconditional": empty} for batch in batches]
