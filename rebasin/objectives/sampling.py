"""Deterministic sampling as a pure function of the model, differentiable through as many last steps as wanted.

DDIM without noise (Song et al., 2010.02502) for epsilon and v_prediction, Euler's method for flow. Timesteps
are the scheduler's "trailing" ones: the first is the last of the training schedule, pure noise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .denoising import Denoising, predict


def sample(
    model: nn.Module,
    problem: Denoising,
    noise: Tensor,
    condition: Tensor | None = None,
    unconditional: Tensor | None = None,
    *,
    steps: int = 10,
    guidance: float = 1.0,
    grad_steps: int = 0,
) -> Tensor:
    """Clean latents [n, ...] that `model` makes of `noise` [n, ...].

    Args:
        model: called like diffusers' conditional UNets, as in `Denoising`.
        problem: what the model predicts, and its noise schedule.
        condition, unconditional: text states [n, tokens, width]; the second, for `guidance` other than 1, also
            [1, tokens, width].
        steps: calls of the model, one after the other.
        guidance: classifier-free guidance (Ho and Salimans, 2207.12598); 1 is none, and half the work.
        grad_steps: so many last steps are differentiable; the others keep no activations.

    Raises:
        ConfigError: fewer than one step, more steps than timesteps, or guidance without `unconditional`.
    """
    times = timesteps(problem, steps)
    if guidance != 1 and unconditional is None:
        raise ConfigError(f"Guidance {guidance} needs the text states of the empty prompt, `unconditional`.")
    latents = noise
    for number, (time, following) in enumerate(zip(times, [*times[1:], None], strict=True)):
        differentiable = torch.is_grad_enabled() and number >= steps - grad_steps
        with torch.set_grad_enabled(differentiable):
            predicted = _predict(model, latents, time, condition, unconditional, guidance)
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


def _predict(
    model: nn.Module,
    latents: Tensor,
    time: int,
    condition: Tensor | None,
    unconditional: Tensor | None,
    guidance: float,
) -> Tensor:
    if guidance == 1 or condition is None or unconditional is None:
        return _call(model, latents, time, condition)
    states = torch.cat([unconditional.expand_as(condition), condition])
    without, given = _call(model, torch.cat([latents, latents]), time, states).chunk(2)
    return without + guidance * (given - without)


def _call(model: nn.Module, latents: Tensor, time: int, condition: Tensor | None) -> Tensor:
    times = torch.full((len(latents),), time, dtype=torch.long, device=latents.device)
    return predict(model, latents, times, condition)


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
