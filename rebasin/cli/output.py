"""What is written: types, pruning, another VAE, CLIP's position ids, single file or folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..checkpoints import FORMATS
from ..checkpoints.classes.folder import MODEL
from ..checkpoints.output import Types, size_in
from ..errors import CheckpointError, ConfigError
from ..types import DerivedState, LazyTensor, State, passed

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint
    from .request import Request

MARKS = ("v_pred", "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
"""Names of empty or tiny tensors by which loaders tell what a model predicts: never pruned."""


def dtype_of(name: str | None) -> torch.dtype | None:
    """The type that a user's word means; None for none.

    Raises:
        ConfigError: there is no such type.
    """
    if name is None:
        return None
    if name not in FORMATS:
        raise ConfigError(f"There is no type {name!r} to store in; choose one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def stored_as(wanted: torch.dtype | None, checkpoint: Checkpoint) -> Types:
    """The type of each tensor, None for the checkpoint's own; 8 bits are for the denoiser's matrices only, as the
    loaders of such files expect.
    """
    if wanted is None:
        return None
    main = next((name for name in ("unet", "transformer", MODEL) if name in checkpoint.components), None)
    if wanted.itemsize > 1 or main is None:
        return wanted
    large = {p.source for key in checkpoint.key_map[main] for p in key.pieces if len(key.shape) > 1}
    return lambda name, own: wanted if name in large else torch.float16


def finished(
    checkpoint: Checkpoint,
    states: Mapping[str, State],
    *,
    keep_dtype: bool = True,
    vae: Checkpoint | None = None,
    prune: bool = False,
    fix_clip: bool = False,
) -> DerivedState:
    """`checkpoint` with these components, as it is to be written; nothing is computed yet. The moving averages of its
    training are left out: they are not those of a merge.

    Args:
        vae: take the VAE from here.
        prune: leave out what belongs to no component, but for marks and position ids.
        fix_clip: position ids as int64 0 to 76.

    Raises:
        CheckpointError: the other VAE does not fit.
    """
    if vae is not None:
        states = {**states, "vae": _fitting_vae(checkpoint, vae)}
    whole = checkpoint.restore(states, keep_dtype)
    kinds = ("ema", "schedule", "unused", "other") if prune else ("ema",)
    dropped = {name for kind in kinds for name in checkpoint.extras.get(kind, ()) if name not in MARKS}
    tensors = {name: passed(whole, name) for name in whole if name not in dropped}
    if fix_clip:
        for name in checkpoint.extras.get("position_ids", ()):
            length = tensors[name].shape[-1]
            tensors[name] = LazyTensor((1, length), torch.int64, lambda n=length: torch.arange(n)[None])
    return DerivedState(tensors)


def _fitting_vae(checkpoint: Checkpoint, vae: Checkpoint) -> State:
    theirs = vae.component("vae")
    ours = checkpoint.shapes("vae")
    for name, shape in ours.items():
        if name not in theirs or tuple(vae.shapes("vae")[name]) != tuple(shape):
            raise CheckpointError(
                f"The VAE of {vae.path} does not fit {checkpoint.path}: {vae.source('vae', name)!r} has another shape"
                " or is missing."
            )
    return theirs


def size_of(like: Checkpoint, request: Request) -> int:
    """Bytes of the tensors of a result that has what `like` has."""
    types = stored_as(dtype_of(request.dtype), like)
    return size_in(request.output, like, finished(like, {}, prune=request.prune), types)
