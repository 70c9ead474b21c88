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

from ..arguments import Count, Finite, Seed, typed
from ..data.batches import length, rows
from ..tensors.modules import computing, device_of, eval_mode, to_device
from .denoising import Batch, Condition, Denoising, predict, stratified
from .sampling import sample


@typed
@dataclass(frozen=True, eq=False)
class Distillation(Denoising):
    """`Denoising`, but batches may bring their own `target` (n, ...), shaped like the latents; see `teach`.

    A batch without one is a plain denoising problem: so real data, where there are some, can judge what was found.
    """

    def noisy_and_target(self, batch: Batch) -> tuple[Tensor, Tensor]:
        noisy, target = super().noisy_and_target(batch)
        return noisy, batch.get("target", target)


@typed
@torch.no_grad()
def teach(
    problem: Denoising,
    model_a: nn.Module,
    model_b: nn.Module,
    conditions: Sequence[Condition | int],
    shape: tuple[int, ...],
    *,
    unconditional: Condition | None = None,
    guidance: Finite = 1.0,
    steps: Count = 20,
    seed: Seed = 0,
) -> list[dict[str, Any]]:
    """Batches for `Distillation`, one for each of `conditions`: what n samples are told, or, for models without a
    condition, their number n.

    The first half of each batch's latents is sampled by A, the rest by B, from noise of its own, with
    `sampling.sample`'s options. Timesteps are stratified: one from each of n equal parts of the schedule, in a random
    order. Everything is fixed by `seed`.

    Args:
        problem: what the models predict, and their noise schedule.
        shape: of one sample's latents.
    """
    options: Any = {"steps": steps, "guidance": guidance}
    generator = torch.Generator().manual_seed(seed)
    device = device_of(model_a)
    unconditional = to_device(unconditional, device)
    batches = []
    with eval_mode(model_a), eval_mode(model_b):
        for item in conditions:
            with computing(item):
                condition, n = (
                    (None, item) if isinstance(item, int) else (to_device(item, device), length(item))
                )
                start, noise = (torch.randn(n, *shape, generator=generator).to(device) for _ in range(2))
                times = stratified(problem, n, generator).to(device)
                made = []
                for model, half in ((model_a, slice(0, n // 2)), (model_b, slice(n // 2, n))):
                    if len(start[half]):
                        given = None if condition is None else rows(condition, half)
                        made.append(sample(model, problem, start[half], given, unconditional, **options))
                batch = {
                    "latents": torch.cat(made),
                    "noise": noise,
                    "timesteps": times,
                    "condition": condition,
                }
                noisy, _ = problem.noisy_and_target(batch)
                a, b = (predict(model, noisy, times, condition) for model in (model_a, model_b))
                batches.append({**batch, "target": (a + b) / 2})
    return batches
