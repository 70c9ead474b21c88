"""How much a scorer likes the images that a diffusion model makes: any differentiable function will do.

    noise -> sampling steps -> clean latents -> autoencoder -> images -> scorer(images, prompts)

Only the last `grad_steps` sampling steps are differentiable, as in ReFL (Xu et al., ImageReward, 2304.05977):
the gradient of a whole trajectory costs as many times the memory, and it is mostly noise.

A batch is a mapping with `noise` (n, ...), `condition` (see `denoising.Condition`), `prompts`, a sequence of n texts,
and, for guidance, `unconditional`, of one or n samples. The noise is fixed with a seed by whoever makes the
batches, so that two models are comparable image by image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import Count, Finite, typed
from ..data.batches import batched, first
from ..errors import ConfigError
from .base import imported, mean_over_batches
from .denoising import Condition, Denoising
from .sampling import sample, timesteps

Scorer = Callable[[Tensor, Sequence[str]], Tensor]
"""(images [n, channels, height, width] in 0..1, n prompts) -> scores [n], higher is better."""

Embed = Callable[[Sequence[str]], Condition]
"""n prompts -> what the model is told of them, text states say."""

Batch = Mapping[str, Any]


@typed
@dataclass(frozen=True, eq=False)
class Reward:
    """Minus the mean score of the images that a model makes.

    Attributes:
        scorer: differentiable; a function, or its path such as "my_package.scores:brightness". A path to a
            class is called without arguments, and its instance is the scorer.
        decode: clean latents -> images in 0..1, differentiable; see `decoder`.
        problem: what the model predicts, and its noise schedule.
        steps, guidance: of the sampler; see `sampling.sample`.
        grad_steps: the gradient flows through so many last steps.

    Raises:
        ConfigError: the scorer can't be imported, or the numbers are impossible.
    """

    scorer: Scorer | str
    decode: Callable[[Tensor], Tensor]
    problem: Denoising
    steps: Count = 10
    grad_steps: Count = 1
    guidance: Finite = 3.0

    def __post_init__(self) -> None:
        if isinstance(self.scorer, str):
            object.__setattr__(self, "scorer", imported("scorer", self.scorer))
        timesteps(self.problem, self.steps)
        if self.grad_steps > self.steps:
            raise ConfigError(f"grad_steps is {self.grad_steps}, but it must be 1 to steps, {self.steps}.")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Minus the mean score: a scalar, differentiable through the last `grad_steps` steps."""
        return -self.scores(model, batch).mean()

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """{"loss": minus the mean score, "reward": the mean score} over all images."""
        return mean_over_batches(model, batches, self._measure)

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """The score of each image, [n], float32."""
        images = self.images(model, batch)
        assert not isinstance(self.scorer, str)
        scores = self.scorer(images, batch["prompts"])
        if scores.shape != images.shape[:1]:
            raise ConfigError(
                f"The scorer returned the shape {tuple(scores.shape)} for {len(images)} images, but it must give"
                " one score for each."
            )
        return scores.float()

    def images(self, model: nn.Module, batch: Batch) -> Tensor:
        """The images [n, channels, height, width] in 0..1."""
        latents = sample(
            model,
            self.problem,
            batch["noise"],
            batch.get("condition"),
            batch.get("unconditional"),
            steps=self.steps,
            guidance=self.guidance,
            grad_steps=self.grad_steps,
        )
        return self.decode(latents)

    def _measure(self, model: nn.Module, batch: Batch) -> tuple[Mapping[str, Tensor], int]:
        scores = self.scores(model, batch)
        return {"loss": -scores.mean(), "reward": scores.mean()}, len(scores)


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
    batches = batched(batch_size, noise=noise.to(first(states).device), condition=states, prompts=texts)
    return [{**batch, "unconditional": empty} for batch in batches]


def decoder(vae: nn.Module) -> Callable[[Tensor], Tensor]:
    """diffusers' autoencoder as a function from scaled latents to images in 0..1; it is frozen.

    Values beyond 0..1 are cut off, and give no gradient, as it is when an image is saved.
    """
    vae = vae.eval().requires_grad_(False)
    config: Any = vae.config
    shift = getattr(config, "shift_factor", None) or 0.0

    def decode(latents: Tensor) -> Tensor:
        weight = next(vae.parameters())
        raw: Any = latents / config.scaling_factor + shift
        images = vae.decode(raw.to(weight.device, weight.dtype)).sample  # pyright: ignore[reportCallIssue]
        return (images.to(latents.device, torch.float32) / 2 + 0.5).clamp(0, 1)

    return decode
