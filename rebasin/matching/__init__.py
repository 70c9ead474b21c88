"""Bringing one model's neurons into the order of another's: one algorithm a file."""

from .assignment import Assignment, Costs, assign
from .certificate import exchange_losses
from .linear import linear_assignment
from .result import MatchResult, MatchState, Sweep, Update
from .weights import weight_matching

__all__ = [
    "Assignment",
    "Costs",
    "MatchResult",
    "MatchState",
    "Sweep",
    "Update",
    "assign",
    "exchange_losses",
    "linear_assignment",
    "weight_matching",
]
