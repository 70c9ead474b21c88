"""Batches for objectives that judge images: prompts, their text states, and fixed noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError

Embed = Callable[[Sequence[str]], Tensor]
"""n prompts -> text states [n, tokens, width]."""


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty and do not begin with #.

    Raises:
        DataError: there is no such file, it is no text, or it has no prompt.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The prompts can't be read from {path}: {error}.") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise DataError(f"{path} has no prompts: write one on each line.")
    return prompts


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
    return [
        {
            "noise": noise[i : i + batch_size].to(states.device),
            "condition": states[i : i + batch_size],
            "unconditional": empty,
            "prompts": texts[i : i + batch_size],
        }
        for i in range(0, count, batch_size)
    ]
