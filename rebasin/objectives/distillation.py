"""Denoising without data: on latents that the endpoints make themselves, with the endpoints as teachers.

The target is the mean of what A and B predict: |m - A|^2 + |m - B|^2 = 2 |m - (A + B) / 2|^2 + what does not
depend on m, so a model is good here if it is close to both. A's and B's own loss is a quarter of their distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import eval_mode
from .denoising import Batch, Denoising
from .sampling import sample


@dataclass(frozen=True, eq=False)
class Distillation(Denoising):
    """`Denoising`, but batches may bring their own `target` (n, ...), shaped like the latents; see `teach`.

    A batch without one is a plain denoising problem: so real data, where there are some, can judge what was found.
    """

    def noisy_and_target(self, batch: Batch) -> tuple[Tensor, Tensor]:
        noisy, target = super().noisy_and_target(batch)
        return noisy, batch.get("target", target)


@torch.no_grad()
def teach(
    problem: Denoising,
    model_a: nn.Module,
    model_b: nn.Module,
    conditions: Sequence[Tensor],
    shape: tuple[int, ...],
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    steps: int = 20,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Batches for `Distillation`, one for each of `conditions`, text states [n, tokens, width].

    The first half of each batch's latents is sampled by A, the rest by B, from noise of its own, with
    `sampling.sample`'s options. Timesteps are stratified: one from each of n equal parts of the schedule, in a random
    order. Everything is fixed by `seed`.

    Args:
        problem: what the models predict, and their noise schedule.
        shape: of one sample's latents.
    """
    generator = torch.Generator().manual_seed(seed)
    device = conditions[0].device
    total = problem.flow_timesteps if problem.alphas_cumprod is None else len(problem.alphas_cumprod)
    batches = []
    with eval_mode(model_a), eval_mode(model_b):
        for condition in conditions:
            n = len(condition)
            start, noise = (torch.randn(n, *shape, generator=generator).to(device) for _ in range(2))
            part = torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)
            made = [
                sample(
                    model,
                    problem,
                    start[half],
                    condition[half],
                    unconditional,
                    steps=steps,
                    guidance=guidance,
                )
                for model, half in ((model_a, slice(0, n // 2)), (model_b, slice(n // 2, n)))
                if len(start[half])
            ]
            batch = {
                "latents": torch.cat(made),
                "noise": noise,
                "timesteps": (part / n * total).long().to(device),
                "condition": condition,
            }
            noisy, _ = problem.noisy_and_target(batch)
            given = {"encoder_hidden_states": condition}
            a, b = (model(noisy, batch["timesteps"], **given).sample for model in (model_a, model_b))
            batches.append({**batch, "target": (a + b) / 2})
    return batches
