"""Importing the package image-reward 1.5 beside a current transformers.

It was written for transformers 4. What it misses in transformers 5 is given to it while it is imported (names that
moved), or added to its own base class (methods that are gone); nothing in transformers stays changed, and the scores
are those of the unpatched package beside the transformers it was written for (tests/data/image_reward.json).
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..integrations.torchvision import prepare_torchvision


@cache
def library() -> tuple[Any, Any]:
    """The package's modules with the class ImageReward, and with the class BLIP_Pretrain that it is made of.

    Raises:
        ConfigError: the package is not installed, or does not import.
    """
    root = _root()
    prepare_torchvision()
    try:
        # It silences all warnings for good.
        with _empty_packages(root), _transformers_4(), warnings.catch_warnings():
            med = importlib.import_module("ImageReward.models.BLIP.med")
            pretrain = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
            main = importlib.import_module("ImageReward.ImageReward")
    except ImportError as error:
        missing = (
            error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else None
        )
        if missing is not None and missing != "ImageReward" and find_spec(missing) is None:
            raise ConfigError(
                f"ImageReward needs the package {missing}, which is not installed: pip install 'git-rebasin[reward]'."
            ) from error
        raise ConfigError(
            f"The package image-reward can't be imported ({error}): install the versions that go together by pip"
            " install 'git-rebasin[reward]'."
        ) from error
    base = med.BertPreTrainedModel
    if not hasattr(base, "invert_attention_mask"):
        base.invert_attention_mask = _invert_attention_mask
    if not hasattr(base, "get_head_mask"):
        base.get_head_mask = _get_head_mask
    if "all_tied_weights_keys" not in vars(base):
        base.all_tied_weights_keys = {}  # what newer versions of transformers ask for while they tie weights
    return main, pretrain


def _root() -> Path:
    try:
        found = find_spec("ImageReward")
    except ValueError:  # somebody put a module without a spec there
        found = None
    if found is None or not found.submodule_search_locations:
        raise ConfigError("ImageReward is not installed: pip install 'git-rebasin[reward]'.")
    return Path(next(iter(found.submodule_search_locations)))


@contextmanager
def _empty_packages(root: Path) -> Iterator[None]:
    """Empty packages in place of the two whose `__init__` also imports CLIP and a trainer, which need more packages
    and nobody here. They go again, so that `import ImageReward` means the real one to everybody else.
    """
    made = {}
    for name, folder in (("ImageReward", root), ("ImageReward.models", root / "models")):
        if name not in sys.modules:
            made[name] = types.ModuleType(name)
            made[name].__path__ = [str(folder)]
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


@contextmanager
def _transformers_4() -> Iterator[None]:
    """The names that the library imports from where transformers 4 had them; taken away again afterwards."""
    from transformers import modeling_utils, pytorch_utils
    from transformers.utils import logging

    given = {
        "apply_chunking_to_forward": pytorch_utils.apply_chunking_to_forward,
        "prune_linear_layer": getattr(pytorch_utils, "prune_linear_layer", _no_pruning),
        "find_pruneable_heads_and_indices": _no_pruning,
    }
    missing = [name for name in given if not hasattr(modeling_utils, name)]
    verbosity = logging.get_verbosity()
    try:
        for name in missing:
            setattr(modeling_utils, name, given[name])
        yield
    finally:
        for name in missing:
            delattr(modeling_utils, name)
        logging.set_verbosity(verbosity)


def _no_pruning(*_: Any) -> Any:
    raise NotImplementedError(
        "ImageReward's attention heads can't be pruned with this version of transformers"
    )


def _invert_attention_mask(self: nn.Module, mask: Tensor) -> Tensor:
    """1 for what may be attended to, 0 for what may not -> what is added to the attention's logits."""
    dtype = next(self.parameters()).dtype
    mask = mask[:, None, :, :] if mask.ndim == 3 else mask[:, None, None, :]
    return (1.0 - mask.to(dtype)) * torch.finfo(dtype).min


def _get_head_mask(self: nn.Module, mask: Tensor | None, layers: int, *_: Any) -> list[None]:
    if mask is not None:
        raise NotImplementedError("ImageReward's attention heads can't be masked here")
    return [None] * layers
