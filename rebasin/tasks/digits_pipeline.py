"""What goes with the UNets of the tiny Stable Diffusion, whoever trained them: VAE, text encoder, data, pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ..data.captioned_digits import PLAIN_TEMPLATES, WORDS, denoising_batches, embed_captions
from ..evaluation.samples import Samples
from ..models import tiny_sd
from ..objectives import Denoising
from ..objectives.reward import Embed, decoder
from ..spec import PermutationSpec
from ..tensors.modules import with_weights
from ..types import State
from .base import Part, Task
from .prompted import ImageMaker, objective_of

TEXTS = ["a handwritten seven", ""]
"""Of the example call."""


class DigitsPipeline:
    """The other parts of the pipeline, from the package or the folder `root`; they are the same for all UNets."""

    def __init__(self, root: Path | None = None):
        self.vae, self.text_encoder = tiny_sd.load_vae(path=root), tiny_sd.load_text_encoder(path=root)
        self.tokenizer, self.scheduler = tiny_sd.load_tokenizer(root), tiny_sd.load_scheduler(root)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        return self.tokenizer(
            list(texts), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids

    def states(self, texts: Sequence[str]) -> Tensor:
        """What the text encoder makes of them."""
        return embed_captions(self.text_encoder, self.tokenizer, list(texts))

    def around(self, unet: Any, text_encoder: Any = None) -> Any:
        """The diffusers pipeline of a UNet (and its own text encoder)."""
        encoder = self.text_encoder if text_encoder is None else text_encoder
        return tiny_sd.build_pipeline(unet, self.vae, encoder, self.tokenizer, self.scheduler)

    def batches(self, cfg: DictConfig, split: str, embed: Embed) -> list[dict[str, Tensor]]:
        """Noise to predict on the images of `data`: the same for every model."""
        train = split == "train"
        return denoising_batches(
            self.vae, self.text_encoder, self.tokenizer, self.scheduler, split="train" if train else "test",
            n=cfg.data.train if train else cfg.data.heldout, batch_size=cfg.data.batch_size,
            seed=cfg.seed + train, path=cfg.data.path, embed=embed,
        )  # fmt: skip

    def task(
        self,
        cfg: DictConfig,
        model: nn.Module,
        config: Mapping[str, Any],
        embed: Embed,
        pipeline: Callable[[Any], Any],
        teachers: Callable[[], tuple[nn.Module, nn.Module]],
        derive: Callable[[tuple[Any, ...]], PermutationSpec] | None = None,
        shared: Mapping[str, Part] | None = None,
        **more: Any,
    ) -> Task:
        """The task for UNets: their captioned digits (`data`), and an objective of one of KINDS.

        Args:
            model: what is aligned: the UNet, or a network with it inside.
            config: of the UNet.
            embed: prompts -> what `model` is given of them.
            pipeline: a model in its place -> the diffusers pipeline.
            teachers: models A and B, for a distillation.
            derive: an example call -> its spec; None: traced.
            shared: the parts that both endpoints share.
            more: labels, endpoints and what else a `Task` has.
        """
        captions = [template.format(digit=word) for template in PLAIN_TEMPLATES for word in WORDS]
        maker = ImageMaker(
            problem=Denoising(self.scheduler.config["prediction_type"], self.scheduler.alphas_cumprod),
            decode=decoder(self.vae),
            embed=embed,
            shape=(config["in_channels"], config["sample_size"], config["sample_size"]),
            prompts=captions,
        )
        objective, batches = objective_of(cfg, maker, lambda split: self.batches(cfg, split, embed), teachers)
        noise = torch.randn(2, *maker.shape, generator=torch.Generator().manual_seed(0))
        call = noise, torch.tensor([10, 500]), embed(TEXTS)
        part = Part(model, call, derive=None if derive is None else lambda: derive(call))

        def sampler(states: Mapping[str, State], seed: int) -> Samples:
            """Images from each state, digit by digit; image i starts from the same noise in every row."""
            own, whole = cfg.model, pipeline(model)
            prompts = [f"a handwritten {WORDS[i % len(WORDS)]}" for i in range(own.samples)]
            options = {"num_inference_steps": own.steps, "guidance_scale": own.guidance}
            rows = {}
            for label, state in states.items():
                noise = [torch.Generator().manual_seed(1000 * seed + i) for i in range(own.samples)]
                with with_weights(model, state):
                    rows[label] = whole(prompts, generator=noise, **options).images
            return Samples(prompts, rows)

        parts, images = {"unet": part, **(shared or {})}, sampler if cfg.model.samples > 0 else None
        more |= {"sampler": images, "pipeline": pipeline, "captions": captions, "maker": maker}
        return Task(parts, "unet", objective=objective, batches=batches, **more)
