"""Combining models that stand in one basis: the line between two states, and all other merge methods."""

from . import methods
from .interpolate import interpolate
from .lazy import MergedState
from .merged import merge
from .registry import METHODS, Method

__all__ = ["METHODS", "MergedState", "Method", "interpolate", "merge", "methods"]
