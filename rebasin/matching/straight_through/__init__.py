"""Matching by the loss of the midpoint."""

from .estimator import straight_through
from .state import StraightThroughState

__all__ = ["StraightThroughState", "straight_through"]
