"""Matching by the loss of the midpoint."""

from .estimator import straight_through

__all__ = ["straight_through"]
