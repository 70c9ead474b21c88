"""Data sets as plain tensors, from packages, files of the user, or a checked download."""

from rebasin.data.classification import Dataset, load

__all__ = ["Dataset", "load"]
