"""The components as modules of diffusers and transformers, called in the way whose outputs must be preserved.

Importing this file imports both libraries, so it is imported late.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from .components import TEXT, TEXT_2, UNET, VAE

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

SIZE = 16
"""Pixels of the latent: after three downsamplings attention still has four places to look at."""


class Autoencoder(AutoencoderKL):
    """A VAE that encodes an image and decodes a latent: neither half may reorder the latent channels."""

    def forward(self, image: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        """[n, 3, h, w] and [n, 4, h / 8, w / 8] -> the moments of the first and the picture of the second."""
        encoded: Any = self.encode(image)
        decoded: Any = self.decode(latent)  # pyright: ignore[reportArgumentType]
        return encoded.latent_dist.parameters, decoded.sample


class TextEncoder(nn.Module):
    """A CLIP text encoder without projection, under the names that checkpoints have: `text_model.*`."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        # transformers has renamed the tensors of CLIPTextModel, but not those of this part.
        self.text_model = CLIPTextModelWithProjection(config).text_model

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [n, length] -> the last layer's states after its norm [n, length, width]."""
        return self.text_model(input_ids=ids).last_hidden_state


class ProjectedTextEncoder(CLIPTextModelWithProjection):
    """A CLIP text encoder with projection, whose states and pooled texts both count."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        """Token ids [n, length] -> states [n, length, width] and pooled texts [n, projection]."""
        found: Any = super().forward(input_ids=ids)
        return found.last_hidden_state, found.text_embeds


def native(module: nn.Module) -> nn.Module:
    """The library's own class with the same tensors and submodules, as pipelines call it; nothing is copied."""
    if isinstance(module, TextEncoder):
        return module.text_model
    kind = {Autoencoder: AutoencoderKL, ProjectedTextEncoder: CLIPTextModelWithProjection}.get(type(module))
    if kind is None:
        return module
    plain = copy.copy(module)
    plain.__class__ = kind
    return plain


def build(component: str, config: dict[str, Any]) -> Built:
    """The module of this config and an example call, on torch's present default device."""
    texts = {TEXT: partial(_text, TextEncoder), TEXT_2: partial(_text, ProjectedTextEncoder)}
    module, args, kwargs = {UNET: _unet, VAE: _vae, **texts}[component](config)
    return module.eval(), args, kwargs


def _unet(config: dict[str, Any]) -> Built:
    model: Any = UNet2DConditionModel.from_config(config)
    kwargs: dict[str, Any] = {}
    if model.config.addition_embed_type == "text_time":
        known = model.config.projection_class_embeddings_input_dim
        # SDXL is told 6 numbers about size and crop, its refiner 5; the rest is the pooled text.
        numbers = 5 if len(model.config.block_out_channels) == 4 else 6
        kwargs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(1, known - numbers * model.config.addition_time_embed_dim),
            "time_ids": torch.rand(1, numbers) * 8,
        }
    args = (
        torch.randn(1, model.config.in_channels, SIZE, SIZE),
        torch.tensor([7]),
        torch.randn(1, 5, model.config.cross_attention_dim),
    )
    return model, args, kwargs


def _vae(config: dict[str, Any]) -> Built:
    model: Any = Autoencoder.from_config(config)
    image = torch.randn(1, model.config.in_channels, 2 * SIZE, 2 * SIZE)
    shrink = 2 ** (len(model.config.block_out_channels) - 1)
    latent = torch.randn(1, model.config.latent_channels, 2 * SIZE // shrink, 2 * SIZE // shrink)
    return model, (image, latent), {}


def _text(kind: Any, config: dict[str, Any]) -> Built:
    other = ("architectures", "dtype", "torch_dtype")  # types are those of the tensors
    text = CLIPTextConfig.from_dict({k: v for k, v in config.items() if k not in other})
    module = kind(text)
    return module, (torch.randint(0, text.vocab_size, (1, text.max_position_embeddings)),), {}
