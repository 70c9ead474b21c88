"""How much memory the straight-through estimator needs on a UNet of Stable Diffusion 1.5's size.

    python -m experiments.benchmark_ste_memory                       # two steps on a CPU, bfloat16 with checkpointing
    python -m experiments.benchmark_ste_memory --device cuda --optimizer adam --batch 4 --steps 20

The UNet has SD 1.5's own configuration (860 M parameters) and random weights; the batch is noise latents of 64 x 64,
which is a picture of 512 x 512. Prints the resident memory (or CUDA's allocated memory) as the steps go by, its peak
(on a CPU also the kernel's own figure, ru_maxrss), and where the time went. What the pieces take in bfloat16:

    A, B, the midpoint, its gradient      1.7 GB each
    auxiliary weights, in float32         3.4 GB, as SGD's momentum, and each of Adam's two moments
"""

from __future__ import annotations

import json
import resource
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import rebasin
from rebasin.checkpoints import write_text
from rebasin.matching.straight_through.estimator import straight_through
from rebasin.objectives import Denoising
from rebasin.objectives.denoising import problems

SD15: dict[str, Any] = dict(
    sample_size=64,
    in_channels=4,
    out_channels=4,
    layers_per_block=2,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    cross_attention_dim=768,
    attention_head_dim=8,
    norm_num_groups=32,
)
GB = 1e9
console = Console(highlight=False, soft_wrap=True)


class Peak:
    """The largest resident memory since the last look, watched by a thread."""

    def __init__(self) -> None:
        self.highest, self.overall = 0.0, 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.highest = max(self.highest, resident())
            time.sleep(0.05)

    def take(self) -> float:
        highest, self.highest = max(self.highest, resident()), 0.0
        self.overall = max(self.overall, highest)
        return highest


def resident() -> float:
    """GB that this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / GB


def unet(seed: int, channels: int, dtype: torch.dtype, device: str, **others: Any) -> torch.nn.Module:
    """SD 1.5's UNet with random weights, made in `dtype` at once; it has 320 channels, and may be given `others`."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(seed)
    try:
        with torch.device(device):
            widths = tuple(channels * factor for factor in (1, 2, 4, 4))
            return (
                UNet2DConditionModel(**{**SD15, "block_out_channels": widths, **others})
                .eval()
                .requires_grad_(False)
            )
    finally:
        torch.set_default_dtype(before)


def main(
    steps: Annotated[int, typer.Option(help="of the gradient")] = 2,
    latents: Annotated[int, typer.Option(help="height and width; 64 for pictures of 512 x 512")] = 64,
    batch: Annotated[int, typer.Option(help="samples in a step")] = 1,
    channels: Annotated[int, typer.Option(help="of the first level; less than 320 for a quick look")] = 320,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    optimizer: Annotated[str, typer.Option(help="sgd or adam")] = "sgd",
    checkpointing: Annotated[bool, typer.Option(help="keep only the activations between blocks")] = True,
    project_every: Annotated[int, typer.Option(help="steps between projections")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    out: Annotated[Path | None, typer.Option(help="a JSON file for the figures")] = None,
) -> None:
    """Peak memory and seconds of a few steps of the straight-through estimator on SD 1.5's UNet."""
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    peak, began = Peak(), time.perf_counter()
    lines: list[dict[str, Any]] = []

    def note(what: str, **more: Any) -> None:
        highest = peak.take()
        if device.startswith("cuda"):
            highest = torch.cuda.max_memory_allocated() / GB
            torch.cuda.reset_peak_memory_stats()
            peak.overall = max(peak.overall, highest)
        line = {
            "what": what,
            "gb": round(highest, 2),
            "seconds": round(time.perf_counter() - began, 1),
            **more,
        }
        lines.append(line)
        console.print(", ".join(f"{key} {value}" for key, value in line.items()))

    meta = unet(0, channels, torch.float32, "meta")
    example = (
        torch.empty(1, 4, latents, latents, device="meta"),
        torch.empty(1, dtype=torch.long, device="meta"),
        torch.empty(1, 77, 768, device="meta"),
    )
    spec = rebasin.trace(meta, *example)
    note("spec", neurons=spec.neurons)
    a, b = (unet(seed, channels, kind, device) for seed in (0, 1))
    note("endpoints", parameters=sum(p.numel() for p in a.parameters()))
    alphas = torch.linspace(0.9999, 0.005, 1000)
    objective = Denoising("epsilon", alphas)
    clean = torch.randn(2 * batch, 4, latents, latents).to(kind)
    batches = problems(objective, clean, torch.randn(2 * batch, 77, 768).to(kind), batch_size=batch)

    def told(event: dict[str, Any]) -> None:
        figures = {key: event[key] for key in ("loss", "heldout", "moved") if event[key] is not None}
        note(
            f"step {event['step']}",
            projection=round(event["seconds_projection"], 1),
            gradient=round(event["seconds_gradient"], 1),
            **{key: round(value, 5) for key, value in figures.items()},
        )

    found = straight_through(
        spec, a, b, objective, batches[:1], heldout=batches[1:], init="identity", steps=steps, device=device,
        optimizer=optimizer, lr=1e-3, schedule="cosine", refine=0, project_every=project_every,  # type: ignore[arg-type]
        projection_sweeps=1, evaluate_every=steps, checkpointing=checkpointing, progress=told,
    )  # fmt: skip
    note("end", moved=found.moved)
    kernel = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB
    console.print(
        f"peak {peak.overall:.1f} GB (ru_maxrss {kernel:.1f} GB), {found.seconds:.0f} s for the search"
    )
    if out is not None:
        parts = {part: getattr(found, f"seconds_{part}") for part in ("projection", "gradient", "scoring")}
        settings = dict(
            steps=steps, latents=latents, batch=batch, dtype=dtype, optimizer=optimizer, device=device
        )
        settings |= dict(checkpointing=checkpointing, project_every=project_every, threads=threads)
        settings["channels"] = channels
        figures = dict(peak_gb=peak.overall, ru_maxrss_gb=kernel, seconds=found.seconds, parts=parts)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps({"settings": settings, **figures, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
