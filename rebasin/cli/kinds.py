"""What kind of file a path is, before it is opened as that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["permutation", "adapter", "controlnet", "model"]


def kind_of_file(path: Path) -> Kind:
    """Permutation, adapter, ControlNet, or else: what `open_checkpoint` may know.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    from ..adapters import is_adapter, is_controlnet
    from ..checkpoints import load_pickled, load_safetensors
    from ..errors import CheckpointError

    if path.is_dir():
        return "controlnet" if _folder_class(path) == "ControlNetModel" else "model"
    if not path.exists():
        raise CheckpointError(f"There is no file {path}.")
    if path.suffix != ".safetensors":
        names = dict.fromkeys(load_pickled(path)) if path.suffix in (".ckpt", ".pt", ".bin", ".pth") else {}
    else:
        state = load_safetensors(path)
        if "spec" in state.metadata:
            return "permutation"
        names = dict.fromkeys(state)
    if is_controlnet(names):
        return "controlnet"
    return "adapter" if is_adapter(names) else "model"


def open_raw(path: Path) -> Mapping[str, Tensor]:
    """The tensors of an adapter or ControlNet under their own names, lazily; of a folder those of its weights."""
    from ..checkpoints import load_pickled, load_safetensors
    from ..checkpoints.folders import load_weights

    if path.is_dir():
        return load_weights(path)
    return load_safetensors(path) if path.suffix == ".safetensors" else load_pickled(path)


def _folder_class(path: Path) -> str:
    import json

    try:
        return str(json.loads((path / "config.json").read_text(encoding="utf-8")).get("_class_name", ""))
    except (OSError, ValueError, AttributeError):
        return ""
