"""What the scripts here share: options, networks trained from seeds, the embedded diffusion model, tables, memory."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from rebasin.data.captioned_digits import denoising_batches
from rebasin.data.classification import Dataset
from rebasin.errors import RebasinError
from rebasin.files import write_text
from rebasin.models.cache import Trained, trained
from rebasin.models.train import Recipe

console = Console(highlight=False, soft_wrap=True)

Data = Annotated[str, typer.Option(help="digits (comes with scikit-learn), mnist or fashion_mnist")]
DataPath = Annotated[
    Path | None, typer.Option(help="for the latter two: an .npz file or a folder with the IDX files")
]
Cache = Annotated[Path | None, typer.Option(help="where trained networks are kept")]
Out = Annotated[Path, typer.Option(help="the folder for tables, JSON and figures")]
Threads = Annotated[int, typer.Option(help="CPU threads")]


@contextmanager
def told_as_usage() -> Iterator[None]:
    """What a user did wrong ends the script with a sentence, not with a traceback."""
    try:
        yield
    except RebasinError as error:
        raise typer.BadParameter(str(error)) from error


def half(data: Dataset, seed: int) -> Dataset:
    """`data` with a random half of its training samples."""
    order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(seed))
    chosen = order[: len(order) // 2].sort().values
    return replace(data, train_x=data.train_x[chosen], train_y=data.train_y[chosen])


def mlps(
    data: Dataset,
    seeds: Iterable[int],
    width: int,
    *,
    depth: int = 3,
    recipe: Recipe | None = None,
    cache: Path | None = None,
    halves: bool = False,
) -> list[Trained]:
    """The paper's MLPs, one for each seed, trained on first use; with `halves` each on a random half of the data."""
    options = {"width": width, "depth": depth}
    return [trained("mlp", half(data, s) if halves else data, options, recipe, s, cache) for s in seeds]


@dataclass(frozen=True)
class Diffusion:
    """The embedded diffusion model's parts but its UNets."""

    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any

    @classmethod
    def load(cls) -> Diffusion:
        from rebasin.models import tiny_sd

        loaders = tiny_sd.load_vae, tiny_sd.load_text_encoder, tiny_sd.load_tokenizer, tiny_sd.load_scheduler
        return cls(*(load() for load in loaders))

    def batches(self, split: Any, n: int, batch_size: int, seed: int) -> list[dict[str, torch.Tensor]]:
        """Problems of noise prediction; see `captioned_digits.denoising_batches`."""
        parts = self.vae, self.text_encoder, self.tokenizer, self.scheduler
        return denoising_batches(*parts, split=split, n=n, batch_size=batch_size, seed=seed)

    @staticmethod
    def inputs(batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What a UNet is traced with: two samples of a batch."""
        return tuple(batch[name][:2] for name in ("latents", "timesteps", "condition"))


def markdown(head: str, rules: str, lines: Iterable[Sequence[str]]) -> str:
    """A table from its first two lines and the cells of the others."""
    return "\n".join([head, rules, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def save(out: Path, name: str, payload: Any, table: str) -> None:
    """The figures as NAME.json, the table as NAME.md."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{name}.json", json.dumps(payload, indent=1) + "\n")
    write_text(out / f"{name}.md", table)


def peak_memory() -> int:
    """The largest resident set of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's memory at the fork, too
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
