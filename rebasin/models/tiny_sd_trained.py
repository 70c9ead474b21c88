"""UNets of the tiny Stable Diffusion at any width, trained on first use and kept on disk under a hash of the recipe;
with the embedded text encoder, or each with a text encoder of its own, trained before it from the same seed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import CLIPTextModel

from ..arguments import check_values
from ..data import captioned_digits as digits
from ..data import classification
from ..errors import ConfigError
from ..files import cache_folder
from ..tensors.modules import find_device
from ..types import Progress, State, within
from . import tiny_sd
from . import tiny_sd_training as training
from .cache import Place, digest, on_cpu
from .tiny_sd_training import Recipe

VERSION = 1
"""Raise it when a change of the networks or of the loop changes the trained weights."""


class PromptedUNet(nn.Module):
    """Text encoder and UNet as one: token ids [n, 16] in the place of text states, called like the UNet."""

    def __init__(self, text_encoder: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        states = self.text_encoder(encoder_hidden_states)[0]
        return self.unet(sample, timestep, encoder_hidden_states=states)


@dataclass(frozen=True)
class Trainer:
    """Trains on the images of `data` (None: the embedded 1,000), with the embedded autoencoder and tokenizer.

    Attributes:
        width: channels of the UNets' first level.
        recipe, text_recipe: of the UNets and of their own text encoders; the seeds in them do not count.
        data: see `captioned_digits.load`.
        cache: the folder; by default `files.cache_folder()`.
        device: where to train.
    """

    width: int
    recipe: Recipe
    text_recipe: Recipe
    data: str | None = None
    cache: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        find_device(self.device)

    def unet(self, seed: int, text_encoder: CLIPTextModel, progress: Progress | None = None) -> State:
        """The UNet of this seed, trained on the states of this text encoder."""
        start = tiny_sd.new_unet(seed, self.width)
        what = {"part": "unet", "width": self.width, "text": digest(text_encoder.state_dict())}

        def train(checkpoint: Path | None) -> tuple[nn.Module, dict[str, float]]:
            corpus = training.make_corpus(
                self._latents.to(self.device), *self._images, text_encoder, tiny_sd.load_tokenizer()
            )
            told = _told(progress, seed, "UNet")
            return training.train_unet("unet", start, corpus, recipe, self.device, told, checkpoint)

        recipe = replace(self.recipe, seed=seed)
        return self._kept(f"tiny_sd_unet{self.width}", start, recipe, what, train)

    def text_encoder(self, seed: int, progress: Progress | None = None) -> CLIPTextModel:
        """The text encoder of this seed."""
        tokenizer = tiny_sd.load_tokenizer()
        model = CLIPTextModel(tiny_sd.text_config(tokenizer))
        recipe = replace(self.text_recipe, seed=seed)

        def train(checkpoint: Path | None) -> tuple[nn.Module, dict[str, float]]:
            told = _told(progress, seed, "text encoder")
            return training.train_text_encoder(
                *self._images, tokenizer, recipe, self.device, told, checkpoint
            )

        state = self._kept("tiny_sd_text", model, recipe, {"part": "text encoder"}, train)
        model.load_state_dict(dict(state))
        return model.eval()

    @cached_property
    def _images(self) -> tuple[np.ndarray, np.ndarray]:
        return digits.load("train", self.data)

    @cached_property
    def _latents(self) -> Tensor:
        vae: Any = tiny_sd.load_vae()
        return digits.encode_latents(vae.to(self.device), self._images[0])

    def _kept(
        self,
        stem: str,
        model: nn.Module,
        recipe: Recipe,
        what: Mapping[str, Any],
        train: Callable[[Path | None], tuple[nn.Module, dict[str, float]]],
    ) -> State:
        """The weights from the cache, or trained and kept; a training that was interrupted goes on."""
        data = classification.load("mnist", digits.ASSET if self.data is None else self.data)
        own = {k: v for k, v in asdict(recipe).items() if k != "checkpoint_every"}
        config = {"version": VERSION, **what, "recipe": own, "data": data.fingerprint}
        place = Place.of(config, self.device, cache_folder(self.cache), stem)
        found = place.read(model.state_dict().keys())
        if found is not None:
            return found[0]
        unfinished = None if place.path is None else place.path.with_suffix(".unfinished")
        began = time.perf_counter()
        made, record = train(unfinished)
        state = on_cpu(made)
        place.write(state, [record["train_loss"]], time.perf_counter() - began)
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)
        return state


def recipe(options: Mapping[str, Any], where: str) -> Recipe:
    """The recipe that a configuration describes at `where`.

    Raises:
        ConfigError: an unknown field, or a number that makes no training.
    """
    check_values(Recipe, options, "A training", f"{where}.")
    try:
        found = Recipe(**{"seed": 0, **options})
    except TypeError as error:
        raise ConfigError(f"The recipe {json.dumps(dict(options))} does not fit: {error}.") from error
    return found


def _told(progress: Progress | None, seed: int, what: str) -> Progress | None:
    return None if progress is None else lambda event: progress(within(event, f"{what} of seed {seed}"))
