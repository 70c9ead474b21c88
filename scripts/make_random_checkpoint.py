"""Stable Diffusion checkpoints of random weights, and copies whose relation to them is known.

    python scripts/make_random_checkpoint.py new sdxl a.safetensors                 full size, fp16, 6.9 GB
    python scripts/make_random_checkpoint.py new sd1 a.safetensors --dtype fp32     4.3 GB
    python scripts/make_random_checkpoint.py new sd1 a.safetensors --width 40       an eighth of the channels
    python scripts/make_random_checkpoint.py permute a.safetensors b.safetensors    the same model, neurons reordered
    python scripts/make_random_checkpoint.py noise a.safetensors c.safetensors      a near copy, as fine-tunes are

What aligns b to a must find the permutation and give a back; what aligns c to a must move nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress

from rebasin.checkpoints import FORMATS, component_spec, open_checkpoint, save_safetensors
from rebasin.checkpoints.random_weights import noisy, random_checkpoint
from rebasin.errors import RebasinError

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Out = Annotated[Path, typer.Argument(help="the file to write, NAME.safetensors")]
Seed = Annotated[int, typer.Option(help="of the random numbers")]


@app.command()
def new(
    family: Annotated[str, typer.Argument(help="sd1, sd2, sdxl or sdxl_refiner")],
    out: Out,
    width: Annotated[
        int | None, typer.Option(help="channels of the UNet's first level; default as released, 320 (384)")
    ] = None,
    depth: Annotated[int | None, typer.Option(help="at most so many transformer layers; default all")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="tokens; default as released, 49408")] = None,
    variant: Annotated[str, typer.Option(help="base or inpainting")] = "base",
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32")] = "fp16",
    ema: Annotated[
        bool, typer.Option(help="with averaged weights of the UNet, as unpruned files have")
    ] = False,
    seed: Seed = 0,
) -> None:
    """A model of random weights."""
    state = random_checkpoint(
        family,
        width,
        variant=variant,
        depth=depth,
        vocabulary=vocabulary,
        seed=seed,
        dtype=FORMATS[dtype],
        ema=ema,
    )
    _save(out, state, {"made": f"random weights, seed {seed}"})


@app.command()
def permute(
    file: Annotated[Path, typer.Argument(help="a checkpoint")],
    out: Out,
    component: Annotated[list[str] | None, typer.Option(help="only these components; default all")] = None,
    seed: Seed = 1,
) -> None:
    """The same function with its neurons in a random order."""
    checkpoint = open_checkpoint(file)
    moved = {}
    for name in component or checkpoint.components:
        permutation = component_spec(checkpoint, name, prove=False).random(seed)
        moved[name] = permutation.view(checkpoint.component(name))
    _save(out, checkpoint.restore(moved), {"made": f"{file.name}, permuted at random, seed {seed}"})


@app.command()
def noise(
    file: Annotated[Path, typer.Argument(help="a checkpoint")],
    out: Out,
    size: Annotated[float, typer.Option(help="of the noise, in standard deviations of each tensor")] = 0.02,
    seed: Seed = 2,
) -> None:
    """A near copy."""
    _save(out, noisy(open_checkpoint(file).raw, size, seed), {"made": f"{file.name} and noise of {size}"})


def _save(out: Path, state: object, metadata: dict[str, str]) -> None:
    with Progress(transient=True) as bar:
        task = bar.add_task(out.name, total=None)
        save_safetensors(
            out,
            state,  # pyright: ignore[reportArgumentType]
            {"format": "pt", **metadata},
            keep_order=True,
            progress=lambda event: bar.update(task, completed=event["step"], total=event["total"]),
        )
    typer.echo(f"{out}, {out.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        app()
    except RebasinError as error:
        sys.exit(f"Error: {error}")
