"""Batches that are mappings: the latents, noise, timesteps and texts of a diffusion model's problems."""

from __future__ import annotations

from typing import Any


def batched(size: int, **columns: Any) -> list[dict[str, Any]]:
    """Columns (tensors or lists) of equal length, cut into batches of `size` rows; the last one may be shorter."""
    count = len(next(iter(columns.values())))
    return [{name: rows[i : i + size] for name, rows in columns.items()} for i in range(0, count, size)]
