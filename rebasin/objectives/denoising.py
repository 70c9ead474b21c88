"""The training loss of a diffusion model: how well it predicts the noise, the velocity or the flow.

With x0 the clean latents, e the noise and abar = alphas_cumprod[t]:

    epsilon        input sqrt(abar) x0 + sqrt(1 - abar) e    target e                                  [1]
    v_prediction   the same input                            target sqrt(abar) e - sqrt(1 - abar) x0   [2]
    flow           input (1 - s) x0 + s e, with s = t / T    target e - x0                             [3]

[1] Ho et al., 2006.11239. [2] Salimans and Ho, 2202.00512. [3] Liu et al., 2209.03003.

A batch is a mapping with `latents` and `noise` (n, ...), `timesteps` (n,), and `condition`, what the model is told
besides (see `Condition`). Noise and timesteps are drawn once with a seed, by whoever makes the batches: so
two models are comparable to the last digit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..arguments import Count, Positive, typed
from ..data.batches import batched, length
from ..errors import ConfigError, DataError
from .base import mean_over_batches

Prediction = Literal["epsilon", "v_prediction", "flow"]

Batch = Mapping[str, Any]

Condition = Tensor | Mapping[str, Any]
"""What a denoiser is told besides noisy latents and timesteps: text states (n, tokens, width), or arguments of its call
by name, nested mappings of tensors with n rows (SDXL's `added_cond_kwargs`, say). CHANNELS in it is no argument, but
further channels beside the latents (inpainting's mask and masked image).
"""

CHANNELS = "further_channels"


@typed
@dataclass(frozen=True, eq=False)
class Denoising:
    """Mean squared error of what a denoiser predicts, averaged over samples and elements.

    The model is called as `model(noisy, timesteps, encoder_hidden_states=condition).sample`, the calling
    convention of diffusers' conditional UNets (without a condition, `encoder_hidden_states` is left out; other
    conditions, see `Condition`).

    Attributes:
        prediction: what the model predicts; the `prediction_type` of its scheduler, or "flow".
        alphas_cumprod: (T,) of the scheduler; needed by epsilon and v_prediction.
        min_snr_gamma: weight each sample by min(snr, gamma) / snr for epsilon, / (snr + 1) for v_prediction,
            where snr = abar / (1 - abar) (Hang et al., 2303.09556; 5 is their gamma). None: no weights.
        flow_timesteps: T of flow matching; the model sees t = s T, which may be fractional.

    Raises:
        ConfigError: an unknown prediction, or alphas_cumprod or min_snr_gamma that do not go with it.
    """

    prediction: Prediction = "epsilon"
    alphas_cumprod: Tensor | None = None
    min_snr_gamma: Positive | None = None
    flow_timesteps: Count = 1000

    def __post_init__(self) -> None:
        if self.prediction == "flow":
            if self.min_snr_gamma is not None:
                raise ConfigError(
                    "min_snr_gamma is defined for epsilon and v_prediction only: leave it out for flow."
                )
        elif self.alphas_cumprod is None or self.alphas_cumprod.ndim != 1:
            raise ConfigError(
                f"Prediction '{self.prediction}' needs the scheduler's alphas_cumprod, a vector of length T."
            )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean (weighted) squared error of the batch, a differentiable scalar in float32."""
        return self._errors(model, batch).mean()

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """{"loss": mean (weighted) squared error over all samples}."""
        return mean_over_batches(model, batches, self._measure)

    def noisy_and_target(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The model's input and what it should return, both shaped like the latents.

        Raises DataError where shapes or timesteps do not fit.
        """
        latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
        if latents.shape != noise.shape or timesteps.shape != latents.shape[:1]:
            raise DataError(
                f"A denoising batch has latents {tuple(latents.shape)}, noise {tuple(noise.shape)} and "
                f"timesteps {tuple(timesteps.shape)}, but noise must be shaped like latents, with one "
                "timestep for each."
            )
        if self.prediction == "flow":
            share = _per_sample(timesteps.to(latents) / self.flow_timesteps, latents)
            return (1 - share) * latents + share * noise, noise - latents
        signal = _per_sample(self._alphas(timesteps).sqrt().to(latents.dtype), latents)
        spread = _per_sample((1 - self._alphas(timesteps)).sqrt().to(latents.dtype), latents)
        target = noise if self.prediction == "epsilon" else signal * noise - spread * latents
        return signal * latents + spread * noise, target

    def weights(self, timesteps: Tensor) -> Tensor:
        """(n,) the weight of each sample's error: ones without `min_snr_gamma`."""
        if self.min_snr_gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        alphas = self._alphas(timesteps)
        snr = alphas / (1 - alphas)
        if self.prediction == "v_prediction":
            return snr.clamp(max=self.min_snr_gamma) / (snr + 1)
        # The same as min(snr, gamma) / snr, and 1 where snr is 0.
        return (self.min_snr_gamma / snr).clamp(max=1)

    def _alphas(self, timesteps: Tensor) -> Tensor:
        assert self.alphas_cumprod is not None  # checked in __post_init__
        steps = len(self.alphas_cumprod)
        if timesteps.is_floating_point() or not bool(((timesteps >= 0) & (timesteps < steps)).all()):
            raise DataError(f"The timesteps of a denoising batch must be integers from 0 to {steps - 1}.")
        return self.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]

    def _errors(self, model: nn.Module, batch: Batch) -> Tensor:
        noisy, target = self.noisy_and_target(batch)
        timesteps = batch["timesteps"]
        predicted = predict(model, noisy, timesteps, batch.get("condition"))
        if predicted.shape != target.shape:  # the subtraction would broadcast
            raise ConfigError(
                f"The model returned {tuple(predicted.shape)} where '{self.prediction}' has a target of "
                f"{tuple(target.shape)}: models that also predict the variance are not supported."
            )
        errors = (predicted.float() - target.float()).square().flatten(1).mean(1)
        return self.weights(timesteps) * errors

    def _measure(self, model: nn.Module, batch: Batch) -> tuple[Mapping[str, Tensor], int]:
        return {"loss": self._errors(model, batch).mean()}, len(batch["timesteps"])


def problems(
    problem: Denoising,
    clean: Tensor,
    condition: Condition | None = None,
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
        condition: of each sample.

    Raises:
        ConfigError: there are no samples, or not as many conditions.
    """
    n = len(clean)
    if n == 0 or batch_size < 1 or (condition is not None and length(condition) != n):
        texts = "no" if condition is None else str(length(condition))
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


def predict(model: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition | None) -> Tensor:
    """What the denoiser says of noisy latents [n, ...] at timesteps [n], in their type; it computes in its own."""
    given: dict[str, Any] = dict(condition) if isinstance(condition, Mapping) else {}
    if isinstance(condition, Tensor):
        given = {"encoder_hidden_states": condition}
    further, inputs = given.pop(CHANNELS, None), noisy
    if further is not None:
        inputs = torch.cat([noisy, further.to(noisy)], dim=1)
    dtype = next((p.dtype for p in model.parameters()), noisy.dtype)
    if dtype != inputs.dtype:
        inputs, given = pytree.tree_map_only(
            Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (inputs, given)
        )
    return model(inputs, timesteps, **given).sample.to(noisy.dtype)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))
