"""Deterministic sampling as a pure function of the model, differentiable through as many last steps as wanted.

DDIM without noise (Song et al., 2010.02502) for epsilon and v_prediction, Euler's method for flow. Timesteps
are the scheduler's "trailing" ones: the first is the last of the training schedule, pure noise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data.batches import joined, length, repeated
from ..errors import ConfigError
from .denoising import Condition, Denoising, predict


def sample(
    model: nn.Module,
    problem: Denoising,
    noise: Tensor,
    condition: Condition | None = None,
    unconditional: Condition | None = None,
    *,
    steps: int = 10,
    guidance: float = 1.0,
    grad_steps: int = 0,
) -> Tensor:
    """Clean latents [n, ...] that `model` makes of `noise` [n, ...].

    Args:
        model: called like diffusers' conditional UNets, as in `Denoising`.
        problem: what the model predicts, and its noise schedule.
        condition, unconditional: of n samples; the second, for `guidance` other than 1, also of one.
        steps: calls of the model, one after the other.
        guidance: classifier-free guidance (Ho and Salimans, 2207.12598); 1 is none, and half the work.
        grad_steps: so many last steps are differentiable; the others keep no activations.

    Raises:
        ConfigError: fewer than one step, more steps than timesteps, or guidance without `unconditional`.
    """
    chosen = timesteps(problem, steps)
    if guidance != 1 and unconditional is None:
        raise ConfigError(f"Guidance {guidance} needs the text states of the empty prompt, `unconditional`.")
    latents, states, copies = noise, condition, 1
    if guidance != 1 and condition is not None and unconditional is not None:
        states, copies = joined([repeated(unconditional, length(condition)), condition]), 2
    for number, (time, following) in enumerate(zip(chosen, [*chosen[1:], None], strict=True)):
        differentiable = torch.is_grad_enabled() and number >= steps - grad_steps
        with torch.set_grad_enabled(differentiable):
            inputs = torch.cat([latents] * copies)
            times = torch.full((len(inputs),), time, dtype=torch.long, device=latents.device)
            predicted = predict(model, inputs, times, states)
            if copies == 2:
                without, given = predicted.chunk(2)
                predicted = without + guidance * (given - without)
            clean, error = _split(problem, latents, predicted, time)
            latents = clean if following is None else _noisy(problem, clean, error, following)
    return latents


def timesteps(problem: Denoising, steps: int) -> list[int]:
    """The trailing timesteps, from the noisiest on."""
    total = problem.flow_timesteps if problem.alphas_cumprod is None else len(problem.alphas_cumprod)
    if not 1 <= steps <= total:
        raise ConfigError(f"Sampling takes 1 to {total} steps, not {steps}.")
    last = 0 if problem.prediction == "flow" else 1  # flow's times run from T, which is pure noise
    return [round(total - i * total / steps) - last for i in range(steps)]


def _split(problem: Denoising, latents: Tensor, predicted: Tensor, time: int) -> tuple[Tensor, Tensor]:
    """The clean latents and the noise that a prediction stands for."""
    signal, spread = _scales(problem, time)
    if problem.prediction == "flow":
        return latents - spread * predicted, latents + signal * predicted
    if problem.prediction == "epsilon":
        return (latents - spread * predicted) / signal, predicted
    return signal * latents - spread * predicted, spread * latents + signal * predicted


def _noisy(problem: Denoising, clean: Tensor, noise: Tensor, time: int) -> Tensor:
    signal, spread = _scales(problem, time)
    return signal * clean + spread * noise


def _scales(problem: Denoising, time: int) -> tuple[float, float]:
    """What clean latents and noise are multiplied by."""
    if problem.prediction == "flow":
        share = time / problem.flow_timesteps
        return 1 - share, share
    assert problem.alphas_cumprod is not None  # Denoising checks that
    alpha = float(problem.alphas_cumprod[time])
    return alpha**0.5, (1 - alpha) ** 0.5
