"""The embedded tiny Stable Diffusion: align two of its UNets; the VAE and the text encoder are shared."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from ..data.captioned_digits import load as load_images
from ..data.captioned_digits import to_pixels
from ..data.sampled import Placed
from ..models import tiny_sd
from ..tensors import load_safetensors
from ..tensors.modules import find_device
from ..types import State
from .around import diffusion_task
from .base import Part, Task, require
from .digits_pipeline import CAPTIONS, SHOWN, TEXTS, digits_pipeline, example
from .prompted import KINDS

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load(cfg: DictConfig) -> Task:
    """Two UNets (`model.a`, `model.b`) on captioned digits (`data`), with an objective of one of KINDS."""
    require(cfg, "data", "captioned images")
    require(cfg, "objective", *KINDS)
    root = Path(cfg.model.path).expanduser() if cfg.model.path else None
    names, device = (cfg.model.a, cfg.model.b), find_device(cfg.device)

    def models() -> tuple[nn.Module, nn.Module]:
        a, b = (nn.Module.to(tiny_sd.load_unet(name, path=root), device) for name in names)
        return a, b

    unet, _ = models()  # a missing B is told now, not after minutes
    around = digits_pipeline(unet, root, device)
    images, _ = load_images("test", cfg.data.path)
    pipeline = around.pipeline
    return diffusion_task(
        cfg,
        Part(unet, example(around, around.states)),
        around,
        Placed(lambda unet: around.holding(unet=unet)),
        around.states,
        prompts=CAPTIONS,
        shown=SHOWN,
        teachers=models,
        shared={
            "vae": Part(pipeline.vae, (to_pixels(images[:2]),)),
            "text_encoder": Part(pipeline.text_encoder, (around.tokens(TEXTS)["text_encoder"],)),
        },
        labels=names,
        endpoints=lambda progress: tuple(_read(name, root) for name in names),
        others={name: partial(_read, name, root) for name in _names(root)},
    )


def _names(root: Path | None) -> list[str]:
    folders = sorted((root or tiny_sd.ASSETS).glob("unet_*"))
    return [folder.name.removeprefix("unet_") for folder in folders if (folder / WEIGHTS).is_file()]


def _read(name: str, root: Path | None) -> State:
    """The weights as they are stored, in their own type: what is saved afterwards has it, too."""
    return dict(load_safetensors((root or tiny_sd.ASSETS) / f"unet_{name}" / WEIGHTS))
