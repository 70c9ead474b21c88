"""Pairs of networks that were trained apart, ready to be aligned and measured, for the scripts that compare on many.

    digits-mlp-32, digits-mlp-128, digits-resnet8-layer, -group, -batch, digits-vgg11    scikit-learn's digits
    mnist-mlp-128                 MNIST, two epochs; needs `--mnist`
    tiny-sd, tiny-sd-wide         the two pairs of UNets that ship
    unet64, dit192                files NAME_a and NAME_b.safetensors in `--pairs`, as `experiments.learned_maps` takes
    cifar-resnet20                two ResNet20 that others trained, *_resnet20.th in `--real`; needs `--cifar`
    mnist-ddpm                    two diffusion models that others trained, *ddpm*.pth in `--real`; needs `--mnist`

A pair whose files are not given is left out; `missing` says why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import rebasin
from experiments.common import Diffusion
from experiments.learned_maps import classes, endpoints
from experiments.learned_scales import PaddedResNet20, batch_statistics, read
from rebasin.data.captioned_digits import denoising_batches
from rebasin.data.classification import Dataset, load
from rebasin.merging.neuron_moments import batch_norms
from rebasin.merging.repair import reset_statistics
from rebasin.models.cache import trained
from rebasin.models.train import RECIPES
from rebasin.objectives import Denoising
from rebasin.objectives.base import checked
from rebasin.tensors.modules import loaded
from rebasin.types import State

Real = Annotated[Path | None, typer.Option(help="folder of *_resnet20.th and *ddpm*.pth; else left out")]
Pairs = Annotated[Path | None, typer.Option(help="folder of unet64_a.safetensors and so on; else left out")]
Mnist = Annotated[Path | None, typer.Option(help="MNIST, .npz or folder; else left out")]
Cifar = Annotated[Path | None, typer.Option(help="CIFAR-10, .npz or folder; else left out")]


@dataclass(frozen=True)
class Places:
    """Where what does not ship is found."""

    real: Path | None = None
    pairs: Path | None = None
    mnist: Path | None = None
    cifar: Path | None = None
    cache: Path | None = None


@dataclass(frozen=True, eq=False)
class Pair:
    """Two trained networks.

    Attributes:
        model: the architecture, in eval mode; its weights do not matter.
        a, b: their weights.
        objective: what alignments that look at data may follow, on `learn`; BatchNorms compute with the batch.
        held: what barriers are measured on.
        fresh: training images for the statistics of BatchNorm; none without it.
        inputs: what the model is traced with.
    """

    name: str
    model: nn.Module
    a: State
    b: State
    objective: Any
    learn: Sequence[Any]
    held: Sequence[Any]
    inputs: tuple[Any, ...]
    fresh: Sequence[Tensor] = ()

    def spec(self) -> rebasin.PermutationSpec:
        """The permutations that change nothing, proved."""
        spec = rebasin.trace(self.model, *self.inputs)
        rebasin.verify(self.model, spec, *self.inputs, dtype=torch.float64).require()
        return spec

    def models(self) -> list[nn.Module]:
        """A and B as models."""
        return [loaded(copy.deepcopy(self.model), state).eval() for state in (self.a, self.b)]

    def curve(self, end: State, points: int, reset: bool = False) -> rebasin.Curve:
        """The loss from A to `end`, with the statistics of BatchNorm anew at each point if `reset`."""
        judge = checked(plain if self.fresh else self.objective)

        def anew(state: State, lam: float) -> State:
            return reset_statistics(self.model, state, self.fresh)

        def losses(model: nn.Module) -> dict[str, float]:
            return judge.evaluate(model, self.held)

        repair = anew if reset else None
        return rebasin.barrier(self.model, self.a, end, losses, points=points, repair=repair)


def plain(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def by_batch(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy, BatchNorms computing with the statistics of the batch."""
    with batch_statistics(model):
        return plain(model, batch)


class DDPM(nn.Module):
    """The MNIST diffusion model of two public repositories, by their names (`gt.` in front)."""

    frequencies: Tensor

    class Block(nn.Module):
        def __init__(self, before: int, channels: int) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(before, channels, 7, padding=3), nn.LayerNorm([channels, 28, 28]), nn.GELU()
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    def __init__(self) -> None:
        super().__init__()
        sizes = (1, 16, 32, 32, 16)
        blocks = [self.Block(n, m) for n, m in pairwise(sizes)]
        self.blocks = nn.ModuleList([*blocks, nn.Conv2d(16, 1, 3, padding=1)])
        time = [nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU()]
        self.time_embed = nn.Sequential(*time, nn.Linear(128, 16))
        self.register_buffer("frequencies", torch.zeros(16))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        told = self.time_embed(torch.cat([angles.sin(), angles.cos() - 1], dim=1))
        x = self.blocks[0](x) + told[:, :, None, None]
        for block in self.blocks[1:]:
            x = block(x)
        return x


def predicted_noise(model: nn.Module, batch: Any) -> Tensor:
    """The error of the noise that `DDPM` predicts."""
    return F.mse_loss(model(batch[0], batch[1]), batch[2])


def available(places: Places, seed: int = 0) -> tuple[dict[str, Callable[[], Pair]], dict[str, str]]:
    """How each pair is made, by name, and why others are missing."""
    made: dict[str, Callable[[], Pair]] = {}
    missing: dict[str, str] = {}
    for width in (32, 128):
        made[f"digits-mlp-{width}"] = lambda width=width: _classifiers("mlp", {"width": width}, places, seed)
    for norm in ("layer", "group", "batch"):
        options = {"blocks": 1, "norm": norm}
        made[f"digits-resnet8-{norm}"] = lambda options=options: _classifiers("resnet", options, places, seed)
    made["digits-vgg11"] = lambda: _classifiers("vgg", {"depth": 11, "width": 16}, places, seed)
    made["tiny-sd"] = lambda: _diffusion("seed", 32, "unet", None, seed)
    made["tiny-sd-wide"] = lambda: _diffusion("wide", 64, "unet", None, seed)
    for name, width, kind in (("unet64", 64, "unet"), ("dit192", 0, "dit")):
        if places.pairs is None:
            missing[name] = "--pairs"
        else:
            file = str(places.pairs / name)
            made[name] = lambda file=file, width=width, kind=kind: _diffusion(
                file, width, kind, places.mnist, seed
            )
    for name, needs, make in (
        ("mnist-mlp-128", ("mnist",), lambda: _classifiers("mlp", {"width": 128}, places, seed, "mnist")),
        ("cifar-resnet20", ("real", "cifar"), lambda: _resnets(places, seed)),
        ("mnist-ddpm", ("real", "mnist"), lambda: _ddpms(places, seed)),
    ):
        lacking = [f"--{need}" for need in needs if getattr(places, need) is None]
        if lacking:
            missing[name] = " and ".join(lacking)
        else:
            made[name] = make
    return {
        name: lambda name=name, make=make: replace(make(), name=name) for name, make in made.items()
    }, missing


def _classifiers(
    kind: str, options: Mapping[str, Any], places: Places, seed: int, data: str = "digits"
) -> Pair:
    images = load(data, places.mnist if data == "mnist" else None)
    recipe = replace(RECIPES[kind], epochs=2 if data == "mnist" else min(RECIPES[kind].epochs, 30))
    # Seeds 2 k and 2 k + 1, so that pairs of different seeds share no network.
    a, b = (trained(kind, images, options, recipe, 2 * seed + k, places.cache) for k in range(2))
    return _classified(a.model(), a.state, b.state, images, seed, 2000)


def _classified(model: nn.Module, a: State, b: State, images: Dataset, seed: int, test: int) -> Pair:
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images.train_x), generator=random)[:6000]
    x, y = images.train_x[order], images.train_y[order]
    held = list(zip(images.test_x[:test].split(500), images.test_y[:test].split(500), strict=True))
    normed = bool(batch_norms(model))
    learn = list(zip(x.split(128), y.split(128), strict=True))
    fresh = list(x[:2000].split(500)) if normed else []
    return Pair("", model, a, b, by_batch if normed else plain, learn, held, (x[:2],), fresh)


def _resnets(places: Places, seed: int) -> Pair:
    assert places.real is not None
    a, b = (read(file) for file in sorted(places.real.glob("*resnet20.th")))
    models = [PaddedResNet20(len(a["conv1.weight"])).eval() for _ in "ab"]
    for model, state in zip(models, (a, b), strict=True):
        model.load_state_dict(state)  # which takes files of old versions, too
    a, b = ({name: t.clone() for name, t in model.state_dict().items()} for model in models)
    return _classified(models[0], a, b, load("cifar10", places.cifar), seed, 2000)


def _ddpms(places: Places, seed: int) -> Pair:
    assert places.real is not None
    files = [
        torch.load(f, map_location="cpu", weights_only=True) for f in sorted(places.real.glob("*ddpm*.pth"))
    ]
    a, b = ({n[3:]: t for n, t in file.items() if n.startswith("gt.")} for file in files[::-1])
    images = load("mnist", places.mnist)
    alphas = files[0]["alpha_t"]

    def batches(x: Tensor, number: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        random = torch.Generator().manual_seed(number)
        steps = torch.linspace(1, 999, len(x)).round().long()[torch.randperm(len(x), generator=random)]
        noise = torch.randn(x.shape, generator=random)
        share = alphas[steps][:, None, None, None]
        noisy = share.sqrt() * (x - 0.5) + (1 - share).sqrt() * noise
        return list(zip(noisy.split(50), (steps / 1000).split(50), noise.split(50), strict=True))

    learn, held = batches(images.train_x[:1000], seed + 1), batches(images.test_x[:300], seed)
    return Pair("", DDPM().eval(), a, b, predicted_noise, learn, held, (held[0][0][:2], held[0][1][:2]))


def _diffusion(pair: str, width: int, kind: Any, mnist: Path | None, seed: int) -> Pair:
    model, a, b = endpoints(pair, width, kind)
    parts = Diffusion.load()
    whole = parts.vae, parts.text_encoder, parts.tokenizer, parts.scheduler

    def batches(split: Any, n: int, number: int) -> list[Any]:
        return denoising_batches(
            *whole, split=split, n=n, batch_size=125, seed=number, path=None if mnist is None else str(mnist),
            embed=classes if kind == "dit" else None,
        )  # fmt: skip

    learn, held = batches("train", 500, seed + 1), batches("test", 250, seed)
    objective = Denoising(parts.scheduler.config["prediction_type"], parts.scheduler.alphas_cumprod)
    a, b = ({name: t.clone() for name, t in state.items()} for state in (a, b))
    return Pair("", model.eval(), a, b, objective, learn, held, Diffusion.inputs(learn[0]))
