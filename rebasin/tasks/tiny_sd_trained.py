"""Two tiny Stable Diffusions of any width, trained here from different seeds, the text encoder shared or not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers import UNet2DConditionModel
from omegaconf import DictConfig
from torch import nn

from ..data.sampled import Placed
from ..errors import ConfigError
from ..integrations.hydra import resolved
from ..models import tiny_sd
from ..models.tiny_sd_trained import PromptedUNet, Trainer, recipe
from ..spec import Group, PermutationSpec
from ..tensors.modules import find_device, loaded
from ..tracing import trace
from ..types import Progress, State
from .around import diffusion_task
from .base import Part, Task, require
from .digits_pipeline import CAPTIONS, SHOWN, digits_pipeline, example
from .prompted import KINDS

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
    unets, texts = (recipe(options[name], f"model.{name}") for name in ("recipe", "text_recipe"))
    device = str(find_device(cfg.device))
    trainer = Trainer(cfg.model.width, unets, texts, cfg.data.path, cfg.path.cache, device)
    unet = tiny_sd.new_unet(0, cfg.model.width).eval()
    around = digits_pipeline(unet, device=find_device(cfg.device))
    shared = around.pipeline.text_encoder
    whole = cfg.model.text == "own" or cfg.model.joint
    model: nn.Module = PromptedUNet(tiny_sd.load_text_encoder(), unet).eval() if whole else unet
    embed = (lambda texts: around.tokens(texts)["text_encoder"]) if whole else around.states

    def endpoint(seed: int, progress: Progress | None) -> State:
        own = trainer.text_encoder(seed, progress) if cfg.model.text == "own" else shared
        found = trainer.unet(seed, own, progress)
        parts = {"text_encoder": own.state_dict(), "unet": found}
        return {f"{part}.{n}": t for part, s in parts.items() for n, t in s.items()} if whole else found

    def endpoints(progress: Progress | None) -> tuple[State, ...]:
        return tuple(endpoint(seed, progress) for seed in seeds)

    def teachers() -> tuple[nn.Module, nn.Module]:
        a, b = (loaded(model, state) for state in endpoints(None))
        return a, b

    def pipeline(net: Any) -> Any:
        return (
            around.holding(unet=net.unet, text_encoder=net.text_encoder)
            if whole
            else around.holding(unet=net)
        )

    call = example(around, embed)
    return diffusion_task(
        cfg,
        Part(model, call, derive=lambda: _spec(model, call, cfg.model.joint)),
        around,
        Placed(pipeline, given=around.given(embed) if whole else None),
        embed,
        prompts=CAPTIONS,
        shown=SHOWN,
        teachers=teachers,
        labels=tuple(f"seed {seed}" for seed in seeds),
        endpoints=endpoints,
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
