"""The embedded tiny Stable Diffusion: align two of its UNets; the VAE and the text encoder are shared."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from omegaconf import DictConfig

from ..checkpoints import load_safetensors
from ..data.captioned_digits import PLAIN_TEMPLATES, WORDS, denoising_batches, embed_captions, to_pixels
from ..data.captioned_digits import load as load_images
from ..evaluation.samples import Samples
from ..models import tiny_sd
from ..modules import with_weights
from ..objectives import Denoising
from ..objectives.reward import decoder
from ..types import Progress, State
from .base import Part, Task, require
from .prompted import KINDS, ImageMaker, objective_of

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load(cfg: DictConfig) -> Task:
    """Two UNets (`model.a`, `model.b`) on captioned digits (`data`), with an objective of one of KINDS."""
    require(cfg, "data", "captioned images")
    require(cfg, "objective", *KINDS)
    root = Path(cfg.model.path).expanduser() if cfg.model.path else None
    unet = tiny_sd.load_unet(cfg.model.a, path=root)
    tiny_sd.load_unet(cfg.model.b, path=root)  # a missing B is told now, not after minutes
    vae, text_encoder = tiny_sd.load_vae(path=root), tiny_sd.load_text_encoder(path=root)
    tokenizer, scheduler = tiny_sd.load_tokenizer(root), tiny_sd.load_scheduler(root)

    captions = [template.format(digit=word) for template in PLAIN_TEMPLATES for word in WORDS]

    def data(split: str) -> list[dict[str, torch.Tensor]]:
        train = split == "train"
        return denoising_batches(
            vae, text_encoder, tokenizer, scheduler, split="train" if train else "test",
            n=cfg.data.train if train else cfg.data.heldout, batch_size=cfg.data.batch_size,
            seed=cfg.seed + train, path=cfg.data.path,
        )  # fmt: skip

    def load_endpoints() -> tuple[torch.nn.Module, torch.nn.Module]:
        a, b = (tiny_sd.load_unet(name, path=root) for name in (cfg.model.a, cfg.model.b))
        return a, b

    maker = ImageMaker(
        problem=Denoising(scheduler.config["prediction_type"], scheduler.alphas_cumprod),
        decode=decoder(vae),
        embed=lambda texts: embed_captions(text_encoder, tokenizer, list(texts)),
        shape=(unet.config["in_channels"], unet.config["sample_size"], unet.config["sample_size"]),
        prompts=captions,
    )
    objective, batches = objective_of(cfg, maker, data, load_endpoints)

    def endpoints(progress: Progress | None) -> tuple[State, State]:
        return _read(cfg.model.a, root), _read(cfg.model.b, root)

    def sampler(states: Mapping[str, State], seed: int) -> Samples:
        pipeline = tiny_sd.build_pipeline(unet, vae, text_encoder, tokenizer, scheduler)
        return sample(pipeline, states, cfg.model.samples, cfg.model.steps, cfg.model.guidance, seed)

    images, _ = load_images("test", cfg.data.path)
    texts = ["a handwritten seven", ""]
    tokens = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    noise = torch.randn(2, *maker.shape, generator=torch.Generator().manual_seed(0))
    return Task(
        parts={
            "unet": Part(unet, (noise, torch.tensor([10, 500]), maker.embed(texts))),
            "vae": Part(vae, (to_pixels(images[:2]),)),
            "text_encoder": Part(text_encoder, (tokens,)),
        },
        aligned="unet",
        labels=(cfg.model.a, cfg.model.b),
        endpoints=endpoints,
        objective=objective,
        batches=batches,
        sampler=sampler if cfg.model.samples > 0 else None,
        pipeline=lambda unet: tiny_sd.load_pipeline(unet, path=root),  # pyright: ignore[reportArgumentType]
        captions=captions,
        maker=maker,
        others={name: partial(_read, name, root) for name in _names(root)},
    )


def sample(
    pipeline: StableDiffusionPipeline,
    states: Mapping[str, State],
    count: int,
    steps: int,
    guidance: float,
    seed: int,
    model: torch.nn.Module | None = None,
) -> Samples:
    """`count` images from each state, digit by digit; image i starts from the same noise in every row.

    The states are those of `model`, a part of the pipeline or one that has parts of it; by default its UNet. Its
    weights are put back afterwards.
    """
    prompts = [f"a handwritten {WORDS[i % len(WORDS)]}" for i in range(count)]
    net = pipeline.unet if model is None else model
    rows = {}
    for label, state in states.items():
        noise = [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)]
        with with_weights(net, state):
            made = pipeline(prompts, generator=noise, num_inference_steps=steps, guidance_scale=guidance)
        rows[label] = made.images  # pyright: ignore[reportAttributeAccessIssue]
    return Samples(prompts, rows)


def _names(root: Path | None) -> list[str]:
    folders = sorted((root or tiny_sd.ASSETS).glob("unet_*"))
    return [folder.name.removeprefix("unet_") for folder in folders if (folder / WEIGHTS).is_file()]


def _read(name: str, root: Path | None) -> State:
    """The weights as they are stored, in their own type: what is saved afterwards has it, too."""
    return dict(load_safetensors((root or tiny_sd.ASSETS) / f"unet_{name}" / WEIGHTS))
