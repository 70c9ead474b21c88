"""Combining models that stand in one basis: the line between two states, and all other merge methods."""

from . import methods
from .blocks import BlockWeights, block_weights
from .fisher import diagonal_fisher
from .interpolate import interpolate
from .lazy import MergedState
from .merged import merge
from .registry import METHODS, Method

__all__ = [
    "METHODS",
    "BlockWeights",
    "MergedState",
    "Method",
    "block_weights",
    "diagonal_fisher",
    "interpolate",
    "merge",
    "methods",
]
