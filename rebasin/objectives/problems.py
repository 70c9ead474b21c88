"""Denoising batches of any clean tensors: images of a model that works on pixels, or an autoencoder's latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data.batches import batched
from ..errors import ConfigError
from .denoising import Denoising


def problems(
    problem: Denoising,
    clean: Tensor,
    condition: Tensor | None = None,
    *,
    batch_size: int = 100,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Fixed problems for `Denoising`, the same for every model that is compared.

    Noise and timesteps are drawn on the CPU from `seed`. Timesteps are stratified: one from each of n equal parts of
    the schedule, in a random order; flow's are fractions.

    Args:
        problem: whose schedule it is.
        clean: [n, ...], as the model was trained on them: images in -1..1, or scaled latents.
        condition: text states [n, tokens, width].

    Raises:
        ConfigError: there are no samples, or not as many conditions.
    """
    n = len(clean)
    if n == 0 or batch_size < 1 or (condition is not None and len(condition) != n):
        texts = "no" if condition is None else str(len(condition))
        raise ConfigError(
            f"Denoising needs samples, with a condition for each or none, but there are {n} samples, {texts}"
            f" conditions and batches of {batch_size}."
        )
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    timesteps = stratified(problem, n, generator).to(clean.device)
    given = {} if condition is None else {"condition": condition}
    return batched(batch_size, latents=clean, noise=noise, timesteps=timesteps, **given)


def stratified(problem: Denoising, n: int, generator: torch.Generator) -> Tensor:
    """n timesteps, one from each of n equal parts of the schedule, in a random order."""
    places = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    if problem.alphas_cumprod is None:
        return places * problem.flow_timesteps
    return (places * len(problem.alphas_cumprod)).long()
