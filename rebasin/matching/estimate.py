"""How long weight matching will take, roughly: a model of its products and assignments, with this machine's speed."""

from __future__ import annotations

import time
from math import prod

import torch

from ..spec import PermutationSpec

SWEEPS = 2
"""A pair that needs no moving takes one sweep that finds so; one that does, a few more, with most work kept."""


def matching_seconds(spec: PermutationSpec, rate: float | None = None) -> float:
    """Seconds of one pair at `rate` multiplications and additions a second; None: measured in a moment.

    Counts the products for the costs of every cell, and its assignment, which is about cubic. Independent networks
    of small width take several times as long: they have more sweeps to go.
    """
    rate = rate or matmul_rate()
    total = 0.0
    for group in spec:
        for cell in group.cells:
            flops = sum(
                2 * cell.size * prod(spec.shapes[site.parameter]) / max(1, len(spec.axes[site.parameter]))
                for site in cell.sites
            )
            total += flops / rate + 3e-10 * cell.size**2.5
    return SWEEPS * total + 0.002 * len(spec)


def matmul_rate(seconds: float = 0.1) -> float:
    """Floating point operations a second of this machine's matrix products in float32."""
    x = torch.randn(512, 512)
    torch.mm(x, x)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        torch.mm(x, x)
        count += 1
    return 2 * 512**3 * count / (time.perf_counter() - began)


def about(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
