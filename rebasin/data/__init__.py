"""Data sets as plain tensors, from packages, files of the user, or a checked download."""

from .classification import Dataset, load

__all__ = ["Dataset", "load"]
