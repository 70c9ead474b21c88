"""Matching beyond permutations: rotations of streams, matrices inside heads, scales."""

from .activations import activation_alignment
from .learned import learned_matching
from .matching import MapsResult, weight_alignment
from .result import LearnedResult, LearnedState

__all__ = [
    "LearnedResult",
    "LearnedState",
    "MapsResult",
    "activation_alignment",
    "learned_matching",
    "weight_alignment",
]
