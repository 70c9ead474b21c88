"""Matching beyond permutations: rotations of streams, matrices inside heads, scales."""

from .learned import LearnedResult, learned_matching
from .matching import MapsResult, weight_alignment

__all__ = ["LearnedResult", "MapsResult", "learned_matching", "weight_alignment"]
