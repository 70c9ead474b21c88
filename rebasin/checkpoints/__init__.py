"""Checkpoints as people have them: read lazily, understood from their tensors, written atomically."""

from ..files import atomic_path, write_text
from ..tensors import (
    FORMATS,
    JoinedState,
    SafetensorsState,
    load_metadata,
    load_safetensors,
    save_safetensors,
)
from .architectures import architecture
from .checkpoint import Checkpoint, open_checkpoint, require_same_family
from .output import Saved, save_checkpoint
from .pickled import PickledState, load_pickled
from .pipeline import assemble
from .specs import component_spec

LazyState = SafetensorsState
"""Its name here, which stays; `rebasin.types.LazyState` is what all lazy states derive from."""

__all__ = [
    "FORMATS",
    "Checkpoint",
    "JoinedState",
    "LazyState",
    "PickledState",
    "SafetensorsState",
    "Saved",
    "architecture",
    "assemble",
    "atomic_path",
    "component_spec",
    "load_metadata",
    "load_pickled",
    "load_safetensors",
    "open_checkpoint",
    "require_same_family",
    "save_checkpoint",
    "save_safetensors",
    "write_text",
]
