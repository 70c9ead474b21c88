"""Images of one's own with captions: a folder with text files beside them or a metadata.jsonl, or an .npz file."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .prompts import IMAGES, captioned_images
from .sampled import look, square

SHARE = 3
"""One image of so many is held out, unless the configuration says how many."""

SEED = 0
"""Which images are held out does not depend on the seed of a run: so runs are compared on the same ones."""

Source = Path | np.ndarray


def load(
    path: str | Path | None,
    split: str,
    *,
    train: int | None = None,
    heldout: int | None = None,
    side: int,
    channels: int,
) -> tuple[Tensor, list[str]]:
    """Images [n, channels, side, side] in -1..1, their middle squares, and their captions.

    Args:
        path: a folder (see `prompts.captioned_images`), or an .npz file with `images`, uint8 [n, h, w] or [n, h, w, c],
            and `captions`, or `labels`, which are then the captions.
        split: "train" or "heldout".
        train, heldout: how many images of either; None: a third of all are held out, and the rest is for training.

    Raises:
        ConfigError: no path, or impossible numbers.
        DataError: there is nothing at this path, an image has no caption or can't be read, a caption has no image, or
            there are fewer images than were asked for.
    """
    rows = listed(path)
    held, first = _shares(path, len(rows), train, heldout)
    order = np.random.default_rng(SEED).permutation(len(rows))
    chosen = order[:held] if split == "heldout" else order[held : held + first]
    pixels = [square(rows[i][0], side, channels) for i in chosen]
    return torch.stack(pixels), [rows[i][1] for i in chosen]


def check(path: str | Path | None, *, train: int | None = None, heldout: int | None = None) -> list[str]:
    """Complain of what `load` would complain of, before anything expensive; images are opened, but not decoded.

    Returns:
        All captions.

    Raises:
        ConfigError, DataError: see `load`.
    """
    rows = listed(path)
    _shares(path, len(rows), train, heldout)
    for source, _ in rows:
        if isinstance(source, Path):
            look(source)
    return [caption for _, caption in rows]


def _shares(path: object, count: int, train: int | None, heldout: int | None) -> tuple[int, int]:
    """How many of so many images are held out, and how many are there to learn from."""
    held = max(1, count // SHARE) if heldout is None else heldout
    first = count - held if train is None else train
    if held < 1 or first < 1 or held + first > count:
        raise DataError(
            f"{path} has {count} images with captions, but data.heldout={held} and data.train={first} are to be at"
            " least 1 and together no more than that."
        )
    return held, first


def listed(path: str | Path | None) -> Sequence[tuple[Source, str]]:
    """All images, not yet opened, with their captions; see `load`."""
    if path is None:
        raise ConfigError(
            "data=captioned_folder needs data.path, a folder of images with captions, or an .npz file of both."
        )
    place = Path(path).expanduser()
    if place.suffix.lower() == ".npz":
        return _archive(place)
    rows = captioned_images(place)
    names = {image.stem for image, _ in rows}
    for text in sorted(place.glob("*.txt")):
        if text.stem not in names:
            raise DataError(
                f"The caption {text} has no image: put {text.stem}{IMAGES[0]} beside it, or take it out."
            )
    return rows


def _archive(place: Path) -> list[tuple[Source, str]]:
    if not place.exists():
        raise DataError(f"There is no file {place}: give an .npz with images and captions.")
    try:
        with zipfile.ZipFile(place):  # which numpy takes other kinds of files for
            pass
        with np.load(place, allow_pickle=False) as file:
            found: dict[str, Any] = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{place} can't be read as an .npz file: give one with images and captions."
        ) from error
    images, captions = found.get("images"), found.get("captions", found.get("labels"))
    if images is None or captions is None:
        raise DataError(
            f"{place} has {', '.join(found) or 'nothing'}, but 'images' and 'captions' (or 'labels') are needed."
        )
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or (images.ndim == 4 and images.shape[3] not in (1, 3))
        or 0 in images.shape[1:3]
    ):
        raise DataError(
            f"{place} has images of type {images.dtype} and shape {images.shape}; they must be uint8 [n, h, w] or"
            " [n, h, w, 3]."
        )  # fmt: skip
    if captions.ndim != 1 or captions.dtype.kind not in "Uiu":
        raise DataError(
            f"{place} has captions of type {captions.dtype} and shape {captions.shape}; they must be texts [n], or"
            " whole numbers."
        )
    if len(captions) != len(images):
        raise DataError(
            f"{place} has {len(images)} images and {len(captions)} captions; each image needs one."
        )
    return list(zip(images, map(str, captions.tolist()), strict=True))
