"""What a projection of the straight-through estimator costs on SD 1.5's UNet, beside the step that it belongs to.

    python -m experiments.benchmark_projection                          # a narrow twin on a CPU
    python -m experiments.benchmark_projection --channels 320 --device cuda --steps 8

The UNet has SD 1.5's own structure and random weights; 320 channels are its size. Each step is a gradient of the loss
at the midpoint and one of Adam's, then two projections from the same permutation, of one sweep each: `afresh`, as
`weight_matching` makes it, and `again`, which starts from what the last one has left (matching/weights/projection.py).
They must find the same. `solving` is what of each the CPU's assignments take, whatever the device, all threads
together. `--near`: B is A and a tenth of noise, so that nothing has to move. On a CPU seconds are those of its cores,
so that other work beside it does not count.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console

import rebasin
from experiments.benchmark_ste_memory import unet
from rebasin.checkpoints import write_text
from rebasin.matching.assignment import blocks, linear_assignment
from rebasin.matching.straight_through.auxiliary import Auxiliary
from rebasin.matching.straight_through.midpoint import Ends
from rebasin.matching.weights.matching import weight_matching
from rebasin.matching.weights.projection import Projector
from rebasin.objectives import Denoising
from rebasin.objectives.denoising import problems

console = Console(highlight=False, soft_wrap=True)
Row = dict[str, float]


class Clock:
    """Seconds of a step's parts, of the CPU, or on another device to their end, and the CPU's in the solvers inside."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.row, self.solving = device, Row(), 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        now = time.process_time if self.device.type == "cpu" else time.perf_counter
        before, began = self.solving, now()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.row[name] = now() - began
        if self.solving > before:
            self.row[f"{name}, solving"] = self.solving - before

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what assignments that the CPU solves take."""
        solved = linear_assignment.solved

        def timed(*given: Any) -> Any:
            began = time.thread_time()
            found = solved(*given)
            self.solving += time.thread_time() - began
            return found

        with patch.object(linear_assignment, "solved", timed), patch.object(blocks, "solved", timed):
            yield


def main(
    channels: Annotated[int, typer.Option(help="of the first level; SD 1.5 has 320")] = 64,
    steps: Annotated[int, typer.Option(help="of the gradient; the first is not counted")] = 4,
    latents: Annotated[int, typer.Option(help="height and width; 64 for pictures of 512 x 512")] = 64,
    batch: Annotated[int, typer.Option(help="samples in a step")] = 4,
    lr: Annotated[float, typer.Option(help="Adam's")] = 1e-3,
    near: Annotated[bool, typer.Option("--near", help="B is nearly A")] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads of torch")] = 1,
    out: Annotated[Path | None, typer.Option(help="a JSON file for the figures")] = None,
) -> None:
    """Seconds of a gradient, of a projection afresh, and of one that starts from the last."""
    torch.set_num_threads(threads)
    kind, where = getattr(torch, dtype), torch.device(device)
    sizes = (1, 4, latents, latents), (1, 77, 768)
    example = [torch.empty(size, device="meta") for size in sizes]
    times = torch.empty(1, dtype=torch.long, device="meta")
    spec = rebasin.trace(unet(0, channels, torch.float32, "meta"), example[0], times, example[1])
    models = [unet(seed, channels, kind, device) for seed in (0, 0 if near else 1)]
    if near:
        for weight in models[1].parameters():
            weight.data += 0.1 * weight.data.std(correction=0) * torch.randn_like(weight)
    clean, texts = (torch.randn((batch, *size[1:])).to(kind) for size in sizes)
    objective = Denoising("epsilon", torch.linspace(0.9999, 0.005, 1000))
    batches = problems(objective, clean, texts, batch_size=batch)
    ends = Ends(spec, models[0], models[1], objective, where)
    w = Auxiliary(ends, "adam", lr, 0.9)
    projector = Projector(spec, {name: ends.b[name] for name in ends.moved}, where)
    pi, rows = spec.identity(), list[Row]()
    clock = Clock(where)
    linear_assignment._solver()  # it is loaded, or compiled, once
    with ends.ready(checkpointing=True), clock.watching():
        for step in range(steps + 1):
            clock.row = Row()
            with clock.part("gradient"):
                w.descend(ends.gradient(ends.midpoint(pi), batches)[1], 0.5, lr)
            target = {
                name: w.weights[name].detach() if name in w.weights else ends.a[name] for name in ends.moved
            }
            with clock.part("afresh"):
                first = weight_matching(
                    spec, target, projector.b, init=pi, max_sweeps=1, seed=step, device=where
                )
            with clock.part("again"):
                found = w.project(projector, pi, 1, step)
            if found.permutation != first.permutation:
                raise SystemExit(f"Step {step}: the projections differ.")
            moved = sum(int((new != pi.index[cell]).sum()) for cell, new in found.permutation.index.items())
            rows.append({**clock.row, "moved": moved})
            pi = found.permutation
            console.print(
                f"step {step}: " + ", ".join(f"{name} {value:.3g}" for name, value in rows[-1].items())
            )
    rows = rows[1:]
    middle = {name: statistics.median(row.get(name, 0.0) for row in rows) for name in rows[0]}
    ratio = middle["afresh"] / middle["again"]
    share = middle["again"] / (middle["again"] + middle["gradient"])
    console.print(
        f"{spec.neurons} neurons; again is {ratio:.2f} times as fast, and {100 * share:.0f} % of a step"
    )
    if out is not None:
        settings = dict(channels=channels, latents=latents, batch=batch, lr=lr, near=near, dtype=dtype)
        settings |= dict(device=device, threads=threads, neurons=spec.neurons)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps({"settings": settings, "median": middle, "steps": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
