"""Two tiny Stable Diffusions of any width, trained here from different seeds, the text encoder shared or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from omegaconf import DictConfig
from torch import Tensor, nn

from ..data.captioned_digits import PLAIN_TEMPLATES, WORDS, denoising_batches, embed_captions
from ..errors import ConfigError
from ..evaluation.samples import Samples
from ..jobs.configuration import resolved
from ..models import tiny_sd
from ..models.tiny_sd_trained import PromptedUNet, Trainer, recipe
from ..modules import loaded
from ..objectives import Denoising
from ..objectives.reward import decoder
from ..spec import Group, PermutationSpec
from ..tracing import trace
from ..types import Progress, State
from .base import Part, Task, require
from .prompted import KINDS, ImageMaker, objective_of
from .tiny_sd import sample

TEXTS = ("shared", "own")


def load(cfg: DictConfig) -> Task:
    """Two trainings (`model.seeds`) at `model.width` on captioned digits (`data`), with an objective of one of KINDS.

    What is aligned is the UNet; with `model.text=own`, or `model.joint=true`, text encoder and UNet as one network, in
    which `model.joint` says whether the neurons that pass from the one to the other may move.
    """
    require(cfg, "data", "captioned images")
    require(cfg, "objective", *KINDS)
    if cfg.model.text not in TEXTS:
        raise ConfigError(f"model.text is {cfg.model.text!r}; choose {' or '.join(TEXTS)}.")
    seeds = _seeds(cfg.model.seeds, cfg.seed)
    options = resolved(cfg.model)
    trainer = Trainer(
        cfg.model.width, recipe(options["recipe"]), recipe(options["text_recipe"]), cfg.data.path, cfg.path.cache,
        cfg.device or "cpu",
    )  # fmt: skip
    vae, text_encoder = tiny_sd.load_vae(), tiny_sd.load_text_encoder()
    tokenizer, scheduler = tiny_sd.load_tokenizer(), tiny_sd.load_scheduler()
    unet = tiny_sd.new_unet(0, cfg.model.width).eval()
    whole = cfg.model.text == "own" or cfg.model.joint
    model: nn.Module = PromptedUNet(tiny_sd.load_text_encoder(), unet).eval() if whole else unet

    def tokens(texts: Sequence[str]) -> Tensor:
        return tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids

    def states(texts: Sequence[str]) -> Tensor:
        return embed_captions(text_encoder, tokenizer, list(texts))

    embed = tokens if whole else states

    def endpoint(seed: int, progress: Progress | None) -> State:
        own = trainer.text_encoder(seed, progress) if cfg.model.text == "own" else text_encoder
        found = trainer.unet(seed, own, progress)
        parts = {"text_encoder": own.state_dict(), "unet": found}
        return {f"{part}.{n}": t for part, s in parts.items() for n, t in s.items()} if whole else found

    def endpoints(progress: Progress | None) -> tuple[State, ...]:
        return tuple(endpoint(seed, progress) for seed in seeds)

    def teachers() -> tuple[nn.Module, nn.Module]:
        a, b = (loaded(model, state) for state in endpoints(None))
        return a, b

    def data(split: str) -> list[dict[str, Tensor]]:
        train = split == "train"
        return denoising_batches(
            vae, text_encoder, tokenizer, scheduler, split="train" if train else "test",
            n=cfg.data.train if train else cfg.data.heldout, batch_size=cfg.data.batch_size,
            seed=cfg.seed + train, path=cfg.data.path, embed=embed,
        )  # fmt: skip

    captions = [template.format(digit=word) for template in PLAIN_TEMPLATES for word in WORDS]
    maker = ImageMaker(
        problem=Denoising(scheduler.config["prediction_type"], scheduler.alphas_cumprod),
        decode=decoder(vae),
        embed=embed,
        shape=(unet.config["in_channels"], unet.config["sample_size"], unet.config["sample_size"]),
        prompts=captions,
    )
    objective, batches = objective_of(cfg, maker, data, teachers)

    def pipeline(net: Any) -> Any:
        inner = (net.unet, net.text_encoder) if whole else (net, text_encoder)
        return tiny_sd.build_pipeline(inner[0], vae, inner[1], tokenizer, scheduler)

    def sampler(found: Mapping[str, State], seed: int) -> Samples:
        own = cfg.model
        return sample(pipeline(model), found, own.samples, own.steps, own.guidance, seed, model)

    noise = torch.randn(2, *maker.shape, generator=torch.Generator().manual_seed(0))
    inputs = noise, torch.tensor([10, 500]), embed(["a handwritten seven", ""])
    return Task(
        parts={"unet": Part(model, inputs, derive=lambda: _spec(model, inputs, cfg.model.joint))},
        aligned="unet",
        labels=tuple(f"seed {seed}" for seed in seeds),
        endpoints=endpoints,
        objective=objective,
        batches=batches,
        sampler=sampler if cfg.model.samples > 0 else None,
        pipeline=pipeline,
        captions=captions,
        maker=maker,
    )


def _spec(model: nn.Module, inputs: tuple[Any, ...], joint: bool) -> PermutationSpec:
    """The symmetries of the network; without `joint` those alone that stay within text encoder or UNet."""
    spec = trace(model, *inputs)
    if joint or isinstance(model, UNet2DConditionModel):
        return spec
    return replace(spec, groups=tuple(group for group in spec.groups if len(_parts(group)) == 1))


def _parts(group: Group) -> set[str]:
    return {site.parameter.split(".")[0] for cell in group.cells for site in cell.sites}


def _seeds(chosen: Any, seed: int) -> tuple[int, int]:
    if chosen is None:
        return 2 * seed, 2 * seed + 1
    if len(chosen) != 2 or not all(isinstance(s, int) for s in chosen):
        raise ConfigError(
            f"model.seeds is {list(chosen)}, but it takes two whole numbers, model.seeds=[0,1]."
        )
    a, b = chosen
    return a, b
