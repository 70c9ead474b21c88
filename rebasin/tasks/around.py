"""A diffusers pipeline as what lies around the part that is aligned: texts, latents, the schedule of the noise; and the
one way in which a task is made of it, whoever trained it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ..data import captioned_digits, captioned_folder
from ..data.sampled import Batch, Given, Placed
from ..errors import ConfigError
from ..evaluation.samples import Samples
from ..integrations.huggingface import quiet
from ..objectives import Denoising
from ..objectives.denoising import CHANNELS, Condition, problems
from ..objectives.reward import Embed, decoder
from ..tensors.modules import device_of, visiting, with_weights
from ..types import State
from .base import Part, Task
from .prompted import ImageMaker, objective_of

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

AESTHETIC = 6.0
"""The score that SDXL's refiner is told that its pictures have; diffusers' default."""


def check_side(side: int, factor: int) -> None:
    """Refuse a side of pictures that no latents have.

    Args:
        factor: pixels of a latent's side.

    Raises:
        ConfigError: it is no multiple.
    """
    if side % factor:
        raise ConfigError(
            f"model.size is {side}, but this model makes pictures whose sides are multiples of {factor} pixels."
        )


class Around:
    """The parts of a pipeline of the Stable Diffusion kind, and what its UNet is told of prompts.

    Args:
        pipeline: diffusers'.
        side: of its pictures in pixels; None: the UNet's own.
        absent: its text encoders that are not in it: they are there only while they are used.
        load: loads one of them.
        device: where it computes; its VAE and text encoders are there only while they are used. None: the CPU.
    """

    def __init__(
        self,
        pipeline: Any,
        side: int | None = None,
        absent: Collection[str] = (),
        load: Callable[[str], nn.Module] | None = None,
        device: torch.device | None = None,
    ):
        self.pipeline = pipeline
        self.device = torch.device("cpu") if device is None else device
        self._absent, self._load = frozenset(absent), load
        self._loaded: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()
        self.config: Any = pipeline.unet.config
        self.factor = pipeline.vae_scale_factor
        self.side = side or self.config.sample_size * self.factor
        check_side(self.side, self.factor)
        self.tokenizers = {
            name: getattr(pipeline, own)
            for name, own in TOKENIZERS.items()
            if getattr(pipeline, own, None) is not None
        }

    def encoder(self, name: str) -> Any:
        """A text encoder of the pipeline; one that is absent goes again with the last who holds it."""
        if name not in self._absent:
            return getattr(self.pipeline, name)
        assert self._load is not None
        found = self._loaded.get(name)
        if found is None:
            found = self._loaded[name] = self._load(name)
        return found

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one picture's latents."""
        side = self.side // self.factor
        return self.config.out_channels, side, side

    @cached_property
    def problem(self) -> Denoising:
        """What the UNet predicts, and its noise schedule."""
        scheduler = self.pipeline.scheduler
        return Denoising(scheduler.config["prediction_type"], scheduler.alphas_cumprod)

    @cached_property
    def decode(self) -> Callable[[Tensor], Tensor]:
        """Clean latents -> images in 0..1, differentiable. A reward decodes at every step: the VAE stays there."""
        return decoder(nn.Module.to(self.pipeline.vae, self.device))

    @torch.no_grad()
    def encode(self, pixels: Tensor, scale: bool = True) -> Tensor:
        """Images [n, channels, side, side] in -1..1 -> latents in float32: the posterior's mode, scaled."""
        vae: Any = self.pipeline.vae
        weight = next(vae.parameters())
        parts = pixels.to(self.device, weight.dtype).split(1 if self.side > 128 else 250)
        with visiting(self.device, vae):
            latents = torch.cat([vae.encode(part).latent_dist.mode().float().cpu() for part in parts])
        latents = latents.contiguous()
        return latents * vae.config.scaling_factor if scale else latents

    def holding(self, **modules: Any) -> Any:
        """The pipeline with these modules in the places of its own."""
        whole = copy.copy(self.pipeline)
        for name, module in (
            {name: self.encoder(name) for name in self._absent - modules.keys()} | modules
        ).items():
            setattr(whole, name, module)
        return whole

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Text encoder -> token ids of the texts."""
        return {
            name: own(
                list(texts), padding="max_length", max_length=own.model_max_length, truncation=True, return_tensors="pt"
            ).input_ids
            for name, own in self.tokenizers.items()
        }  # fmt: skip

    @property
    def pooled(self) -> bool:
        """Whether the UNet is told pooled texts and sizes, too, as SDXL's is."""
        return self.config.addition_embed_type == "text_time"

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> Condition:
        """What the UNet is told of these texts."""
        found = []
        for name, ids in self.tokens(texts).items():
            encoder = self.encoder(name)
            with visiting(self.device, encoder):
                ids = ids.to(self.device)
                found.append(encoder(ids, output_hidden_states=True) if self.pooled else encoder(ids))
        if not self.pooled:
            return self._with_channels({"encoder_hidden_states": found[0][0].float().cpu()}, len(texts))
        states = torch.cat([one.hidden_states[-2] for one in found], dim=-1).float().cpu()
        added = {"text_embeds": found[-1].text_embeds.float().cpu(), "time_ids": self.sizes(len(texts))}
        return self._with_channels({"encoder_hidden_states": states, "added_cond_kwargs": added}, len(texts))

    def prompted(self, texts: Sequence[str]) -> Condition:
        """The same with token ids for states: for a UNet together with its text encoders."""
        added = {"added_cond_kwargs": {"time_ids": self.sizes(len(texts))}} if self.pooled else {}
        return self._with_channels({"ids": self.tokens(texts), **added}, len(texts))

    def sizes(self, count: int) -> Tensor:
        """The numbers that SDXL is told about sizes and crops, [count, 6], or about beauty, [count, 5]."""
        side, about_beauty = float(self.side), self.pipeline.config.get("requires_aesthetics_score", False)
        told = [side, side, 0.0, 0.0, *((AESTHETIC,) if about_beauty else (side, side))]
        return torch.tensor([told]).repeat(count, 1)

    def _with_channels(self, given: dict[str, Any], count: int) -> Condition:
        further = self.channels(count)
        if further is not None:
            given[CHANNELS] = further
        return given["encoder_hidden_states"] if list(given) == ["encoder_hidden_states"] else given

    def channels(self, count: int, pixels: Tensor | None = None, seed: int = 0) -> Tensor | None:
        """The UNet's further inputs beside the latents [count, ...]; None where it has none.

        Inpainting sees a mask and the encoded image without what is to be painted; other UNets with further channels
        (depth, instructions) an image, or nothing.

        Args:
            pixels: real images; half of each is masked, which half is drawn by `seed`. None: grey ones, masked whole.
        """
        own, rest = self.shape[0], self.config.in_channels - self.shape[0]
        if rest == 0:
            return None
        side = self.shape[-1]
        if rest not in (own, own + 1):
            return torch.zeros(count, rest, side, side)
        if pixels is None:
            picture = self._grey.repeat(count, 1, 1, 1)
            mask = torch.ones(count, 1, side, side)
        else:
            mask = torch.zeros(count, 1, side, side)
            drawn = torch.randint(4, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
            for number, place in enumerate(drawn):
                half = slice(side // 2) if place % 2 else slice(side // 2, None)
                mask[number, 0].movedim(place // 2, 0)[half] = 1
            hidden = mask.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)
            picture = self.encode(pixels * (1 - hidden) if rest > own else pixels, scale=rest > own)
        return torch.cat([mask, picture], dim=1) if rest > own else picture

    @cached_property
    def _grey(self) -> Tensor:
        vae: Any = self.pipeline.vae
        grey = torch.zeros(1, vae.config.in_channels, self.side, self.side)
        return self.encode(grey, scale=self.config.in_channels > 2 * self.shape[0])

    @property
    def call(self) -> Mapping[str, Any]:
        """What the pipeline must be given besides prompts and noise, to make pictures of this size of prompts alone."""
        from PIL import Image

        kind = type(self.pipeline).__name__
        size = {"height": self.side, "width": self.side}
        if not any(word in kind for word in ("Inpaint", "Img2Img", "Pix2Pix")):
            return size
        grey, white = (Image.new("RGB", (self.side, self.side), color) for color in ("gray", "white"))
        if "Inpaint" not in kind:
            return {"image": grey, **({"strength": 1.0} if "Img2Img" in kind else {})}
        return {"image": grey, "mask_image": white, "strength": 1.0, **size}

    def maker(self, embed: Embed, prompts: Sequence[str]) -> ImageMaker:
        """What makes pictures of prompts, of which the aligned part is told what `embed` says."""
        return ImageMaker(self.problem, self.decode, embed, self.shape, prompts)

    def given(self, embed: Embed) -> Given:
        """A record of the UNet -> the call of a network that has the UNet inside and is told what `embed` says."""

        def call(batch: Batch, texts: Sequence[str]) -> Batch:
            sample, timestep = (*batch[0], *batch[1].values())[:2]
            rest = len(sample) - len(texts)  # with guidance the empty prompts come first
            told = embed([*[""] * rest, *texts])
            if isinstance(told, Tensor):
                return (sample, timestep), {"encoder_hidden_states": told}
            return (sample, timestep), {name: part for name, part in told.items() if name != CHANNELS}

        return call

    def batches(self, cfg: DictConfig, split: str, embed: Embed) -> list[dict[str, Any]]:
        """Noise to predict on the images of `data`: the same for every model."""
        data, train = cfg.data, split == "train"
        seed = cfg.seed + train
        if data.kind == "captioned folder":
            return self._on_images(cfg, split, embed, seed)
        vae: Any = self.pipeline.vae
        plain = self.config.in_channels == self.shape[0] and not self.pooled
        if vae.config.in_channels != 1 or self.side != captioned_digits.SIDE or not plain:
            raise ConfigError(
                f"data={data.name} are grey pictures of {captioned_digits.SIDE} pixels, but this model makes others;"
                " use data=captioned_folder data.path=FOLDER."
            )
        return captioned_digits.denoising_batches(
            self.pipeline.vae, self.encoder("text_encoder"), self.pipeline.tokenizer, self.pipeline.scheduler,
            split="train" if train else "test", n=data.train if train else data.heldout,
            batch_size=data.batch_size, seed=seed, path=data.path, embed=embed, draws=data.draws if train else 1,
        )  # fmt: skip

    def _on_images(self, cfg: DictConfig, split: str, embed: Embed, seed: int) -> list[dict[str, Any]]:
        data, vae = cfg.data, self.pipeline.vae
        images, captions = captioned_folder.load(
            data.path,
            split,
            train=data.train,
            heldout=data.heldout,
            side=self.side,
            channels=vae.config.in_channels,
        )
        told = embed(captions)
        if isinstance(told, Mapping) and CHANNELS in told:
            told = {**told, CHANNELS: self.channels(len(images), images, seed)}
        return problems(self.problem, self.encode(images), told, batch_size=data.batch_size, seed=seed)


def diffusion_task(
    cfg: DictConfig,
    part: Part,
    around: Around,
    placed: Placed,
    embed: Embed,
    *,
    name: str = "unet",
    prompts: Sequence[str],
    shown: Sequence[str] | None = None,
    teachers: Callable[[], tuple[nn.Module, nn.Module]],
    data: bool = True,
    shared: Mapping[str, Part] | None = None,
    **more: Any,
) -> Task:
    """The task of aligning a UNet, or a network with it inside, with an objective of one of `prompted.KINDS`.

    Args:
        part: what is aligned; its weights do not matter.
        placed: puts a model of this architecture into the pipeline.
        embed: prompts -> what the model is told of them.
        prompts: what the model was made for.
        shown: the prompts of the samples; None: `prompts`.
        teachers: models A and B, for a distillation.
        data: whether there are real images.
        shared: the parts that both endpoints share.
        more: labels, endpoints and what else a `Task` has.
    """
    part = part.on(around.device)
    maker = around.maker(embed, prompts)
    objective, batches = objective_of(
        cfg, maker, (lambda split: around.batches(cfg, split, embed)) if data else None, teachers
    )
    return Task(
        {name: part, **(shared or {})},
        name,
        objective=objective,
        batches=batches,
        sampler=sampler(cfg, part.model, placed, shown or prompts),
        pipeline=placed,
        captions=prompts,
        maker=maker,
        **more,
    )


def sampler(
    cfg: DictConfig, model: nn.Module, placed: Placed, prompts: Sequence[str]
) -> Callable[[Mapping[str, State], int], Samples] | None:
    """Makes the sample grid of `model.samples` pictures from each state; None: there is to be none."""
    own = cfg.model
    if own.samples < 1:
        return None

    def sample(states: Mapping[str, State], seed: int) -> Samples:
        """Image i starts from the same noise in every row."""
        whole = placed(model)
        parts = [part for part in whole.components.values() if isinstance(part, nn.Module)]
        texts = [prompts[i % len(prompts)] for i in range(own.samples)]
        options = {"num_inference_steps": own.steps, "guidance_scale": own.guidance, **placed.call}
        rows = {}
        for label, state in states.items():
            noise = [torch.Generator().manual_seed(1000 * seed + i) for i in range(own.samples)]
            with with_weights(model, state), visiting(device_of(model), *parts), quiet():
                rows[label] = whole(texts, generator=noise, **options).images
        return Samples(texts, rows)

    return sample
