"""Reading and writing tensors: lazily, atomically, and the same bytes for the same tensors."""

from .atomic import atomic_path, write_text
from .pickled import PickledState, load_pickled
from .reader import JoinedState, LazyState, load_metadata, load_safetensors
from .writer import save_safetensors

__all__ = [
    "JoinedState",
    "LazyState",
    "PickledState",
    "atomic_path",
    "load_metadata",
    "load_pickled",
    "load_safetensors",
    "save_safetensors",
    "write_text",
]
