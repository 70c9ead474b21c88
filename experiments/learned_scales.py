"""What positive scales are worth on two real ResNet20 for CIFAR-10 that others trained, of the usual width.

    python -m experiments.learned_scales A.th B.th --data cifar10.npz
    python -m experiments.learned_scales A.th B.th --data cifar10.npz --rows activations,activations+filters --low 0 \
        --high 1

The files are those of `resnet20` with zero-padded shortcuts (He et al. 2016, option A), names as in
akamaster/pytorch_resnet_cifar10, with or without `module.` in front. Behind each norm and along each residual stream
neurons have positive scales, which change nothing of what the network computes; they are learned by the loss between
A and B, on images that are flipped and shifted anew each time. BatchNorm computes with the statistics of the batch
while they are learned, and with statistics collected anew at each point where the line is measured. The best step is
chosen on training images that are not learned from.

A norm does not see the scale of what enters it, up to its eps. `ROW+norms` first gives B's filters the norms of A's,
in the order that was found; `ROW+filters` learns a scale of each of B's filters on top of that, of mean 1 in each
layer (`--free`: of any mean). Where shares are drawn uniformly from the inner part of the line, free ones can turn
nearly all of it into one of the ends and hide the barrier close to the other. `--draw worst --low 0 --high 1` looks
where the line is highest instead; all rows have the worst point of the line.

Barriers are of the cross entropy on test images: the worst of 21 points above the line between the ends' losses.
Seconds are those of this process' CPU time.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import rebasin
from rebasin.data.classification import load
from rebasin.files import write_text
from rebasin.matching import activation_matching, learned_matching, weight_matching
from rebasin.matching.maps.shares import LamDraw
from rebasin.merging.repair import reset_statistics
from rebasin.models.augment import AUGMENTATIONS
from rebasin.spec import ContinuousGroup, MapSite
from rebasin.tensors.modules import loaded
from rebasin.types import ProgressEvent, State

Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        self.stride = 1 if before == channels else 2
        self.conv1 = nn.Conv2d(before, channels, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.stride == 2:
            added = h.shape[1] - x.shape[1]
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, added // 2, added // 2))
        return (h + x).relu()


class PaddedResNet20(nn.Module):
    """ResNet20 for CIFAR-10 with shortcuts that have no parameters: channels that are missing are zeros."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(Block(before, n), Block(n, n), Block(n, n))
            for before, n in ((width, width), (width, 2 * width), (2 * width, 4 * width))
        )
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def read(file: Path) -> dict[str, Tensor]:
    """The weights in a file of torch, by the names of `PaddedResNet20`."""
    found = torch.load(file, map_location="cpu", weights_only=True)
    state = found.get("state_dict", found)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """All BatchNorms compute with the statistics of the batch, and keep no record of them."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, (training, track) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, track


def classified(model: nn.Module, batch: Batch) -> Tensor:
    with batch_statistics(model):
        return F.cross_entropy(model(batch[0]), batch[1])


def fast(x: Tensor) -> Tensor:
    """Images in the order in which CPUs convolve them fastest."""
    return x.contiguous(memory_format=torch.channels_last)


class Augmented(Sequence[Batch]):
    """Batches of training images, flipped and shifted anew whenever they are asked for."""

    def __init__(self, x: Tensor, y: Tensor, size: int, random: torch.Generator) -> None:
        self.x, self.y, self.random = x.split(size), y.split(size), random

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        moved = AUGMENTATIONS["crop"](self.x[number], self.random)
        return fast(moved), self.y[number]


def measured(model: nn.Module, fresh: Sequence[Tensor], held: Sequence[Batch]) -> dict[str, float]:
    """Loss and accuracy on `held`, with statistics collected on `fresh`; the model keeps them."""
    model.load_state_dict(reset_statistics(model, model.state_dict(), fresh))
    loss = right = count = 0.0
    with torch.no_grad():
        for x, y in held:
            logits = model(x)
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            right += float((logits.argmax(-1) == y).sum())
            count += len(y)
    return {"loss": loss / count, "accuracy": right / count}


def filters(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Convolutions and the norms behind them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            yield name, name.replace("conv", "bn")


def with_norms_of(model: nn.Module, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """B with each filter as large as A's, statistics scaled with it: the same up to the norm's eps."""
    made = dict(b)
    for conv, norm in filters(model):
        sizes = [state[f"{conv}.weight"].flatten(1).norm(dim=1) for state in (a, b)]
        scale = sizes[0] / sizes[1].clamp_min(1e-12)
        made[f"{conv}.weight"] = b[f"{conv}.weight"] * scale[:, None, None, None]
        made[f"{norm}.running_mean"] = b[f"{norm}.running_mean"] * scale
        made[f"{norm}.running_var"] = b[f"{norm}.running_var"] * scale.square()
    return made


def with_filters(model: nn.Module, spec: rebasin.PermutationSpec) -> rebasin.PermutationSpec:
    """The spec with a scale for each filter before a norm: exact up to eps, and only with fresh statistics."""
    more = []
    for conv, _ in filters(model):
        weight = f"{conv}.weight"
        size = len(model.get_parameter(weight))
        site = MapSite(weight, 0, range(size), 1)
        more.append(ContinuousGroup(f"{conv} before its norm", "positive scales", size, 1, (site,)))
    return replace(spec, continuous=(*spec.continuous, *more))


def main(
    file_a: Annotated[Path, typer.Argument(help="A, a file of torch")],
    file_b: Annotated[Path, typer.Argument(help="B")],
    data: Annotated[Path, typer.Option(help="CIFAR-10: an .npz file or the publisher's folder")],
    steps: Annotated[int, typer.Option(help="gradient steps")] = 2400,
    lr: Annotated[float, typer.Option(help="of Adam")] = 1.5e-1,
    low: Annotated[float, typer.Option(help="the least share of B that is drawn")] = 0.1,
    high: Annotated[float, typer.Option(help="the largest")] = 0.9,
    draw: Annotated[LamDraw, typer.Option(help="worst: where the line is highest; or uniform")] = "worst",
    size: Annotated[int, typer.Option(help="images in a batch")] = 64,
    batches: Annotated[int, typer.Option(help="training batches to learn from")] = 480,
    select: Annotated[int, typer.Option(help="further ones, by which the best step is chosen")] = 20,
    bf16: Annotated[bool, typer.Option(help="learn in bfloat16; what is measured is float32")] = True,
    free_mean: Annotated[bool, typer.Option("--free", help="filters' scales of any mean")] = False,
    test: Annotated[int, typer.Option(help="test images")] = 10_000,
    fresh: Annotated[int, typer.Option(help="training images for the statistics of each point")] = 2000,
    points: Annotated[int, typer.Option(help="points of the line")] = 21,
    rows: Annotated[
        str, typer.Option(help="what to start from, with , between")
    ] = "naive,weights,activations",
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="keep the figures here")] = None,
) -> None:
    """Measure permutations and learned scales on a pair of ResNet20; prints a table."""
    console = Console(highlight=False, soft_wrap=True)
    images = load("cifar10", data)
    random = torch.Generator().manual_seed(seed)
    used = (batches + select) * size
    if used + fresh > len(images.train_x):
        raise typer.BadParameter(
            f"{used + fresh:,} training images are asked for, of {len(images.train_x):,}: lower --batches."
        )
    order = torch.randperm(len(images.train_x), generator=random)[: used + fresh]
    x, y = images.train_x[order], images.train_y[order]
    measured_x = fast(images.test_x[:test]).split(125)
    held = list(zip(measured_x, images.test_y[:test].split(125), strict=True))
    del images
    new = list(fast(x[used:]).split(500))
    learn = Augmented(x[: batches * size], y[: batches * size], size, random)
    heldout = list(Augmented(x[batches * size : used], y[batches * size : used], size, random))
    plain = [
        (fast(part), labels) for part, labels in zip(x[:2048].split(128), y[:2048].split(128), strict=True)
    ]
    a, b = read(file_a), read(file_b)
    models = [PaddedResNet20(len(a["conv1.weight"])).eval() for _ in "ab"]
    models = [model.to(memory_format=torch.channels_last) for model in models]  # pyright: ignore[reportCallIssue]
    for model, state in zip(models, (a, b), strict=True):
        model.load_state_dict(state)
    a, b = ({name: t.clone() for name, t in model.state_dict().items()} for model in models)
    work = copy.deepcopy(models[0])
    spec = rebasin.trace(work, x[:2])
    report = rebasin.verify(copy.deepcopy(work), spec, x[:2], dtype=torch.float64).require()
    exact = {group.name for group in spec.continuous}
    free = sum(group.dimension for group in spec.continuous)
    console.print(f"{spec.neurons:,} neurons; {free:,} scales in {report.maps} continuous groups, proved")
    figures: dict[str, dict[str, Any]] = {}
    starts: dict[str, rebasin.Permutation] = {}

    def measure(name: str, end: State, seconds: float) -> None:
        curve = rebasin.barrier(work, a, end, lambda m: measured(m, new, held), points=points)
        accuracy = curve.metrics["accuracy"]
        figures[name] = {
            "barrier": curve.barrier, "at": curve.argmax, "highest": max(curve.losses), "midpoint": curve.at(0.5),
            "accuracy": curve.at(0.5, "accuracy"), "lowest accuracy": min(accuracy), "seconds": seconds,
            "ends": [curve.losses[0], curve.losses[-1]], "accuracies": [accuracy[0], accuracy[-1]],
            "losses": list(curve.losses),
        }  # fmt: skip
        console.print(
            f"{name}: {curve.barrier:.4f}, {curve.at(0.5, 'accuracy'):.1%} at the midpoint, {seconds:.0f} s"
        )
        if json_file is not None:
            about = {
                "steps": steps,
                "lr": lr,
                "shares": [low, high],
                "draw": draw,
                "free": free_mean,
                "size": size,
                "batches": batches,
                "select": select,
                "bf16": bf16,
                "test": test,
                "seed": seed,
            }
            about |= {"fresh": fresh, "points": points, "torch": torch.__version__, "rows": figures}
            write_text(json_file, json.dumps(about, indent=1) + "\n")

    def say(event: ProgressEvent) -> None:
        if event["step"] % 100 == 0:
            console.print(f"  step {event['step']} of {event['total']}: {event['objective']:.4f} so far")

    for row in dict.fromkeys(["naive", *rows.split(",")]):
        began = time.process_time()
        name, _, more = row.partition("+")
        if name not in starts and name == "weights":
            starts[name] = weight_matching(spec, a, b, seed=seed).permutation
        elif name not in starts and name == "activations":
            starts[name] = activation_matching(
                spec, models[0], models[1], plain, objective=classified, seed=seed
            ).permutation
        start = starts.get(name, spec.identity())
        end = start.apply(b)
        if more:
            end = with_norms_of(work, a, end)
        measure(row, end, time.process_time() - began)
        if row in rows.split(","):
            began = time.process_time()
            moved = loaded(copy.deepcopy(work), end).eval()
            wider = with_filters(work, spec) if more == "filters" else spec
            found = learned_matching(
                wider, models[0], moved, classified, learn, heldout=heldout, init="identity",
                balanced=() if free_mean else [g.name for g in wider.continuous if g.name not in exact],
                steps=steps, lr=lr, lam_low=low, lam_high=high, lam_draw=draw, evaluate_every=100,
                autocast="bf16" if bf16 else None, seed=seed, progress=say,
            )  # fmt: skip
            measure(f"{row}, scales", found.alignment.apply(end), time.process_time() - began)
    table = Table(
        "", "barrier", "at", "highest loss", "loss at the midpoint", "accuracy there", "lowest", "CPU seconds"
    )
    for name, row in figures.items():
        losses = (f"{row[key]:.3f}" for key in ("barrier", "at", "highest", "midpoint"))
        shares = (f"{row[key]:.1%}" for key in ("accuracy", "lowest accuracy"))
        table.add_row(name, *losses, *shares, f"{row['seconds']:.0f}")
    console.print(table)
    console.print(f"ends: {figures['naive']['ends']}, accuracy {figures['naive']['accuracies']}")


if __name__ == "__main__":
    typer.run(main)
