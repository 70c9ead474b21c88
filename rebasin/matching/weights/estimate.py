"""How long weight matching will take, roughly: a model of its products and assignments, with this machine's speed."""

from __future__ import annotations

import time
from math import prod

import torch

from ...spec import PermutationSpec
from ...types import State
from .nearness import in_place

SWEEPS = 2
"""A pair that needs no moving takes one sweep that finds so; one that does, a few more, with most work kept."""


NEAR = 0.4
"""A sweep that proves that all stays takes this share of its cost matrices' time, most of it for reading (measured)."""

LATENCY = 0.02
"""Seconds of a look at a group on a GPU, nearly all of it waiting: a UNet of width 64, 40 groups and 30 sweeps, took
27 s on an H100, and 3.0 s on one core; a ResNet18 .18 s instead of 2.84 s."""

LOOKED_AT = 6
"""Groups by which a pair is judged."""


def matching_seconds(spec: PermutationSpec, rate: float | None = None, near: float = 0.0) -> float:
    """Seconds of one pair at `rate` multiplications and additions a second; None: measured in a moment.

    Counts the products for the costs of every cell, and its assignment, which is about cubic; of the share `near` of
    the groups only a proof that they stay. Independent networks of small width take several times as long: they have
    more sweeps to go.
    """
    products = operations(spec) / (rate or matmul_rate())
    assignments = sum(3e-10 * cell.size**2.5 for cell in spec.cells.values())
    return SWEEPS * (1 - near) * (products + assignments) + NEAR * near * products + 0.002 * len(spec)


def operations(spec: PermutationSpec) -> float:
    """Multiplications and additions of the products for the costs of every cell."""
    return sum(
        2 * cell.size * prod(spec.shapes[site.parameter]) / max(1, len(spec.axes[site.parameter]))
        for cell in spec.cells.values()
        for site in cell.sites
    )


def where_quicker(spec: PermutationSpec, device: torch.device) -> torch.device:
    """The CPU, if it has looked at a group before `device` would have answered; else `device`."""
    if device.type == "cpu" or operations(spec) / matmul_rate(0.02) > LATENCY * len(spec):
        return device
    return torch.device("cpu")


def near_share(spec: PermutationSpec, state_a: State, state_b: State) -> float:
    """Of which share of the largest groups the neurons seem to be in place, by a look at one tensor of each."""
    largest = sorted(spec, key=lambda group: -max(cell.size for cell in group.cells))[:LOOKED_AT]
    looks = []
    for group in largest:
        cell = group.cells[0]
        first = [s for s in cell.sites if s.axis == 0 and len(spec.shapes[s.parameter]) > 1]
        known = first and all(first[0].parameter in state for state in (state_a, state_b))
        if known and len(first[0].positions) == cell.size:
            name, places = first[0].parameter, torch.as_tensor(first[0].positions)
            looks.append(in_place(*(state[name][places].flatten(1) for state in (state_a, state_b))))
    return sum(looks) / len(looks) if looks else 0.0


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
