"""An objective that needs no data: how far a model's outputs are from the mean of what both endpoints compute.

|m - A|^2 + |m - B|^2 = 2 |m - (A + B) / 2|^2 + what does not depend on m, so a merge is good here if it stays close to
both. The loss of A and of B is a quarter of their squared distance. Inputs are random: noise for a UNet and a VAE,
tokens for a text encoder. It tells whether a merge computes what its parents compute, not whether pictures are good.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..objectives.base import mean_over_batches
from ..tensors.modules import device_of, to_device
from ..tracing.export import named_outputs

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Agreement:
    """Mean squared distance from the targets, each output divided by its target's mean square.

    A batch has `args` and `kwargs` of the model and `targets`, output name -> tensor; see `targets_of`.
    """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """A scalar in float32; 1 is as far away as an output of zeros."""
        found = named_outputs(model(*batch["args"], **batch["kwargs"]))
        errors = [
            (found[name].float() - target).square().mean() / target.square().mean().clamp_min(1e-12)
            for name, target in batch["targets"].items()
        ]
        return torch.stack(errors).mean()

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """{"loss": mean over the batches}."""
        return mean_over_batches(model, batches, lambda m, batch: ({"loss": self.loss(m, batch)}, 1))


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """What a model computes on each batch's `args` and `kwargs`, in float32, by output name."""
    device = device_of(model)
    return [
        {name: t.float().cpu() for name, t in named_outputs(model(*one["args"], **one["kwargs"])).items()}
        for one in (to_device(batch, device) for batch in inputs)
    ]


def with_targets(
    inputs: Sequence[Batch], a: Sequence[Mapping[str, Tensor]], b: Sequence[Mapping[str, Tensor]]
) -> list[dict[str, Any]]:
    """The batches with the mean of both models' outputs as targets."""
    return [
        {**batch, "targets": {name: (one[name] + two[name]) / 2 for name in one}}
        for batch, one, two in zip(inputs, a, b, strict=True)
    ]
