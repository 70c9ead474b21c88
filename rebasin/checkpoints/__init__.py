"""Reading and writing tensors: lazily, atomically, and the same bytes for the same tensors."""

from .atomic import LazyState, atomic_path, load_metadata, load_safetensors, save_safetensors, write_text

__all__ = ["LazyState", "atomic_path", "load_metadata", "load_safetensors", "save_safetensors", "write_text"]
