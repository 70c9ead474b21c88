"""The memory that merging N checkpoints takes: the same for 10 as for 40.

    python -m experiments.benchmark_merge_many run                       # Stable Diffusion 1.5's UNet, N = 10 and 40
    python -m experiments.benchmark_merge_many run --scale 0.5           # half as many channels: a quarter of the bytes
    python -m experiments.benchmark_merge_many run --models 10 --scratch # the running mean on disk

Files of random fp16 weights, made by shape: a common network with noise of a tenth of each tensor's spread, as
fine-tunes of one base are. There are at most --files of them; further models are these files seen through a hidden
permutation each, moved tensor by tensor as they are read. One pass of MergeMany with one sweep a matching (--sweeps),
and the merge streamed to a file. With --join K all but the last K models have the permutations of a finished merge,
and only these K are matched: what costs time is matching, and what is measured is memory. Every N runs in a process of
its own, whose peak resident memory is told. Writes merge_many_memory.json and merge_many_memory.md to --out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor

import rebasin
from experiments.benchmark_matching import SD15, Drawn, unet
from experiments.common import Out, peak_memory, save
from rebasin.checkpoints import load_safetensors, save_safetensors
from rebasin.matching import ManyState, merge_many
from rebasin.spec import Permutation, PermutationSpec
from rebasin.types import LazyState

app = typer.Typer(add_completion=False)
console = Console(stderr=True)


def spec_of(scale: float) -> PermutationSpec:
    """SD1.5's UNet with `scale` times its channels, traced by shape."""
    channels = tuple(int(width * scale) for width in (320, 640, 1280, 1280))
    with torch.device("meta"):
        model = unet(**SD15, block_out_channels=channels)
    latents, times = torch.zeros(1, 4, 16, 16, device="meta"), torch.zeros(1, device="meta")
    return rebasin.trace(model, latents, times, torch.zeros(1, 77, 768, device="meta"))


class Hidden(LazyState):
    """A file seen through a permutation. It stays open, which is a header and a file descriptor."""

    def __init__(self, path: Path, permutation: Permutation) -> None:
        self.state, self.permutation = load_safetensors(path), permutation
        super().__init__(self.state)

    def __getitem__(self, name: str) -> Tensor:
        return self.permutation.apply_to(name, self.state[name])


@app.command(hidden=True)
def work(
    folder: Path, models: int, scale: float, sweeps: int, join: int, scratch: bool, result: Path
) -> None:
    """One measurement, in this process."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    spec = spec_of(scale)
    files = sorted(folder.glob("model-*.safetensors"))
    hidden = [spec.identity(), *(spec.random(seed=k) for k in range(1, models))]
    states = [Hidden(files[k % len(files)], p) for k, p in enumerate(hidden)]
    began = perf_counter()
    told: list[float] = []

    def progress(event: dict[str, Any]) -> None:
        told.append(event["seconds"])
        console.print(
            f"N = {models}: model {event['step']} of {models}, {event['seconds']:.0f} s, {peak_memory() / 1e9:.2f} GB"
        )

    kept = folder / "state.safetensors"

    def checkpoint(state: ManyState) -> None:
        state.save(kept)

    start: dict[str, Any] = {}
    if join:
        start = {"init": [p.invert() for p in hidden[: models - join]], "keep": True}
    found = merge_many(
        spec, states, **start, max_passes=1, match={"max_sweeps": sweeps}, progress=progress, checkpoint=checkpoint,
        scratch=folder if scratch else None,
    )  # fmt: skip
    matched = perf_counter() - began
    save_safetensors(folder / "merged.safetensors", found.merged)
    right = sum(
        int(np.count_nonzero(p.compose(h).index[cell] == np.arange(size.size)))
        for p, h in zip(found.permutations, hidden, strict=True)
        for cell, size in spec.cells.items()
    )
    figures = {
        "models": models,
        "parameters": sum(int(np.prod(shape)) for shape in spec.shapes.values()),
        "file_gb": files[0].stat().st_size / 1e9,
        "peak_gb": peak_memory() / 1e9,
        "scratch": scratch,
        "matched": join or models,
        "distance_before": found.distance_before,
        "distance": found.distance,
        "recovered": right / (models * spec.neurons),
        "state_mb": kept.stat().st_size / 1e6,
        "seconds_align": matched,
        "seconds": perf_counter() - began,
    }
    for path in (kept, folder / "merged.safetensors"):
        path.unlink()
    result.write_text(json.dumps(figures))


@app.command(name="run")
def run(
    models: Annotated[str, typer.Option(help="the numbers of models, with commas")] = "10,40",
    scale: Annotated[float, typer.Option(help="of the channels; 1 is SD1.5")] = 1.0,
    files: Annotated[int, typer.Option(help="distinct files at most (1.7 GB each at scale 1)")] = 10,
    sweeps: Annotated[int, typer.Option(help="of weight matching for each model")] = 1,
    join: Annotated[int, typer.Option(help="match only so many, the last; 0: all")] = 0,
    scratch: Annotated[bool, typer.Option(help="keep the running mean on disk")] = False,
    work_folder: Annotated[Path | None, typer.Option(help="where the files are made, and removed")] = None,
    out: Out = Path("outputs/merge_many"),
) -> None:
    """Measure the peak memory for every number of models."""
    counts = [int(n) for n in models.split(",")]
    rows = []
    with tempfile.TemporaryDirectory(dir=work_folder, prefix="merge-many-") as name:
        folder = Path(name)
        spec = spec_of(scale)
        base = Drawn(spec.shapes, 0)
        for k in range(min(files, max(counts))):
            save_safetensors(folder / f"model-{k:02}.safetensors", Drawn(spec.shapes, k + 1, base))
            console.print(f"file {k + 1} is made")
        for n in counts:
            result = folder / "result.json"
            arguments = map(str, (folder, n, scale, sweeps, join, scratch, result))
            module = "experiments.benchmark_merge_many"
            subprocess.run([sys.executable, "-m", module, "work", *arguments], check=True)
            rows.append(json.loads(result.read_text()))
    save(out, "merge_many_memory", rows, table(rows))
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| N | matched | parameters | file, GB | peak memory, GB | mean on disk | neurons found | distance | minutes |",
        "|--:|--:|--:|--:|--:|:--|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['models']} | {row['matched']} | {row['parameters']:,} | {row['file_gb']:.2f} |"
            f" **{row['peak_gb']:.2f}** |"
            f" {'yes' if row['scratch'] else 'no'} | {row['recovered']:.1%} |"
            f" {row['distance_before']:.0f} → {row['distance']:.0f} | {row['seconds'] / 60:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app()
