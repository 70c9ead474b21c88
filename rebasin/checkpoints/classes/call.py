"""A model of a library's class, called in the way whose outputs must be preserved."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .examples import example
from .known import Known, built

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def call(what: Known, where: object, *, part: bool = False) -> Built:
    """A model of this class, freshly initialised on torch's present default device, and an example call.

    Outputs are those of the class. An autoencoder is called with a picture and a latent, as others read its latents; of
    a `part` of a pipeline all hidden states are outputs, as pipelines read any of them.

    Raises:
        CheckpointError: nothing can be built from the configuration, or nothing is known about the class's inputs.
    """
    model = built(what, where)
    inputs = example(model)
    if what.library == "diffusers" and hasattr(model, "encode") and hasattr(model, "decode"):
        return _halves(what, where, model, inputs)
    known = inspect.signature(model.forward).parameters
    if (
        part
        and what.library == "transformers"
        and ("output_hidden_states" in known or any(p.kind is p.VAR_KEYWORD for p in known.values()))
    ):
        inputs = {**inputs, "output_hidden_states": True}
    return model, (), inputs


def _halves(what: Known, where: object, model: Any, inputs: dict[str, Any]) -> Built:
    picture = next(iter(inputs.values()))
    with torch.device("meta"), torch.no_grad():  # the model itself may have no numbers beside such that has
        other: Any = built(what, where)
        latent = _latent(other.encode(torch.empty(picture.shape)))
    model.__class__ = _called_by_halves(type(model))
    return model, (), {"sample": picture, "latent": torch.randn(latent.shape)}


def _latent(encoded: Any) -> Any:
    """The latent that an encoder's output holds, or the mean of its distribution."""
    if isinstance(encoded, Tensor):
        return encoded
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded.latent if hasattr(encoded, "latent") else encoded.latents


@cache
def _called_by_halves(kind: type) -> type:
    """The class with a forward pass that encodes a picture and decodes a latent."""

    def forward(self: Any, sample: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        found = self.encode(sample)
        own = found.latent_dist.parameters if hasattr(found, "latent_dist") else _latent(found)
        decoded = self.decode(latent)
        return own, decoded if isinstance(decoded, Tensor) else decoded.sample

    return type(f"{kind.__name__}ByHalves", (kind,), {"forward": forward, "__module__": kind.__module__})
