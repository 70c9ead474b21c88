"""Block weights as sliders: from the text that `--weights` takes to one number for each slider, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..checkpoints import open_checkpoint
from ..merging.block_names import Blocks, find_blocks
from ..merging.block_settings import preset_names
from ..merging.blocks import block_weights

PLACES = 12
"""Sliders for a model whose layers have no names that people use: so many places from its input to its output."""

SAME = 5e-4
"""Sliders that differ by less from a preset are the preset."""


@dataclass(frozen=True)
class Sliders:
    """One number for each block, or for each of some places over the depth, and what to tell about them."""

    names: tuple[str, ...]
    values: tuple[float, ...]
    notes: tuple[str, ...] = ()


def sliders(models: Sequence[Path], text: str, default: float) -> Sliders:
    """What a text means for the blocks that these models share; `default` where it says nothing.

    Raises:
        RebasinError: the text is not understood, or a model can't be opened.
    """
    names, blocks = _blocks(models)
    text = text.strip()
    weights = block_weights(text, names, default) if text else block_weights(default, names)
    means = [row.mean for row in weights.rows()]
    if blocks.kind != "layers":
        return Sliders(blocks.order, tuple(means), weights.notes)
    at = np.interp(np.linspace(0, 1, PLACES), np.linspace(0, 1, len(means)), means)
    return Sliders(places(), tuple(map(float, at)), weights.notes)


def text_of(models: Sequence[Path], values: Sequence[float], default: float) -> str:
    """The shortest text that these sliders mean: nothing, a preset, or an entry for each block that differs.

    Raises:
        RebasinError: a model can't be opened.
    """
    _, blocks = _blocks(models)
    if all(abs(value - default) < SAME for value in values):
        return ""
    for name in preset_names():
        if np.allclose(sliders(models, name, default).values, values, rtol=0, atol=SAME):
            return name
    told = [f"{round(value, 3):g}" for value in values]
    if blocks.kind == "layers":
        return f"*=[{','.join(told)}]"
    entries, start = [], 0
    for end in range(1, len(told) + 1):
        ends_alone = blocks.order[start] in ("BASE", "VAE")
        if end < len(told) and told[end] == told[start] and blocks.order[end] != "VAE" and not ends_alone:
            continue
        if abs(float(told[start]) - default) >= SAME:
            first, last = blocks.order[start], blocks.order[end - 1]
            entries.append(f"{first if first == last else f'{first}-{last}'}={told[start]}")
        start = end
    return ",".join(entries)


def places() -> tuple[str, ...]:
    """Names of places over the depth."""
    return tuple(f"{100 * i / (PLACES - 1):.0f}%" for i in range(PLACES))


def _blocks(models: Sequence[Path]) -> tuple[tuple[str, ...], Blocks]:
    return _read(tuple((str(path), path.stat().st_mtime_ns if path.exists() else 0) for path in models))


@lru_cache(maxsize=8)
def _read(models: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ...], Blocks]:
    """The names of the tensors of the components that all have, and their blocks."""
    first, *others = (open_checkpoint(Path(path)) for path, _ in models)
    shared = [part for part in first.components if all(part in other.components for other in others)]
    names = tuple(f"{part}.{name}" for part in shared for name in first.shapes(part))
    return names, find_blocks(names)
