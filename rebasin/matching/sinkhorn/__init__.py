"""Sinkhorn re-basin: permutations that are soft while they are learned (Pena et al., CVPR 2023, arXiv 2212.12042)."""

from .matching import sinkhorn_matching
from .operator import sinkhorn, soft_permutation
from .result import SinkhornResult, SinkhornState

__all__ = ["SinkhornResult", "SinkhornState", "sinkhorn", "sinkhorn_matching", "soft_permutation"]
