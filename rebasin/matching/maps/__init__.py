"""Matching beyond permutations: rotations of streams, matrices inside heads, scales."""

from .matching import MapsResult, weight_alignment

__all__ = ["MapsResult", "weight_alignment"]
