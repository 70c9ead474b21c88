"""Matching beyond permutations: rotations of streams, matrices inside heads, scales."""

from .learned import learned_matching
from .matching import MapsResult, weight_alignment
from .result import LearnedResult, LearnedState

__all__ = ["LearnedResult", "LearnedState", "MapsResult", "learned_matching", "weight_alignment"]
