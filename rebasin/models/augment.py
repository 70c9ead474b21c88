"""Random changes of training images, on whole batches and on any device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

DEGREES = 30.0
ZOOM = 1.2


def affine(x: Tensor, random: torch.Generator) -> Tensor:
    """Git Re-Basin's augmentation of CIFAR: zoom from 1/1.2 to 1.2 (even in its logarithm; the paper's code has 0.8)
    about a random place, mirrored or not, rotated by up to 30 degrees. What comes from outside is 0.

    x: (n, channels, height, width); `random` is on the CPU, so that a seed means the same on every device.
    """
    n = len(x)
    zoom = torch.exp((2 * torch.rand(n, generator=random) - 1) * math.log(ZOOM))
    angle = (2 * torch.rand(n, generator=random) - 1) * math.radians(DEGREES)
    mirror = torch.where(torch.rand(n, generator=random) < 0.5, -1.0, 1.0)
    offset = (2 * torch.rand(n, 2, generator=random) - 1) * (1 - zoom).abs()[:, None]
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    rows = torch.stack([cos * mirror, -sin, offset[:, 0], sin * mirror, cos, offset[:, 1]], dim=1)
    grid = F.affine_grid(rows.reshape(n, 2, 3).to(x.device, x.dtype), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def crop(x: Tensor, random: torch.Generator) -> Tensor:
    """The usual one of CIFAR: mirrored or not, and moved by up to 4 pixels. x: (n, channels, height, width)."""
    n, _, height, width = x.shape
    mirror = torch.rand(n, generator=random) < 0.5
    x = torch.where(mirror.to(x.device)[:, None, None, None], x.flip(3), x)
    moves = torch.randint(0, 9, (2, n), generator=random).to(x.device)
    padded = F.pad(x, (4, 4, 4, 4))
    rows = moves[0][:, None] + torch.arange(height, device=x.device)
    columns = moves[1][:, None] + torch.arange(width, device=x.device)
    images = torch.arange(n, device=x.device)[:, None, None]
    # Advanced indices around a slice put the channels last.
    return padded[images, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"affine": affine, "crop": crop}
