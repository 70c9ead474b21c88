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
    """The shortest text that these sliders mean: nothing, a preset, or entries for the blocks that differ from it.

    Raises:
        RebasinError: a model can't be opened.
    """
    _, blocks = _blocks(models)
    wanted = np.asarray(values, dtype=float)
    bases = {"": np.full(len(wanted), default)}
    bases |= {name: np.asarray(sliders(models, name, default).values) for name in preset_names()}
    near = {name: np.abs(base - wanted) < SAME for name, base in bases.items()}
    if blocks.kind == "layers":
        whole = next((name for name, same in near.items() if same.all()), None)
        return f"*=[{','.join(f'{value:.3g}' for value in wanted)}]" if whole is None else whole
    told = {name: _entries(blocks.order, wanted, same) for name, same in near.items()}
    name = min(told, key=lambda name: (len(told[name]), bool(name)))
    return ",".join([*([name] if name else []), *told[name]])


def _entries(order: Sequence[str], values: np.ndarray, same: np.ndarray) -> list[str]:
    """An entry for each run of neighbours of one value, but for those that are the same anyhow."""
    found, start = [], 0
    for end in range(1, len(order) + 1):
        alone = "BASE" in order[start] or end == len(order) or order[end] == "VAE"
        if not alone and abs(values[end] - values[start]) < SAME and same[end] == same[start]:
            continue
        if not same[start]:
            run = order[start] if end - start == 1 else f"{order[start]}-{order[end - 1]}"
            found.append(f"{run}={values[start]:.3g}")
        start = end
    return found


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
