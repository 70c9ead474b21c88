"""What a model's class and configuration say about its inputs, and small tensors to put there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WORDS = 5
"""Tokens of text in an example."""
PLACES = 4
"""Patches along a side of an image in an example."""
FRAMES = 2
"""Frames of a video in an example, after its patches in time."""


class Untold(Exception):
    """A configuration does not say what an argument needs; the message is what it lacks."""


@dataclass(frozen=True)
class Facts:
    """A model, and what its configuration says."""

    model: nn.Module
    part: Any = None

    def within(self, part: Any) -> Facts:
        """Of a part of the configuration."""
        return Facts(self.model, part)

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def config(self) -> Any:
        return getattr(self.model, "config", None) if self.part is None else self.part

    @property
    def arguments(self) -> Mapping[str, inspect.Parameter]:
        """Those of the forward pass, without the ones that collect the rest."""
        found = inspect.signature(self.model.forward).parameters
        return {n: p for n, p in found.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}

    def get(self, *keys: str, default: Any = None) -> Any:
        """The value of the first of these keys that is in the configuration and not None."""
        for key in keys:
            config = self.config
            value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
            if value is not None:
                return value
        return default

    def number(self, *keys: str) -> int:
        """`get` of a whole number.

        Raises:
            Untold: no such key, or no number under it.
        """
        value = self.get(*keys)
        if isinstance(value, bool) or not isinstance(value, int):
            raise Untold(f"no number as {' or '.join(map(repr, keys))}")
        return value

    @property
    def patch(self) -> tuple[int, int, int]:
        """Sides of a patch in time, height and width; ones where there is none."""
        patch = self.get("patch_size", default=1)
        if isinstance(patch, int):
            time = self.get("patch_size_t", default=1)
            return int(time), patch, patch
        sizes = [int(size) for size in patch]
        return (1, sizes[0], sizes[-1]) if len(sizes) < 3 else (sizes[0], sizes[1], sizes[2])


Rule = Callable[[Facts], Any]
Rules = Mapping[str, Rule]


def floats(*shape: int) -> Tensor:
    return torch.randn(shape)


def whole(values: Any, dtype: torch.dtype = torch.long) -> Tensor:
    """Positions, lengths and masks: their values say what a model does, so for the meta device they are on the CPU."""
    device = torch.get_default_device()
    return torch.tensor(values, dtype=dtype, device="cpu" if device.type == "meta" else device)


def ones(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
    """A mask that hides nothing."""
    return whole(1, dtype).expand(shape).clone()


def ids(count: int, vocabulary: int, least: int = 3) -> Tensor:
    """Token ids in the vocabulary, different where it has enough, none of them one of the first (padding, ends)."""
    room = max(vocabulary - least, 1)
    return whole([[least % vocabulary + 7 * k % room for k in range(count)]])


def grid(*sizes: int) -> Tensor:
    """The coordinates of all points of a grid, [points, axes]."""
    return torch.cartesian_prod(*(whole(range(n)) for n in sizes)).reshape(-1, len(sizes))


def turns(*shape: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of angles of positions, each angle for two neighbours."""
    angles = torch.rand(*shape[:-1], shape[-1] // 2).repeat_interleave(2, -1)
    return angles.cos(), angles.sin()
