"""Files of named tensors in the safetensors format (read lazily, checked as a whole, written tensor by tensor), and
modules that hold such tensors (modules.py)."""

from .reader import JoinedState, SafetensorsState, load_metadata, load_safetensors
from .writer import FORMATS, save_safetensors

__all__ = [
    "FORMATS",
    "JoinedState",
    "SafetensorsState",
    "load_metadata",
    "load_safetensors",
    "save_safetensors",
]
