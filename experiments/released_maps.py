"""The continuous groups of Stable Diffusion's components at the sizes in which they were released, proved.

    python -m experiments.released_maps        # some five minutes; the table of docs/continuous.md

Models are traced on the meta device, without weights. The proof is made on a narrow twin in float64, which must permute
and map the same axes together.
"""

from __future__ import annotations

import os
import time
from collections import Counter

import torch
import typer
from rich.console import Console
from rich.table import Table

import rebasin
from rebasin.checkpoints.architectures import architecture, published
from rebasin.checkpoints.specs import proof

COMPONENTS = (
    ("sd1", "text_encoder"),
    ("sd1", "vae"),
    ("sd1", "unet"),
    ("sd2", "unet"),
    ("sdxl", "text_encoder_2"),
    ("sdxl_refiner", "unet"),
    ("sdxl", "unet"),
)


def main() -> None:
    """Trace and prove each component, and print the table."""
    os.environ["REBASIN_CACHE"] = "off"
    torch.set_num_threads(1)
    table = Table(
        "component", "groups", "kinds", "free dimensions", "error (fp64)", "seconds of CPU to trace"
    )
    for family, part in COMPONENTS:
        module, args, kwargs = architecture(family, part)
        began = time.process_time()
        spec = rebasin.trace(module, *args, **kwargs)
        seconds = time.process_time() - began
        made = proof(spec, published(family)[part], family, part)
        kinds = Counter(group.kind for group in spec.continuous)
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        free = sum(group.dimension for group in spec.continuous)
        error = f"{made.max_relative_error:.1e}"
        table.add_row(
            f"{family} {part}", str(len(spec.continuous)), told, f"{free:,}", error, f"{seconds:.1f}"
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
